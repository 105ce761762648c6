"""Byte-level BPE (``tokenizer.ggml.model`` = gpt2): bytes become letters, letters merge by rank within a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import Tokenizer, models

from shoal.text.pretokenizers import PreTokenizer


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable bytes are their own, the others take U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_LETTERS = _byte_letters()
_LETTER_TO_BYTE = {ord(letter): byte for byte, letter in _LETTERS.items()}


def letters_to_bytes(piece: str) -> bytes:
    """The text of a token as bytes; a character that stands for no byte is its own UTF-8."""
    try:
        return piece.translate(_LETTER_TO_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return b"".join(_letter_to_bytes(letter) for letter in piece)


def _letter_to_bytes(letter: str) -> bytes:
    byte = _LETTER_TO_BYTE.get(ord(letter))
    return letter.encode() if byte is None else bytes((byte,))


class ByteLevelBPE:
    """Ids of text without special tokens. Safe to use from several threads.

    Symbols that have no token are given ids past the vocabulary, so that they take part in merging as llama.cpp
    has it; afterwards a byte without a token is dropped and a merged symbol falls apart into its ASCII letters.
    """

    def __init__(self, ids: Mapping[str, int], merges: Iterable[tuple[str, str]], pre: PreTokenizer) -> None:
        self._vocab_size = len(ids)
        merges = list(dict.fromkeys(merges))  # the first of two equal merges counts
        extra = dict(enumerate(self._missing(ids, merges), start=self._vocab_size))
        symbols = {**ids, **{symbol: token for token, symbol in extra.items()}}
        self._extra = {token: _ascii_ids(symbol, ids) for token, symbol in extra.items()}
        self._engine = Tokenizer(models.BPE(symbols, merges, ignore_merges=pre.whole_words))
        self._engine.pre_tokenizer = pre.build()

    @staticmethod
    def _missing(ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> list[str]:
        symbols = {*_LETTERS.values(), *chain.from_iterable(merges), *map("".join, merges)}
        return sorted(symbols - ids.keys())

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        ids: list[int] = self._engine.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self._extra and max(ids, default=0) >= self._vocab_size:
            return [part for token in ids for part in self._extra.get(token, (token,))]
        return ids


def _ascii_ids(symbol: str, ids: Mapping[str, int]) -> Sequence[int]:
    return tuple(ids[letter] for letter in symbol if len(symbol) > 1 and letter.isascii() and letter in ids)
