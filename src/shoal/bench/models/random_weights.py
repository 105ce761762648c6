"""Random weights of any format: random bytes around scales that are sane, so that nothing overflows and no number is odd enough
to be slow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.gguf.quants import QuantFormat

Bytes = NDArray[np.uint8]

STD = 0.02
"""About the standard deviation of the weights, as in a trained model; of every format."""

# Of random blocks whose scale is 1: the standard deviation of their numbers, and the minimum that centres them on zero.
_UNITS: dict[str, tuple[float, ...]] = {
    "Q4_0": (4.6,),
    "Q4_1": (4.6, -7.5),
    "Q5_0": (9.2,),
    "Q5_1": (9.2, -15.5),
    "Q8_0": (74,),
    "Q2_K": (14, 1.5),
    "Q3_K": (43,),
    "Q4_K": (259, 7.5),
    "Q5_K": (526, 15.5),
    "Q6_K": (1364,),
    "Q8_K": (74,),
    "IQ1_S": (7.2,),
    "IQ1_M": (7.2,),
    "IQ2_XXS": (53,),
    "IQ2_XS": (56,),
    "IQ2_S": (56,),
    "IQ3_XXS": (143,),
    "IQ3_S": (140,),
    "IQ4_NL": (67,),
    "IQ4_XS": (1244,),
    "TQ1_0": (0.82,),
    "TQ2_0": (0.82,),
    "I2_S": (0.82,),
    "MXFP4": (2.9,),
}
_TERNARY_BYTES = {
    "TQ2_0": 64,
    "I2_S": 32,
}  # at the start of a block: four numbers of two bits in each, of which 3 is none


def random_rows(format: QuantFormat, shape: tuple[int, int], rng: np.random.Generator) -> Bytes:
    """Weights of ``shape`` (rows, columns) as they lie in a file: uint8 [rows, row_bytes], columns in whole blocks.

    What follows the last row of a format with a tail is in ``tail``. Raises UnsupportedError for formats that hold no weights.
    """
    if format.block_size == 1:
        return _floats(format, shape, rng)
    if format.name not in _UNITS:
        raise UnsupportedError(f"random weights of format {format.name}: one of F32, F16, BF16, {', '.join(_UNITS)}")
    rows, columns = shape
    blocks = rng.integers(0, 256, (rows, columns // format.block_size, format.block_bytes), np.uint8)
    if ternary := _TERNARY_BYTES.get(format.name):
        codes = rng.integers(0, 3, (rows, columns // format.block_size, ternary, 4), np.uint8)
        blocks[..., :ternary] = np.bitwise_or.reduce(codes << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    for offset, value in _scales(format):
        blocks[..., offset : offset + len(value)] = value
    return blocks.reshape(rows, -1)


def tail(format: QuantFormat) -> Bytes:
    """What follows the last row of a tensor: [``tail_bytes``]; of I2_S its one scale."""
    out = np.zeros(format.tail_bytes, np.uint8)
    if format.tail_bytes:
        out[:4] = np.array([STD / _UNITS[format.name][0]], "<f4").view(np.uint8)
    return out


def _floats(format: QuantFormat, shape: tuple[int, int], rng: np.random.Generator) -> Bytes:
    values = rng.standard_normal(shape, np.float32) * np.float32(STD)
    match format.name:
        case "F32":
            return values.view(np.uint8)
        case "F16":
            return values.astype("<f2").view(np.uint8)
        case "BF16":
            return np.ascontiguousarray(values.view("<u2")[:, 1::2]).view(np.uint8)  # the upper half of a float32
        case name:
            raise UnsupportedError(f"random weights of format {name}: it holds no weights")


def _scales(format: QuantFormat) -> Iterator[tuple[int, Bytes]]:
    """Where in a block its scales lie, and their bytes."""
    unit, *minimum = _UNITS[format.name]
    scale = STD / unit
    match format.name:
        case "MXFP4":  # an exponent
            yield 0, np.array([127 + round(np.log2(scale))], np.uint8)
        case "IQ1_M":
            # Four bits of a float16 on top of each of four words; below them the scales of 16 numbers, here 2 * 4 + 1.
            bits = int(np.float16(scale).view(np.uint16))
            words = [(bits >> shift & 15) << 12 | 0o4444 for shift in (0, 4, 8, 12)]
            yield 48, np.array(words, "<u2").view(np.uint8)
        case "I2_S":  # in the tail
            return
        case "Q8_K":
            yield 0, np.array([scale], "<f4").view(np.uint8)
        case _:
            for offset, factor in zip(format.scale_offsets, (1.0, *minimum), strict=True):
                yield offset, np.array([scale * factor], "<f2").view(np.uint8)
