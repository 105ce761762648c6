"""Text out of tokens, one at a time, without ever giving out a piece of a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Joins the bytes of tokens and gives out whole characters.

    All that ``push`` and ``flush`` return, joined, is the bytes of the tokens decoded at once. Bytes that can no
    longer become a character come out as U+FFFD as soon as that is certain.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = _Utf8Decoder("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often none. Raises RequestError for an id out of range."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was cut off. Afterwards the decoder starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
