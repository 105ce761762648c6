"""Codes of GGUF blocks: what the table in `codes.py` says of a weight, worked out in NumPy, has the bits of dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf
from shoal.gguf.quants import dequantise, format_named
from shoal.kernels.codes import (
    CODES,
    IQ2_LEVELS,
    IQ3_XXS_LEVELS,
    IQ4_VALUES,
    MXFP4_VALUES,
    Codes,
)
from tests.support.gguf_builder import random_rows, set_scales

F32 = NDArray[np.float32]
Bytes = NDArray[Any]

NAMES_OF_BITS = {
    2: ("Q2_K", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "I2_S"),
    3: ("Q3_K", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    4: ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_XXS", "IQ3_S"),
    5: ("Q5_0", "Q5_1", "Q5_K"),
    6: ("Q6_K",),
    8: ("Q8_0", "Q8_K"),
}
BITS = {name: bits for bits, names in NAMES_OF_BITS.items() for name in names}
NAMES = sorted(BITS)
I2_S_SCALE = 0.37
HALVES = st.floats(width=16, allow_nan=False, allow_infinity=False)  # denormal and negative ones too


def floats(bits: NDArray[Any]) -> F32:
    """float16 bits, or floats as they are."""
    return (bits.view(np.float16) if bits.dtype == np.uint16 else bits).astype(np.float32)


def head(codes: Codes, i: int) -> F32:
    """Float i of the head, for each group of 32: [rows, groups, 1]."""
    return np.repeat(floats(codes.head[:, :, i]), 8, axis=1)[:, :, None]


def whole(scales: NDArray[Any]) -> F32:
    """One scale for each 32: [rows, groups, 1] -> the same in float32."""
    return scales.astype(np.float32)


def split(scales: NDArray[Any]) -> F32:
    """One scale for each 16: [rows, groups, 2] -> for each column, [rows, groups, 32]."""
    return np.repeat(scales, 16, axis=2).astype(np.float32)


def looked_up(values: tuple[int, ...], q: NDArray[Any]) -> F32:
    return np.take(np.array(values, np.float32), q)


def signed(levels: F32, negative: NDArray[Any]) -> F32:
    return np.where(negative, -levels, levels)


# The weights of each format: values q [rows, groups, 32] as float32 and the codes they come from -> [rows, groups, 32].
# d and n are the head's floats.


def centred(offset: int) -> Callable[[Bytes, Codes], F32]:
    return lambda q, c: floats(c.scales) * (q.astype(np.float32) - offset)


def affine(q: Bytes, c: Codes) -> F32:
    d, m = floats(c.scales[:, :, 0:1]), floats(c.scales[:, :, 1:2])
    return d * q.astype(np.float32) + m


def q8_k(q: Bytes, c: Codes) -> F32:
    return head(c, 0) * (q.astype(np.float32) - 128)


def q2_k(q: Bytes, c: Codes) -> F32:
    d, n = head(c, 0), head(c, 1)
    return (d * split(c.scales & 15)) * q.astype(np.float32) - n * split(c.scales >> 4)


def k(q: Bytes, c: Codes) -> F32:
    d, n = head(c, 0), head(c, 1)
    return (d * whole(c.scales[:, :, 0:1])) * q.astype(np.float32) - n * whole(c.scales[:, :, 1:2])


def k_centred(offset: int) -> Callable[[Bytes, Codes], F32]:
    return lambda q, c: (head(c, 0) * split(c.scales.view(np.int8))) * (q.astype(np.float32) - offset)


def iq4_nl(q: Bytes, c: Codes) -> F32:
    return floats(c.scales) * looked_up(IQ4_VALUES, q)


def iq4_xs(q: Bytes, c: Codes) -> F32:
    return (head(c, 0) * whole(c.scales.view(np.int8))) * looked_up(IQ4_VALUES, q)


def mxfp4(q: Bytes, c: Codes) -> F32:
    return np.ldexp(np.float32(1), c.scales.astype(np.int32) - 128) * looked_up(MXFP4_VALUES, q)


def iq3_xxs(q: Bytes, c: Codes) -> F32:
    return (head(c, 0) * whole(c.scales) / np.float32(4)) * signed(looked_up(IQ3_XXS_LEVELS, q & 7), q & 8)


def iq3_s(q: Bytes, c: Codes) -> F32:
    return (head(c, 0) * whole(c.scales)) * (2 * q.astype(np.float32) - 15)


def iq2(q: Bytes, c: Codes) -> F32:
    halves = np.concatenate((c.scales & 15, c.scales >> 4), axis=2)
    return (head(c, 0) * split(2 * halves + 1) / np.float32(8)) * signed(looked_up(IQ2_LEVELS, q & 3), q & 4)


def iq1(q: Bytes, c: Codes) -> F32:
    octets = np.repeat(np.stack((c.scales & 1, c.scales >> 1 & 1), axis=3), 8, axis=3).reshape(q.shape)
    delta = np.where(octets, np.float32(0.125), np.float32(-0.125))
    return (head(c, 0) * split(2 * (c.scales >> 2) + 1)) * (q.astype(np.float32) - 1 + delta)


def ternary(q: Bytes, c: Codes) -> F32:
    return head(c, 0) * (q.astype(np.float32) - 1)


def i2_s(q: Bytes, c: Codes) -> F32:
    return np.float32(I2_S_SCALE) * (q.astype(np.float32) - 1)


WEIGHTS: dict[str, Callable[[Bytes, Codes], F32]] = {
    "Q4_0": centred(8),
    "Q4_1": affine,
    "Q5_0": centred(16),
    "Q5_1": affine,
    "Q8_0": centred(128),
    "Q8_K": q8_k,
    "Q2_K": q2_k,
    "Q3_K": k_centred(4),
    "Q4_K": k,
    "Q5_K": k,
    "Q6_K": k_centred(32),
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "MXFP4": mxfp4,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ2_XXS": iq2,
    "IQ2_XS": iq2,
    "IQ2_S": iq2,
    "IQ1_S": iq1,
    "IQ1_M": iq1,
    "TQ1_0": ternary,
    "TQ2_0": ternary,
    "I2_S": i2_s,
}


def weights(name: str, codes: Codes) -> F32:
    rows, columns = codes.values.shape
    values = WEIGHTS[name](codes.values.reshape(rows, columns // 32, 32), codes)
    assert values.dtype == np.float32
    return values.reshape(rows, columns)


def expected(name: str, raw: Bytes) -> F32:
    """By the gguf package, but for the two formats of which it has no decoder."""
    if name in ("Q8_K", "I2_S"):
        return dequantise(format_named(name), raw, I2_S_SCALE)
    values: F32 = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    return values


def assert_same_bits(a: F32, b: F32) -> None:
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


def random_blocks(name: str, rows: int, blocks: int, seed: int) -> Bytes:
    fmt = format_named(name)
    return random_rows(fmt, (rows, blocks * fmt.block_size), np.random.default_rng(seed))


def test_every_format_of_blocks_that_can_be_dequantised_has_codes() -> None:
    assert set(CODES) == set(BITS) == set(WEIGHTS)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name: str) -> None:
    raw = random_blocks(name, 3, 2, 0)
    codes = CODES[name](raw)
    columns = 2 * format_named(name).block_size
    assert codes.values.shape == (3, columns)
    assert codes.values.dtype == np.uint8
    assert codes.values.max() < 1 << BITS[name]
    assert codes.head.shape[:2] == (3, columns // 256)
    assert codes.head.dtype == (np.float32 if name == "Q8_K" else np.uint16)
    assert codes.scales.shape[:2] == (3, columns // 32)
    assert codes.scales.dtype in (np.uint8, np.uint16)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_weights_have_the_bits_of_dequantisation(name: str, seed: int, rows: int, blocks: int) -> None:
    raw = random_blocks(name, rows, blocks, seed)
    assert_same_bits(weights(name, CODES[name](raw)), expected(name, raw))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("MXFP4", "I2_S")])
@given(seed=st.integers(0, 2**32 - 1), d=HALVES, second=HALVES)
def test_so_have_they_at_any_scale(name: str, seed: int, d: float, second: float) -> None:
    fmt = format_named(name)
    raw = random_blocks(name, 2, 2, seed)
    set_scales(fmt, raw.reshape(-1, fmt.block_bytes), d, second)
    assert_same_bits(weights(name, CODES[name](raw)), expected(name, raw))


def test_every_exponent_of_mxfp4() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (253, 17), dtype=np.uint8)
    raw[:, 0] = np.arange(253)  # from 253 on products overflow
    assert_same_bits(weights("MXFP4", CODES["MXFP4"](raw)), expected("MXFP4", raw))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("IQ") and n[2] < "4"])
def test_every_entry_of_a_grid(name: str) -> None:
    """Enough random blocks that each of up to 2048 indices is met."""
    raw = random_blocks(name, 16, 32 * 4, 1)
    assert_same_bits(weights(name, CODES[name](raw)), expected(name, raw))


def test_columns_of_i2_s_are_in_their_natural_order() -> None:
    digits = np.random.default_rng(0).integers(0, 3, (5, 384), dtype=np.uint8)
    q = digits.reshape(5, 3, 4, 32)
    raw = q[:, :, 0] << 6 | q[:, :, 1] << 4 | q[:, :, 2] << 2 | q[:, :, 3]
    assert np.array_equal(CODES["I2_S"](raw.reshape(5, 96)).values, digits)
