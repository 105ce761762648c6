"""SentencePiece-style BPE (``tokenizer.ggml.model`` = llama): characters merge by score, the rest falls back to bytes.

The merging is the ``sentencepiece`` library's, from which llama.cpp's comes. It reads its own model format, so the
vocabulary of the GGUF file is written as one (sentencepiece_model.proto; the field numbers below are its).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # the mark that stands for a space inside pieces

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2
_TAIL_SIZE = 7  # bytes of a piece's score and type


class SentencePieceBPE:
    """Ids of text without special tokens. Safe to use from several threads.

    ``pieces`` are the texts of all tokens, ``scores`` float32 of the same length. ``control`` are ids that no text
    may become; ``byte_ids`` the tokens of single bytes; ``unknown`` stands for what nothing else covers.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        scores: NDArray[np.float32],
        *,
        control: frozenset[int],
        byte_ids: frozenset[int],
        unknown: int,
    ) -> None:
        kinds = [_NORMAL] * len(pieces)
        for kind, ids in ((_CONTROL, control), (_BYTE, byte_ids), (_UNKNOWN, {unknown})):
            for token in ids:
                kinds[token] = kind
        model = _piece_messages(pieces, scores, kinds)
        model += _trainer_spec(unknown, byte_fallback=len(byte_ids) == 256) + _normalizer_spec()
        self._engine = SentencePieceProcessor()
        self._engine.LoadFromSerializedProto(model)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in order."""
        ids: list[int] = self._engine.EncodeAsIds(text.replace(" ", SPACE))
        return ids


def _piece_messages(pieces: Sequence[str], scores: NDArray[np.float32], kinds: Sequence[int]) -> bytes:
    """Each token as ModelProto.pieces (1): piece (1), score (2), type (3). Written so that no loop runs in Python."""
    texts = list(map(str.encode, pieces))
    sizes = list(map(len, texts))
    heads = {size: _piece_head(size) for size in set(sizes)}
    tails = np.empty(len(pieces), dtype=[("score", "u1"), ("value", "<f4"), ("type", "u1"), ("kind", "u1")])
    tails["score"], tails["value"] = 0x15, scores
    tails["type"], tails["kind"] = 0x18, kinds
    tail_bytes = tails.view(f"V{_TAIL_SIZE}").tolist()
    return b"".join(chain.from_iterable(zip(map(heads.__getitem__, sizes), texts, tail_bytes, strict=True)))


def _piece_head(size: int) -> bytes:
    """What stands before the text of a piece of ``size`` bytes: the lengths of the message and of the text."""
    inner = b"\x0a" + _varint(size)
    return b"\x0a" + _varint(len(inner) + size + _TAIL_SIZE) + inner


def _trainer_spec(unknown: int, *, byte_fallback: bool) -> bytes:
    """ModelProto.trainer_spec (2): model_type (3), byte_fallback (35), unk_id (40)."""
    return _message(2, _number(3, _BPE) + _number(35, byte_fallback) + _number(40, unknown))


def _normalizer_spec() -> bytes:
    """ModelProto.normalizer_spec (3) that changes nothing: name (1), and (3), (4), (5) off."""
    off = b"".join(_number(field, 0) for field in (3, 4, 5))  # dummy prefix, extra white space, escaping
    return _message(3, _message(1, b"identity") + off)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """A number in base 128, low digits first (Protocol Buffers' encoding)."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
