"""``shoal bench quantize`` and ``shoal bench random-model``: files to measure with."""

from __future__ import annotations

from pathlib import Path

import click

from shoal.cli.bench_options import POSITIVE, peer_python_option

_new_file = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("model")
@click.argument("type_name", metavar="TYPE")
@click.argument("out", type=_new_file)
@peer_python_option
@click.option("--threads", type=POSITIVE, default=2, show_default=True, help="Threads of the quantiser.")
def quantize(model: str, type_name: str, out: Path, peer_python: str, threads: int) -> None:
    """Make OUT from MODEL with llama.cpp's quantiser; TYPE as in Q4_K_M.

    What MODEL lost when it was quantised stays lost: such files are for measuring speed.
    """
    from shoal import hub
    from shoal.bench.models import quantize as quantiser
    from shoal.bench.peers.programs import LLAMA_CPP, importable

    importable({LLAMA_CPP: peer_python})  # before a model is downloaded in vain
    quantiser.quantize(hub.resolve(model), type_name, out, python=peer_python, threads=threads)


@click.command()
@click.argument("out", type=_new_file)
@click.option("--shape", default="llama-1b", show_default=True, help="Or llama-3b, llama-8b, smollm2-135m.")
@click.option("--type", "type_name", default="Q4_K_M", show_default=True, help="Or Q5_K_M, or any one tensor type.")
@click.option("--tokenizer-from", default="smollm2:135m", show_default=True, help="Model whose tokenizer it gets.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the weights.")
def random_model(out: Path, shape: str, type_name: str, tokenizer_from: str, seed: int) -> None:
    """Write a model with random weights, to measure speed with."""
    from shoal import hub
    from shoal.bench.models.networks import SHAPES, mix_of
    from shoal.bench.models.random_model import write_random_model
    from shoal.errors import ParameterError

    if shape not in SHAPES:
        raise ParameterError("shape", shape, f"one of {', '.join(SHAPES)}")
    mix_of(type_name)  # before a tokenizer is downloaded in vain
    write_random_model(out, SHAPES[shape], type_name, hub.resolve(tokenizer_from), seed)
