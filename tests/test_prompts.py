"""Prompts to ids, on a tiny model whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import RequestError
from shoal.gguf.reader import GGUFFile
from shoal.params import EngineConfig
from shoal.prompts import PromptEncoder
from tests.support.tiny_model import write_tiny_model

KEYS = "{% for m in messages %}{{ m.keys() | join }}{% for p in m.content %}{{ p.keys() | join }}{{ p.text }}{% endfor %};{% endfor %}"


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[PromptEncoder]:
    """That of a model whose template writes which keys it sees."""
    with GGUFFile.open(write_tiny_model(tmp_path / "tiny.gguf", template=KEYS)) as file:
        encoder = PromptEncoder.from_gguf(file, EngineConfig(), 512)
    yield encoder
    encoder.close()


def text_of(encoder: PromptEncoder, prompt: Any) -> str:
    assert encoder.tokenizer is not None
    return encoder.tokenizer.decode(encoder.encode(prompt).ids)


def test_a_template_sees_what_is_given(encoder: PromptEncoder) -> None:
    part = {"type": "text", "text": "x", "image_url": None}
    user = {"role": "user", "content": [part], "name": None, "tool_calls": None}
    answer = {"role": "assistant", "content": [part], "tool_calls": [], "refusal": ""}
    assert text_of(encoder, {"messages": [user, answer]}) == "rolecontenttypetextx;rolecontenttypetextx;"


@pytest.mark.parametrize("messages", [5, None, "hi", {"role": "user"}, [5], [{"role": "user"}]], ids=str)
def test_messages_that_are_none_are_refused(encoder: PromptEncoder, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        encoder.encode({"messages": messages})


def test_nesting_without_end_is_refused(encoder: PromptEncoder) -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(RequestError, match="not plain JSON"):
        encoder.encode({"messages": [{"role": "user", "content": "x", "extra": deep}]})


@pytest.mark.parametrize("ids", [[1.0, 2], np.array([1.0, 2.0]), np.array([1, 2], np.uint8)], ids=repr)
def test_token_ids_of_any_type_are_integers(encoder: PromptEncoder, ids: Any) -> None:
    assert repr(encoder.encode({"prompt_token_ids": ids}).ids) == "[1, 2]"
