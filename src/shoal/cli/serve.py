"""``shoal serve``: the OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli.options import engine_options, integer, model_argument
from shoal.params import EngineConfig


@click.command()
@model_argument()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--served-model-name", "served", multiple=True, help="What requests may call the model; may be repeated.")
@click.option("--max-waiting", type=integer, default=1024, show_default=True, help="Requests that may wait.")
@engine_options
def serve(
    model: str, host: str, port: int, served: tuple[str, ...], max_waiting: int, engine_config: EngineConfig
) -> int:
    """Serve MODEL behind OpenAI's API."""
    import uvicorn

    from shoal import hub
    from shoal.llm import LLM
    from shoal.server.app import create_app
    from shoal.server.service import Service
    from shoal.server.settings import ServerSettings

    path: Path = hub.resolve(model)
    settings = ServerSettings(engine=engine_config, served=served or (model,), max_waiting=max_waiting)
    app = create_app(Service(lambda: LLM(path, config=engine_config), settings))
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
    return 0
