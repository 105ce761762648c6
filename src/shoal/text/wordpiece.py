"""BERT's WordPiece (``tokenizer.ggml.model`` = bert): words, each cut greedily into the longest tokens.

Tokens that begin a word are spelled with U+2581 in front, as in GGUF files; a word that cannot be spelled wholly is
one unknown token.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from shoal.text.spm import SPACE

_WHITE_SPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
)
# Blocks of Chinese characters, each a word of its own. The gap before U+2B920 is llama.cpp's and transformers'.
_CHINESE = (
    range(0x4E00, 0xA000),
    range(0x3400, 0x4DC0),
    range(0x20000, 0x2A6E0),
    range(0x2A700, 0x2B740),
    range(0x2B740, 0x2B820),
    range(0x2B920, 0x2CEB0),
    range(0xF900, 0xFB00),
    range(0x2F800, 0x2FA20),
)


class WordPiece:
    """Ids of text without special tokens. Safe to use from several threads.

    ``unknown`` stands for a word that no tokens spell. ``lowercase`` and ``strip_accents`` are what is done to the
    text first.
    """

    def __init__(self, ids: Mapping[str, int], unknown: int, *, lowercase: bool, strip_accents: bool) -> None:
        self._ids = ids
        self._unknown = unknown
        self._longest = max(map(len, ids))
        self._folding = _Folding(lowercase, strip_accents)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        words = text.translate(self._folding).split(" ")
        return [token for word in words if word for token in self._encode_word(SPACE + word)]

    def _encode_word(self, word: str) -> list[int]:
        ids = []
        start = 0
        while start < len(word):
            end = self._longest_match(word, start)
            if end == start:
                return [self._unknown]
            ids.append(self._ids[word[start:end]])
            start = end
        return ids

    def _longest_match(self, word: str, start: int) -> int:
        """Where the longest token that stands at ``start`` ends; ``start`` itself if there is none."""
        ends = range(min(len(word), start + self._longest), start, -1)
        return next((end for end in ends if word[start:end] in self._ids), start)


class _Folding(dict[int, str]):
    """What each character becomes before words are cut at spaces; filled as characters are met (see str.translate)."""

    def __init__(self, lowercase: bool, strip_accents: bool) -> None:
        super().__init__()
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._fold(chr(code))
        return folded

    def _fold(self, char: str) -> str:
        if self._strip_accents:
            char = unicodedata.normalize("NFD", char)[0]  # of a decomposition llama.cpp keeps the first character only
        category = unicodedata.category(char)
        if char in _WHITE_SPACE:
            return " "
        if char == "\ufffd" or category in ("Cc", "Cf", "Co") or (self._strip_accents and category[0] == "M"):
            return ""
        stands_alone = category[0] == "P" or (char < "\x7f" and category[0] == "S") or _is_chinese(char)
        folded = char.lower()[0] if self._lowercase else char
        return f" {folded} " if stands_alone else folded


def _is_chinese(char: str) -> bool:
    return any(ord(char) in block for block in _CHINESE)
