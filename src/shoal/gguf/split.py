"""Models split over several files: which they are, and whether they belong together.

The scheme is llama.cpp's: part i of n is named ``PREFIX-0000i-of-0000n.gguf`` (from 1) and says ``split.no`` = i - 1
and ``split.count`` = n; the first part holds the metadata; ``split.tensors.count`` counts the tensors of all parts.
"""

from __future__ import annotations

import re
from pathlib import Path

from shoal.errors import GGUFError
from shoal.gguf.header import Header

_PART_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, header: Header) -> list[Path]:
    """All parts of the model whose first part is ``path``; ``[path]`` where it is not split.

    Raises GGUFError where name and metadata disagree, ``path`` is not the first part or another part is missing.
    """
    count = _integer(path, header, "split.count", default=1)
    if count <= 1:
        return [path]
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise _error(path, header, "split.count", f"is {count}, but the file is not named *-00001-of-{count:05d}.gguf")
    paths = [path.with_name(f"{name['prefix']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if int(name["number"]) != 1:
        raise _error(path, header, "split.no", f"this is not the first part; open {paths[0].name}")
    for part in paths:
        if not part.is_file():
            raise _error(path, header, "split.count", f"is {count}, but part {part.name} is missing")
    return paths


def check_parts(paths: list[Path], headers: list[Header]) -> None:
    """Raise GGUFError unless the parts are numbered in order and agree on how many they and their tensors are."""
    for i, (path, header) in enumerate(zip(paths, headers, strict=True)):
        _expect(path, header, "split.no", i)
        _expect(path, header, "split.count", len(paths))
    if "split.tensors.count" in headers[0].metadata:
        _expect(paths[0], headers[0], "split.tensors.count", sum(len(h.tensors) for h in headers))


def _expect(path: Path, header: Header, key: str, expected: int) -> None:
    value = _integer(path, header, key)
    if value != expected:
        raise _error(path, header, key, f"is {value}, should be {expected}")


def _integer(path: Path, header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        raise _error(path, header, key, "missing" if value is None else "not an integer")
    return value


def _error(path: Path, header: Header, key: str, reason: str) -> GGUFError:
    return GGUFError(path, key, header.positions.get(key, header.metadata_end), reason)
