"""One GGUF file's header: metadata and tensor table, read from a buffer that may hold anything.

Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every size in the file is a
claim: it is checked, as a Python integer, against the bytes that are left before anything is read or allocated by it.
"""

from __future__ import annotations

import math
import mmap
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from shoal.errors import GGUFError
from shoal.gguf.quants import FORMATS, REMOVED, QuantFormat

Buffer = bytes | mmap.mmap

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# Far above any real model; they bound the time and the memory that a hostile header can take.
MAX_METADATA = 1 << 14
MAX_TENSORS = 1 << 14
MAX_ARRAY_STRINGS = 3 << 19  # over all arrays of the file
MAX_DECODED_BYTES = 1 << 24  # keys, names, string values and boolean arrays, which are copied out of the file
MAX_ELEMENTS = 1 << 63

_MIN_METADATA_BYTES = 8 + 4 + 1  # key length, value type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimension count, one dimension, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, tuple[str, struct.Struct]] = {
    type_id: (name, struct.Struct(code))
    for type_id, name, code in (
        (0, "uint8", "<B"),
        (1, "int8", "<b"),
        (2, "uint16", "<H"),
        (3, "int16", "<h"),
        (4, "uint32", "<I"),
        (5, "int32", "<i"),
        (6, "float32", "<f"),
        (10, "uint64", "<Q"),
        (11, "int64", "<q"),
        (12, "float64", "<d"),
    )
}
_UINT32 = 4
_VALUE_TYPES = "0 to 12"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file describes it.

    ``shape`` is in NumPy's order (rows first; GGUF writes it the other way round). ``offset`` is where the data lies,
    ``entry`` where the tensor table describes it, both in bytes from the start of file number ``part`` (0 unless
    the model is split).
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    entry: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensor data.

    ``positions`` are the byte offsets of each key's value, ``metadata_end`` that of the tensor table. Only what everybody needs is
    decoded strictly: a string that is not UTF-8 stays bytes, a boolean that is neither 0 nor 1 a number, and bytes of names
    (of keys, of tensors) that are not UTF-8 are surrogates, as in Python's file names.
    """

    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    positions: dict[str, int]
    metadata_end: int


class StringArray(Sequence[str]):
    """An array of strings that stays in the file: where each one lies is known, each is decoded when asked for."""

    def __init__(
        self,
        buffer: Buffer,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        error: Callable[[int, str], GGUFError],
    ):
        self._buffer = buffer
        self._starts = starts
        self._lengths = lengths
        self._error = error

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One string, or a list of them. Raises GGUFError where the bytes are not UTF-8, IndexError past the end."""
        if isinstance(index, slice):
            return [self._decoded(i, raw) for i, raw in zip(range(len(self))[index], self._raw(index), strict=True)]
        position = range(len(self))[index]
        start, length = int(self._starts[position]), int(self._lengths[position])
        return self._decoded(position, self._buffer[start : start + length])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def tolist(self) -> list[str]:
        """All strings. Raises GGUFError at the first that is not UTF-8."""
        try:
            return list(map(bytes.decode, self.bytes_list()))
        except UnicodeDecodeError:
            return self[:]  # says which one it is

    def bytes_list(self) -> list[bytes]:
        """All strings as the bytes that stand in the file."""
        return self._raw(slice(None))

    def _raw(self, index: slice) -> list[bytes]:
        starts = self._starts[index]
        ends = starts + self._lengths[index]
        buffer = self._buffer
        return [buffer[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def _decoded(self, index: int, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as problem:
            raise self._error(int(self._starts[index]), f"string {index} is not UTF-8: {problem.reason}") from None


def shown(name: str) -> str:
    """A name out of a file, fit for a one-line message."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def read_header(path: Path, buffer: Buffer) -> Header:
    """Read and check all that stands before the tensor data, which is not touched.

    Raises GGUFError for anything that is not well-formed.
    """
    cursor = _Cursor(path, buffer)
    version = _read_version(cursor)
    tensor_count = cursor.count("tensor_count", _MIN_TENSOR_BYTES, MAX_TENSORS)
    metadata_count = cursor.count("metadata_kv_count", _MIN_METADATA_BYTES, MAX_METADATA)
    metadata, positions = _read_metadata(cursor, metadata_count)
    metadata_end = cursor.pos
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    return Header(version, alignment, metadata, tensors, positions, metadata_end)


class _Cursor:
    """A place in a buffer that never passes its end."""

    def __init__(self, path: Path, buffer: Buffer) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.pos = 0
        self.decoded_left = MAX_DECODED_BYTES
        self.strings_left = MAX_ARRAY_STRINGS

    def error(self, field: str, reason: str, offset: int | None = None) -> GGUFError:
        return GGUFError(self.path, field, self.pos if offset is None else offset, reason)

    def skip(self, length: int, field: str) -> int:
        """Move past ``length`` bytes and return where they start."""
        left = self.size - self.pos
        if length > left:
            raise self.error(field, f"needs {length} bytes, the file has {left} left")
        start = self.pos
        self.pos += length
        return start

    def unpack(self, layout: struct.Struct, field: str) -> Any:
        return layout.unpack_from(self.buffer, self.skip(layout.size, field))[0]

    def u32(self, field: str) -> int:
        return int(self.unpack(_U32, field))

    def u64(self, field: str) -> int:
        return int(self.unpack(_U64, field))

    def copy(self, length: int, field: str) -> bytes:
        """The next ``length`` bytes, counted against what may be copied out of one file."""
        start = self.skip(length, field)
        self.decoded_left -= length
        if self.decoded_left < 0:
            raise self.error(field, f"keys, names and text of the header take over {MAX_DECODED_BYTES} bytes", start)
        return self.buffer[start : self.pos]

    def name(self, field: str) -> str:
        """A string in which bytes that are not UTF-8 are surrogates: nothing asks for such a name, and no two become one."""
        return self.string(field).decode(errors="surrogateescape")

    def string(self, field: str) -> bytes:
        """A string's bytes."""
        return self.copy(self.u64(field), field)

    def count(self, field: str, item_bytes: int, limit: int) -> int:
        """A number of items that take at least ``item_bytes`` each, and of which there may be ``limit``."""
        start = self.pos
        count = self.u64(field)
        left = self.size - self.pos
        if count * item_bytes > left:
            raise self.error(
                field, f"{count} items need {count * item_bytes} bytes or more, the file has {left} left", start
            )
        if count > limit:
            raise self.error(field, f"{count} is over the limit of {limit}", start)
        return count


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.buffer[cursor.skip(4, "magic") : 4])
    if magic != b"GGUF":
        raise cursor.error("magic", f"{magic!r} is not b'GGUF': not a GGUF file", 0)
    version = cursor.u32("version")
    if version in (2, 3):
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, 2, 3):
        reason = f"big-endian file (version {swapped}), only little-endian is supported"
    elif version == 1:
        reason = "version 1 is no longer supported; convert the model again"
    else:
        reason = f"version {version} is unknown, must be 2 or 3"
    raise cursor.error("version", reason, 4)


# Metadata


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    positions: dict[str, int] = {}
    for i in range(count):
        start = cursor.pos
        key = cursor.name(f"metadata[{i}].key")
        if not key:
            raise cursor.error(f"metadata[{i}].key", "empty", start)
        if key in metadata:
            raise cursor.error(shown(key), "duplicate key", start)
        positions[key] = cursor.pos
        metadata[key] = _read_value(cursor, key)
    return metadata, positions


def _read_value(cursor: _Cursor, key: str) -> Any:
    field = shown(key)
    start = cursor.pos
    type_id = cursor.u32(field)
    if key == "general.alignment":
        return _read_alignment(cursor, type_id, start)
    if type_id in _SCALARS:
        return cursor.unpack(_SCALARS[type_id][1], field)
    if type_id == _STRING:
        return _text_or_bytes(cursor.string(field))
    if type_id == _BOOL:
        return _read_bools(cursor, field, 1)[0].item()
    if type_id == _ARRAY:
        return _read_array(cursor, field)
    raise cursor.error(field, f"value type {type_id} is unknown, must be {_VALUE_TYPES}", start)


def _read_alignment(cursor: _Cursor, type_id: int, start: int) -> int:
    if type_id != _UINT32:
        raise cursor.error("general.alignment", f"value type {type_id}, must be {_UINT32} (uint32)", start)
    alignment = cursor.u32("general.alignment")
    if alignment == 0 or alignment & (alignment - 1):
        raise cursor.error("general.alignment", f"{alignment} is not a power of two", start)
    return alignment


def _text_or_bytes(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _read_bools(cursor: _Cursor, field: str, count: int) -> NDArray[Any]:
    """Booleans are copied, since NumPy misreads any byte but 0 and 1; with others among them they stay bytes."""
    raw = np.frombuffer(cursor.copy(count, field), dtype=np.uint8)
    return raw if (raw > 1).any() else raw.view(np.bool_)


def _read_array(cursor: _Cursor, field: str) -> Any:
    start = cursor.pos
    type_id = cursor.u32(field)
    if type_id == _STRING:
        return _read_strings(cursor, field, cursor.count(field, 8, cursor.strings_left))
    if type_id == _BOOL:
        return _read_bools(cursor, field, cursor.count(field, 1, MAX_DECODED_BYTES))
    if type_id in _SCALARS:
        return _read_numbers(cursor, field, _SCALARS[type_id][1])
    if type_id == _ARRAY:
        raise cursor.error(field, "array of arrays is not supported", start)
    raise cursor.error(field, f"array element type {type_id} is unknown, must be {_VALUE_TYPES}", start)


def _read_numbers(cursor: _Cursor, field: str, layout: struct.Struct) -> NDArray[Any]:
    """A read-only view of the file."""
    count = cursor.count(field, layout.size, cursor.size)
    start = cursor.skip(count * layout.size, field)
    return np.frombuffer(cursor.buffer, dtype=layout.format, count=count, offset=start)


def _read_strings(cursor: _Cursor, field: str, count: int) -> StringArray:
    """Find where each string starts. Gemma has 262,144 of them, so the loop is kept to a few operations."""
    cursor.strings_left -= count
    starts = array("q")
    lengths = array("q")
    view, unpack, size, pos = memoryview(cursor.buffer), _U64.unpack_from, cursor.size, cursor.pos
    for _ in range(count):
        if pos + 8 > size:
            break
        (length,) = unpack(view, pos)
        pos += 8
        if length > size - pos:
            break
        starts.append(pos)
        lengths.append(length)
        pos += length
    cursor.pos = pos
    if len(starts) < count:
        raise cursor.error(field, f"string {len(starts)} of {count} runs past the end of the file")

    def error(offset: int, reason: str) -> GGUFError:
        return cursor.error(field, reason, offset)

    return StringArray(cursor.buffer, np.frombuffer(starts, np.int64), np.frombuffer(lengths, np.int64), error)


# Tensors


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for i in range(count):
        info = _read_tensor(cursor, i, alignment)
        if info.name in tensors:
            raise cursor.error(_tensor_field(info.name), "duplicate name", info.entry)
        tensors[info.name] = info
    return _placed(cursor, tensors, alignment)


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> TensorInfo:
    """One entry of the table; its ``offset`` still counts from the start of the data."""
    entry = cursor.pos
    name = cursor.name(f"tensor[{index}].name")
    field = _tensor_field(name)
    shape = _read_shape(cursor, field)
    fmt = _read_format(cursor, field, shape)
    start = cursor.pos
    offset = cursor.u64(f"{field} offset")
    if offset % alignment:
        raise cursor.error(f"{field} offset", f"{offset} is not a multiple of the alignment {alignment}", start)
    nbytes = math.prod(shape[:-1]) * fmt.row_bytes(shape[-1]) + fmt.tail_bytes
    return TensorInfo(name, fmt, shape, offset, nbytes, entry)


def _tensor_field(name: str) -> str:
    return f"tensor {shown(name)!r}"


def _read_shape(cursor: _Cursor, field: str) -> tuple[int, ...]:
    start = cursor.pos
    n_dims = cursor.u32(f"{field} n_dims")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"{field} n_dims", f"{n_dims} is not from 1 to {MAX_DIMS}", start)
    dims: list[int] = []
    for i in range(n_dims):
        start = cursor.pos
        dims.append(cursor.u64(f"{field} dims[{i}]"))
        if not 1 <= dims[i] < MAX_ELEMENTS:
            raise cursor.error(f"{field} dims[{i}]", f"{dims[i]} is not from 1 to 2^63 - 1", start)
    if math.prod(dims) >= MAX_ELEMENTS:
        raise cursor.error(f"{field} dims", f"{math.prod(dims)} elements, must be below 2^63", start)
    return tuple(reversed(dims))


def _read_format(cursor: _Cursor, field: str, shape: tuple[int, ...]) -> QuantFormat:
    start = cursor.pos
    type_id = cursor.u32(f"{field} type")
    fmt = FORMATS.get(type_id)
    if fmt is None:
        fault = (
            f"({REMOVED[type_id]}) was removed from GGUF; convert the model again"
            if type_id in REMOVED
            else "is unknown"
        )
        raise cursor.error(f"{field} type", f"type {type_id} {fault}", start)
    if shape[-1] % fmt.block_size:
        reason = f"rows of {shape[-1]} numbers are not a multiple of {fmt.name}'s block of {fmt.block_size}"
        raise cursor.error(f"{field} type", reason, start)
    return fmt


def _placed(cursor: _Cursor, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The same tensors with offsets from the start of the file, once none passes its end or overlaps another."""
    data_start = -(-cursor.pos // alignment) * alignment
    placed = {name: replace(info, offset=data_start + info.offset) for name, info in tensors.items()}
    end, before = data_start, ""
    for info in sorted(placed.values(), key=lambda t: t.offset):
        field = f"{_tensor_field(info.name)} offset"
        if info.offset < end:
            raise cursor.error(field, f"data at byte {info.offset} overlaps {_tensor_field(before)}", info.entry)
        end, before = info.offset + info.nbytes, info.name
        if end > cursor.size:
            raise cursor.error(field, f"data ends at byte {end}, the file at byte {cursor.size}", info.entry)
    return placed
