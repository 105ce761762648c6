"""Random weights of every format, as the ``gguf`` package reads them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf
from shoal.bench.models.random_weights import STD, random_rows, tail
from shoal.errors import UnsupportedError
from shoal.gguf.quants import format_named

NAMES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *(
        "IQ1_S",
        "IQ1_M",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "TQ1_0",
        "TQ2_0",
        "MXFP4",
    ),
)


def rows(name: str, seed: int = 0) -> NDArray[np.uint8]:
    return random_rows(format_named(name), (64, 1024), np.random.default_rng(seed))


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_the_size_of_trained_ones(name: str) -> None:
    data = rows(name)
    assert data.shape == (64, format_named(name).row_bytes(1024))
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert values.shape == (64, 1024)
    assert values.std() == pytest.approx(STD, rel=0.25)
    assert abs(values.mean()) < STD / 5
    assert abs(values).max() < 8 * STD


def test_bitnets_weights_are_ternary_with_one_scale() -> None:
    codes = rows("I2_S")[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    assert codes.size == 64 * 1024
    assert set(np.unique(codes)) == {0, 1, 2}
    end = tail(format_named("I2_S"))
    assert len(end) == 32
    assert (codes - 1.0).std() * end[:4].view("<f4")[0] == pytest.approx(STD, rel=0.05)
    assert len(tail(format_named("Q4_0"))) == 0


def test_eight_bit_blocks_of_256_have_a_float32_scale() -> None:
    blocks = rows("Q8_K").reshape(-1, 292)
    values = blocks[:, :4].view("<f4") * blocks[:, 4:260].view(np.int8)
    assert values.std() == pytest.approx(STD, rel=0.05)


def test_the_same_generator_gives_the_same_bytes() -> None:
    assert (rows("Q4_K") == rows("Q4_K")).all()
    assert (rows("Q4_K") != rows("Q4_K", seed=1)).any()


@pytest.mark.parametrize("name", ["I8", "F64", "NVFP4"])
def test_what_holds_no_weights_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"random weights of format {name}"):
        rows(name)
