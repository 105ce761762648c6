"""ModelConfig: the hyper-parameters of a model, read from GGUF metadata and checked before anything is computed with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shoal.errors import UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import Routing
from shoal.models.archs import ARCHS, Arch, arch_of
from shoal.params import POOLINGS, Pooling

_MAX_LAYERS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCAB = 1 << 24
_MAX_CONTEXT = 1 << 27
_MAX_EXPERTS = 1 << 12
_LEAST = 1e-300  # any number above 0


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary angles are stretched: ``kind`` none, linear or yarn (Peng et al. 2023). ``log_multiplier``: DeepSeek-V2's own way to
    scale attention under yarn (0: the usual one)."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    log_multiplier: float = 0.0


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Latent attention (DeepSeek-V2): ``rank`` values from which all heads' K and V are made, next to one rotated key of ``rope_dim``
    for all of them; a query head has ``nope_dim`` values that are not rotated, a value head ``value_dim``."""

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of a model; sizes in elements, ``context_length`` in tokens.

    ``windows`` and ``rotated`` have an item for each layer: its sliding window (0: none), and whether its rope turns.
    ``logit_factor`` multiplies the logits; a soft cap of 0 is none. The first ``n_dense_layers`` have no experts. ``pooling``: what the
    file says about embeddings, if anything.
    """

    architecture: str
    arch: Arch
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
    windows: tuple[int, ...]
    rotated: tuple[bool, ...]
    attention_scale: float
    window_rope_base: float = 0.0
    attention_cap: float = 0.0
    final_cap: float = 0.0
    alibi: float = 0.0
    clamp_qkv: float = 0.0
    parallel: bool = False
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logit_factor: float = 1.0
    routing: Routing | None = None
    n_experts: int = 0
    n_dense_layers: int = 0
    latent: LatentConfig | None = None
    pooling: Pooling | None = None

    @property
    def pooling_type(self) -> Pooling:
        """How embeddings are pooled: as the file says, else as vLLM does."""
        return self.pooling or ("cls" if self.arch.encoder else "last")

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read and check. Raises GGUFError (missing, wrong or absurd value) or UnsupportedError (a model shoal cannot run)."""
        architecture = file.get("general.architecture", str)
        if architecture not in ARCHS:
            raise UnsupportedError(
                f"general.architecture: {architecture[:64]!r} is not supported; known: {', '.join(sorted(ARCHS))}"
            )
        read = _Reader(file, architecture)
        n_layers = _n_layers(read)
        arch = arch_of(architecture, n_layers)
        n_embd = read.integer("embedding_length", _MAX_WIDTH)
        n_heads = read.integer("attention.head_count", _MAX_WIDTH)
        latent = _latent(read, n_embd // n_heads) if arch.latent else None
        n_kv_heads = 1 if latent else read.integer("attention.head_count_kv", _MAX_WIDTH, default=n_heads)
        if n_heads % n_kv_heads:
            read.wrong("attention.head_count_kv", f"{n_kv_heads} does not divide head_count {n_heads}")
        head_dim = latent.rank + latent.rope_dim if latent else _head_dim(read, n_embd // n_heads)
        context = _context_length(read)
        scaling = RopeScaling() if arch.rope == "none" else _rope_scaling(read, context)
        windows = _windows(read, arch, n_layers)
        rope_base = read.number("rope.freq_base", default=10000.0)
        residual_factor = read.number("residual_scale", default=1.4 / n_layers**0.5 if arch.scaled_by_size else 1.0)
        n_experts = read.integer("expert_count", _MAX_EXPERTS, default=0, low=0)
        return cls(
            architecture=architecture,
            arch=arch,
            n_layers=n_layers,
            n_embd=n_embd,
            n_ff=read.integer("feed_forward_length", _MAX_WIDTH) // (2 if arch.halved_ff else 1),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_dim=_rope_dim(read, arch, head_dim),
            rope_base=rope_base,
            rope_scaling=scaling,
            norm_eps=read.number(f"attention.layer_norm{'_rms' if arch.norm == 'rms' else ''}_epsilon"),
            vocab_size=_vocab_size(file, read),
            context_length=context,
            windows=windows,
            window_rope_base=_window_rope_base(read, arch, rope_base),
            rotated=_rotated(read, arch, windows),
            attention_scale=_attention_scale(read, arch, n_layers, n_embd // n_heads, head_dim, scaling, latent),
            attention_cap=read.number("attn_logit_softcapping", default=arch.attention_cap, low=0.0)
            if arch.attention_cap
            else 0.0,
            final_cap=read.number("final_logit_softcapping", default=arch.final_cap, low=0.0),
            alibi=read.number("attention.max_alibi_bias", default=arch.alibi, low=0.0) if arch.alibi else 0.0,
            clamp_qkv=read.number("attention.clamp_kqv", default=0.0, low=0.0),
            parallel=_parallel(read, arch),
            embedding_factor=_embedding_factor(read, arch, n_embd),
            residual_factor=residual_factor,
            logit_factor=_logit_factor(read, arch, n_embd),
            routing=_routing(read, arch, n_experts, residual_factor),
            n_experts=n_experts,
            n_dense_layers=read.integer("leading_dense_block_count", _MAX_LAYERS, default=0, low=0),
            latent=latent,
            pooling=_pooling(read, arch),
        )


class _Reader:
    """Typed, bounded access to the keys of one architecture."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.prefix = architecture

    def integer(self, key: str, high: int, *, default: int | None = None, low: int = 1) -> int:
        name = f"{self.prefix}.{key}"
        value: int | None = self._same_everywhere(name)
        if value is None:
            value = self.file.get(name, int) if default is None else self.file.get(name, int, default=default)
        if not low <= value <= high:
            self.wrong(key, f"{value} is not from {low} to {high}")
        return value

    def _same_everywhere(self, name: str) -> int | None:
        """Some files give a number for each layer where one for all would do. None: it is one number, or they differ."""
        values = self.file.metadata.get(name)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or len(set(values.tolist())) != 1:
            return None
        return int(values[0])

    def number(self, key: str, *, default: float | None = None, low: float = _LEAST) -> float:
        name = f"{self.prefix}.{key}"
        value: float = self.file.get(name, float) if default is None else self.file.get(name, float, default=default)
        if not math.isfinite(value) or value < low:
            self.wrong(key, f"{value} is not a finite number {'above 0' if low == _LEAST else f'from {low:g} up'}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value: bool = self.file.get(f"{self.prefix}.{key}", bool, default=default)
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self.file.get(f"{self.prefix}.{key}", str, default=default)
        return value

    def wrong(self, key: str, reason: str) -> None:
        raise self.file.error(f"{self.prefix}.{key}", reason)


def _n_layers(read: _Reader) -> int:
    """Without the layers at the end that only guess further tokens, which shoal leaves out."""
    n_layers = read.integer("block_count", _MAX_LAYERS)
    guessing = read.integer("nextn_predict_layers", _MAX_LAYERS, default=0, low=0)
    if guessing >= n_layers:
        read.wrong("nextn_predict_layers", f"{guessing} is not below block_count {n_layers}")
    return n_layers - guessing


def _rope_scaling(read: _Reader, context: int) -> RopeScaling:
    kind = read.text("rope.scaling.type", "none")
    # Older files give only the linear factor.
    factor = read.number("rope.scaling.factor", default=read.number("rope.scale_linear", default=1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"{read.prefix}.rope.scaling.type: {kind[:32]!r} is not supported (none, linear, yarn, longrope)"
        )
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=read.integer("rope.scaling.original_context_length", _MAX_CONTEXT, default=context),
        attn_factor=read.number("rope.scaling.attn_factor", default=1.0),
        log_multiplier=read.number("rope.scaling.yarn_log_multiplier", default=0.0, low=0.0),
    )


def _head_dim(read: _Reader, share: int) -> int:
    """Of keys and of values; ``share`` is width / heads."""
    head_dim = read.integer("attention.key_length", _MAX_WIDTH, default=max(1, share))
    if read.integer("attention.value_length", _MAX_WIDTH, default=head_dim) != head_dim:
        raise UnsupportedError(f"{read.prefix}.attention.value_length differs from key_length {head_dim}")
    return head_dim


def _context_length(read: _Reader) -> int:
    """Where scores are sharpened with growing position (Mistral 3), only as far as that has not begun."""
    context = read.integer("context_length", _MAX_CONTEXT)
    if not read.number("attention.temperature_scale", default=0.0, low=0.0):
        return context
    begins = read.integer("rope.scaling.original_context_length", _MAX_CONTEXT, default=context)
    return min(context, begins, read.integer("attention.temperature_length", _MAX_CONTEXT, default=begins))


def _rope_dim(read: _Reader, arch: Arch, head_dim: int) -> int:
    if arch.rope == "none":
        return 0
    rope_dim = read.integer("rope.dimension_count", _MAX_WIDTH, default=head_dim)
    if rope_dim > head_dim or rope_dim % 2:
        read.wrong("rope.dimension_count", f"{rope_dim} is odd or more than the head size {head_dim}")
    return rope_dim


def _windows(read: _Reader, arch: Arch, n_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer."""
    if arch.windows is None:
        return (0,) * n_layers
    size = arch.windows.size
    window = read.integer("attention.sliding_window", _MAX_CONTEXT, default=size, low=1 if size is None else 0)
    pattern = read.file.metadata.get(f"{read.prefix}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):  # says for each layer whether it has one
        if len(pattern) < n_layers:
            read.wrong("attention.sliding_window_pattern", f"{len(pattern)} items for {n_layers} layers")
        return tuple(window if pattern[i] else 0 for i in range(n_layers))
    period = read.integer("attention.sliding_window_pattern", _MAX_LAYERS, default=arch.windows.period)
    return tuple(window if i % period < period - 1 else 0 for i in range(n_layers))


def _window_rope_base(read: _Reader, arch: Arch, rope_base: float) -> float:
    base = None if arch.windows is None else arch.windows.rope_base
    return 0.0 if base is None else read.number("rope.freq_base_swa", default=base or rope_base)


def _rotated(read: _Reader, arch: Arch, windows: tuple[int, ...]) -> tuple[bool, ...]:
    switched_on = not arch.rope_switch or read.flag("rope.scaling.finetuned", default=True)
    if arch.rope == "none" or not switched_on:
        return (False,) * len(windows)
    if arch.windows is not None and arch.windows.rope_only:
        return tuple(window > 0 for window in windows)
    period = arch.unrotated_period
    return tuple(period == 0 or (i + 1) % period != 0 for i in range(len(windows)))


# llama.cpp knows the 27B models by their number of layers; they divide by the root of another size than the head's.
_WIDE_SCALE = {("gemma2", 46), ("gemma3", 62)}


def _attention_scale(
    read: _Reader,
    arch: Arch,
    n_layers: int,
    share: int,
    head_dim: int,
    scaling: RopeScaling,
    latent: LatentConfig | None,
) -> float:
    """What scores are multiplied by: 1 / sqrt(head size) unless something says otherwise. ``share`` is width / heads."""
    given = read.number("attention.scale", default=0.0, low=0.0)
    if given:
        return given
    if latent is not None:
        stretch = 1.0 + scaling.log_multiplier * math.log(scaling.factor) if scaling.kind == "yarn" else 1.0
        return stretch**2 / math.sqrt(latent.nope_dim + latent.rope_dim)
    if arch.unrooted_scale:
        return 1.0 / head_dim
    return 1.0 / math.sqrt(share if (read.prefix, n_layers) in _WIDE_SCALE else head_dim)


def _parallel(read: _Reader, arch: Arch) -> bool:
    if arch.parallel != "maybe":
        return arch.parallel == "yes"
    # stablelm: no norm before the MLP means that it reads what attention reads; gptneox: a key.
    if "blk.0.ffn_norm.weight" not in read.file.tensors:
        return True
    return read.flag("use_parallel_residual", default=False)


def _embedding_factor(read: _Reader, arch: Arch, n_embd: int) -> float:
    if arch.scaled_embedding:
        return math.sqrt(n_embd)
    return read.number("embedding_scale", default=12.0 if arch.scaled_by_size else 1.0)


def _logit_factor(read: _Reader, arch: Arch, n_embd: int) -> float:
    if arch.logit_scale == "none":
        return 1.0
    given = read.number("logit_scale", default=256.0 / n_embd if arch.scaled_by_size else 1.0)
    return given if arch.logit_scale == "multiply" else 1.0 / given


def _routing(read: _Reader, arch: Arch, n_experts: int, residual_factor: float) -> Routing | None:
    if n_experts == 0:
        return None
    if arch.routing is None:
        raise UnsupportedError(f"{read.prefix}.expert_count: {n_experts} experts are not known of this architecture")
    groups = read.integer("expert_group_count", n_experts, default=1)
    if n_experts % groups:
        read.wrong("expert_group_count", f"{groups} does not divide expert_count {n_experts}")
    gating = read.integer("expert_gating_func", 2, default=0, low=0)
    if read.integer("interleave_moe_layer_step", _MAX_LAYERS, default=1) != 1:
        raise UnsupportedError(f"{read.prefix}.interleave_moe_layer_step: only 1 is supported")
    return Routing(
        used=read.integer("expert_used_count", n_experts),
        gating=("softmax", "sigmoid")[gating - 1] if gating else arch.routing.gating,
        renormalise=read.flag("expert_weights_norm", default=arch.routing.renormalise),
        scale=residual_factor * (read.number("expert_weights_scale", default=1.0, low=0.0) or 1.0),
        groups=groups,
        groups_used=read.integer("expert_group_used_count", groups, default=groups),
    )


def _pooling(read: _Reader, arch: Arch) -> Pooling | None:
    """What the file says, if anything. Raises UnsupportedError for an encoder that is causal."""
    if arch.encoder and read.flag("attention.causal", default=False):
        raise UnsupportedError(f"{read.prefix}.attention.causal: true is not supported for an encoder")
    if f"{read.prefix}.pooling_type" not in read.file.metadata:
        return None
    return POOLINGS[read.integer("pooling_type", len(POOLINGS) - 1, low=0)]


def _latent(read: _Reader, share: int) -> LatentConfig:
    """``share`` is width / heads. Older files give the sizes of whole heads where newer ones give those of what is stored."""
    rank = read.integer("attention.kv_lora_rank", _MAX_WIDTH)
    rotated = read.integer("rope.dimension_count", _MAX_WIDTH)
    newer = f"{read.prefix}.attention.key_length_mla" in read.file.metadata
    key, value = (
        read.integer(f"attention.{name}{'_mla' if newer else ''}", _MAX_WIDTH, default=max(1, share))
        for name in ("key_length", "value_length")
    )
    if rotated >= key:
        read.wrong("rope.dimension_count", f"{rotated} is not below the size of a key, {key}")
    return LatentConfig(rank, rotated, key - rotated, value)


def _vocab_size(file: GGUFFile, read: _Reader) -> int:
    """Rows of the embedding: the one number that is always true."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise file.error("token_embd.weight", "missing, or not a matrix")
    vocab = embedding.shape[0]
    if not 1 <= vocab <= _MAX_VOCAB:
        raise file.error("token_embd.weight", f"{vocab} rows is not from 1 to {_MAX_VOCAB}")
    return vocab
