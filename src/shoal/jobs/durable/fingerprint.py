"""Fingerprints: whether a file holds what it held before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec

from shoal.errors import JobError
from shoal.gguf.reader import GGUFFile

_DIGEST_BYTES = 16
_CHUNK_BYTES = 1 << 20
_SAMPLES = 256
_SAMPLE_BYTES = 4096


def file_fingerprint(path: Path) -> dict[str, int | str]:
    """``path`` (absolute), ``bytes`` and ``blake2b`` of the whole content (hex of 16 bytes).

    Raises JobError for a file that cannot be read.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    size = 0
    try:
        with path.open("rb") as file:
            for chunk in _chunks(file):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise JobError(f"{path}: {error.strerror or error}") from error
    return {"path": path_text(path), "bytes": size, "blake2b": digest.hexdigest()}


def files_fingerprint(place: str, files: Iterable[tuple[str, int, str]]) -> dict[str, int | str]:
    """``path`` (``place``, which says where they are), the number of ``files``, their ``bytes``, and ``blake2b`` of what is said of
    them: of each, in the order in which they are read, its name, its size, and what changes with its content."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    count = size = 0
    for file in files:
        digest.update(msgspec.json.encode(file))
        count, size = count + 1, size + file[1]
    return {"path": place, "files": count, "bytes": size, "blake2b": digest.hexdigest()}


def path_text(path: Path) -> str:
    """An absolute path as text that any JSON can hold."""
    return printable(os.path.abspath(path))


def place_text(place: str) -> str:
    """A URL as it is, a path as by ``path_text``; a slash at its end stays."""
    if "://" in place:
        return printable(place)
    return path_text(Path(place)) + ("/" if place.endswith("/") else "")


def printable(name: str | Path) -> str:
    """A path or a part of it as text that any JSON can hold: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def model_fingerprint(path: Path) -> dict[str, int | str]:
    """``bytes`` and ``blake2b`` (hex of 16 bytes) of a GGUF model, all parts of a split one; its name is no part of it.

    Of each part the size, the header (metadata and table of tensors) and 256 samples of 4 KiB, evenly spaced over its
    weights, are hashed: a model of 100 GB takes no longer than a small one, and one of up to 1 MiB is hashed whole.
    Raises as ``GGUFFile.open`` does.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with GGUFFile.open(path) as file:
        for part, place in enumerate(file.paths):
            starts = (info.offset for info in file.tensors.values() if info.part == part)
            size = place.stat().st_size
            for piece in _pieces(place, min(starts, default=size), size):
                digest.update(piece)
        return {"bytes": file.file_size, "blake2b": digest.hexdigest()}


def _pieces(path: Path, data_start: int, size: int) -> Iterator[bytes]:
    """What is hashed of one part."""
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        yield from _chunks(file, data_start)
        span = max(0, size - data_start - _SAMPLE_BYTES)  # from the start of the first sample to that of the last
        for i in range(_SAMPLES):
            file.seek(data_start + span * i // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)


def _chunks(file: BinaryIO, end: int | None = None) -> Iterator[bytes]:
    """The bytes of ``file`` up to offset ``end``, or all."""
    left = os.fstat(file.fileno()).st_size if end is None else end
    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        yield chunk
        left -= len(chunk)
