from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf
from shoal.errors import UnsupportedError
from shoal.gguf.quants import DEQUANTISABLE, FORMATS, REMOVED, dequantise, format_named, non_finite_scales
from tests.support.gguf_builder import random_rows, random_scale, set_scales

DECODED = sorted(DEQUANTISABLE)
ORACLE_LACKS = {"Q8_K", "I2_S"}
IN_ORACLE = sorted(DEQUANTISABLE - ORACLE_LACKS)
BLOCK_SCALED = sorted(DEQUANTISABLE - {"F32", "F16", "BF16", "MXFP4", "I2_S"})


def oracle(name: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        values: NDArray[np.float32] = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    return values


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_the_table_agrees_with_the_gguf_package() -> None:
    ours = {f.type_id: (f.name, f.block_size, f.block_bytes) for f in FORMATS.values() if f.name != "I2_S"}
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    # The package gains types over time; those that it has must be the same here.
    assert {i: ours[i] for i in theirs if i in ours} == {i: theirs[i] for i in theirs if i in ours}
    assert set(ours) >= {int(t) for t in gguf.GGMLQuantizationType if int(t) <= 41}


def test_removed_types_are_not_in_the_table() -> None:
    assert not set(REMOVED) & set(FORMATS)


def test_i2_s_is_two_bits_and_one_scale_a_tensor() -> None:
    fmt = FORMATS[36]
    assert (fmt.name, fmt.row_bytes(2560), fmt.tail_bytes) == ("I2_S", 640, 32)


def test_formats_by_name() -> None:
    assert format_named("Q4_1") is FORMATS[3]
    with pytest.raises(UnsupportedError, match="Q4_9"):
        format_named("Q4_9")


@pytest.mark.parametrize("name", IN_ORACLE)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 5), blocks=st.integers(1, 4))
def test_dequantise_gives_the_bits_of_the_gguf_package(name: str, seed: int, rows: int, blocks: int) -> None:
    """Any bytes at all: NaN and infinite scales included."""
    fmt = format_named(name)
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks * fmt.block_bytes), dtype=np.uint8)
    values = dequantise(fmt, data)
    assert values.shape == (rows, blocks * fmt.block_size)
    if rows:
        assert same_bits(values, oracle(name, data))


@pytest.mark.parametrize("name", IN_ORACLE)
def test_dequantise_of_many_blocks(name: str) -> None:
    """More blocks than are decoded at a time, in three dimensions, from a view that is not contiguous."""
    fmt = format_named(name)
    data = np.random.default_rng(1).integers(0, 256, (3, 3001, 2 * fmt.block_bytes), dtype=np.uint8)[:, ::2]
    assert same_bits(dequantise(fmt, data), oracle(name, np.ascontiguousarray(data)))


@given(d=st.floats(width=32, allow_infinity=False, allow_nan=False), seed=st.integers(0, 2**32 - 1))
def test_dequantise_q8_k(d: float, seed: int) -> None:
    """One float32, 256 int8, and their sums by 16, which are not needed."""
    block = np.random.default_rng(seed).integers(0, 256, 292, dtype=np.uint8)
    block[0:4] = np.array([d], "<f4").view(np.uint8)
    with np.errstate(over="ignore"):
        want = np.float32(d) * block[4:260].view(np.int8).astype(np.float32)
    assert same_bits(dequantise(format_named("Q8_K"), block), want)


def test_dequantise_i2_s() -> None:
    """Byte p of 32 holds weights p, p + 32, p + 64 and p + 96 of 128, highest bits first; a 3 is as in bitnet.cpp."""
    digits = np.random.default_rng(0).integers(0, 4, (3, 256))
    raw = np.zeros((3, 64), dtype=np.uint8)
    for row, column in np.ndindex(3, 256):
        block, weight = divmod(column, 128)
        raw[row, 32 * block + weight % 32] |= digits[row, column] << (6 - 2 * (weight // 32))
    want = np.array([-1, 0, 1, 0], np.float32)[digits] * np.float32(0.3)
    assert same_bits(dequantise(format_named("I2_S"), raw, 0.3), want)


@pytest.mark.parametrize("name", DECODED)
def test_dequantise_of_a_vector(name: str) -> None:
    fmt = format_named(name)
    data = random_rows(fmt, (512,), np.random.default_rng(2))
    assert dequantise(fmt, data).shape == (512,)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.name not in DEQUANTISABLE], ids=lambda f: f.name)
def test_formats_without_a_decoder_are_refused_by_name(fmt: gguf.GGMLQuantizationType) -> None:
    with pytest.raises(UnsupportedError, match=f"{fmt.name} .type {fmt.type_id}"):
        dequantise(fmt, np.zeros((1, fmt.block_bytes), dtype=np.uint8))


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="19 bytes"):
        dequantise(format_named("Q4_0"), np.zeros((2, 19), dtype=np.uint8))


@pytest.mark.parametrize("name", BLOCK_SCALED)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_scales_are_found(name: str, bad: float) -> None:
    fmt = format_named(name)
    data = random_rows(fmt, (8, 512), np.random.default_rng(3))
    assert non_finite_scales(fmt, data).size == 0
    both = ((bad, 1.0), (1.0, bad))  # the scale, and the minimum where there is one
    for scales in both[: len(fmt.scale_offsets) or 1]:
        broken = data.copy().reshape(-1, fmt.block_bytes)
        set_scales(fmt, broken[5:6], *scales)
        assert non_finite_scales(fmt, broken).tolist() == [5]
        assert not np.isfinite(dequantise(fmt, broken)[5]).all()


def test_the_exponent_of_mxfp4_that_means_nan_is_found() -> None:
    fmt = format_named("MXFP4")
    data = random_rows(fmt, (8, 64), np.random.default_rng(3)).reshape(16, 17)
    assert non_finite_scales(fmt, data).size == 0
    data[5, 0] = 0xFF
    assert non_finite_scales(fmt, data).tolist() == [5]


@pytest.mark.parametrize("name", ["F32", "BF16", "F16"])
@given(st.binary(min_size=64, max_size=64))
def test_non_finite_values_are_those_that_decode_to_nan_or_infinity(name: str, data: bytes) -> None:
    fmt = format_named(name)
    row = np.frombuffer(data, dtype=np.uint8)
    assert non_finite_scales(fmt, row).tolist() == np.flatnonzero(~np.isfinite(dequantise(fmt, row))).tolist()


@pytest.mark.parametrize("name", DECODED)
def test_random_rows_have_the_standard_deviation_asked_for(name: str) -> None:
    fmt = format_named(name)
    rows = random_rows(fmt, (64, 512), np.random.default_rng(4), std=0.05)
    values = dequantise(fmt, rows, random_scale(fmt, std=0.05))
    assert values.std() == pytest.approx(0.05, rel=0.15)
    assert abs(values.mean()) < 0.01
