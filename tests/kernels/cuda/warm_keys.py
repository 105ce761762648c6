"""A program that says what is launched for the first time after load: kernels, by all that they are compiled for. Nothing is computed.

Its own process: Triton must not be in interpreter mode, where programs have many rows and not one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shoal.gguf.quants import format_named
from shoal.kernels.base import (
    PAGE_SIZE,
    Array,
    AttentionShape,
    Experts,
    KVGroup,
    Linear,
    Ops,
    RawTensor,
    Routing,
    StepInput,
    StepLimits,
)
from shoal.kernels.cuda import warm
from shoal.kernels.cuda.backend import CudaBackend
from shoal.kernels.cuda.compile_ahead import Launch, launch_of
from shoal.kernels.cuda.launch import launches_go_to
from shoal.llm import LLM
from tests.kernels.cuda.test_sample import how
from tests.kernels.cuda.test_samplers import random_chain
from tests.support.tiny_archs import TINY_ARCHS
from tests.support.tiny_encoders import TINY_ENCODERS
from tests.support.tiny_model import write_tiny_model

MOST_ROWS, MOST_SEQS, PAGES = 300, 5, 3


class Kernels:
    """What was launched so far; ``new`` are those that came after the last ``load`` had ended."""

    def __init__(self) -> None:
        self.known: set[Launch] = set()
        self.new: set[Launch] = set()

    def note(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.new |= {launch_of(kernel, args, options)} - self.known

    @contextmanager
    def load(self) -> Iterator[None]:
        yield
        self.known, self.new = self.known | self.new, set()


def of_model(path: Path, kernels: Kernels, *, encoder: bool = False, **flags: Any) -> None:
    sizes: dict[str, Any] = {
        "max_num_seqs": MOST_SEQS,
        "max_num_batched_tokens": MOST_ROWS,
        "max_model_len": PAGES * PAGE_SIZE,
    }
    with LLM(path, device="cuda", skip_tokenizer_init=True, **sizes, **flags) as llm:
        assert llm.engine._compute is not None
        network: Any = llm.engine._compute[0].network
        with kernels.load():
            network.warm_up()
        groups = len(network._scratch)
        for step in steps(groups):
            network.layers(step)
        for count in (1, 3, 17, 64):
            rows = np.zeros(count, np.int32)
            network.logits(rows)
            network.states(rows)
            if not encoder:
                sample(network, rows)


def steps(groups: int) -> Iterator[StepInput]:
    """Of all sizes; with sequences of one row and of several."""
    rng = np.random.default_rng(1)
    for rows in (*range(1, 24), *rng.integers(1, MOST_ROWS + 1, 20).tolist(), MOST_ROWS):
        cuts = rng.integers(0, rows + 1, rng.integers(0, MOST_SEQS))
        yield step([int(count) for count in np.diff([0, *np.sort(cuts), rows]) if count], groups)
    for seqs in range(1, MOST_SEQS + 1):
        yield step([1] * seqs, groups)


def step(counts: list[int], groups: int = 1) -> StepInput:
    seqs = len(counts)
    return StepInput(
        token_ids=np.zeros(sum(counts), np.int32),
        positions=np.zeros(sum(counts), np.int32),
        row_start=np.cumsum([0, *counts]).astype(np.int32),
        kv_len=np.arange(1, seqs + 1, dtype=np.int32) * 7,
        page_table=np.zeros((groups, seqs, PAGES), np.int32),
    )


def sample(network: Any, rows: Any) -> None:
    count = len(rows)
    for seed in range(4):
        fields = {"temperature": 0.5 * (np.arange(count) % 3), "top_k": seed % 2, "top_p": 1 - 0.1 * (seed // 2)}
        asked = how(count, **fields)
        network.sample(rows, asked)
        chains = [random_chain(16 * seed + i) if i % 5 else None for i in range(count)]
        banned = [np.arange(i % 4, dtype=np.int32) for i in range(count)]
        mask = [np.ones(2, np.uint32) if i % 2 else None for i in range(count)]
        surprise = np.zeros(count, np.float32)
        network.sample(rows, replace(asked, samplers=chains, banned=banned, mask=mask, surprise=surprise))


def of_experts(count: int, used: int, kernels: Kernels) -> None:
    """Tiles of experts depend on how many rows there are for each: chunks of any size."""
    backend, most = CudaBackend(), 1100
    up, down = (backend.matrix([zeros("Q4_0", 64, 32)]), backend.matrix([zeros("Q8_0", 32, 32)]))
    router = Linear(backend.matrix([zeros("F32", count, 32)]))
    experts = Experts(router, Routing(used), (up,) * count, (down,) * count, "silu")
    table = backend.matrix([zeros("F32", 9, 32)])

    def layers(ops: Ops) -> Array:
        x = ops.embed(table)
        ops.experts(x, x, experts)
        return x

    pages = backend.kv_cache([KVGroup((0,), 1)], AttentionShape(1, 1, 32, 1.0), "f16")
    bound: Any = backend.bind_layers(layers, pages, StepLimits(most, 2, PAGES))
    with kernels.load():
        bound.warm_up()
    for rows in (*range(1, 150), *range(150, most, 11), most):
        bound.layers(step([rows]))


def zeros(type_name: str, *shape: int) -> RawTensor:
    fmt = format_named(type_name)
    return RawTensor("zeros", fmt, shape, np.zeros((shape[0], fmt.row_bytes(shape[1])), np.uint8))


def report(name: str, load_and_run: Callable[[Kernels], None]) -> None:
    kernels = Kernels()
    with launches_go_to(kernels.note):
        load_and_run(kernels)
    print(json.dumps([name, len(kernels.known), sorted(map(str, kernels.new))]))


def main(what: str) -> None:
    CudaBackend.describe = lambda self: "no GPU"  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        if what == "models":
            quantised = write_tiny_model(Path(folder) / "tiny.gguf", fmt="Q4_0")
            report("tiny q8_0", partial(of_model, quantised, kv_cache_dtype="q8_0"))
            for name in ("starcoder", "olmoe", "gemma3_27b", "deepseek2_unsplit", "glm4moe"):
                path = TINY_ARCHS[name].write(Path(folder) / f"{name}.gguf")
                report(name, partial(of_model, path))
            encoder = TINY_ENCODERS["bert_rank"].write(Path(folder) / "bert.gguf")
            report("bert_rank", partial(of_model, encoder, encoder=True))
        if what == "experts":
            for count, used in ((8, 2), (60, 4), (128, 8), (5, 5)):
                report(f"{used} of {count}", partial(of_experts, count, used))
        if what == "nothing":
            warm.chunk_sizes = lambda calls, most: []
            path = write_tiny_model(Path(folder) / "tiny.gguf")
            report("cold", partial(of_model, path))


if __name__ == "__main__":
    main(sys.argv[1])
