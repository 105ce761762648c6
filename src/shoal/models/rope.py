"""Rotary frequencies of a model: its base, what stretches them, factors from the file."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import Rope
from shoal.models.config import ModelConfig

Factors = NDArray[np.float32]


def rope_of(config: ModelConfig, factors: Factors | None = None) -> Rope:
    """Frequencies [rope_dim / 2] as the file's rope scaling says; ``factors`` (rope_freqs, or phi3's long or short ones) divide
    them one by one."""
    theta = _frequencies(config.rope_base, config.rope_dim)
    if factors is not None:
        theta = theta / factors.astype(np.float64)
    scaling, scale = config.rope_scaling, config.rope_scaling.attn_factor
    if scaling.kind == "linear":
        theta = theta / scaling.factor
    elif scaling.kind == "yarn":
        ramp = _yarn_ramp(config)
        theta = theta / scaling.factor * (1 - ramp) + theta * ramp
        if not scaling.log_multiplier:  # DeepSeek-V2 scales its scores instead
            scale *= 1.0 + 0.1 * math.log(scaling.factor)
    return Rope(inv_freq=theta.astype(np.float32), neox=config.arch.rope == "neox", scale=scale)


def window_rope_of(config: ModelConfig) -> Rope:
    """The rope of windowed layers where they have a base of their own: never scaled."""
    theta = _frequencies(config.window_rope_base, config.rope_dim)
    return Rope(inv_freq=theta.astype(np.float32), neox=config.arch.rope == "neox")


def alibi_slopes(heads: int, max_bias: float) -> tuple[float, ...]:
    """The slope of each head (Press et al. 2022); heads past the last power of two take every second of a finer series."""
    whole = 1 << (heads.bit_length() - 1)
    coarse, fine = 2.0 ** (-max_bias / whole), 2.0 ** (-max_bias / 2 / whole)
    return tuple(coarse ** (h + 1) if h < whole else fine ** (2 * (h - whole) + 1) for h in range(heads))


def _frequencies(base: float, rope_dim: int) -> NDArray[np.float64]:
    pairs = rope_dim // 2
    theta: NDArray[np.float64] = base ** (-np.arange(pairs, dtype=np.float64) / pairs)
    return theta


def _yarn_ramp(config: ModelConfig) -> NDArray[np.float64]:
    """YaRN's share of unscaled rotation for each pair (Peng et al. 2023, section 3.2; beta_fast 32, beta_slow 1)."""
    rot, base, context = config.rope_dim, config.rope_base, config.rope_scaling.original_context

    def correction(rotations: float) -> float:
        return rot * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0.0, math.floor(correction(32.0)))
    high = min(rot - 1.0, math.ceil(correction(1.0)))
    pairs = np.arange(rot // 2, dtype=np.float64)
    return 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
