"""Batch files for benchmarks: rows in OpenAI's format, with texts that have about so many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.gguf.reader import GGUFFile
from shoal.text.tokenizer import Tokenizer

_URLS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}
_WORDS = (  # of one token each for most models
    "time year people way day man thing woman life child world school state family student group country problem hand part"
    " place case week company system program question work number night point home water room mother area money story fact"
    " month lot right study book eye job word business issue side kind head house service friend father power hour game line"
)


class RandomTexts:
    """Texts of everyday words in the tokens of a model; the same ones for the same ``seed``."""

    def __init__(self, model: Path, seed: int = 0) -> None:
        with GGUFFile.open(model) as file:
            self._tokenizer = Tokenizer.from_gguf(file)
        self._rng = np.random.default_rng(seed)

    def text(self, tokens: int) -> str:
        """The next text, about ``tokens`` tokens long."""
        words = " ".join(self._rng.choice(_WORDS.split(), tokens))
        return self._tokenizer.decode(self._tokenizer.encode(words, add_special=False)[:tokens])

    def completions(self, rows: int, prompt_len: int, output_len: int) -> Iterator[dict[str, Any]]:
        """Bodies with a prompt of their own each, and answers of exactly ``output_len`` tokens."""
        for _ in range(rows):
            yield {"prompt": self.text(prompt_len), **_exactly(output_len)}

    def chats(self, rows: int, system_len: int, question_len: int, output_len: int) -> Iterator[dict[str, Any]]:
        """Bodies with one system prompt for all, then a question of their own."""
        system = {"role": "system", "content": self.text(system_len)}
        for _ in range(rows):
            question = {"role": "user", "content": self.text(question_len)}
            yield {"messages": [system, question], **_exactly(output_len)}


def write_batch(path: Path, bodies: Iterable[dict[str, Any]]) -> Path:
    """Write a row for each body, one in memory at a time; their custom_ids are "0", "1" and so on."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for number, body in enumerate(bodies):
            url = next(url for field, url in _URLS.items() if field in body)
            row = {"custom_id": str(number), "method": "POST", "url": url, "body": body}
            file.write(encoder.encode(row) + b"\n")
    return path


def _exactly(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True}
