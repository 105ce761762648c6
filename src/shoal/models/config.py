"""ModelConfig: the hyper-parameters of a model, read from GGUF metadata and checked before anything is computed with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.errors import UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.models.archs import ARCHS, Arch

_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 24
_MAX_CONTEXT = 1 << 27


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary angles are stretched: ``kind`` none, linear or yarn (Peng et al. 2023)."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of a model; sizes in elements, ``context_length`` in tokens."""

    architecture: str
    arch: Arch
    name: str
    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_dim: int
    rope_base: float
    rope_scaling: RopeScaling
    norm_eps: float
    vocab_size: int
    context_length: int

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read and check. Raises GGUFError (missing, wrong or absurd value) or UnsupportedError (a model shoal cannot run)."""
        architecture = file.get("general.architecture", str)
        if architecture not in ARCHS:
            raise UnsupportedError(
                f"general.architecture: {architecture[:64]!r} is not supported; known: {', '.join(sorted(ARCHS))}"
            )
        read = _Reader(file, architecture)
        n_embd = read.integer("embedding_length", _MAX_WIDTH)
        n_heads = read.integer("attention.head_count", _MAX_WIDTH)
        n_kv_heads = read.integer("attention.head_count_kv", _MAX_WIDTH, default=n_heads)
        if n_heads % n_kv_heads:
            read.wrong("attention.head_count_kv", f"{n_kv_heads} does not divide head_count {n_heads}")
        head_dim = read.integer("attention.key_length", _MAX_WIDTH, default=max(1, n_embd // n_heads))
        if read.integer("attention.value_length", _MAX_WIDTH, default=head_dim) != head_dim:
            raise UnsupportedError(f"{architecture}.attention.value_length differs from key_length {head_dim}")
        if read.integer("expert_count", _MAX_WIDTH, default=0, low=0):
            raise UnsupportedError(f"{architecture}.expert_count: mixtures of experts are not supported yet")
        rope_dim = read.integer("rope.dimension_count", _MAX_WIDTH, default=head_dim)
        if rope_dim > head_dim or rope_dim % 2:
            read.wrong("rope.dimension_count", f"{rope_dim} is odd or more than the head size {head_dim}")
        context = read.integer("context_length", _MAX_CONTEXT)
        return cls(
            architecture=architecture,
            arch=ARCHS[architecture],
            name=file.get("general.name", str, default=""),
            n_layers=read.integer("block_count", _MAX_LAYERS),
            n_embd=n_embd,
            n_ff=read.integer("feed_forward_length", _MAX_WIDTH),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_dim=rope_dim,
            rope_base=read.number("rope.freq_base", default=10000.0),
            rope_scaling=_rope_scaling(read, context),
            norm_eps=read.number("attention.layer_norm_rms_epsilon"),
            vocab_size=_vocab_size(file, read),
            context_length=context,
        )


class _Reader:
    """Typed, bounded access to the keys of one architecture."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.prefix = architecture

    def integer(self, key: str, high: int, *, default: int | None = None, low: int = 1) -> int:
        name = f"{self.prefix}.{key}"
        value: int = self.file.get(name, int) if default is None else self.file.get(name, int, default=default)
        if not low <= value <= high:
            self.wrong(key, f"{value} is not from {low} to {high}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        name = f"{self.prefix}.{key}"
        value: float = self.file.get(name, float) if default is None else self.file.get(name, float, default=default)
        if not math.isfinite(value) or value <= 0:
            self.wrong(key, f"{value} is not a finite number above 0")
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self.file.get(f"{self.prefix}.{key}", str, default=default)
        return value

    def wrong(self, key: str, reason: str) -> None:
        raise self.file.error(f"{self.prefix}.{key}", reason)


def _rope_scaling(read: _Reader, context: int) -> RopeScaling:
    kind = read.text("rope.scaling.type", "none")
    # Older files give only the linear factor.
    factor = read.number("rope.scaling.factor", default=read.number("rope.scale_linear", default=1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{read.prefix}.rope.scaling.type: {kind[:32]!r} is not supported (none, linear, yarn)")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=read.integer("rope.scaling.original_context_length", _MAX_CONTEXT, default=context),
        attn_factor=read.number("rope.scaling.attn_factor", default=1.0),
    )


def _vocab_size(file: GGUFFile, read: _Reader) -> int:
    """Rows of the embedding: the one number that is always true."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.error("token_embd.weight", "missing, or not a matrix")
    vocab = embedding.shape[0]
    if not 1 <= vocab <= _MAX_VOCAB:
        raise file.error("token_embd.weight", f"{vocab} rows is not from 1 to {_MAX_VOCAB}")
    return vocab
