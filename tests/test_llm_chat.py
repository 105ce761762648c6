"""LLM.chat with tools, thinking and messages that are continued, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.errors import ParameterError
from tests.chat.templates import OPENED
from tests.support.tiny_model import write_tiny_model

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"), device="reference") as llm:
        yield llm


def prompt_of(llm: LLM, messages: Any = USER, **options: Any) -> str:
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert output.error is None
    assert llm.tokenizer is not None
    return llm.tokenizer.decode(output.prompt_token_ids)


def test_what_is_said_beside_the_messages_arrives(llm: LLM) -> None:
    assert '{"name": "f"' in prompt_of(llm, tools=[TOOL])
    assert '{"name": "f"' not in prompt_of(llm, tools=[TOOL], tool_choice="none")
    assert not prompt_of(llm, add_generation_prompt=False).endswith("assistant\n")
    continued = [*USER, {"role": "assistant", "content": "Well"}]
    assert prompt_of(llm, continued, continue_final_message=True).endswith("assistant\nWell")


def test_many_conversations_and_iterators_take_the_same(llm: LLM) -> None:
    outputs = llm.chat([USER, USER], GREEDY, False, tools=[TOOL])
    lazily = list(llm.chat(iter([USER, USER]), GREEDY, False, tools=[TOOL]))
    assert [output.prompt_token_ids for output in outputs] == [output.prompt_token_ids for output in lazily]
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in lazily]


def test_a_reply_is_content_where_nothing_else_is_found(llm: LLM) -> None:
    (output,) = llm.chat(USER, GREEDY, False, tools=[TOOL])
    answer = output.outputs[0]
    assert answer.reply.content == answer.text
    assert answer.reply.tool_calls == ()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tools": "f"}, "tools: got str"),
        ({"tool_choice": "required"}, "tool_choice: asks for a call"),
        ({"reasoning_effort": "much"}, "reasoning_effort: got 'much'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_what_is_wrong_is_the_error_of_its_conversation(llm: LLM, options: dict[str, Any], error: str) -> None:
    (output,) = llm.chat(USER, GREEDY, False, **options)
    assert output.outputs[0].finish_reason == "error"
    assert str(output.error).startswith(error)


def test_a_request_brings_no_template(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="chat_template"):
        llm.chat(USER, chat_template="{{ 1 }}")  # type: ignore[call-overload]


def test_a_prompt_that_opens_the_thoughts(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", template=OPENED)
    with LLM(path, device="reference") as llm:
        (output,) = llm.chat(USER, SamplingParams(temperature=0, max_tokens=4), False)
        reply = output.outputs[0].reply
        assert (reply.content, reply.reasoning) == ("", output.outputs[0].text.lstrip())
    with LLM(path, device="reference", reasoning_parser="none", chat_template_kwargs={"x": 1}) as llm:
        (output,) = llm.chat(USER, SamplingParams(temperature=0, max_tokens=4), False)
        assert output.outputs[0].reply.content == output.outputs[0].text
