"""Weights of a model in the backend's layout: what reads the same input goes into one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.gguf.quants import format_named
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import Array, AttentionShape, Backend, Matrix, RawTensor, Rope
from shoal.models.config import ModelConfig

Progress = Callable[[int, int], None]  # (bytes packed, bytes in all)
_F32 = format_named("F32")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: [rows, columns] matrices; qkv and gate_up are stacked in that order; a bias is None where the file has none."""

    attn_norm: Array
    qkv: Matrix
    qkv_bias: Array | None
    attn_output: Matrix
    attn_output_bias: Array | None
    ffn_norm: Array
    gate_up: Matrix
    gate_up_bias: Array | None
    ffn_down: Matrix
    ffn_down_bias: Array | None


@dataclass(frozen=True, slots=True)
class Model:
    """A network ready to run. ``head`` is ``embedding`` itself where the file ties them; ``nbytes`` of weights in the file."""

    config: ModelConfig
    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    output_norm: Array
    head: Matrix
    shape: AttentionShape
    rope: Rope
    nbytes: int


def check_supported(file: GGUFFile, backend: Backend) -> ModelConfig:
    """The model's configuration, if shoal can run it. Raises GGUFError or UnsupportedError that says why not."""
    config = ModelConfig.from_gguf(file)
    for name, info in file.tensors.items():
        if len(info.shape) == 2 and not backend.supports(info.format):
            raise UnsupportedError(f"tensor {name}: type {info.format.name} is not supported yet on {backend.name}")
    _Loader(file, config, backend, None).check_shapes()
    return config


def load_model(file: GGUFFile, backend: Backend, progress: Progress | None = None) -> Model:
    """Pack every tensor once. The file's own pages are let go as soon as they are packed.

    Raises GGUFError for missing tensors and shapes that disagree with the metadata, UnsupportedError for types and
    architectures that shoal does not run.
    """
    config = check_supported(file, backend)
    return _Loader(file, config, backend, progress).load()


def rope_of(config: ModelConfig, freq_factors: NDArray[np.float32] | None = None) -> Rope:
    """Rotary frequencies [rope_dim / 2]; ``freq_factors`` (rope_freqs.weight) divides them one by one."""
    pairs = config.rope_dim // 2
    theta = config.rope_base ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if freq_factors is not None:
        theta = theta / freq_factors.astype(np.float64)
    scaling, scale = config.rope_scaling, 1.0
    if scaling.kind == "linear":
        theta = theta / scaling.factor
    elif scaling.kind == "yarn":
        ramp = _yarn_ramp(config)
        theta = theta / scaling.factor * (1 - ramp) + theta * ramp
        scale = (1.0 + 0.1 * math.log(scaling.factor)) * scaling.attn_factor
    return Rope(inv_freq=theta.astype(np.float32), neox=config.arch.neox_rope, scale=scale)


def _yarn_ramp(config: ModelConfig) -> NDArray[np.float64]:
    """YaRN's share of unscaled rotation for each pair (Peng et al. 2023, section 3.2; beta_fast 32, beta_slow 1)."""
    rot, base, context = config.rope_dim, config.rope_base, config.rope_scaling.original_context

    def correction(rotations: float) -> float:
        return rot * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(correction(32.0)))
    high = min(rot - 1.0, math.ceil(correction(1.0)))
    pairs = np.arange(rot // 2, dtype=np.float64)
    return 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)


