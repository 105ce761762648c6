"""RWKV's tokenizer (``tokenizer.ggml.model`` = rwkv): at every byte, the longest token that stands there."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_NAMED = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def unescape(piece: str) -> bytes:
    r"""The bytes of a token as RWKV's vocabulary spells it, with ``\t``, ``\n``, ``\r``, ``\xNN`` and ``\`` for itself."""
    return _ESCAPE.sub(lambda match: _unescaped(match[1]), piece.encode())


def _unescaped(code: bytes) -> bytes:
    return bytes.fromhex(code[1:].decode()) if len(code) == 3 else _NAMED.get(code, code)


class GreedyBytes:
    """Ids of text without special tokens. Safe to use from several threads.

    ``unknown`` stands for a byte at which no token does; None drops it.
    """

    def __init__(self, pieces: Sequence[str], unknown: int | None) -> None:
        self._ids = {unescape(piece): token for token, piece in enumerate(pieces)}
        self._unknown = [] if unknown is None else [unknown]
        lengths: dict[bytes, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {head: sorted(group, reverse=True) for head, group in lengths.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        data = text.encode()
        ids: list[int] = []
        start = 0
        while start < len(data):
            length = self._longest_match(data, start)
            ids += [self._ids[data[start : start + length]]] if length else self._unknown
            start += length or 1
        return ids

    def _longest_match(self, data: bytes, start: int) -> int:
        """The length of the longest token that stands at ``start``; 0 if there is none."""
        for length in self._lengths.get(data[start : start + 2], ()):
            if data[start : start + length] in self._ids:
                return length
        return int(data[start : start + 1] in self._ids)
