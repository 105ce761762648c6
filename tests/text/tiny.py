"""Small vocabularies as GGUF files, one of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shoal.text.bpe import _LETTERS
from shoal.text.vocab import Kind
from tests.support.gguf_builder import INT32, UINT8, GGUFBuilder

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_BPE_WORDS = ("he", "ll", "hell", "hello", "\u0120w", "or", "ld", "\u0120wor", "\u0120world", "ab", "abab", "\u0120<")
_BPE_MERGES = (
    "h e",
    "l l",
    "he ll",
    "hell o",
    "\u0120 w",
    "o r",
    "l d",
    "\u0120w or",
    "\u0120wor ld",
    "a b",
    "ab ab",
    "\u0120 <",
)
CONTROL = ("<|im_start|>", "<|im_end|>", "<|x|>")
USER_DEFINED = ("<tool>", "<tool>\n", "\n\n")

_TYPES = {"token_type": INT32, "precompiled_charsmap": UINT8}
_SPM_WORDS = ("\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "a", "aa", "aaaa", "\u00e9")


def byte_level(path: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A file of kind gpt2. ``changes`` set or (None) leave out keys of tokenizer.ggml; ``without`` are letters left out."""
    letters = [letter for letter in _LETTERS.values() if letter not in without]
    pieces = [*CONTROL, *USER_DEFINED, *letters, *_BPE_WORDS]
    kinds = {**dict.fromkeys(CONTROL, Kind.CONTROL), **dict.fromkeys(USER_DEFINED, Kind.USER_DEFINED)}
    merges = [merge for merge in _BPE_MERGES if not set(merge.replace(" ", "")) & set(without)]
    entries = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": pieces,
        "token_type": [kinds.get(piece, Kind.NORMAL) for piece in pieces],
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _write(path, {**entries, **changes})


def sentencepiece(path: Path, **changes: Any) -> Path:
    """A file of kind llama, with control tokens <unk>, <s>, </s>, all bytes, and a few words; longer ones score higher."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *_SPM_WORDS]
    entries = {
        "model": "llama",
        "tokens": pieces,
        "scores": [0.0] * (len(pieces) - len(_SPM_WORDS)) + [float(len(word)) for word in _SPM_WORDS],
        "token_type": [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL] + [Kind.BYTE] * 256 + [Kind.NORMAL] * len(_SPM_WORDS),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return _write(path, {**entries, **changes})


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def characters(path: Path, **changes: Any) -> Path:
    """A file of kind gemma4: BPE over characters, with <bos>, <eos>, all bytes, lines of newlines and a few words."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = ["\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "\n", "\n\n\n", "\u00e9"]
    entries = {
        "model": "gemma4",
        "tokens": [*special, *_BYTES, *words],
        "token_type": [Kind.CONTROL] * 4 + [Kind.BYTE] * 256 + [Kind.NORMAL] * len(words),
        "merges": ["h e", "l l", "he ll", "hell o", "\u2581 hello", "\u00e9 \u00e9", "\n \n"],
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    return _write(path, {**entries, **changes})


def wordpiece(path: Path, **changes: Any) -> Path:
    """A file of kind bert, with [UNK], [CLS], [SEP], [MASK] and a few words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [
        "un",
        "able",
        "cafe",
        "caf",
        "istanbul",
        "!",
        "'",
        "s",
        "\u4f60",
        "\u597d",
        "\u00df",
        "\u03c3",
        "\u1100",
        "$",
        "x",
    ]
    parts = ["aff", "able", "s", "e", "\u00e9", "\u0301", "x"]
    entries = {
        "model": "bert",
        "tokens": [*special, *(f"\u2581{word}" for word in words), *parts],
        "token_type": [Kind.CONTROL] * 5 + [Kind.NORMAL] * (len(words) + len(parts)),
        "unknown_token_id": 1,
        "bos_token_id": 2,
        "seperator_token_id": 3,
        "mask_token_id": 4,
    }
    return _write(path, {**entries, **changes})


def unigram(path: Path, charsmap: bytes = b"", **changes: Any) -> Path:
    """A file of kind t5, with </s>, <unk>, a user-defined token and a few words, likelier the shorter their negated score."""
    words = {
        "\u2581": -2.0,
        "\u2581a": -3.0,
        "a": -4.0,
        "b": -4.5,
        "ab": -5.0,
        "\u2581ab": -7.5,
        "abc": -20.0,
        "c": -4.0,
        "bc": -6.0,
        "1": -3.0,
        "fi": -5.0,
        "f": -6.0,
        "i": -6.0,
        "A": -5.0,
        "\u2581aa": -6.5,
    }
    entries = {
        "model": "t5",
        "tokens": ["<pad>", "</s>", "<unk>", "<x>", *words, "unused"],
        "scores": [0.0, 0.0, 0.0, -9.0, *words.values(), -8.0],
        "token_type": [Kind.CONTROL, Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED]
        + [Kind.NORMAL] * len(words)
        + [Kind.UNUSED],
        "eos_token_id": 1,
        "unknown_token_id": 2,
        "precompiled_charsmap": np.frombuffer(charsmap, np.uint8) if charsmap else None,
    }
    return _write(path, {**entries, **changes})


def greedy(path: Path, **changes: Any) -> Path:
    """A file of kind rwkv: <end>, all bytes in RWKV's spelling, and a few words."""
    plain = {*range(0x20, 0x7F)} - {0x5C}
    letters = [chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in range(256)]
    letters[0x0A], letters[0x09], letters[0x5C] = "\\n", "\\t", "\\\\"
    words = ["he", "hello", " hello", "\\n\\n", "\u4f60", "\\xe4\\xbd", "    "]
    entries = {
        "model": "rwkv",
        "tokens": ["<end>", *letters, *words],
        "token_type": [Kind.CONTROL] + [Kind.NORMAL] * (256 + len(words)),
        "eos_token_id": 0,
    }
    return _write(path, {**entries, **changes})


def _write(path: Path, entries: dict[str, Any]) -> Path:
    builder = GGUFBuilder()
    builder.add("general.architecture", "llama")
    for key, value in entries.items():
        if key == "chat_template":
            builder.add("tokenizer.chat_template", value)
        elif value is not None:
            builder.add(f"tokenizer.ggml.{key}", value, _TYPES.get(key))
    return builder.write(path)
