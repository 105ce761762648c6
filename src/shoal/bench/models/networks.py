"""Networks to measure with: shapes of real ones, and the type that each tensor has in llama.cpp's mixes.

Speed does not depend on what the weights say, so random ones are as good as trained ones that nobody has to download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.bench.models.random_weights import random_rows, tail
from shoal.errors import ParameterError
from shoal.gguf.quants import FORMATS, QuantFormat, format_named

_F32 = format_named("F32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A llama network. ``tied``: its embedding is also its head."""

    n_embd: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ff: int
    vocab_size: int
    context_length: int
    rope_base: float
    tied: bool = True


SHAPES = {
    "llama-1b": Shape(  # Llama 3.2 1B
        n_embd=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        n_ff=8192,
        vocab_size=128256,
        context_length=131072,
        rope_base=500000.0,
    ),
    "llama-3b": Shape(  # Llama 3.2 3B
        n_embd=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        head_dim=128,
        n_ff=8192,
        vocab_size=128256,
        context_length=131072,
        rope_base=500000.0,
    ),
    "llama-8b": Shape(  # Llama 3.1 8B
        n_embd=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        n_ff=14336,
        vocab_size=128256,
        context_length=131072,
        rope_base=500000.0,
        tied=False,
    ),
    "smollm2-135m": Shape(
        n_embd=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        n_ff=1536,
        vocab_size=49152,
        context_length=8192,
        rope_base=100000.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Mix:
    """Which format a matrix has: ``more`` are attn_v and ffn_down in some layers, ``head`` is the head, or the
    embedding where that is the head too."""

    base: str
    more: str
    head: str


_MIXES = {"Q4_K_M": Mix("Q4_K", "Q6_K", "Q6_K"), "Q5_K_M": Mix("Q5_K", "Q6_K", "Q6_K")}
_OWN_HEAD = {"F32", "F16", "BF16", "Q8_0"}  # files of these types have an embedding of the same type
_WEIGHTS = [
    f.name for f in FORMATS.values() if f.name not in {"I8", "I16", "I32", "I64", "F64", "Q8_1", "NVFP4", "Q1_0"}
]

TYPES = (*_MIXES, *_WEIGHTS)
"""The types of file that can be made: a mix of llama.cpp, or one format for every matrix but the embedding."""

# What llama.cpp takes where a row is no whole number of blocks (`tensor_type_fallback` in llama-quant.cpp).
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
_OTHER_FALLBACK = "IQ4_NL"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to be written; a norm if it has one dimension."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        rows = self.shape[0] if len(self.shape) == 2 else 1
        return rows * self.format.row_bytes(self.shape[-1]) + self.format.tail_bytes

    def data(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """A norm of ones, or random weights as they lie in the file."""
        if len(self.shape) == 1:
            return np.ones(self.shape, np.float32)
        rows = random_rows(self.format, (self.shape[0], self.shape[1]), rng)
        return np.concatenate([rows.reshape(-1), tail(self.format)]) if self.format.tail_bytes else rows


def mix_of(type_name: str) -> Mix:
    """The formats of a file of this type. Raises ParameterError where it is not one of TYPES."""
    if type_name not in TYPES:
        raise ParameterError("type", type_name, f"one of {', '.join(TYPES)}")
    return _MIXES.get(type_name) or Mix(type_name, type_name, type_name if type_name in _OWN_HEAD else "Q6_K")


def tensors_of(shape: Shape, vocab_size: int, mix: Mix) -> Iterator[Tensor]:
    """All tensors of a network, in the order of the file."""
    width, queries, keys = shape.n_embd, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    yield _matrix("token_embd", (vocab_size, width), mix.head if shape.tied else mix.base)
    yield Tensor("output_norm.weight", (width,), _F32)
    if not shape.tied:
        yield _matrix("output", (vocab_size, width), mix.head)
    for layer in range(shape.n_layers):
        more = mix.more if uses_more_bits(layer, shape.n_layers) else mix.base
        block = f"blk.{layer}."
        yield Tensor(f"{block}attn_norm.weight", (width,), _F32)
        yield _matrix(f"{block}attn_q", (queries, width), mix.base)
        yield _matrix(f"{block}attn_k", (keys, width), mix.base)
        yield _matrix(f"{block}attn_v", (keys, width), more)
        yield _matrix(f"{block}attn_output", (width, queries), mix.base)
        yield Tensor(f"{block}ffn_norm.weight", (width,), _F32)
        yield _matrix(f"{block}ffn_gate", (shape.n_ff, width), mix.base)
        yield _matrix(f"{block}ffn_up", (shape.n_ff, width), mix.base)
        yield _matrix(f"{block}ffn_down", (width, shape.n_ff), more)


def uses_more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's ``use_more_bits``: the first eighth of the layers, the last, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _matrix(name: str, shape: tuple[int, int], format_name: str) -> Tensor:
    """A matrix in this format, or in the one that llama.cpp would fall back to."""
    fmt = format_named(format_name)
    if shape[1] % fmt.block_size:
        fmt = format_named(_FALLBACK.get(format_name, _OTHER_FALLBACK))
    return Tensor(f"{name}.weight", shape, fmt)
