"""What an input is, whatever its name says: told from its first bytes, so that a file of another kind is one message, not a
thousand bad rows. Only what is sure counts: where a row may be good, the file is read and its bad rows are refused one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from shoal.errors import JobError

HEAD_BYTES = 1 << 16  # as much of a file is looked at, at most
BOM = b"\xef\xbb\xbf"


class _Kind(NamedTuple):
    """What a file is, and what helps."""

    what: str
    advice: str


_UNPACK = "unpack it"
_REPACK = "decompress it, or pack it as .gz or .zst"
_EXPORT = "export its rows as CSV or JSON lines"
_SAVE = "save its table as CSV in UTF-8"
_GGUF = _Kind("a GGUF model", "give it with --model")
_GZIP = _Kind("gzip data", "name it .gz, or decompress it")
_ZSTD = _Kind("Zstandard data", "name it .zst, or decompress it")

# How files begin that no text begins like.
_KINDS: dict[bytes, _Kind] = {
    b"\x1f\x8b": _GZIP,
    b"\x28\xb5\x2f\xfd": _ZSTD,
    **{bytes((first,)) + b"\x2a\x4d\x18": _ZSTD for first in range(0x50, 0x60)},  # a frame to be skipped
    b"\xfd7zXZ\x00": _Kind("xz data", _REPACK),
    **{b"BZh%d1AY&SY" % level: _Kind("bzip2 data", _REPACK) for level in range(1, 10)},
    b"\x04\x22\x4d\x18": _Kind("lz4 data", _REPACK),
    b"\xff\x06\x00\x00sNaPpY": _Kind("Snappy data", _REPACK),
    b"\x1f\x9d": _Kind("compress (.Z) data", _REPACK),
    b"7z\xbc\xaf\x27\x1c": _Kind("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": _Kind("a RAR archive", _UNPACK),
    b"PAR1\x15": _Kind("a Parquet file", "name it .parquet"),
    b"ARROW1\x00\x00": _Kind("an Arrow (Feather) file", "write it as Parquet, CSV or JSON lines"),
    b"\xff\xff\xff\xff": _Kind("an Arrow stream", "write it as Parquet, CSV or JSON lines"),
    b"Obj\x01": _Kind("an Avro file", _EXPORT),
    b"SQLite format 3\x00": _Kind("an SQLite database", _EXPORT),
    b"\x89HDF\r\n\x1a\n": _Kind("an HDF5 file", _EXPORT),
    b"\x93NUMPY": _Kind("a NumPy array", _EXPORT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": _Kind("an old Office file (Excel?)", _SAVE),
    b"%PDF-": _Kind("a PDF", "requests are text"),
    b"GGUF\x02\x00\x00\x00": _GGUF,
    b"GGUF\x03\x00\x00\x00": _GGUF,
}
_ZIP = b"PK\x03\x04"
_OFFICE = (b"[Content_Types].xml", b"_rels/.rels", b"xl/")
_HTML = (b"<!doctype html", b"<html")

_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")

_JSON = re.compile(rb'\{\s*"|\[\s*\{')
_BROKEN_OFF = (b"{", b"[", b",")  # how a line ends where JSON is spread over several
_DELIMITER = re.compile(rb"[,;\t|]")


class EmptyInputError(JobError):
    """A file without anything in it."""


def refuse_foreign(path: object, head: bytes, table: str | None) -> None:
    """Raise JobError for a file that begins with ``head`` and so is no "csv" or "parquet" ``table``, or for None no JSON lines."""
    if not head:
        raise EmptyInputError(f"{path}: is empty: there is nothing to run")
    wanted = {"csv": "CSV", "parquet": "Parquet"}.get(table or "", "JSON lines")
    for kind in _foreign(head, table):
        raise JobError(f"{path}: this is {kind.what}, not {wanted}: {kind.advice}")


def refuse_misnamed(path: object, head: bytes, compression: str) -> None:
    """Raise JobError for a file that begins with ``head`` and so is not compressed as its suffix ``compression`` says."""
    if not head:
        raise JobError(f"{path}: is empty, which no {compression} file is")
    kind = next(_binary(head), _Kind("not compressed", f"leave {compression} away"))
    if kind != {".gz": _GZIP, ".zst": _ZSTD}[compression]:
        raise JobError(f"{path}: this is {kind.what}, though its name ends in {compression}: {kind.advice}")


def _foreign(head: bytes, table: str | None) -> Iterator[_Kind]:
    """What the file is if it is not what is wanted; the first kind is right."""
    if table == "parquet":
        if not head.startswith((b"PAR1", b"PARE")):
            yield next(_binary(head), _Kind("something else", "such a file begins with PAR1"))
        return
    yield from _binary(head)
    text = head.removeprefix(BOM).lstrip()
    if text[:15].lower().startswith(_HTML):
        yield _Kind("an HTML page", "was it downloaded from where one has to log in?")
    if table == "csv" and _JSON.match(text):
        yield _Kind("JSON", "name it .jsonl if it has one object a line")
    lines = [line for piece in text.split(b"\n") if (line := piece.removeprefix(BOM).strip())]
    if table is None and lines:
        yield from _not_lines(text, lines)


def _binary(head: bytes) -> Iterator[_Kind]:
    """What has marks of its own."""
    yield from (kind for magic, kind in _KINDS.items() if head.startswith(magic))
    if head.startswith(_ZIP):
        office = any(name in head for name in _OFFICE)
        yield _Kind("an Excel or other Office file", _SAVE) if office else _Kind("a zip file", _UNPACK)
    if head.startswith(b"ustar", 257):
        yield _Kind("a tar archive", _UNPACK)
    if encoding := _wide_encoding(head):
        yield _Kind(f"text in {encoding}", "save it as UTF-8")
    if head.startswith(b"\x00"):
        yield _Kind("binary data", "it begins with zeros")


def _wide_encoding(head: bytes) -> str | None:
    """The encoding of a text with two or four bytes a character: that of its mark, or the one in which it begins in ASCII."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    for encoding in _WIDE:
        start = head[:16].decode(encoding, "ignore")
        if len(start) > 1 and start.isascii() and all(char.isprintable() or char.isspace() for char in start):
            return encoding[:6].upper()
    return None


def _not_lines(text: bytes, lines: list[bytes]) -> Iterator[_Kind]:
    """What a text is of whose lines (stripped, none blank) none is an object, or whose first one is only the beginning of one."""
    first = lines[0]
    # Of the last line the end may not be in the head.
    cut = not text.endswith(b"\n") and lines[-1].startswith(b"{")
    has_objects = cut or any(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    if first.startswith(b"[") and not (first.endswith(b"]") and has_objects):
        yield _Kind("a JSON array", "write one object a line (jq -c '.[]' does)")
    if first.startswith(b"{") and first.endswith(_BROKEN_OFF) and len(lines) > 1:
        yield _Kind("JSON with an object over several lines", "write one object a line (jq -c . does)")
    if not has_objects:
        yield _text_kind(text, first)


def _text_kind(text: bytes, first: bytes) -> _Kind:
    if b"\x00" in text:
        return _Kind("binary data", "requests are text")
    cells = [cell.strip(b' "') for cell in _DELIMITER.split(first)]
    if len(cells) > 1 and (b"prompt" in cells or b"messages" in cells):
        return _Kind("a table", "name it .csv")
    return _Kind("text whose first lines are no JSON objects", 'a row is {"prompt": "..."} on a line of its own')
