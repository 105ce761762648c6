"""SentencePiece's precompiled character map: which spellings a text's characters are replaced by.

The map is a trie of byte strings (equal tails may be shared), packed as an XOR-compressed double array (S. Kanda,
"Space- and time-efficient string dictionaries", 2018; the Darts-clone library): 32-bit units, of which the low byte is
the byte that leads to the unit, bit 8 says that a key ends here, bit 9 and bits 10 to 30 give where its children are.
After the units come the replacements, each ended by a zero byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.uint32]

MAX_SIZE = 1 << 24  # bytes; the largest known map has a quarter of a million
_MAX_NODES = 1 << 20  # with shared tails counted as often as they are reached
_LONGEST_KEY = 255  # bytes
_LABEL = np.uint32(1 << 31 | 0xFF)
_BLOCK = 1 << 12  # nodes looked at together


class CharsMap:
    """Replaces the longest spelling that the map knows, from the left."""

    def __init__(self, data: bytes) -> None:
        """``data`` as in a SentencePiece model; empty for a map that changes nothing. Raises ValueError for a broken one."""
        self._rules = dict(_read(data)) if data else {}
        self._longest: dict[str, int] = {}
        for key in self._rules:
            self._longest[key[0]] = max(len(key), self._longest.get(key[0], 0))

    def apply(self, text: str) -> str:
        """``text`` with all replacements made."""
        parts = []
        start = 0
        while start < len(text):
            length = self._longest_match(text, start)
            key = text[start : start + max(length, 1)]
            parts.append(self._rules[key] if length else key)
            start += len(key)
        return "".join(parts)

    def _longest_match(self, text: str, start: int) -> int:
        """The length of the longest key that stands at ``start``; 0 if there is none."""
        for length in range(self._longest.get(text[start], 0), 0, -1):
            if text[start : start + length] in self._rules:
                return length
        return 0


def _read(data: bytes) -> Iterator[tuple[str, str]]:
    size = int.from_bytes(data[:4], "little")
    if len(data) > MAX_SIZE or size % 4 or not 4 <= size < len(data) - 4:
        raise ValueError(f"{len(data)} bytes with a trie of {size} bytes")
    units = np.frombuffer(data, "<u4", count=size // 4, offset=4).astype(np.uint32)
    replacements = data[4 + size :]
    for key, place in _keys(units):
        end = replacements.find(b"\0", place)
        if end < 0:
            raise ValueError(f"no replacement ends after byte {place} of {len(replacements)}")
        with suppress(UnicodeDecodeError):  # a key that is not whole characters can match no text
            yield key.decode(), replacements[place:end].decode("utf-8", "replace")


def _keys(units: Units) -> Iterator[tuple[bytes, int]]:
    """Every key of the trie, and where its replacement begins."""
    pending = [(np.array([_children_at(units[:1])[0]], np.uint32), [b""])]
    nodes = 0
    while pending:
        places, keys = pending.pop()
        rows, children = _children(units, places)
        nodes += len(children)
        if nodes > _MAX_NODES or len(keys[0]) > _LONGEST_KEY:
            raise ValueError(f"over {_MAX_NODES} nodes or {_LONGEST_KEY} levels; its trie may lead back into itself")
        labels = units[children].astype(np.uint8).tolist()
        keys = [keys[row] + bytes((label,)) for row, label in zip(rows.tolist(), labels, strict=True)]
        places = children ^ _children_at(units[children])
        for i in np.flatnonzero(units[children] >> np.uint32(8) & np.uint32(1)).tolist():
            yield keys[i], _value(units, int(places[i]))
        pending += [(places[i : i + _BLOCK], keys[i : i + _BLOCK]) for i in range(0, len(keys), _BLOCK)]


def _children(units: Units, places: Units) -> tuple[NDArray[np.intp], Units]:
    """The children of the nodes whose children are at ``places``: the row of each one's parent, and its unit."""
    labels = np.arange(1, 256, dtype=np.uint32)
    candidates = places[:, None] ^ labels
    found = candidates < len(units)
    found[found] = (units[candidates[found]] & _LABEL) == np.broadcast_to(labels, found.shape)[found]
    return found.nonzero()[0], candidates[found]


def _children_at(units: Units) -> Units:
    """The offsets that units hold: 21 bits, in steps of 256 where bit 9 is set."""
    return (units >> np.uint32(10)) << ((units & np.uint32(1 << 9)) >> np.uint32(6))


def _value(units: Units, place: int) -> int:
    if place >= len(units):
        raise ValueError(f"a value at unit {place} of {len(units)}")
    return int(units[place]) & 0x7FFFFFFF
