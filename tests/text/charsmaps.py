"""A real precompiled character map (NFKC), as the sentencepiece library ships it, and that library's way of applying one."""

from __future__ import annotations

from sentencepiece import SentencePieceNormalizer

from shoal.text.spm import _message, _number


def _nfkc() -> bytes:
    """Field 2 of the normaliser's own message: a tag byte, the length in base 128, the map."""
    name = b"\x0a\x04nfkc"
    spec: bytes = SentencePieceNormalizer(rule_name="nfkc").serialized_normalizer_spec()
    assert spec.startswith(name + b"\x12")
    place, size, shift = len(name) + 1, 0, 0
    while True:
        digit = spec[place]
        size |= (digit & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if digit < 0x80:
            return spec[place : place + size]


NFKC = _nfkc()


def normaliser() -> SentencePieceNormalizer:
    """Applies NFKC and does nothing to spaces."""
    off = b"".join(_number(field, 0) for field in (3, 4, 5))  # dummy prefix, extra white space, escaping
    return SentencePieceNormalizer(model_proto=_message(3, _message(1, b"nfkc") + _message(2, NFKC) + off))
