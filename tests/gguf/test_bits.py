"""The packings that blocks share, against their definitions; those of single formats are held to the gguf package elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gguf.bits import bit_fields, i2_s_digits, single_bits, trits

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("bits", [1, 2, 4])
@given(seed=SEEDS, blocks=st.integers(0, 3), groups=st.integers(1, 3), group=st.integers(1, 5))
def test_bit_fields(bits: int, seed: int, blocks: int, groups: int, group: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (blocks, groups * group), dtype=np.uint8)
    fields = bit_fields(packed, bits, group)
    want = [
        [
            int(block[g * group + i]) >> (plane * bits) & ((1 << bits) - 1)
            for g in range(groups)
            for plane in range(8 // bits)
            for i in range(group)
        ]
        for block in packed
    ]
    assert fields.dtype == np.uint8
    assert fields.shape == (blocks, groups * group * 8 // bits)
    assert fields.tolist() == want


def test_single_bits_come_lowest_first() -> None:
    assert single_bits(np.array([[0b11, 0x80]], np.uint8)).tolist() == [[1, 1, *[0] * 13, 1]]


@pytest.mark.parametrize("count", [4, 5])
@given(seed=SEEDS)
def test_trits(count: int, seed: int) -> None:
    """Bytes as TQ1_0's quantiser makes them: digits of base 3, the first leading, scaled from 243 to 256 and rounded up."""
    digits = np.random.default_rng(seed).integers(0, 3, (2, count, 6))  # of one group of 6 bytes
    numbers = sum(digits[:, i] * 3 ** (4 - i) for i in range(count))
    packed = (-(-numbers * 256 // 243)).astype(np.uint8)
    assert trits(packed, count, 6).tolist() == digits.reshape(2, -1).tolist()


def test_i2_s_digits() -> None:
    packed = np.zeros((1, 32), np.uint8)
    packed[0, 5] = 0b10_01_00_11
    digits = i2_s_digits(packed)[0]
    assert {i: int(digits[i]) for i in np.flatnonzero(digits)} == {5: 2, 5 + 32: 1, 5 + 96: 1}
