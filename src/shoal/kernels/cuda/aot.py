"""``python -m shoal.kernels.cuda.aot``: what whole models launch, compiled for GPUs that are not there.

Prints a line for each kernel and configuration: registers, spilled bytes, shared memory, matrix instructions. Fails where one spills,
needs more shared memory than there is, does not compile, or where a matrix, or attention in a layer, has different matrix instructions
with different numbers of rows. Weights are zeros and vocabularies small: neither is compiled in.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.gguf.quants import format_named
from shoal.kernels.base import (
    PAGE_SIZE,
    Array,
    AttentionShape,
    Experts,
    Head,
    Heads,
    KVGroup,
    Layers,
    Linear,
    Norm,
    Ops,
    RawTensor,
    Rope,
    Routing,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.cuda import warm
from shoal.kernels.cuda.backend import CudaBackend
from shoal.kernels.cuda.compile_ahead import (
    TARGETS,
    Compiled,
    Launch,
    Named,
    Recorder,
    compile_all,
    mixed_instructions,
    recorded,
)
from shoal.kernels.cuda.launch import device
from shoal.kernels.cuda.linear import (
    CHIPS,
    CONFIGS,
    FEW,
    Source,
    as_on,
    gated_parts,
    linear,
    linear_gated,
    scratch_for,
)
from shoal.kernels.cuda.pack import LAYOUTS, PackedMatrix
from shoal.kernels.cuda.sample import Sampler
from shoal.system.machine_limits import usable_cores

_VOCAB = 16384
_CHUNK = 2048  # rows of a prompt
_CONTEXT = 4096
_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SQUARE = 1024  # rows and columns of a matrix whose K is cut into pieces, be it gated or not


@dataclass(frozen=True, slots=True)
class Plan:
    """Which models, types of weights and of KV, numbers of rows; and types whose products are compiled in every form."""

    models: tuple[str, ...]
    types: tuple[str, ...]
    products: tuple[str, ...]
    kv_dtypes: tuple[str, ...] = ("f16", "q8_0")
    rows: tuple[int, ...] = (*_BUCKETS, _CHUNK)


@dataclass(frozen=True, slots=True)
class Network:
    """Sizes of a llama network."""

    n_embd: int
    n_ff: int
    heads: AttentionShape


NETWORKS = {
    "llama-8b": Network(4096, 14336, AttentionShape(32, 8, 128, 128**-0.5)),  # Llama 3.1 8B
    "llama-1b": Network(2048, 8192, AttentionShape(32, 8, 64, 0.125)),  # Llama 3.2 1B
    "smollm2": Network(576, 1536, AttentionShape(9, 3, 64, 0.125)),  # SmolLM2 135M: no whole number of K blocks
}
ALL = Plan(tuple(NETWORKS), ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_K", "IQ4_XS"), tuple(LAYOUTS))
SHORT = Plan(("llama-1b",), ("Q4_K", "Q6_K"), ("Q4_K",), rows=(1, 8, 64, _CHUNK))


def record(plan: Plan, target: str) -> Recorder:
    """Bind every network of the plan and run every kind of step, with the tiles of a target, while nothing is computed."""
    with recorded() as recorder, as_on(CHIPS[target]):
        recorder.subject_of = subject_of
        backend = CudaBackend()
        for network in (NETWORKS[name] for name in plan.models):
            for type_name in _types_that_fit(network, plan.types):
                for kv_dtype in plan.kv_dtypes:
                    _record_network(backend, network, type_name, kv_dtype, plan.rows)
        for type_name in plan.products:
            _record_products(backend.matrix([_zeros(type_name, _SQUARE, _SQUARE)]))
        _record_rest(backend, plan.rows)
        _record_samplers()
    return recorder


def subject_of(named: Named) -> str:
    """What fixes the order of sums: of a product the type, rows and columns of its weights; of attention the constants of its layer and
    the type of its pages."""
    if {"FORMAT", "R", "K"} <= named.keys():
        return f"{named['FORMAT']} {named['R']}x{named['K']}"
    if {"C", "keys"} <= named.keys():
        return f"attention {named['keys'].dtype} {named['C']}"
    return ""


def _types_that_fit(network: Network, types: Sequence[str]) -> Iterator[str]:
    sizes = (network.n_embd, network.n_ff, network.heads.heads * network.heads.head_dim)
    return (name for name in types if all(size % format_named(name).block_size == 0 for size in sizes))


def _record_network(backend: CudaBackend, network: Network, type_name: str, kv_dtype: str, rows: Sequence[int]) -> None:
    shape, width = network.heads, network.n_embd
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    table = backend.matrix([_zeros(type_name, _VOCAB, width)])
    qkv = Linear(backend.matrix([_zeros(type_name, queries + 2 * keys, width)]))
    output = Linear(backend.matrix([_zeros(type_name, width, queries)]))
    gate_up = Linear(backend.matrix([_zeros(type_name, 2 * network.n_ff, width)]))
    down = Linear(backend.matrix([_zeros(type_name, width, network.n_ff)]))
    norm = Norm(backend.vector(_zeros("F32", width)), 1e-5)
    rope = Rope(np.ones(shape.head_dim // 2, np.float32), neox=False)

    def layers(ops: Ops) -> Array:
        x = ops.embed(table)
        q = ops.rope_store(ops.linear(ops.norm(x, norm), qkv), 0, shape, rope)
        ops.linear_add(x, ops.attention(q, 0, shape), output)
        ops.linear_add(x, ops.gated(ops.linear(ops.norm(x, norm), gate_up), "silu"), down)
        return x

    def head(ops: Ops, x: Array) -> Array:
        return ops.linear(ops.norm(ops.logit_rows(x), norm), Linear(table))

    _run(backend, (layers, head), shape, kv_dtype, rows)


def _record_products(matrix: PackedMatrix) -> None:
    """What few rows need in some networks alone: gate and up whose K is cut into pieces; rows that come as floats, in every bucket."""
    half, scale = torch.zeros((FEW, matrix.columns), dtype=torch.float16), torch.zeros(FEW)
    halves, floats = Source(half, scale), Source(half, scale, floats=half.float(), largest=torch.zeros(16, FEW))
    out, scratch = torch.zeros(FEW, matrix.rows), scratch_for([matrix], FEW)
    for rows in (bucket for bucket in CONFIGS if bucket <= FEW):
        linear(floats, matrix, out, rows, scratch=scratch)
        linear_gated(halves, matrix, out, rows, "silu", scratch=scratch, largest=torch.zeros(gated_parts(matrix), FEW))


def _record_rest(backend: CudaBackend, rows: Sequence[int]) -> None:
    """What llama networks leave out."""
    width, shape = 512, AttentionShape(8, 8, 64, 0.125, window=1024, soft_cap=50.0, slopes=(0.5,) * 8)
    table = backend.matrix([_zeros("F16", _VOCAB, width)])
    square = backend.matrix([_zeros("BF16", width, width)])
    vector = backend.vector(_zeros("F32", width))
    biased, gate = Linear(square, vector, vector), Linear(backend.matrix([_zeros("F32", 1, width)]))
    qkv = Linear(backend.matrix([_zeros("F16", 3 * width, width)]))
    of_heads = [Linear(backend.matrix([_zeros("Q8_0", 128, width // 2)])) for _ in range(2)]
    norms = [Norm(vector, 1e-5), Norm(vector, 1e-5, centred=True, bias=vector)]
    experts = Experts(
        router=Linear(backend.matrix([_zeros("F32", 8, width)])),
        routing=Routing(used=2),
        gate_up=tuple(backend.matrix([_zeros("Q4_K", 2 * width, width)]) for _ in range(8)),
        down=tuple(backend.matrix([_zeros("Q6_K", width, width)]) for _ in range(8)),
        activation="silu",
    )

    def layers(ops: Ops) -> Array:
        x = ops.embed(table)
        ops.add(x, ops.positions(table))
        for norm in norms:
            ops.norm_heads(x, Heads(64, 2, 64), norm)
            ops.add(x, ops.linear(ops.norm(x, norm), biased))
        heads = ops.linear(x, qkv)
        ops.clamp(heads, 8.0)
        a = ops.attention(ops.rope_store(heads, 0, shape, None), 0, shape)
        ops.gate_rows(a, x, gate)
        ops.linear_add(x, ops.activate(a, "gelu"), biased)
        ops.linear_add(x, ops.activate(a, "relu2"), biased)
        ops.experts(x, ops.norm(x, norms[0]), experts)
        ops.add_vector(x, vector)
        ops.multiply(x, 2.0)
        halves = [ops.columns(x, first, width // 2) for first in (0, width // 2)]
        ops.concat([ops.linear(half, product) for half, product in zip(halves, of_heads, strict=True)])
        return ops.concat([ops.columns(x, 256, 256), ops.columns(x, 0, 256)])

    def head(ops: Ops, x: Array) -> Array:
        logits = ops.linear(ops.norm(ops.logit_rows(x), norms[1]), Linear(table))
        ops.soft_cap(logits, 30.0)
        return logits

    for kv_dtype in ("f16", "f32", "q8_0"):
        _run(backend, (layers, head), shape, kv_dtype, rows)


def _run(
    backend: CudaBackend, network: tuple[Layers, Head], shape: AttentionShape, kv_dtype: str, rows: Sequence[int]
) -> None:
    """Each number of rows as one sequence each, and as one prompt; then the head, with every way to choose."""
    pages = _CONTEXT // PAGE_SIZE
    cache = backend.kv_cache([KVGroup((0,), pages)], shape, kv_dtype)
    most = max(rows)
    layers, head = network
    bound = backend.bind(layers, head, cache, StepLimits(most, max(_BUCKETS), pages))
    bound.layers(_step([1], pages, context=1))
    for count in rows:
        if count <= max(_BUCKETS):
            bound.layers(_step([1] * count, pages))
        bound.layers(_step([count], pages))
    for count in (count for count in rows if count <= 64):
        chosen = np.arange(count, dtype=np.int32)
        bound.logits(chosen)
        for temperature in (0.0, 1.0):
            bound.sample(chosen, _how(count, temperature))
    backend.copy_pages(cache, 0, [(0, 1), (2, 3)])


def _step(counts: Sequence[int], pages: int, context: int = _CONTEXT // 2) -> StepInput:
    """Sequences with so many rows each, all at the end of a context; they share its pages."""
    lengths = np.array([max(count, context) for count in counts], np.int32)
    positions = [np.arange(end - count, end) for end, count in zip(lengths, counts, strict=True)]
    return StepInput(
        token_ids=np.zeros(sum(counts), np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        row_start=np.cumsum([0, *counts]).astype(np.int32),
        kv_len=lengths,
        page_table=np.tile(np.arange(pages, dtype=np.int32), (1, len(counts), 1)),
    )


def _how(count: int, temperature: float) -> SampleRows:
    plain = temperature == 0.0
    return SampleRows(
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, 0 if plain else 40, np.int32),
        top_p=np.full(count, 1.0 if plain else 0.9, np.float32),
        min_p=np.full(count, 0.0 if plain else 0.05, np.float32),
        seed=np.zeros(count, np.uint64),
        sample=np.zeros(count, np.uint32),
        position=np.zeros(count, np.uint32),
        banned=[None if plain else np.array([3, 5], np.int32)] * count,
        mask=None if plain else [np.full(_VOCAB // 32, 2**32 - 1, np.uint32)] * count,
    )


def _record_samplers() -> None:
    """Every way to sample."""
    for how in warm.samples(_VOCAB):
        count = len(how.temperature)
        Sampler(_VOCAB, count).sample(torch.zeros((count, _VOCAB), device=device()), how)


def _zeros(type_name: str, *shape: int) -> RawTensor:
    fmt = format_named(type_name)
    return RawTensor("zeros", fmt, shape, np.zeros((*shape[:-1], fmt.row_bytes(shape[-1])), np.uint8))


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 if there is any fault."""
    parser = argparse.ArgumentParser(prog="python -m shoal.kernels.cuda.aot", description="Compile without a GPU.")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be said again (default: all)")
    parser.add_argument("--all", action="store_true", help="every shape, type and number of rows, not a few")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="that compile side by side")
    found = parser.parse_args(arguments)
    started = time.monotonic()
    faults = []
    for target in found.target or TARGETS:
        recorder, results = record(ALL if found.all else SHORT, target), list[Compiled]()
        print(f"{target}: {len(recorder.launches)} kernels x configurations", flush=True)
        for result in compile_all(target, recorder.launches, found.processes):
            results.append(result)
            print(_line(result), flush=True)
        faults += list(_faults(target, results, recorder.launches))
    print(f"{len(faults)} faults, {time.monotonic() - started:.0f} s")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def _line(result: Compiled) -> str:
    numbers = f"{result.registers:4d} registers {result.spilled:5d} spilled {result.shared:7d} shared"
    return f"{result.target} {numbers}  {result.launch}  {', '.join(result.instructions)}"


def _faults(target: str, results: Sequence[Compiled], subjects: dict[Launch, set[str]]) -> Iterator[str]:
    for result in results:
        yield from (f"{target} {result.launch}: {fault}" for fault in result.faults)
    yield from (f"{target} {mixed}" for mixed in mixed_instructions(results, subjects))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
