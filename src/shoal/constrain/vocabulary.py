"""A vocabulary as llguidance takes it: the bytes of every token, and which of them are no text."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLTokenizer, TokenizerWrapper


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``tokens``: the bytes that each stands for, none for those that nobody can write. ``special``: those that are no text.

    ``ends`` end a text; there is at least one.
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    ends: Sequence[int]

    def packed(self) -> dict[str, Any]:
        """As JSON can hold it."""
        joined = b64encode(b"".join(self.tokens)).decode()
        return {"joined": joined, "lengths": [*map(len, self.tokens)], "special": [*self.special], "ends": [*self.ends]}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Vocabulary:
        """From what ``packed`` made."""
        joined, tokens, start = b64decode(packed["joined"]), [], 0
        for length in packed["lengths"]:
            tokens.append(joined[start : start + length])
            start += length
        return cls(tokens, packed["special"], packed["ends"])

    def tokenizer(self, encode: Callable[[str], list[int]]) -> LLTokenizer:
        """llguidance's tokenizer. ``encode`` gives the ids of text that continues another, as the model is used to see it."""
        return LLTokenizer(TokenizerWrapper(_Encoder(self, encode)), eos_token=list(self.ends))

    def plain_tokenizer(self) -> LLTokenizer:
        """One that is ready sooner: masks take longer, and forced text comes in tokens of any kind."""
        return LLTokenizer(TokenizerWrapper(_Encoder(self, None)), eos_token=list(self.ends), slices=[])


class _Encoder:
    """What TokenizerWrapper wants. Where the text is forced, its tokens are those of ``encode``, if these spell that very text."""

    def __init__(self, vocabulary: Vocabulary, encode: Callable[[str], list[int]] | None) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        special = frozenset(vocabulary.special)
        self._ids = {data: token for token, data in enumerate(self.tokens) if data and token not in special}
        self._longest = max(map(len, self._ids), default=0)
        self._encode = encode

    def __call__(self, data: bytes) -> list[int]:
        try:
            ids = self._encode(data.decode()) if self._encode else []
        except UnicodeDecodeError:
            ids = []
        return ids if ids and b"".join(self.tokens[token] for token in ids) == data else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token at each place; bytes that no token has are left out."""
        ids, start = [], 0
        while start < len(data):
            size = next((n for n in range(self._longest, 0, -1) if data[start : start + n] in self._ids), 0)
            if size:
                ids.append(self._ids[data[start : start + size]])
            start += max(1, size)
        return ids
