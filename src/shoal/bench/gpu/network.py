"""Models of random weights in memory, bound to a backend, and the steps they run: without files, tokenizers or the engine.

Layers that have the same types share their bytes in the memory of the host, not on the device: even a large model is made in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.bench.models.networks import Shape, Tensor, mix_of, tensors_of
from shoal.gguf.header import Header, TensorInfo
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    Backend,
    IntArray,
    KVGroup,
    Matrix,
    RawTensor,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.models.transformer import run_head, run_layers
from shoal.models.weights import AttentionWeights, Encoder, Model, pack_model

if TYPE_CHECKING:
    from shoal.kernels.load import Use

_ALIGNMENT = 64


def random_file(shape: Shape, type_name: str, seed: int = 0) -> GGUFFile:
    """A llama network in one of ``networks.TYPES``."""
    rng = np.random.default_rng(seed)
    chunks: list[bytes] = []
    offsets: dict[tuple[tuple[int, ...], str], int] = {}
    infos: dict[str, TensorInfo] = {}
    size = 0
    for tensor in tensors_of(shape, shape.vocab_size, mix_of(type_name)):
        key = (tensor.shape, tensor.format.name)
        if key not in offsets:
            offsets[key] = size
            chunks.append(_padded(tensor, rng))
            size += len(chunks[-1])
        infos[tensor.name] = TensorInfo(tensor.name, tensor.format, tensor.shape, offsets[key], tensor.nbytes, 0)
    header = Header(3, _ALIGNMENT, _metadata(shape), infos, {}, 0)
    return GGUFFile([Path(f"random {type_name}")], [header], [b"".join(chunks)])


def _padded(tensor: Tensor, rng: np.random.Generator) -> bytes:
    data = tensor.data(rng).tobytes()
    return data + bytes(-len(data) % _ALIGNMENT)


def _metadata(shape: Shape) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": shape.n_layers,
        "llama.context_length": shape.context_length,
        "llama.embedding_length": shape.n_embd,
        "llama.feed_forward_length": shape.n_ff,
        "llama.attention.head_count": shape.n_heads,
        "llama.attention.head_count_kv": shape.n_kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": shape.rope_base,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }


class _PackOnce:
    """A backend whose matrices of the same bytes are packed once and copied on the device."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._packed: dict[tuple[tuple[int, tuple[int, ...]], ...], Matrix] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def matrix(self, parts: Sequence[RawTensor]) -> Matrix:
        """A matrix of its own."""
        key = tuple((part.data.ctypes.data, part.shape) for part in parts)
        if key in self._packed:
            return deepcopy(self._packed[key])
        return self._packed.setdefault(key, self._backend.matrix(parts))


def pack(backend: Backend, file: GGUFFile, context: int) -> Model:
    """The weights on the device, for sequences of up to ``context`` positions."""
    model = pack_model(file, _PackOnce(backend), max_model_len=context)
    assert not isinstance(model, Encoder)
    return model


def matrices_of(model: Model) -> list[tuple[Matrix, Use]]:
    """All that products of a llama network read, and how they are used."""
    found: list[tuple[Matrix, Use]] = [(model.head.matrix, "")]
    for layer in model.layers:
        assert isinstance(layer.attention, AttentionWeights)
        assert layer.mlp is not None
        found += [(layer.attention.qkv.matrix, ""), (layer.attention.output.matrix, "floats")]
        found += [(layer.mlp.up.matrix, "gated"), (layer.mlp.down.matrix, "floats")]
    return found


class Network:
    """A random model bound to ``backend``, with KV pages of its own for ``sequences`` of up to ``context`` positions; or, in the same
    pages, for one of as many as a step has ``rows``."""

    def __init__(
        self, backend: Backend, model: Model, sequences: int, context: int, rows: int, kv_dtype: str = "f16"
    ) -> None:
        self._model = model  # a bound network may hold bare addresses of its weights: they must live as long
        pages = -(-context // PAGE_SIZE)
        self._pages = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        self._backend = backend
        longest = max(pages, -(-rows // PAGE_SIZE))
        groups = [KVGroup(tuple(range(model.config.n_layers)), max(self._pages.size, longest))]
        self._cache = backend.kv_cache(groups, model.shape, kv_dtype)
        self._bound = backend.bind(
            lambda ops: run_layers(ops, model),
            lambda ops, x: run_head(ops, model, x),
            self._cache,
            StepLimits(rows, sequences, longest),
        )

    def run(self, sequences: Sequence[int], first: Sequence[int], tokens: Sequence[IntArray]) -> None:
        """One step of all layers: of each sequence some tokens, from a position on."""
        self._step(self._pages[list(sequences)], first, tokens)

    def run_prompt(self, tokens: IntArray) -> None:
        """One step with a prompt that may be longer than a sequence; all of these lose their context."""
        self._step(np.arange(-(-len(tokens) // PAGE_SIZE), dtype=np.int32)[None], [0], [tokens])

    def _step(self, pages: IntArray, first: Sequence[int], tokens: Sequence[IntArray]) -> None:
        counts = [len(ids) for ids in tokens]
        starts = np.array(first, np.int32)
        self._bound.layers(
            StepInput(
                token_ids=np.concatenate(tokens).astype(np.int32),
                positions=np.concatenate([np.arange(s, s + n) for s, n in zip(first, counts, strict=True)]).astype(
                    np.int32
                ),
                row_start=np.cumsum([0, *counts]).astype(np.int32),
                kv_len=(starts + np.array(counts)).astype(np.int32),
                page_table=np.ascontiguousarray(pages[None]),
            )
        )

    def logits(self, rows: IntArray) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits of some rows of the last step, the caller's to keep."""
        blocks = [self._bound.logits(rows[i : i + LOGIT_ROWS]).copy() for i in range(0, len(rows), LOGIT_ROWS)]
        return np.concatenate(blocks)

    def sample(self, rows: IntArray) -> IntArray:
        """The likeliest token of some rows of the last step."""
        blocks = [rows[i : i + LOGIT_ROWS] for i in range(0, len(rows), LOGIT_ROWS)]
        return np.concatenate([self._bound.sample(block, greedy(len(block))) for block in blocks])

    def share_context(self, positions: int) -> None:
        """Give every sequence what the first one has of its first ``positions``, in pages of its own."""
        pages = self._pages[:, : -(-positions // PAGE_SIZE)]
        pairs = [(int(a), int(b)) for row in pages[1:] for a, b in zip(pages[0], row, strict=True)]
        if pairs:
            self._backend.copy_pages(self._cache, 0, pairs)


def greedy(count: int) -> SampleRows:
    """How to choose the likeliest token of some rows."""
    return SampleRows(
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.zeros(count, np.uint64),
        sample=np.zeros(count, np.uint32),
        position=np.zeros(count, np.uint32),
        banned=[None] * count,
    )
