"""``shoal bench gpu``: checks the GPU backend, then measures it. Runs from the source tree where nothing is installed but NumPy, torch
and Triton: ``PYTHONPATH=src python -m shoal bench gpu``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.bench.gpu import checks, speed
from shoal.bench.gpu.parts import Part, Results, Row, run_parts
from shoal.bench.gpu.report import as_markdown
from shoal.bench.models.networks import SHAPES, TYPES, mix_of
from shoal.errors import ParameterError, ShoalError
from shoal.kernels.base import Backend
from shoal.kernels.load import load_backend, load_probe
from shoal.version import __version__

if TYPE_CHECKING:
    from shoal.kernels.load import Probe

_MODELS = ("llama-8b", "llama-1b", "llama-3b")
_FIRST_TYPES = ("Q4_K", "Q6_K", "Q8_0")  # those that most models are made of, and that the others resemble
_COPY_BYTES = 2 << 30
_FAILED, _BAD_INPUT = 1, 2


@dataclass(frozen=True, slots=True)
class Options:
    """What to do in ``budget`` seconds; ``types`` of weights that are checked; ``models`` that are measured."""

    models: tuple[str, ...]
    model_type: str
    types: tuple[str, ...]
    budget: float
    plan: speed.Plan
    output_json: Path | None


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 if anything failed, 2 where there is no GPU to measure."""
    try:
        options = _options(arguments)
        results = run(options)
    except SystemExit as ended:  # argparse has said what it had to say
        return int(ended.code or 0)
    except ShoalError as problem:
        print(f"shoal: {problem}", file=sys.stderr)
        return _BAD_INPUT
    print(as_markdown(results))
    return _FAILED if results.failed else 0


def run(options: Options) -> Results:
    """Do it, as far as time allows."""
    probe, reference = load_probe(), load_backend("reference")
    backend = load_backend("cuda", compile_at_load=False)  # each check needs few kernels of its own
    about = {"shoal": __version__, "backend": backend.describe(), **probe.describe()}
    results = Results(options.output_json, lambda line: print(line, file=sys.stderr, flush=True), about)
    run_parts(_parts(options, backend, reference, probe, results), results, options.budget)
    backend.close()
    return results


def _parts(options: Options, backend: Backend, reference: Backend, probe: Probe, results: Results) -> Iterator[Part]:
    """The most telling first: a whole model, each operation, models' speed; then what is left of types."""
    copy_bytes = 1 << 20 if probe.interpreted else _COPY_BYTES
    yield Part("device", "copy", lambda: {"bytes_per_second": probe.copy_bandwidth(copy_bytes)})
    yield _checked(f"model {options.model_type}", lambda: checks.check_model(options.model_type, backend, reference))
    first = tuple(name for name in options.types if name in _FIRST_TYPES)
    for attention in checks.attentions():
        yield _checked(attention.name, partial(checks.check_attention, attention, backend, reference))
    yield from _cases(checks.cases(backend, first), backend, reference)
    bandwidth = results.rows.get("device", {}).get("copy", {}).get("bytes_per_second", 0.0)
    for name in options.models:
        shape = checks.TINY if name == "tiny" else SHAPES[name]
        measured = speed.ModelSpeed(name, shape, options.model_type, options.plan)
        yield from measured.parts(backend, probe, bandwidth)
    rest = tuple(name for name in options.types if name not in _FIRST_TYPES)
    yield from _cases(checks.products(backend, rest), backend, reference)


def _cases(cases: Iterator[checks.Case], backend: Backend, reference: Backend) -> Iterator[Part]:
    for case in cases:
        yield _checked(case.name, partial(checks.check_case, case, backend, reference))


def _checked(name: str, run: checks.Check) -> Part:
    def row() -> Row:
        return {"nmse": run()}

    return Part("check", name, row)


def _options(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="shoal bench gpu", description="Check and measure the GPU backend.")
    add = parser.add_argument
    add("--models", default=",".join(_MODELS), metavar="NAME,...", help="which to measure: %(default)s, tiny, none")
    add("--type", default="Q4_K_M", help="type of their weights: %(default)s, ...")
    add("--types", default=",".join(TYPES[2:]), metavar="NAME,...", help="types of weights to check (all)")
    add("--batches", default="1,4,16,64,256", metavar="N,...", help="sequences that decode at once: %(default)s")
    add("--context", type=_positive, default=128, metavar="N", help="tokens that they have by then: %(default)s")
    add("--steps", type=_positive, default=32, metavar="N", help="steps that are measured: %(default)s")
    add("--prompt", type=_positive, default=2048, metavar="N", help="tokens of the long prompt: %(default)s")
    add("--tune", type=float, default=60.0, metavar="SECONDS", help="for choosing tiles of a model: %(default)s")
    add("--budget", type=float, default=420.0, metavar="SECONDS", help="when to begin nothing new: %(default)s")
    add("--output-json", type=Path, metavar="FILE", help="results, written anew after each")
    found = parser.parse_args(arguments)
    models = tuple(name for name in found.models.split(",") if name not in ("", "none"))
    for name in models:
        if name not in SHAPES and name != "tiny":
            raise ParameterError("models", name, f"some of {', '.join(SHAPES)}, tiny")
    types = tuple(name for name in found.types.split(",") if name)
    for name in (found.type, *types):
        mix_of(name)
    plan = speed.Plan(_batches(found.batches), found.context, found.steps, found.prompt, found.tune)
    return Options(models, found.type, types, found.budget, plan, found.output_json)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(item) for item in text.split(","))
    except ValueError:
        raise ParameterError("batches", text, "numbers from 1 up with commas between them") from None
