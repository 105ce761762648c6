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
from shoal.requests.prompts import PromptEncoder
from shoal.text.chat import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from tests.support.tiny_model import write_tiny_model
from tests.text.tiny import CHATML, byte_level, sentencepiece

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


# Control tokens and BOS -----------------------------------------------------------------------------------------------

TEMPLATED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
TALK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def bpe(tmp_path: Path) -> Iterator[PromptEncoder]:
    """Has a chat template, adds nothing to texts."""
    tokenizer, template = Tokenizer.from_gguf(byte_level(tmp_path / "bpe.gguf")), ChatTemplate(CHATML)
    yield PromptEncoder(tmp_path / "bpe.gguf", tokenizer, template, 512)
    template.close()


@pytest.fixture
def spm(tmp_path: Path) -> Iterator[PromptEncoder]:
    """Puts BOS in front of texts; so does its chat template."""
    tokenizer, template = Tokenizer.from_gguf(sentencepiece(tmp_path / "spm.gguf")), ChatTemplate("<s>hello")
    yield PromptEncoder(tmp_path / "spm.gguf", tokenizer, template, 512)
    template.close()


def ids_of(encoder: PromptEncoder, prompt: Any) -> list[int]:
    return encoder.encode(prompt).ids


def test_a_prompt_may_be_a_text_with_options(spm: PromptEncoder) -> None:
    tokenizer = spm.tokenizer
    assert tokenizer is not None
    text = "hello</s>"
    nothing_said: list[Any] = [
        text,
        {"prompt": text},
        {"prompt": text, "add_special_tokens": None, "parse_special": None},
    ]
    for prompt in nothing_said:
        assert spm.encode(prompt)[:2] == (tokenizer.encode(text), text)
    for add in (True, False):
        for parse in (True, False):
            prompt = {"prompt": text, "add_special_tokens": add, "parse_special": parse}
            assert spm.encode(prompt)[:2] == (tokenizer.encode(text, add, parse), text)


def test_a_text_that_a_template_was_applied_to_gives_the_ids_of_its_messages(bpe: PromptEncoder) -> None:
    parsed = ids_of(bpe, {"prompt": TEMPLATED, "parse_special": True})
    assert parsed == ids_of(bpe, {"messages": TALK})
    assert parsed != ids_of(bpe, TEMPLATED)


def test_bos_is_added_to_a_conversation_only_where_asked_for(spm: PromptEncoder) -> None:
    plain = ids_of(spm, {"messages": TALK})
    assert ids_of(spm, {"messages": TALK, "add_special_tokens": False}) == plain
    assert ids_of(spm, {"messages": TALK, "add_special_tokens": True}) == [1, *plain]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt": "x", "parse_special": "yes"}, "parse_special: got 'yes', must be true or false"),
        ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens: got 1"),
        ({"messages": TALK, "add_special_tokens": 1}, "add_special_tokens: got 1"),
        ({"prompt": "x", "parse_specials": True}, "'parse_specials': a prompt that is a text has only"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [1]}, "must be a text"),
        ({}, "must be a text"),
        (5, "must be a text"),
    ],
)
def test_prompts_that_are_none_are_refused(bpe: PromptEncoder, prompt: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        bpe.encode(prompt)


def test_control_tokens_that_are_taken_as_text_are_said_once(
    bpe: PromptEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    bpe.encode("hello")
    bpe.encode({"prompt": TEMPLATED, "parse_special": True})
    bpe.encode({"messages": [{"role": "user", "content": TEMPLATED}]})
    assert caplog.messages == []
    for _ in range(3):
        bpe.encode(f"hello {TEMPLATED}")
    (said,) = caplog.messages
    assert "spells the control token '<|im_start|>', which is taken as text: give messages" in said
    assert "set parse_special to true (said once)" in said


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt": "<s>hello", "parse_special": True}, "begins with '<s>', and the special token is added again"),
        ({"messages": TALK, "add_special_tokens": True}, "begins with '<s>', and the special token is added again"),
        ("<s>hello", "set parse_special to true and add_special_tokens to false"),
        ("hello</s>", "set parse_special to true (said once)"),
    ],
)
def test_two_bos_are_said(spm: PromptEncoder, caplog: pytest.LogCaptureFixture, prompt: Any, says: str) -> None:
    spm.encode({"prompt": "<s>hello", "parse_special": True, "add_special_tokens": False})
    spm.encode({"messages": TALK})
    assert caplog.messages == []
    spm.encode(prompt)
    spm.encode(prompt)
    (said,) = caplog.messages
    assert says in said
