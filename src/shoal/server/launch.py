"""From flags to a server that runs, and its exit code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starlette.types import ASGIApp

from shoal import hub
from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM
from shoal.params import EngineConfig, parse_size
from shoal.server.access import configure_logging
from shoal.server.app import body_of_error, create_app
from shoal.server.front import Front, behind
from shoal.server.keys import VARIABLE, Keys, read_keys
from shoal.server.limits import allowed_hosts
from shoal.server.protocol import Bounds
from shoal.server.routes import batches, files, page
from shoal.server.routes.status import page_state
from shoal.server.run import Server, Serving
from shoal.server.service import Service
from shoal.server.settings import ServerSettings, served_names
from shoal.server.store.runner import BatchRunner, Served
from shoal.server.store.store import Store, default_folder
from shoal.system.streams import say

_LOAD_FAILED, _ENGINE_ENDED = 2, 1
_AROUND_FILE = 1024 * 1024  # bytes of an upload that are not the file's


def launch(model: str, config: EngineConfig, flags: Mapping[str, Any]) -> int:
    """Serve until a signal. Returns the exit code: 0 after a signal, 1 where the engine has ended, 2 where the model cannot be loaded.

    Raises ParameterError and JobError for flags that cannot be followed, ModelNotFoundError and GGUFError for the model.
    """
    configure_logging(access_log=flags["access_log"] or flags["log_prompts"])
    path = hub.resolve(model)
    keys = Keys(read_keys(flags["api_key"], flags["api_key_file"], os.environ.get(VARIABLE)))
    settings = _settings(flags, config, flags["served_model_name"] or served_names(model, path), keys_given=bool(keys))
    serving = _serving(flags, settings)
    service = Service(lambda: LLM(path, config=config), settings)
    with ExitStack() as opened:
        store = _store(flags, settings, opened)
        opened.callback(store.close)
        runner = BatchRunner(store)
        server = Server(_app(flags, service, store, runner, keys), serving, on_drain=lambda: _drain(service, runner))
        service.worker.on_loaded = lambda llm: _begin_batches(service, runner, llm)
        service.worker.on_failure = lambda error: _fail(server, service, error)
        service.before_closing = runner.stop
        return server.main()


def _settings(
    flags: Mapping[str, Any], config: EngineConfig, served: tuple[str, ...], *, keys_given: bool
) -> ServerSettings:
    return ServerSettings(
        engine=config,
        served=served,
        keys_given=keys_given,
        max_body=parse_size("max_body_size", flags["max_body_size"]),
        max_file_size=parse_size("max_file_size", flags["max_file_size"]),
        **{
            name: flags[name]
            for name in (
                "max_waiting",
                "max_waiting_tokens",
                "request_timeout",
                "queue_timeout",
                "isolate_prefix_cache",
                "keep_alive",
                "stall_timeout",
                "drain_timeout",
                "log_prompts",
            )
        },
    )


def _serving(flags: Mapping[str, Any], settings: ServerSettings) -> Serving:
    bounds = Bounds(stall_seconds=settings.stall_timeout)
    return Serving(
        host=flags["host"],
        port=flags["port"],
        uds=flags["uds"],
        drain_seconds=settings.drain_timeout,
        bounds=bounds,
    )


def _app(flags: Mapping[str, Any], service: Service, store: Store, runner: BatchRunner, keys: Keys) -> ASGIApp:
    settings = service.settings
    service.unfinished_batches = runner.unfinished
    routes = [
        *files.routes(store.files),
        *batches.routes(store, runner),
        *page.routes(page.page_folder(), lambda: page_state(service)),
    ]
    front = Front(
        hosts=allowed_hosts(None if flags["uds"] else flags["host"], flags["allowed_host"]),
        cors_origins=flags["cors_origin"],
        keys=keys,
        body_bytes=settings.max_body,
        uploads={"/v1/files": settings.max_file_size + _AROUND_FILE},
        error_body=body_of_error,
    )
    return behind(front, create_app(service, routes))


def _store(flags: Mapping[str, Any], settings: ServerSettings, opened: ExitStack) -> Store:
    folder: Path | None = flags["data_dir"]
    if folder is None and (flags["uds"] or not flags["port"]):  # which is another server's as well, or never the same
        folder = opened.enter_context(_temporary_folder())
    folder = folder or default_folder(flags["port"])
    if folder is None:
        raise ParameterError("--data-dir", None, "given where the user has no home folder")
    return Store(folder, max_file_size=settings.max_file_size)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Files and batches end with this process."""
    say("without a port of its own a server forgets files and batches when it ends; give --data-dir to keep them")
    with TemporaryDirectory(prefix="shoal-") as name:
        yield Path(name)


def _begin_batches(service: Service, runner: BatchRunner, llm: LLM) -> None:
    try:
        llm.refuse_encoder("a chat")
    except RequestError:
        say("the model embeds texts: /v1/embeddings works, chats and completions do not")
    say(f"{service.settings.served[0]} is loaded: {llm.config.max_num_seqs} sequences at once")
    runner.start(Served(llm, service.worker.session("batch:"), service.settings.served))


def _drain(service: Service, runner: BatchRunner) -> None:
    service.draining = True
    runner.stop(0)  # it ends after the step that is computed; nobody waits for it here


def _fail(server: Server, service: Service, error: BaseException) -> None:
    """Nothing more can be answered: who watches over the process may start it again."""
    loaded = service.worker.llm is not None
    say(f"{'the engine has ended' if loaded else 'the model cannot be loaded'}: {error or type(error).__name__}")
    server.stop(_ENGINE_ENDED if loaded else _LOAD_FAILED)
