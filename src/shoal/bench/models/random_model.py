"""Model files for benchmarks: random weights in the shape of a real network and in llama.cpp's mixes of types.

Speed does not depend on what the weights say, so such a file is as good as a trained one that nobody has to download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gguf
from shoal.bench.models.random_weights import random_rows, tail
from shoal.errors import ParameterError
from shoal.gguf.quants import FORMATS, QuantFormat, format_named
from shoal.gguf.reader import GGUFFile, StringArray

_F32 = format_named("F32")
_UNUSED = 5  # llama.cpp's type of a token that never occurs
_WORST_SCORE = -1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A llama network whose embedding is also its head."""

    n_embd: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ff: int
    vocab_size: int
    context_length: int
    rope_base: float


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
    """Which format a matrix has: ``more`` are attn_v and ffn_down in some layers, ``head`` is the embedding."""

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


def write_random_model(path: Path, shape: Shape, type_name: str, tokenizer_from: Path, seed: int = 0) -> None:
    """Write a file with random weights, one tensor in memory at a time. ``path`` appears once it is complete.

    ``type_name`` is one of TYPES. The tokenizer is that of ``tokenizer_from``, filled up to the vocabulary of ``shape`` with
    tokens that never occur; if it is larger, the embedding has its size.

    Raises ParameterError for an unknown type, UnsupportedError for one without random weights.
    """
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    with GGUFFile.open(tokenizer_from) as file:
        vocab_size = max(shape.vocab_size, len(file.get("tokenizer.ggml.tokens", StringArray)))
        _add_hyper_parameters(writer, shape, type_name, vocab_size)
        _add_tokenizer(writer, file, vocab_size)
    tensors = list(tensors_of(shape, vocab_size, mix_of(type_name)))
    for tensor in tensors:  # float32 here says that the shape counts numbers, not bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.format.type_id)
    try:
        _write(writer, tensors, np.random.default_rng(seed))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write(writer: gguf.GGUFWriter, tensors: list[Tensor], rng: np.random.Generator) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data(rng))
    writer.close()


def mix_of(type_name: str) -> Mix:
    """The formats of a file of this type. Raises ParameterError where it is not one of TYPES."""
    if type_name not in TYPES:
        raise ParameterError("type", type_name, f"one of {', '.join(TYPES)}")
    return _MIXES.get(type_name) or Mix(type_name, type_name, type_name if type_name in _OWN_HEAD else "Q6_K")


def tensors_of(shape: Shape, vocab_size: int, mix: Mix) -> Iterator[Tensor]:
    """All tensors of a network, in the order of the file."""
    width, queries, keys = shape.n_embd, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    yield _matrix("token_embd", (vocab_size, width), mix.head)
    yield Tensor("output_norm.weight", (width,), _F32)
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


def _add_hyper_parameters(writer: gguf.GGUFWriter, shape: Shape, type_name: str, vocab_size: int) -> None:
    writer.add_name(f"random {type_name}")
    writer.add_file_type(_file_type(type_name))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab_size)


def _file_type(type_name: str) -> gguf.LlamaFileType:
    """llama.cpp's number for the type; a guess of its own where it has no such type of file."""
    kinds = gguf.LlamaFileType.__members__
    return kinds.get(f"MOSTLY_{type_name}") or kinds.get(f"ALL_{type_name}", gguf.LlamaFileType.GUESSED)


def _add_tokenizer(writer: gguf.GGUFWriter, file: GGUFFile, vocab_size: int) -> None:
    """Copy every key of the tokenizer; what has an entry for each token is filled up."""
    fillers: dict[str, str | float] = {"tokens": "[PAD{}]", "token_type": _UNUSED, "scores": _WORST_SCORE}
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer."):
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                filler = fillers.get(key.removeprefix("tokenizer.ggml."))
                writer.add_array(key, value.tolist() if filler is None else _filled(value.tolist(), filler, vocab_size))


def _filled(entries: list[Any], filler: str | float, length: int) -> list[Any]:
    """``entries`` and then the filler up to ``length``; a text gets its number where it says ``{}``."""
    missing = range(len(entries), length)
    return entries + [filler.format(i) if isinstance(filler, str) else filler for i in missing]