class _Loader:
    """Finds, checks and packs tensors by name."""

    def __init__(self, file: GGUFFile, config: ModelConfig, backend: Backend, progress: Progress | None) -> None:
        self.file, self.config, self.backend, self.progress = file, config, backend, progress
        self.total = sum(info.nbytes for info in file.tensors.values())
        self.done = 0

    def load(self) -> Model:
        config = self.config
        embedding = self.matrix("token_embd")
        tied = "output.weight" not in self.file.tensors
        return Model(
            config=config,
            embedding=embedding,
            layers=tuple(self.layer(f"blk.{i}.") for i in range(config.n_layers)),
            output_norm=self.vector("output_norm.weight"),
            head=embedding if tied else self.matrix("output"),
            shape=AttentionShape(config.n_heads, config.n_kv_heads, config.head_dim, config.head_dim**-0.5),
            rope=rope_of(config, self.freq_factors()),
            nbytes=self.total,
        )

    def layer(self, prefix: str) -> LayerWeights:
        qkv = [prefix + name for name in ("attn_q", "attn_k", "attn_v")]
        gate_up = [prefix + name for name in ("ffn_gate", "ffn_up")]
        return LayerWeights(
            attn_norm=self.vector(prefix + "attn_norm.weight"),
            qkv=self.matrix(*qkv),
            qkv_bias=self.bias(*qkv),
            attn_output=self.matrix(prefix + "attn_output"),
            attn_output_bias=self.bias(prefix + "attn_output"),
            ffn_norm=self.vector(prefix + "ffn_norm.weight"),
            gate_up=self.matrix(*gate_up),
            gate_up_bias=self.bias(*gate_up),
            ffn_down=self.matrix(prefix + "ffn_down"),
            ffn_down_bias=self.bias(prefix + "ffn_down"),
        )

    def matrix(self, *names: str) -> Matrix:
        parts = [self.raw(name + ".weight") for name in names]
        packed = self.backend.matrix(parts)
        for part in parts:
            self.packed(part.name)
        return packed

    def vector(self, name: str) -> Array:
        packed = self.backend.vector(self.raw(name))
        self.packed(name)
        return packed

    def bias(self, *names: str) -> Array | None:
        """The stacked biases of some matrices, zero for those without one; None where none has one."""
        present = [name for name in names if name + ".bias" in self.file.tensors]
        if not present:
            return None
        parts = []
        for name in names:
            rows = self.file.tensors[name + ".weight"].shape[0]
            raw = self.raw(name + ".bias") if name in present else None
            parts.append(np.zeros(rows, np.float32) if raw is None else raw.dequantised())
        stacked = np.concatenate(parts).astype(np.float32)
        return self.backend.vector(RawTensor(names[0] + ".bias", _F32, stacked.shape, stacked.view(np.uint8)))

    def freq_factors(self) -> NDArray[np.float32] | None:
        if "rope_freqs.weight" not in self.file.tensors:
            return None
        return self.raw("rope_freqs.weight").dequantised()

    def raw(self, name: str) -> RawTensor:
        info = self.file.tensors[name]
        return RawTensor(name, info.format, info.shape, self.file.tensor(name), self.file.scale(name))

    def packed(self, name: str) -> None:
        """A tensor now lives in the backend's layout: let its file pages go and report."""
        self.done += self.file.tensors[name].nbytes
        self.file.release(name)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def check_shapes(self) -> None:
        """Every tensor the network needs is there and has the shape the metadata promises; the rest is refused, not ignored."""
        expected = self.expected_shapes()
        for name, (shape, required) in expected.items():
            info = self.file.tensors.get(name)
            if info is None:
                if required:
                    raise self.file.error(name, "tensor is missing")
            elif info.shape != shape:
                raise self.file.error(name, f"shape {info.shape} should be {shape} by the metadata")
        unknown = [name for name in self.file.tensors if name not in expected]
        if unknown:
            raise UnsupportedError(
                f"tensor {unknown[0]}: not part of the {self.config.architecture} network that shoal runs"
            )

    def expected_shapes(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Tensor name -> (shape, whether it must be there)."""
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        shapes: dict[str, tuple[tuple[int, ...], bool]] = {
            "token_embd.weight": ((c.vocab_size, c.n_embd), True),
            "output_norm.weight": ((c.n_embd,), True),
            "output.weight": ((c.vocab_size, c.n_embd), False),
            "rope_freqs.weight": ((c.rope_dim // 2,), False),
        }
        matrices = {
            "attn_q": (q, c.n_embd),
            "attn_k": (kv, c.n_embd),
            "attn_v": (kv, c.n_embd),
            "attn_output": (c.n_embd, q),
            "ffn_gate": (c.n_ff, c.n_embd),
            "ffn_up": (c.n_ff, c.n_embd),
            "ffn_down": (c.n_embd, c.n_ff),
        }
        for i in range(c.n_layers):
            for name, shape in matrices.items():
                shapes[f"blk.{i}.{name}.weight"] = (shape, True)
                shapes[f"blk.{i}.{name}.bias"] = (shape[:1], False)
            shapes[f"blk.{i}.attn_norm.weight"] = ((c.n_embd,), True)
            shapes[f"blk.{i}.ffn_norm.weight"] = ((c.n_embd,), True)
        return shapes
