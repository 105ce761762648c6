"""BPE (``tokenizer.ggml.model`` = gpt2): bytes become letters, letters merge by rank within a word.

Some vocabularies are spelled in characters instead, with U+2581 for a space and tokens for single bytes (Gemma 4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import Tokenizer, models

from shoal.text.pretokenizers import PreTokenizer
from shoal.text.spm import SPACE

_NEWLINES = re.compile("(\n+)")


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


class _Merging:
    """The ``tokenizers`` library's merging of a vocabulary, which wants a token for every symbol.

    Symbols without one are given ids past the vocabulary, so that they take part in merging as llama.cpp has it;
    afterwards they fall apart into the tokens that ``parts`` gives for them.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        pre: PreTokenizer,
        *,
        letters: Iterable[str] = (),
        parts: Callable[[str], Sequence[int]],
    ) -> None:
        self._vocab_size = len(ids)
        missing = set(letters) - ids.keys()
        try:
            model = self._model(ids, merges, pre, missing)
        except Exception:  # tokenizers has no type of its own for a merge with a symbol that has no token; few files do
            missing |= {*chain.from_iterable(merges), *map("".join, merges)} - ids.keys()
            model = self._model(ids, merges, pre, missing)
        self._parts = {token: parts(symbol) for symbol, token in self._past(missing).items()}
        self._engine = Tokenizer(model)
        self._engine.pre_tokenizer = pre.build()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        return [
            self._tokens(encoding.ids) for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _model(
        self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer, missing: set[str]
    ) -> models.BPE:
        symbols = {**ids, **self._past(missing)}
        return models.BPE(symbols, merges, ignore_merges=pre.whole_words, byte_fallback=not pre.bytewise)

    def _past(self, missing: set[str]) -> dict[str, int]:
        return {symbol: token for token, symbol in enumerate(sorted(missing), start=self._vocab_size)}

    def _tokens(self, ids: list[int]) -> list[int]:
        if self._parts and max(ids, default=0) >= self._vocab_size:
            return [part for token in ids for part in self._parts.get(token, (token,))]
        return ids


class ByteLevelBPE:
    """Ids of text without special tokens. Safe to use from several threads.

    ``merges`` are all different, the first to be made first. A byte without a token is dropped; a merged symbol
    without one falls apart into its ASCII letters.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> None:
        self._merging = _Merging(
            ids, merges, pre, letters=_LETTERS.values(), parts=lambda symbol: _ascii_ids(symbol, ids)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        return self._merging.encode([text])[0]


class CharacterBPE:
    """As ByteLevelBPE, for a vocabulary that is spelled in characters. Characters without a token become bytes."""

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> None:
        self._merging = _Merging(ids, merges, pre, parts=lambda symbol: _byte_ids(symbol, ids))
        runs = [piece for piece in ids if not piece.strip("\n")] if pre.whole_newlines else []
        self._newlines = {piece: ids[piece] for piece in runs}

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        text = text.replace(" ", SPACE)
        lines = _NEWLINES.split(text) if self._newlines else [text]
        ids: list[int] = []
        for line, encoded in zip(lines, self._merging.encode(lines), strict=True):
            ids += [self._newlines[line]] if line in self._newlines else encoded
        return ids


def _ascii_ids(symbol: str, ids: Mapping[str, int]) -> Sequence[int]:
    return tuple(ids[letter] for letter in symbol if len(symbol) > 1 and letter.isascii() and letter in ids)


def _byte_ids(symbol: str, ids: Mapping[str, int]) -> Sequence[int]:
    names = (f"<0x{byte:02X}>" for byte in symbol.encode())
    return tuple(ids[name] for name in names if name in ids)
