"""Two small vocabularies as GGUF files: byte-level BPE and SentencePiece, each with all 256 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.text.bpe import _LETTERS
from shoal.text.vocab import Kind
from tests.support.gguf_builder import INT32, GGUFBuilder

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


def _write(path: Path, entries: dict[str, Any]) -> Path:
    builder = GGUFBuilder()
    builder.add("general.architecture", "llama")
    for key, value in entries.items():
        if key == "chat_template":
            builder.add("tokenizer.chat_template", value)
        elif value is not None:
            builder.add(f"tokenizer.ggml.{key}", value, INT32 if key == "token_type" else None)
    return builder.write(path)
