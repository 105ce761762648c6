"""Model files for benchmarks: random weights in the shape of a real network and in llama.cpp's mixes of types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gguf
from shoal.bench.models.networks import Shape, Tensor, mix_of, tensors_of
from shoal.gguf.reader import GGUFFile, StringArray

_UNUSED = 5  # llama.cpp's type of a token that never occurs
_WORST_SCORE = -1e6


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
