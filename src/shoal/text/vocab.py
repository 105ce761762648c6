"""The vocabulary of a GGUF file: pieces, their kinds, special ids, and which tokens end a generation.

Where files are silent or wrong this follows llama.cpp, which finds some special tokens by their text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.reader import GGUFFile, StringArray
from shoal.text.special import SpecialToken

_KEY = "tokenizer.ggml."


class Kind(IntEnum):
    """What a token is; the numbers are those of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Roles that tokens have by metadata key or, where the key is missing, by text (the first of these that exists).
# Roles with ``True`` end a generation. A token found by text becomes a control token, whatever the file says.
_ROLES_BY_TEXT: dict[str, tuple[bool, tuple[str, ...]]] = {
    "fim_pre": (
        False,
        (
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<\uff5cfim\u2581begin\uff5c>",
            "<PRE>",
            "\u2581<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ),
    ),
    "fim_suf": (
        False,
        (
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<\uff5cfim\u2581hole\uff5c>",
            "<SUF>",
            "\u2581<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ),
    ),
    "fim_mid": (
        False,
        (
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<\uff5cfim\u2581end\uff5c>",
            "<MID>",
            "\u2581<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ),
    ),
    "fim_pad": (True, ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    "fim_rep": (True, ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    "fim_sep": (True, ("<|file_sep|>",)),
}

# Tokens that end a generation wherever a vocabulary has them; they become control tokens too.
_END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
)
# Where all texts on the left end a generation, the one on the right does not after all, and has the kind given.
_NOT_AN_END = (
    (("<|return|>", "<|call|>", "<|end|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|return|>", "<|calls|>", "<|end|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|call|>", "<|flush|>", "<|end|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|calls|>", "<|flush|>", "<|end|>"), "<|end|>", Kind.USER_DEFINED),
    (("<|tool_response>", "</s>"), "</s>", Kind.NORMAL),
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# Special tokens of files that do not name them, by the kind of tokenizer. ("seperator" is how GGUF spells it.)
_DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"bos": 101, "unknown": 100, "seperator": 102},
    "t5": {"eos": 1, "unknown": 2},
}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens. ``kinds`` is a Kind for each of ``pieces``; ids are places in them."""

    model: str
    pre: str
    pieces: list[str]
    ids: dict[str, int]
    kinds: bytearray
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    separator_id: int | None
    eog_sources: Mapping[int, str]
    lstrip_ids: frozenset[int]
    rstrip_ids: frozenset[int]

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Vocabulary:
        """Read ``tokenizer.ggml.*``. Raises GGUFError for missing, wrong-typed, wrong-sized or duplicate entries."""
        model = file.get(_KEY + "model", str)
        pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(file.get(_KEY + "tokens", StringArray).tolist())]
        if not pieces:
            raise file.error(_KEY + "tokens", "empty")
        ids = _index(file, pieces)
        kinds = file_kinds(file, len(pieces))
        bos_id, eos_id, unknown_id = (special_id(file, role, len(pieces)) for role in ("bos", "eos", "unknown"))
        eog_sources = _resolve_ends(file, ids, kinds, eos_id)
        return cls(
            model=model,
            pre=file.get(_KEY + "pre", str, ""),
            pieces=pieces,
            ids=ids,
            kinds=kinds,
            bos_id=bos_id,
            eos_id=eos_id,
            unknown_id=unknown_id,
            separator_id=special_id(file, "seperator", len(pieces)),
            eog_sources=eog_sources,
            lstrip_ids=_lstrip_ids(file, ids),
            rstrip_ids=_rstrip_ids(file, pieces, kinds),
        )

    def ids_of(self, *kinds: Kind) -> frozenset[int]:
        """All tokens of these kinds."""
        return frozenset(np.flatnonzero(np.isin(np.frombuffer(self.kinds, np.uint8), kinds)).tolist())

    def special_tokens(self) -> Iterator[SpecialToken]:
        """The tokens that text is cut at before it is merged."""
        for token in sorted(self.ids_of(Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)):
            control = self.kinds[token] != Kind.USER_DEFINED
            strips = (token in self.lstrip_ids, token in self.rstrip_ids)
            yield SpecialToken(self.pieces[token], token, control, *strips)


def special_id(file: GGUFFile, role: str, vocab_size: int) -> int | None:
    """The token that ``tokenizer.ggml.ROLE_token_id`` names; None where the file names none, or one out of range."""
    default = _DEFAULT_IDS.get(file.get(_KEY + "model", str), {}).get(role)
    for token in (file.get(f"{_KEY}{role}_token_id", int, None), default):
        if token is not None and 0 <= token < vocab_size:
            return token
    return None


def per_token(file: GGUFFile, name: str, vocab_size: int, default: float) -> NDArray[Any]:
    """The array ``tokenizer.ggml.NAME``, one number for each token; all ``default`` where the file has none."""
    key = _KEY + name
    values = file.get(key, np.ndarray, None)
    if values is None:
        return np.full(vocab_size, default)
    if len(values) < vocab_size or values.dtype.kind not in "iuf":
        raise file.error(key, f"{len(values)} of {values.dtype}, must be a number for each of {vocab_size} tokens")
    return values[:vocab_size]


def file_kinds(file: GGUFFile, vocab_size: int) -> bytearray:
    """The kind of each token as the file has it; all NORMAL where it does not say."""
    values = per_token(file, "token_type", vocab_size, default=Kind.NORMAL)
    known = np.isin(values, list(Kind))
    return bytearray(np.where(known, values, Kind.UNDEFINED).astype(np.uint8).tobytes())


def _index(file: GGUFFile, pieces: list[str]) -> dict[str, int]:
    ids = {piece: token for token, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        token = next(token for token, piece in enumerate(pieces) if ids[piece] != token)
        raise file.error(_KEY + "tokens", f"{pieces[token][:40]!r} is both token {token} and {ids[pieces[token]]}")
    return ids


def _resolve_ends(file: GGUFFile, ids: Mapping[str, int], kinds: bytearray, eos_id: int | None) -> Mapping[int, str]:
    """Which tokens end a generation, and why. Corrects ``kinds`` in place."""
    ends: dict[int, str] = {}
    for key, token in _ends_by_key(file, len(ids), eos_id):
        ends.setdefault(token, key)
    for text, token, is_end in _found_by_text(file, ids):
        kinds[token] = Kind.CONTROL
        if is_end:
            ends.setdefault(token, f"text {text}")
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = Kind.USER_DEFINED
    for texts, text, kind in _NOT_AN_END:
        if all(ids.get(other) in ends for other in texts):
            del ends[ids[text]]
            kinds[ids[text]] = kind
    return dict(sorted(ends.items()))


def _ends_by_key(file: GGUFFile, vocab_size: int, eos_id: int | None) -> Iterator[tuple[str, int]]:
    if eos_id is not None:
        yield "tokenizer.ggml.eos_token_id", eos_id
    ends = [role for role, (is_end, _) in _ROLES_BY_TEXT.items() if is_end]
    for role in ("eot", "eom", *ends):
        token = special_id(file, role, vocab_size)
        if token is not None:
            yield f"{_KEY}{role}_token_id", token


def _found_by_text(file: GGUFFile, ids: Mapping[str, int]) -> Iterator[tuple[str, int, bool]]:
    for role, (is_end, texts) in _ROLES_BY_TEXT.items():
        if special_id(file, role, len(ids)) is None:
            yield from [(text, ids[text], is_end) for text in texts if text in ids][:1]
    yield from ((text, ids[text], True) for text in _END_TEXTS if text in ids)


def _lstrip_ids(file: GGUFFile, ids: Mapping[str, int]) -> frozenset[int]:
    """Some mask tokens swallow the white space before them; GGUF cannot say so, llama.cpp goes by names."""
    masks = {
        "<mask>": (
            (_KEY + "pre", ("jina-v2-de", "jina-v2-es", "jina-v2-code")),
            ("general.architecture", ("nomic-bert-moe", "jina-bert-v3")),
        ),
        "[MASK]": (("general.name", ("modern-bert",)),),
    }
    named = {
        mask
        for mask, rules in masks.items()
        for key, names in rules
        if any(name in file.label(key).lower() for name in names)
    }
    return frozenset(ids[mask] for mask in named if mask in ids)


def _rstrip_ids(file: GGUFFile, pieces: list[str], kinds: bytearray) -> frozenset[int]:
    """Phi-3's special tokens swallow the white space after them; GGUF cannot say so, llama.cpp goes by the name."""
    name = file.label("general.name").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(i for i, kind in enumerate(kinds) if kind in special and pieces[i] not in keeps)
