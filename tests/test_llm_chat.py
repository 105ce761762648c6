"""LLM.chat with tools, thinking and messages that are continued, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams, StructuredOutputsParams
from shoal.errors import ParameterError
from tests.chat.templates import OPENED
from tests.support.tiny_model import write_tiny_model

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMPOSSIBLE = {"type": "function", "function": {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}}
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=2048), device="reference") as llm:
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
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
                "tool_choice": "required",
            },
            "tools: ",
        ),
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


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
LONG = SamplingParams(temperature=1.5, seed=1, max_tokens=400)


@pytest.mark.parametrize(("choice", "parallel"), [(NAMED, None), ("required", None), ("required", False)])
def test_a_forced_call_follows_its_schema_even_from_random_weights(
    llm: LLM, choice: Any, parallel: bool | None
) -> None:
    params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=400) for seed in range(3)]
    outputs = llm.chat(
        [USER] * 3, params, False, tools=[WEATHER, TOOL], tool_choice=choice, parallel_tool_calls=parallel
    )
    for output in outputs:
        assert output.error is None
        answer = output.outputs[0]
        reply = answer.reply
        if answer.finish_reason == "length":  # a list of calls may go on for long
            assert reply.finish_reason("length") == "length"
            continue
        assert reply.finish_reason(answer.finish_reason) == "tool_calls"
        assert reply.content == ""
        if choice == NAMED:
            assert [call.name for call in reply.tool_calls] == ["get_weather"]
        if parallel is False:
            assert len(reply.tool_calls) == 1
        for call in reply.tool_calls:
            arguments = json.loads(call.arguments)
            assert call.name == "f" or (arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9)
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs)


def test_forced_and_free_rows_do_not_disturb_each_other(llm: LLM) -> None:
    forced = {"messages": USER, "tools": [WEATHER], "tool_choice": NAMED}
    free = {"messages": USER}
    alone = [llm.generate([prompt], LONG, False)[0].outputs[0].token_ids for prompt in (forced, free)]
    together = [output.outputs[0].token_ids for output in llm.generate([forced, free], LONG, False)]
    assert together == alone


def test_samples_of_a_forced_call_are_held_to_it_apart(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=1, max_tokens=400)
    (output,) = llm.chat(USER, params, False, tools=[WEATHER], tool_choice=NAMED)
    calls = [answer.reply.tool_calls[0] for answer in output.outputs]
    assert all(json.loads(call.arguments)["city"] in ("Rome", "Oslo") for call in calls)
    assert len({call.id for call in calls}) == 3


def test_a_forced_call_and_another_form_contradict_each_other(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="aaaa"), max_tokens=9)
    (output,) = llm.chat(USER, params, False, tools=[WEATHER], tool_choice=NAMED)
    assert str(output.error).startswith("tool_choice: ")
    (output,) = llm.chat(USER, params, False, tools=[WEATHER])
    assert output.outputs[0].text == "aaaa"


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Its prompts open the thoughts."""
    path = write_tiny_model(tmp_path_factory.mktemp("model") / "thinking.gguf", template=OPENED)
    with LLM(path, device="reference") as llm:
        yield llm


@pytest.mark.parametrize("budget", [0, 5])
def test_thoughts_have_a_limit_and_a_form_waits_for_their_end(thinking: LLM, budget: int) -> None:
    params = SamplingParams(
        temperature=1,
        seed=1,
        max_tokens=200,
        thinking_token_budget=budget,
        structured_outputs=StructuredOutputsParams(choice=["yes", "no"]),
    )
    (output,) = thinking.chat(USER, params, False)
    answer = output.outputs[0]
    assert answer.finish_reason == "stop"
    assert answer.token_ids[budget : budget + len("</think>")] == list(b"</think>")
    assert answer.reply.content in ("yes", "no")
    (free,) = thinking.chat(
        USER, SamplingParams(temperature=1, seed=1, max_tokens=20, thinking_token_budget=budget), False
    )
    assert free.outputs[0].token_ids[: budget + 8] == answer.token_ids[: budget + 8]


def test_without_an_end_of_the_thoughts_nothing_is_said(thinking: LLM) -> None:
    params = SamplingParams(
        temperature=1, seed=1, max_tokens=20, structured_outputs=StructuredOutputsParams(choice=["yes"])
    )
    (output,) = thinking.chat(USER, params, False)
    answer = output.outputs[0]
    assert (answer.finish_reason, answer.reply.content, len(answer.token_ids)) == ("length", "", 20)


def test_a_limit_needs_thoughts_to_be_told_apart(llm: LLM) -> None:
    (output,) = llm.chat(USER, SamplingParams(thinking_token_budget=3), False)
    assert str(output.error).startswith("thinking_token_budget: ")
    (output,) = llm.generate(["x"], SamplingParams(thinking_token_budget=3), False)
    assert str(output.error).startswith("thinking_token_budget: ")


def test_a_prompt_that_opens_the_thoughts(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", template=OPENED)
    with LLM(path, device="reference") as llm:
        (output,) = llm.chat(USER, SamplingParams(temperature=0, max_tokens=4), False)
        reply = output.outputs[0].reply
        assert (reply.content, reply.reasoning) == ("", output.outputs[0].text.lstrip())
    with LLM(path, device="reference", reasoning_parser="none", chat_template_kwargs={"x": 1}) as llm:
        (output,) = llm.chat(USER, SamplingParams(temperature=0, max_tokens=4), False)
        assert output.outputs[0].reply.content == output.outputs[0].text
