"""``shoal bench``: throughput and latency; its other verbs are in modules of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.cli.bench_constraints import constraints
from shoal.cli.bench_files import quantize, random_model
from shoal.cli.bench_gpu import gpu
from shoal.cli.bench_jobs import jobs
from shoal.cli.bench_kernels import kernels
from shoal.cli.bench_mixed import mixed
from shoal.cli.bench_options import POSITIVE, disable_detokenize_option, output_json_option, show
from shoal.cli.bench_peers import peers
from shoal.cli.bench_sampling import sampling
from shoal.cli.bench_scale import scale
from shoal.cli.bench_serve import serve
from shoal.cli.bench_soak import soak
from shoal.cli.bench_speculative import speculative
from shoal.cli.bench_startup import startup
from shoal.cli.bench_sweep import sweep
from shoal.cli.options import bench_engine_options, model_argument
from shoal.params import EngineConfig

if TYPE_CHECKING:
    from shoal.bench.workload import Prompt
    from shoal.llm import LLM


@click.group()
def bench() -> None:
    """Measure speed; nothing else should be running."""


for _verb in (
    kernels,
    gpu,
    sampling,
    sweep,
    startup,
    mixed,
    speculative,
    jobs,
    scale,
    constraints,
    serve,
    soak,
    peers,
    quantize,
    random_model,
):
    bench.add_command(_verb)


@bench.command()
@model_argument()
@click.option("--num-prompts", type=POSITIVE, default=100, show_default=True, help="Requests.")
@click.option("--input-len", type=POSITIVE, default=128, show_default=True, help="Tokens of a random prompt.")
@click.option("--output-len", type=POSITIVE, default=128, show_default=True, help="Tokens of each answer.")
@click.option(
    "--dataset-name",
    type=click.Choice(["random", "custom"]),
    default="random",
    show_default=True,
    help="random: token ids. custom: the file of --dataset-path.",
)
@click.option(
    "--dataset-path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL with a text "prompt" on each line.',
)
@click.option("--compare-sequential", is_flag=True, help="Run the same requests one at a time too.")
@click.option("--busy-neighbour", is_flag=True, help="Run them together once more while another process spins.")
@disable_detokenize_option
@output_json_option
@bench_engine_options
def throughput(
    model: str,
    num_prompts: int,
    input_len: int,
    output_len: int,
    dataset_name: str,
    dataset_path: Path | None,
    compare_sequential: bool,
    busy_neighbour: bool,
    disable_detokenize: bool,
    output_json: Path | None,
    engine_config: EngineConfig,
) -> None:
    """Many requests together: requests and tokens a second."""
    from shoal.bench import workload
    from shoal.bench.throughput import measure_throughput

    if (dataset_name == "custom") != (dataset_path is not None):
        raise click.UsageError("--dataset-name custom and --dataset-path FILE go together.")
    with _llm(model, engine_config, disable_detokenize) as llm:
        prompts: list[Prompt]
        if dataset_path is None:
            prompts = workload.random_prompts(llm, num_prompts, input_len)
        else:
            prompts = workload.read_prompts(dataset_path, num_prompts)
        params = workload.fixed_length(output_len)
        result = measure_throughput(
            llm, prompts, params, compare_sequential=compare_sequential, busy_neighbour=busy_neighbour
        )
    show(str(result), result.as_json(), output_json)


@bench.command()
@model_argument()
@click.option("--input-len", type=POSITIVE, default=32, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=POSITIVE, default=128, show_default=True, help="Tokens of each answer.")
@click.option("--batch-size", type=POSITIVE, default=8, show_default=True, help="Requests at once.")
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=10, show_default=True, help="Not timed.")
@click.option("--num-iters", type=POSITIVE, default=30, show_default=True, help="Timed.")
@disable_detokenize_option
@output_json_option
@bench_engine_options
def latency(
    model: str,
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    disable_detokenize: bool,
    output_json: Path | None,
    engine_config: EngineConfig,
) -> None:
    """One batch again and again: seconds from start to end."""
    from shoal.bench import workload
    from shoal.bench.latency import measure_latency

    with _llm(model, engine_config, disable_detokenize) as llm:
        prompts = workload.random_prompts(llm, batch_size, input_len)
        params = workload.fixed_length(output_len)
        result = measure_latency(llm, prompts, params, warmup=num_iters_warmup, iterations=num_iters)
    show(str(result), result.as_json(), output_json)


def _llm(model: str, config: EngineConfig, disable_detokenize: bool) -> LLM:
    from shoal.llm import LLM

    return LLM(model, config=replace(config, skip_tokenizer_init=disable_detokenize))
