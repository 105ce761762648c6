"""GGUFFile: a model file, memory-mapped. Weights are views of the file; nothing is read before it is asked for."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.errors import GGUFError, ModelNotFoundError
from shoal.gguf.header import Buffer, Header, StringArray, TensorInfo, read_header, shown
from shoal.gguf.quants import non_finite_scales
from shoal.gguf.split import check_parts, part_paths

__all__ = ["GGUFFile", "StringArray", "TensorInfo"]

T = TypeVar("T")

_REQUIRED: Final[Any] = object()
_CHECK_BYTES = 1 << 24  # how much of a tensor is looked at at a time


class GGUFFile:
    """One model: a GGUF file, or all parts of a split one (``paths``; ``path`` is the first).

    ``metadata``: key -> int, float, bool, str, read-only array (numbers, booleans) or StringArray. What a key holds is judged by
    those who read it, with ``get``: a string that is not UTF-8 is there as bytes, a boolean that is neither 0 nor 1 as an int.
    ``tensors``: name -> TensorInfo. Arrays and views outlive ``close``: the mapping goes with the last of them.
    """

    def __init__(self, paths: list[Path], headers: list[Header], buffers: list[Buffer]) -> None:
        self.path = paths[0]
        self.version = headers[0].version
        self.alignment = headers[0].alignment
        self.metadata: Mapping[str, Any] = MappingProxyType(headers[0].metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merged(paths, headers))
        self.file_size = sum(len(buffer) for buffer in buffers)
        self.paths = paths
        self._header = headers[0]
        self._buffers = buffers

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file and check its header; of a split model, name the first part.

        Raises ModelNotFoundError where there is no file to read, GGUFError where it is not a well-formed GGUF file.
        """
        first = Path(path)
        buffer = _map(first)
        header = read_header(first, buffer)
        paths = part_paths(first, header)
        buffers = [buffer, *map(_map, paths[1:])]
        headers = [header, *map(read_header, paths[1:], buffers[1:])]
        if len(paths) > 1:
            check_parts(paths, headers)
        return cls(paths, headers, buffers)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; ``tensor`` raises ValueError from here on. Closing twice does nothing."""
        self._buffers = []

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of ``key``, which must be an int, float, bool, str, np.ndarray or StringArray as ``kind`` says.

        A missing key gives ``default`` where there is one. Raises GGUFError for a missing key or another kind of value.
        """
        if key not in self.metadata:
            if default is _REQUIRED:
                raise self.error(key, "missing")
            return default  # type: ignore[no-any-return]
        value = self.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, _mismatch(value, kind))
        return value

    def label(self, key: str) -> str:
        """A text that is only shown or looked into, such as a name: what is not UTF-8 in it is replaced; "" where there is none."""
        value = self.metadata.get(key, "")
        return value.decode(errors="replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""

    def error(self, field: str, reason: str) -> GGUFError:
        """A GGUFError about a key or a tensor, at the place where the file says it (or would have)."""
        info = self.tensors.get(field)
        if field in self._header.positions or info is None:
            offset = self._header.positions.get(field, self._header.metadata_end)
            return GGUFError(self.path, shown(field), offset, reason)
        return GGUFError(self.paths[info.part], f"tensor {shown(field)!r}", info.entry, reason)

    def tensor(self, name: str) -> NDArray[np.uint8]:
        """A read-only view of a tensor's rows in the file: uint8 [rows, row_bytes], or [row_bytes] for a vector.

        Raises KeyError for an unknown name, ValueError once the file is closed.
        """
        info = self.tensors[name]
        row_bytes = info.format.row_bytes(info.shape[-1])
        nbytes = _tail_offset(info) - info.offset
        flat = np.frombuffer(self._buffer(info), dtype=np.uint8, count=nbytes, offset=info.offset)
        return flat.reshape(*info.shape[:-1], row_bytes)

    def scale(self, name: str) -> float:
        """What all numbers of a tensor are multiplied by, in formats that keep it behind the rows (I2_S); else 1.

        Raises as ``tensor`` does.
        """
        info = self.tensors[name]
        if not info.format.tail_bytes:
            return 1.0
        return float(np.frombuffer(self._buffer(info), dtype="<f4", count=1, offset=_tail_offset(info))[0])

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory, once it has been copied; reading it again reads the file again.

        Raises as ``tensor`` does. Does nothing where the system has no madvise.
        """
        info = self.tensors[name]
        buffer = self._buffer(info)
        if isinstance(buffer, mmap.mmap) and hasattr(buffer, "madvise"):
            start = info.offset - info.offset % mmap.PAGESIZE
            buffer.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def check_tensors(self) -> list[GGUFError]:
        """Read every tensor and report those whose scales (or float values) hold NaN or Inf: where first, and how many.

        Formats of which shoal does not know where the scales are (Q8_1, NVFP4), and integers, always pass.
        """
        found = [self._check_tensor(info) for info in self.tensors.values()]
        return [error for error in found if error is not None]

    def _check_tensor(self, info: TensorInfo) -> GGUFError | None:
        fmt = info.format
        data = self.tensor(info.name).reshape(-1, fmt.block_bytes)
        step = _CHECK_BYTES // fmt.block_bytes
        bad = [start + non_finite_scales(fmt, data[start : start + step]) for start in range(0, len(data), step)]
        whole = self.scale(info.name)
        self.release(info.name)
        blocks = np.concatenate(bad)
        if not math.isfinite(whole):
            return self._bad_tensor(info, _tail_offset(info), f"the scale of the tensor is {whole}")
        if not blocks.size:
            return None
        unit = "values" if fmt.block_size == 1 else "block scales"
        reason = f"{blocks.size} of {len(data)} {unit} are NaN or Inf"
        return self._bad_tensor(info, info.offset + int(blocks[0]) * fmt.block_bytes, reason)

    def _bad_tensor(self, info: TensorInfo, offset: int, reason: str) -> GGUFError:
        return GGUFError(self.paths[info.part], f"tensor {shown(info.name)!r}", offset, reason)

    def _buffer(self, info: TensorInfo) -> Buffer:
        if not self._buffers:
            raise ValueError(f"{self.path}: the file is closed")
        return self._buffers[info.part]


def _mismatch(value: object, kind: type) -> str:
    """Why ``value`` is not what was asked for."""
    if kind is str and isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as problem:
            return f"not UTF-8: {problem.reason} at its byte {problem.start}"
    return f"{type(value).__name__}, must be {kind.__name__}"


def _tail_offset(info: TensorInfo) -> int:
    """Where a tensor's rows end."""
    return info.offset + info.nbytes - info.format.tail_bytes


def _map(path: Path) -> Buffer:
    try:
        if not path.is_file():  # a pipe or a device would block or never end
            raise ModelNotFoundError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            if not file.seek(0, 2):
                return b""  # cannot be mapped; the header check says that it is too short
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as problem:
        raise ModelNotFoundError(f"{path}: {problem.strerror or problem}") from problem


def _merged(paths: list[Path], headers: list[Header]) -> dict[str, TensorInfo]:
    """The tensors of all parts in one table."""
    tensors: dict[str, TensorInfo] = {}
    for part, header in enumerate(headers):
        for name, info in header.tensors.items():
            if name in tensors:
                reason = f"duplicate name, also in {paths[tensors[name].part].name}"
                raise GGUFError(paths[part], f"tensor {shown(name)!r}", info.entry, reason)
            tensors[name] = replace(info, part=part) if part else info
    return tensors
