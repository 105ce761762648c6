"""``shoal bench startup``: how long it takes to the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import POSITIVE, disable_detokenize_option, output_json_option, show
from shoal.cli.options import model_argument


@click.command()
@model_argument()
@click.option("--rounds", type=POSITIVE, default=3, show_default=True, help="Pairs of a cold and a warm start.")
@click.option("--prompt-len", type=POSITIVE, default=16, show_default=True, help="Tokens of the prompt.")
@click.option("--threads", type=POSITIVE, help="Threads that compute.  [default: the usable cores]")
@click.option("--device", type=click.Choice(["cpu", "reference"]), default="cpu", show_default=True)
@disable_detokenize_option
@output_json_option
def startup(model: str, disable_detokenize: bool, output_json: Path | None, **settings: Any) -> None:
    """Seconds from starting Python to the first token, stage by stage, with a cold and a warm kernel cache; prints Markdown."""
    from shoal import hub
    from shoal.bench.startup.measure import StartupPlan, measure_startup

    plan = StartupPlan(model=hub.resolve(model), skip_tokenizer_init=disable_detokenize, **settings)
    report = measure_startup(plan, lambda line: click.echo(line, err=True))
    show(report.as_markdown(), report.as_json(), output_json)
