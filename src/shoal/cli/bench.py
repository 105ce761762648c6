"""``shoal bench``: throughput, latency, and llama.cpp side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.options import engine_options, model_argument
from shoal.params import EngineConfig

if TYPE_CHECKING:
    from shoal.bench.workload import Prompt
    from shoal.llm import LLM

_POSITIVE = click.IntRange(min=1)
_MAX_SEQUENCES = 256  # of a llama.cpp context


def _numbers(low: int, high: int, *, at_least: int = 1) -> Callable[[str], tuple[int, ...]]:
    """A type of option: at least so many whole numbers from ``low`` to ``high`` with commas between them."""

    def convert(text: str) -> tuple[int, ...]:
        items = [item.strip() for item in text.split(",") if item.strip()]
        good = all(item.isdecimal() and low <= int(item) <= high for item in items)
        if not good or len(items) < at_least:
            raise click.BadParameter(f"{text!r} is not numbers from {low} to {high} with commas between them.")
        return tuple(map(int, items))

    return convert


_disable_detokenize = click.option("--disable-detokenize", is_flag=True, help="Leave the tokenizer out.")
_output_json = click.option(
    "--output-json", type=click.Path(dir_okay=False, path_type=Path), help="Write results here."
)


@click.group()
def bench() -> None:
    """Measure speed; nothing else should be running."""


@bench.command()
@model_argument()
@click.option("--num-prompts", type=_POSITIVE, default=100, show_default=True, help="Requests.")
@click.option("--input-len", type=_POSITIVE, default=128, show_default=True, help="Tokens of a random prompt.")
@click.option("--output-len", type=_POSITIVE, default=128, show_default=True, help="Tokens of each answer.")
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
@_disable_detokenize
@_output_json
@engine_options
def throughput(
    model: str,
    num_prompts: int,
    input_len: int,
    output_len: int,
    dataset_name: str,
    dataset_path: Path | None,
    compare_sequential: bool,
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
        result = measure_throughput(llm, prompts, params, compare_sequential=compare_sequential)
    _show(str(result), result.as_json(), output_json)


@bench.command()
@model_argument()
@click.option("--input-len", type=_POSITIVE, default=32, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=_POSITIVE, default=128, show_default=True, help="Tokens of each answer.")
@click.option("--batch-size", type=_POSITIVE, default=8, show_default=True, help="Requests at once.")
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=10, show_default=True, help="Not timed.")
@click.option("--num-iters", type=_POSITIVE, default=30, show_default=True, help="Timed.")
@_disable_detokenize
@_output_json
@engine_options
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
    _show(str(result), result.as_json(), output_json)


@bench.command()
@model_argument()
@click.option("--peer-python", metavar="PYTHON", help="Interpreter that has llama-cpp-python.  [default: this one]")
@click.option("--prompt-len", type=_POSITIVE, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=_POSITIVE, default=32, show_default=True, help="Decode steps.")
@click.option(
    "--batch",
    "batches",
    type=_numbers(1, _MAX_SEQUENCES),
    metavar="N,N,...",
    default="1,4,8,16,32",
    show_default=True,
    help="Sequences.",
)
@click.option(
    "--prefill-len",
    "prefill_lens",
    type=_numbers(1, 1 << 20, at_least=0),
    metavar="N,N,...",
    default="512",
    show_default=True,
    help="Single prompts that are only prefilled.",
)
@click.option("--rounds", type=_POSITIVE, default=5, show_default=True, help="Turns of each side.")
@click.option("--threads", type=_POSITIVE, default=2, show_default=True, help="Threads of each side.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the token ids.")
@click.option("--device", type=click.Choice(["auto", "cpu", "reference"]), default="auto", show_default=True)
@_disable_detokenize
@_output_json
def peers(
    model: str, peer_python: str | None, disable_detokenize: bool, output_json: Path | None, **settings: Any
) -> None:
    """shoal and llama.cpp in turns on the same file; prints Markdown."""
    from shoal import hub
    from shoal.bench.peers import Plan, compare_with_llama_cpp, require_llama_cpp

    python = peer_python or sys.executable
    require_llama_cpp(python)  # before a model is downloaded in vain
    plan = Plan(model=hub.resolve(model), peer_python=python, skip_tokenizer_init=disable_detokenize, **settings)
    report = compare_with_llama_cpp(plan, lambda line: click.echo(line, err=True))
    _show(report.as_markdown(), report.as_json(), output_json)


def _llm(model: str, config: EngineConfig, disable_detokenize: bool) -> LLM:
    from shoal.llm import LLM

    return LLM(model, config=replace(config, skip_tokenizer_init=disable_detokenize))


def _show(text: str, results: dict[str, Any], output_json: Path | None) -> None:
    click.echo(text)
    if output_json is not None:
        output_json.write_text(json.dumps(results, indent=4) + "\n", encoding="utf-8")
