"""``shoal bench sampling``: what samplers cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from shoal.cli.bench_options import POSITIVE, output_json_option, show
from shoal.cli.options import bench_engine_options, model_argument
from shoal.params import EngineConfig


@click.command()
@model_argument()
@click.option("--sequences", type=POSITIVE, default=32, show_default=True, help="Rows of a step.")
@click.option("--steps", type=POSITIVE, default=32, show_default=True, help="Steps of a turn.")
@click.option("--rounds", type=POSITIVE, default=9, show_default=True, help="Turns of each way to sample.")
@output_json_option
@bench_engine_options
def sampling(
    model: str, sequences: int, steps: int, rounds: int, output_json: Path | None, engine_config: EngineConfig
) -> None:
    """Decoding with rows that are sampled in many ways, beside greedy rows, in turns; prints Markdown."""
    from shoal.bench.sampling import measure_sampling_cost
    from shoal.llm import LLM

    config = replace(engine_config, skip_tokenizer_init=True, max_num_seqs=sequences)
    with LLM(model, config=config) as llm:
        cost = measure_sampling_cost(llm, sequences, steps, rounds)
    show(cost.as_markdown(), cost.as_json(), output_json)
