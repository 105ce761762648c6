"""Whether another machine computes the same bits.

    python -m tests.arm64.bits write FILE [TYPE or MODEL.gguf ...]      here
    python -m tests.arm64.bits compare FILE [TYPE or MODEL.gguf ...]    there

The first keeps what products of tensor types, all if none is named, are made of and what comes of them, and logits of models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels.base import RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.cpu.isa import ISA
from shoal.kernels.cpu.pack import LAYOUTS
from shoal.llm import LLM
from tests.kernels.runner import multiply
from tests.support.gguf_builder import random_rows, random_scale

Arrays = dict[str, NDArray[np.generic]]

SHAPE = (40, 512)
TOKENS = (1, 2, 3, 4, 13)
IDS = list(range(2, 50))


def inputs() -> Arrays:
    """Activations, and rows of each type with random scales."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((max(TOKENS), SHAPE[1])).astype(np.float32)
    x[0], x[1] = 1, -1  # all of them the largest
    return {"x": x} | {name: random_rows(format_named(name), SHAPE, rng, 0.05) for name in LAYOUTS}


def products(given: Arrays, types: Iterable[str]) -> Arrays:
    """Of some types, by some numbers of tokens."""
    backend, x = CPUBackend(2), given["x"].astype(np.float32)
    found: Arrays = {}
    for name in types:
        fmt = format_named(name)
        tensor = RawTensor("w", fmt, SHAPE, given[name].astype(np.uint8), random_scale(fmt, 0.05))
        matrix = backend.matrix([tensor])
        found[f"{name} product"] = np.concatenate([multiply(backend, matrix, x[:count]) for count in TOKENS])
    backend.close()
    return found


def logits(model: str) -> NDArray[np.float32]:
    """Of some tokens of a model."""
    with LLM(model, max_model_len=64, max_num_batched_tokens=64, skip_tokenizer_init=True) as llm:
        return np.asarray(llm.logits(IDS))


def computed(given: Arrays, names: Sequence[str]) -> Arrays:
    """All that is compared."""
    types = [name for name in names if name in LAYOUTS] or LAYOUTS
    models = [name for name in names if name not in LAYOUTS]
    return products(given, types) | {f"{Path(model).stem} logits": logits(model) for model in models}


def main(command: str, file: str, *names: str) -> None:
    """See above. Exits with the names of what differs."""
    if command == "write":
        given = inputs()
        np.savez(file, **given, **computed(given, names))  # type: ignore[arg-type]
        return
    with np.load(file) as kept:
        expected = {name: kept[name] for name in kept.files}
    found = computed(expected, names)
    different = [name for name, array in found.items() if array.tobytes() != expected[name].tobytes()]
    print(f"{ISA}: {len(found) - len(different)} of {len(found)} have the same bits")
    if different:
        sys.exit(f"{ISA}: others are {', '.join(different)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
