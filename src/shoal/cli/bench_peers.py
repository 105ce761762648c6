"""``shoal bench peers``: other programs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import (
    POSITIVE,
    disable_detokenize_option,
    numbers,
    output_json_option,
    peer_python_option,
    show,
)
from shoal.cli.options import model_argument

_MAX_SEQUENCES = 256  # of a llama.cpp context


@click.command()
@model_argument()
@peer_python_option
@click.option("--openvino-python", metavar="PYTHON", help="Interpreter that has openvino-genai.  [default: the same]")
@click.option("--prompt-len", type=POSITIVE, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--output-len", type=POSITIVE, default=32, show_default=True, help="Decode steps.")
@click.option(
    "--batch",
    "batches",
    type=numbers(1, _MAX_SEQUENCES),
    metavar="N,N,...",
    default="1,4,8,16,32",
    show_default=True,
    help="Sequences.",
)
@click.option(
    "--prefill-len",
    "prefill_lens",
    type=numbers(1, 1 << 20, at_least=0),
    metavar="N,N,...",
    default="512",
    show_default=True,
    help="Single prompts that are only prefilled.",
)
@click.option("--rounds", type=POSITIVE, default=5, show_default=True, help="Turns of each side.")
@click.option("--threads", type=POSITIVE, default=2, show_default=True, help="Threads of each side.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the token ids.")
@click.option("--device", type=click.Choice(["cpu", "reference"]), default="cpu", show_default=True)
@disable_detokenize_option
@output_json_option
def peers(
    model: str,
    peer_python: str,
    openvino_python: str | None,
    disable_detokenize: bool,
    output_json: Path | None,
    **settings: Any,
) -> None:
    """shoal, llama.cpp and OpenVINO GenAI in turns on the same file; prints Markdown."""
    from shoal import hub
    from shoal.bench.peers.measure import Plan, compare_with_peers
    from shoal.bench.peers.programs import LLAMA_CPP, OPENVINO, importable

    pythons = {LLAMA_CPP: peer_python, OPENVINO: openvino_python or peer_python}
    importable(pythons)  # before a model is downloaded in vain
    plan = Plan(model=hub.resolve(model), pythons=pythons, skip_tokenizer_init=disable_detokenize, **settings)
    report = compare_with_peers(plan, lambda line: click.echo(line, err=True))
    show(report.as_markdown(), report.as_json(), output_json)
