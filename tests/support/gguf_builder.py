"""Builds GGUF files in memory: well-formed ones, and ones that lie.

    builder = GGUFBuilder()
    builder.add("general.architecture", "llama")
    builder.add_random_tensor("blk.0.ffn_up.weight", (64, 256), "Q4_K", rng)
    path = builder.write(tmp_path / "model.gguf")

Every field that a reader has to distrust can be set to anything: counts, version and magic are attributes,
``add_raw`` and ``add_raw_tensor`` take values as they should stand in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import QuantFormat, dequantise, format_named

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)

_CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}

# Where a second scale is a minimum, the value that centres the numbers on zero, in units of the first scale.
_MIN_PER_SCALE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


@dataclass
class RawTensor:
    """A row of the tensor table, and the data that goes with it. ``dims`` are in the file's order (columns first)."""

    name: bytes
    dims: Sequence[int]
    type_id: int
    offset: int
    data: bytes
    n_dims: int | None = None


class GGUFBuilder:
    """A GGUF file to be. ``tensor_count`` and ``metadata_count`` None means the true ones."""

    def __init__(self, *, version: int = 3, alignment: int = 32) -> None:
        self.magic = b"GGUF"
        self.version = version
        self.alignment = alignment
        self.tensor_count: int | None = None
        self.metadata_count: int | None = None
        self.tensors: list[RawTensor] = []
        self._metadata: list[bytes] = []
        if alignment != 32:
            self.add("general.alignment", alignment, UINT32)

    def add(self, key: str, value: Any, type_id: int | None = None) -> None:
        """Add a key. The type follows from the value: bool, uint32 (else int64), float32, string, array of those.

        ``type_id`` sets another; for an array, that of its elements.
        """
        if isinstance(value, (list, tuple, np.ndarray)):
            self.add_raw(key, ARRAY, array_payload(value, type_id))
        else:
            kind = value_type(value) if type_id is None else type_id
            self.add_raw(key, kind, payload(value, kind))

    def add_raw(self, key: str | bytes, type_id: int, data: bytes) -> None:
        """Add a key whose type and bytes are whatever they are."""
        name = key.encode() if isinstance(key, str) else key
        self._metadata.append(string(name) + struct.pack("<I", type_id) + data)

    def add_tensor(self, name: str, data: NDArray[Any], fmt: str = "F32", scale: float = 1.0) -> None:
        """Add a tensor: uint8 [..., row_bytes] rows of format ``fmt``, or float [...] to be stored as F32 or F16.

        ``scale`` is written behind the rows of formats that have one there (I2_S).
        """
        f = format_named(fmt)
        if data.dtype != np.uint8:
            data = data.astype({"F32": "<f4", "F16": "<f2"}[fmt])
            shape = data.shape
        else:
            shape = (*data.shape[:-1], data.shape[-1] // f.block_bytes * f.block_size)
        tail = struct.pack("<f", scale).ljust(f.tail_bytes, b"\0") if f.tail_bytes else b""
        self.add_raw_tensor(name, shape[::-1], f.type_id, data.tobytes() + tail)

    def add_random_tensor(
        self, name: str, shape: tuple[int, ...], fmt: str, rng: np.random.Generator, std: float = 0.02
    ) -> None:
        """Add a tensor of random numbers of about this standard deviation; ``shape`` is rows, columns."""
        f = format_named(fmt)
        self.add_tensor(name, random_rows(f, shape, rng, std), fmt, random_scale(f, std))

    def add_raw_tensor(
        self,
        name: str | bytes,
        dims: Sequence[int],
        type_id: int,
        data: bytes,
        *,
        offset: int | None = None,
        n_dims: int | None = None,
    ) -> None:
        """Add a row of the tensor table as it is; without ``offset`` the data follows the tensors before it."""
        place = self._data_end() if offset is None else offset
        raw = name.encode() if isinstance(name, str) else name
        self.tensors.append(RawTensor(raw, dims, type_id, place, data, n_dims))

    def header(self) -> bytes:
        """All that stands before the data, without padding."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        metadata = len(self._metadata) if self.metadata_count is None else self.metadata_count
        start = self.magic + struct.pack("<IQQ", self.version, tensors, metadata)
        return start + b"".join(self._metadata) + b"".join(map(_table_row, self.tensors))

    def to_bytes(self) -> bytes:
        """The whole file."""
        header = self.header()
        out = bytearray(header)
        start = _aligned(len(header), self.alignment)
        for tensor in self.tensors:
            if not tensor.data:
                continue
            out.extend(bytes(max(0, start + tensor.offset + len(tensor.data) - len(out))))
            out[start + tensor.offset : start + tensor.offset + len(tensor.data)] = tensor.data
        return bytes(out)

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.write_bytes(self.to_bytes())
        return path

    def _data_end(self) -> int:
        return _aligned(max((t.offset + len(t.data) for t in self.tensors), default=0), self.alignment)


def value_type(value: Any) -> int:
    """The type under which a Python value is stored unless told otherwise."""
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return UINT32 if 0 <= value < 1 << 32 else INT64
    return FLOAT32 if isinstance(value, float) else STRING


def payload(value: Any, type_id: int) -> bytes:
    """The bytes of one value after its type."""
    if type_id == STRING:
        return string(value.encode() if isinstance(value, str) else value)
    return struct.pack("<" + _CODES[type_id], value)


def array_payload(values: Sequence[Any] | NDArray[Any], type_id: int | None = None) -> bytes:
    """The bytes of an array after its type; an empty one of unnamed type holds uint32."""
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)
    kind = type_id if type_id is not None else value_type(items[0]) if items else UINT32
    return struct.pack("<IQ", kind, len(items)) + b"".join(payload(item, kind) for item in items)


def string(data: bytes) -> bytes:
    """A string as it stands in a file: length, bytes."""
    return struct.pack("<Q", len(data)) + data


def random_rows(
    fmt: QuantFormat, shape: tuple[int, ...], rng: np.random.Generator, std: float = 0.02
) -> NDArray[np.uint8]:
    """Random rows of a format that shoal can decode: uint8 [..., row_bytes], numbers of standard deviation ``std``.

    Of I2_S they have it once they are multiplied by ``random_scale``.
    """
    if fmt.block_size == 1:
        return _random_floats(fmt, shape, rng, std)
    blocks = _random_blocks(fmt, (*shape[:-1], shape[-1] // fmt.block_size), rng)
    rows = blocks.reshape(-1, fmt.block_bytes)
    _set_random_scales(fmt, rows, np.ones(len(rows)), rng)
    unit = float(dequantise(fmt, blocks).std())
    _set_random_scales(fmt, rows, rng.uniform(0.5, 1.5, len(rows)) * (std / unit), rng)
    return blocks.reshape(*shape[:-1], -1)


def random_scale(fmt: QuantFormat, std: float = 0.02) -> float:
    """The scale of a whole tensor with which ``random_rows`` have the standard deviation ``std``; 1 where there is none."""
    return float(np.float32(std / np.sqrt(2 / 3))) if fmt.tail_bytes else 1.0


def set_scales(
    fmt: QuantFormat,
    blocks: NDArray[np.uint8],
    first: NDArray[np.float64] | float,
    second: NDArray[np.float64] | float,
) -> None:
    """Write the floating-point scales of [blocks, block_bytes] where their format keeps them."""
    if fmt.name == "IQ1_M":
        _set_split_scale(blocks, np.broadcast_to(first, len(blocks)))
    kind = "<f4" if fmt.name == "Q8_K" else "<f2"
    for offset, values in zip(fmt.scale_offsets, (first, second), strict=False):
        field = np.broadcast_to(values, len(blocks)).astype(kind)[:, None].view(np.uint8)
        blocks[:, offset : offset + field.shape[1]] = field


def _random_blocks(fmt: QuantFormat, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Any bytes, but for the formats that have four codes and use three."""
    if fmt.name not in ("TQ2_0", "I2_S"):
        return rng.integers(0, 256, (*shape, fmt.block_bytes), dtype=np.uint8)
    digits = rng.integers(0, 3, (*shape, fmt.block_bytes, 4), dtype=np.uint8)
    packed: NDArray[np.uint8] = (digits << np.arange(0, 8, 2, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return packed


def _random_floats(fmt: QuantFormat, shape: tuple[int, ...], rng: np.random.Generator, std: float) -> NDArray[np.uint8]:
    values = rng.normal(0, std, shape).astype("<f4")
    if fmt.name == "BF16":
        return np.ascontiguousarray(values.view("<u2")[..., 1::2]).view(np.uint8)  # the upper half of a float32
    return values.astype({"F32": "<f4", "F16": "<f2"}[fmt.name]).view(np.uint8)


def _set_random_scales(
    fmt: QuantFormat, blocks: NDArray[np.uint8], scales: NDArray[np.float64], rng: np.random.Generator
) -> None:
    if fmt.name == "MXFP4":
        blocks[:, 0] = _random_exponents(scales, rng)
    else:
        set_scales(fmt, blocks, scales, scales * _MIN_PER_SCALE.get(fmt.name, 0.0))


def _random_exponents(scales: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The power of two below or above each scale, so that the mean of the squares is right. Exponent 128 is 1."""
    below = np.floor(np.log2(scales))
    above = rng.random(len(scales)) < ((scales / 2**below) ** 2 - 1) / 3
    exponents: NDArray[np.uint8] = (128 + below).astype(np.uint8) + above
    return exponents


def _set_split_scale(blocks: NDArray[np.uint8], scales: NDArray[np.float64]) -> None:
    """IQ1_M keeps four bits of its scale in the top nibbles of bytes 49, 51, 53 and 55, the lowest first."""
    bits = scales.astype("<f2").view("<u2")
    for i in range(4):
        nibble = (bits >> (4 * i) & 15).astype(np.uint8)
        blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 0x0F | nibble << 4


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _table_row(tensor: RawTensor) -> bytes:
    n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
    dims = b"".join(struct.pack("<Q", size % (1 << 64)) for size in tensor.dims)
    return string(tensor.name) + struct.pack("<I", n_dims) + dims + struct.pack("<IQ", tensor.type_id, tensor.offset)
