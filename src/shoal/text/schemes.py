"""The kinds of tokenizer that GGUF files name (``tokenizer.ggml.model``), and how each is built from its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.reader import GGUFFile, StringArray
from shoal.text.bpe import ByteLevelBPE, CharacterBPE, letters_to_bytes
from shoal.text.charsmap import CharsMap
from shoal.text.pretokenizers import pre_tokenizer_named
from shoal.text.rwkv import GreedyBytes, unescape
from shoal.text.spm import SPACE, SentencePieceBPE
from shoal.text.unigram import Normaliser, Unigram
from shoal.text.vocab import Kind, Vocabulary, file_kinds, per_token
from shoal.text.wordpiece import WordPiece

_KEY = "tokenizer.ggml."


@dataclass(frozen=True)
class Scheme:
    """What sets one file's tokenizer apart.

    ``encode`` gives the ids of text without special tokens, ``spell`` the bytes that a normal token stands for.
    ``first`` and ``last`` are the tokens put around a text, ``between`` what else stands between two that are compared.
    ``prefix``: text gets a space in front, at the beginning and after a special token; ``strip``: decoding takes a space in front
    away. ``bounded``: no token stands for more than its own text (as an unknown token may), and no text disappears.
    """

    encode: Callable[[str], list[int]]
    spell: Callable[[str], bytes]
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    prefix: bool = False
    strip: bool = False
    bounded: bool = True


def _byte_pairs(file: GGUFFile, vocab: Vocabulary) -> Scheme:
    pre = pre_tokenizer_named("gemma4" if vocab.model == "gemma4" else vocab.pre)
    engine = (ByteLevelBPE if pre.bytewise else CharacterBPE)(vocab.ids, _merges(file), pre)
    bos = _around(file, "bos", vocab.bos_id, default=pre.add_bos or pre.always_bos, always=pre.always_bos)
    eos = _around(file, "eos", vocab.eos_id, default=False)
    spell = letters_to_bytes if pre.bytewise else _spaced
    return Scheme(engine.encode, spell, bos, eos, _separator(file, vocab))


def _sentencepiece(file: GGUFFile, vocab: Vocabulary) -> Scheme:
    try:
        engine = SentencePieceBPE(
            vocab.pieces,
            _scores(file, vocab),
            control=vocab.ids_of(Kind.CONTROL, Kind.UNKNOWN),
            byte_ids=vocab.ids_of(Kind.BYTE),
            unknown=vocab.unknown_id or 0,
        )
    except RuntimeError as problem:  # what sentencepiece raises for a vocabulary that it cannot make sense of
        raise file.error(_KEY + "tokens", str(problem)) from problem
    prefix = file.get(_KEY + "add_space_prefix", bool, True)
    bos = _around(file, "bos", vocab.bos_id, default=True)
    eos = _around(file, "eos", vocab.eos_id, default=False)
    return Scheme(engine.encode, _spaced, bos, eos, _separator(file, vocab), prefix=prefix, strip=prefix)


def _wordpiece(file: GGUFFile, vocab: Vocabulary) -> Scheme:
    lowercase = file.get(_KEY + "normalizer.lowercase", bool, True)
    strip_accents = file.get(_KEY + "normalizer.strip_accents", bool, lowercase)
    unknown = _needed(file, "unknown", vocab.unknown_id)
    engine = WordPiece(vocab.ids, unknown, lowercase=lowercase, strip_accents=strip_accents)
    first, last = _needed(file, "bos", vocab.bos_id), _needed(file, "seperator", vocab.separator_id)
    return Scheme(engine.encode, _spaced, (first,), (last,), bounded=False)


def _unigram(file: GGUFFile, vocab: Vocabulary) -> Scheme:
    prefix = file.get(_KEY + "add_space_prefix", bool, False)
    merge_spaces = file.get(_KEY + "remove_extra_whitespaces", bool, False)
    kinds = np.frombuffer(file_kinds(file, len(vocab.pieces)), np.uint8)
    scores = np.where(kinds == Kind.USER_DEFINED, 0, _scores(file, vocab))
    matched = np.isin(kinds, (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED))
    engine = Unigram(
        vocab.pieces,
        scores.tolist(),
        hidden=frozenset(np.flatnonzero(~matched).tolist()),
        unknown=_needed(file, "unknown", vocab.unknown_id),
        normaliser=Normaliser(_charsmap(file), prefix, merge_spaces),
    )
    bos = _around(file, "bos", vocab.bos_id, default=False)
    eos = _around(file, "eos", vocab.eos_id, default=True)
    return Scheme(engine.encode, _spaced, bos, eos, _separator(file, vocab), strip=prefix, bounded=False)


def _greedy(_: GGUFFile, vocab: Vocabulary) -> Scheme:
    return Scheme(GreedyBytes(vocab.pieces, vocab.unknown_id).encode, unescape)


SCHEMES: Mapping[str, Callable[[GGUFFile, Vocabulary], Scheme]] = MappingProxyType(
    {
        "gpt2": _byte_pairs,
        "gemma4": _byte_pairs,
        "llama": _sentencepiece,
        "bert": _wordpiece,
        "t5": _unigram,
        "rwkv": _greedy,
    }
)


def _spaced(piece: str) -> bytes:
    return piece.replace(SPACE, " ").encode()


def _separator(file: GGUFFile, vocab: Vocabulary) -> tuple[int, ...]:
    """What stands between two texts besides the end of the first, if the file asks for it and has it (RoBERTa's has two ends there)."""
    wanted = file.get(_KEY + "add_sep_token", bool, False)
    return (vocab.separator_id,) if wanted and vocab.separator_id is not None else ()


def _around(file: GGUFFile, role: str, token: int | None, *, default: bool, always: bool = False) -> tuple[int, ...]:
    """The token to put before or after every text, if there is to be one."""
    key = f"{_KEY}add_{role}_token"
    if not (file.get(key, bool, default) or always):
        return ()
    if token is None:
        raise file.error(key, f"true, but there is no tokenizer.ggml.{role}_token_id within the vocabulary")
    return (token,)


def _needed(file: GGUFFile, role: str, token: int | None) -> int:
    if token is None:
        raise file.error(f"{_KEY}{role}_token_id", "missing or not in the vocabulary; this kind of tokenizer needs it")
    return token


def _scores(file: GGUFFile, vocab: Vocabulary) -> NDArray[np.float32]:
    scores = per_token(file, "scores", len(vocab.pieces), default=0).astype(np.float32)
    if np.isnan(scores).any():
        raise file.error(_KEY + "scores", f"token {int(np.isnan(scores).argmax())} has the score NaN")
    return scores


def _charsmap(file: GGUFFile) -> CharsMap:
    key = _KEY + "precompiled_charsmap"
    data = file.get(key, np.ndarray, np.empty(0, np.uint8))
    if data.dtype.itemsize != 1:
        raise file.error(key, f"an array of {data.dtype}, must be one of bytes")
    try:
        return CharsMap(data.tobytes())
    except ValueError as problem:
        raise file.error(key, str(problem)) from problem


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    lines = list(dict.fromkeys(file.get(_KEY + "merges", StringArray).tolist()))  # the first of two equal merges counts
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines]
    if set(map(len, pairs)) <= {2} and "" not in chain.from_iterable(pairs):
        return pairs
    return [_merge(file, i, line) for i, line in enumerate(lines)]  # symbols may begin with a space


def _merge(file: GGUFFile, i: int, line: str) -> tuple[str, str]:
    space = line.find(" ", 1)
    if not 0 < space < len(line) - 1:
        raise file.error(_KEY + "merges", f"merge {i} is {line[:40]!r}, must be two symbols with a space between")
    return line[:space], line[space + 1 :]
