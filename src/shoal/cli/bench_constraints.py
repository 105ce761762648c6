"""``shoal bench constraints``."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli.bench_options import POSITIVE, output_json_option, show
from shoal.cli.options import bench_engine_options, model_argument
from shoal.params import EngineConfig


@click.command()
@model_argument()
@click.option("--rows", type=POSITIVE, default=32, show_default=True, help="Requests at once.")
@click.option("--steps", type=POSITIVE, default=60, show_default=True, help="Decoding steps of a round.")
@click.option("--rounds", type=POSITIVE, default=5, show_default=True, help="Rounds of each kind, in turn.")
@output_json_option
@bench_engine_options
def constraints(
    model: str, rows: int, steps: int, rounds: int, output_json: Path | None, engine_config: EngineConfig
) -> None:
    """What JSON schemas cost: a step of free rows, of rows under one schema, of rows each under its own."""
    from shoal.bench.constraints import measure_constraints
    from shoal.llm import LLM

    with LLM(model, config=engine_config) as llm:
        result = measure_constraints(llm, rows=rows, steps=steps, rounds=rounds)
    show(str(result), result.as_json(), output_json)
