"""``shoal bench mixed``: waiting times of requests that decode while long prompts come in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from shoal.cli.bench_options import POSITIVE, output_json_option, show
from shoal.cli.options import bench_engine_options, model_argument
from shoal.params import EngineConfig


@click.command()
@model_argument()
@click.option("--batch-size", type=POSITIVE, default=8, show_default=True, help="Requests that decode.")
@click.option("--input-len", type=POSITIVE, default=32, show_default=True, help="Tokens of their prompts.")
@click.option("--output-len", type=POSITIVE, default=1024, show_default=True, help="Tokens of their answers.")
@click.option("--num-prefills", type=POSITIVE, default=20, show_default=True, help="Long prompts.")
@click.option("--prefill-len", type=POSITIVE, default=2000, show_default=True, help="Tokens of a long prompt.")
@click.option(
    "--prefill-interval",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Seconds from one long prompt to the next.",
)
@click.option(
    "--fixed-work",
    is_flag=True,
    help="One answer for each request that decodes, all waited for: the same tokens with and without a target.",
)
@output_json_option
@bench_engine_options
def mixed(
    model: str,
    batch_size: int,
    input_len: int,
    output_len: int,
    num_prefills: int,
    prefill_len: int,
    prefill_interval: float,
    fixed_work: bool,
    output_json: Path | None,
    engine_config: EngineConfig,
) -> None:
    """Requests that decode while long prompts come in: seconds from token to token, and tokens a second.

    With --target-step-ms the same without it is measured first.
    """
    from shoal.bench.mixed import MixedLoad, measure_mixed
    from shoal.llm import LLM

    load = MixedLoad(batch_size, input_len, output_len, num_prefills, prefill_len, prefill_interval, fixed_work)
    config = replace(engine_config, skip_tokenizer_init=True)
    targets: dict[str, float | None] = {"without a target": None}
    if config.target_step_ms is not None:
        targets[f"target {config.target_step_ms:g} ms"] = config.target_step_ms
    results = {}
    for name, target in targets.items():
        with LLM(model, config=replace(config, target_step_ms=target)) as llm:
            results[name] = measure_mixed(llm, load)
    text = "\n".join(f"{name}: {result}" for name, result in results.items())
    show(text, {name: result.as_json() for name, result in results.items()}, output_json)
