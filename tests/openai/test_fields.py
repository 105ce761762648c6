"""Fields of bodies: used, refused with what shoal lacks, or known to be harmless; none is dropped silently."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.openai.convert import Call, parse_chat, parse_completion
from shoal.openai.fields import IGNORED, LACKS
from shoal.openai.schema import APIError, ChatBody, CompletionBody

USER = [{"role": "user", "content": "hi"}]
LACKING = {field: off for fields in LACKS.values() for field, off in fields.items()}

# All that OpenAI's client can send, of version 3.57 of its package.
OPENAI_SHARED = {
    *("frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty", "seed", "stop"),
    *("stream", "stream_options", "temperature", "top_p", "user"),
}
OPENAI_CHAT = {
    *(
        "audio",
        "function_call",
        "functions",
        "max_completion_tokens",
        "messages",
        "metadata",
        "modalities",
        "moderation",
    ),
    *("parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "tool_choice", "tools"),
    *("top_logprobs", "verbosity", "web_search_options"),
}
OPENAI_COMPLETION = {"prompt", "best_of", "echo", "suffix"}


def chat(**fields: Any) -> Call:
    return parse_chat({"messages": USER, **fields})


def completion(**fields: Any) -> Call:
    return parse_completion({"prompt": "hi", **fields})


def refused(parse: Any, **fields: Any) -> APIError:
    own = {"messages": USER} if parse is parse_chat else {"prompt": "hi"}
    with pytest.raises(APIError) as caught:
        parse({**own, **fields})
    assert caught.value.status == 400
    return caught.value


def test_every_field_of_openai_is_known() -> None:
    known = {*IGNORED, *LACKING}
    assert known | set(ChatBody.__struct_fields__) >= OPENAI_SHARED | OPENAI_CHAT
    assert known | set(CompletionBody.__struct_fields__) >= OPENAI_SHARED | OPENAI_COMPLETION


@pytest.mark.parametrize(
    ("field", "value", "lack"),
    [
        ("best_of", 4, "ranked"),
        ("suffix", "x", "filled in"),
        ("stream", True, "stream"),
        ("stream_options", {"include_usage": True}, "stream"),
        ("functions", [{}], "tools"),
        ("guided_json", {}, "give structured_outputs.json"),
        ("audio", {"voice": "a"}, "text alone"),
        ("modalities", ["text", "audio"], "text alone"),
        ("moderation", {"model": "x"}, "moderated"),
        ("web_search_options", {"search_context_size": "low"}, "know"),
        ("chat_template", "{{ 1 }}", "template"),
        ("verbosity", "low", "max_tokens"),
    ],
)
@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_what_is_not_supported_is_refused_with_what_shoal_lacks(parse: Any, field: str, value: Any, lack: str) -> None:
    error = refused(parse, **{field: value})
    assert error.param == field
    assert str(error).startswith(f"{field}: not supported: ")
    assert lack in str(error)


@pytest.mark.parametrize("field", sorted(LACKING))
def test_what_is_not_supported_may_be_null_empty_or_off(field: str) -> None:
    for value in (None, "", *LACKING[field]):
        assert completion(**{field: value}) == completion()
        if field not in ChatBody.__struct_fields__:
            assert chat(**{field: value}) == chat()


@pytest.mark.parametrize("field", sorted(IGNORED))
def test_harmless_fields_change_nothing(field: str) -> None:
    assert completion(**{field: {"a": ["b"]}}) == completion()
    assert chat(**{field: "anything"}) == chat()


def test_a_field_of_a_struct_may_be_null() -> None:
    """As Arrow gives columns that are structs, where another row has more of them."""
    assert chat(response_format={"type": "text", "json_schema": {"name": None}, "strict": None}).prompt == chat().prompt
    assert chat(tool_choice={"type": None, "function": None}, stream_options={"include_usage": None}) == chat()


@pytest.mark.parametrize("field", sorted({*ChatBody.__struct_fields__} - {"messages"}))
def test_what_is_used_may_be_null_or_empty(field: str) -> None:
    for value in (None, ""):
        assert chat(**{field: value}) == chat()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("made_up", 1, "made_up: no such field"),
        ("made_up", False, "made_up: no such field"),
        ("max_token", 5, "max_token: no such field; did you mean max_tokens?"),
        ("temprature", 0, "temprature: no such field; did you mean temperature?"),
        ("respons_format", {}, "respons_format: no such field; did you mean response_format?"),
        ("x" * 100_000, 1, "no such field"),
    ],
)
def test_an_unknown_field_is_refused_and_the_nearest_known_named(field: str, value: Any, says: str) -> None:
    for parse in (parse_chat, parse_completion):
        error = refused(parse, **{field: value})
        assert error.param is not None
        assert field.startswith(error.param.removesuffix("..."))
        assert says in str(error) or len(field) > 100


def test_a_field_of_the_other_endpoint_is_named_as_that() -> None:
    assert "prompt: is a field of /v1/completions, not of /v1/chat/completions" in str(refused(parse_chat, prompt="x"))
    assert "is a field of /v1/chat/completions" in str(refused(parse_completion, max_completion_tokens=1))
    assert "only chats have it" in str(refused(parse_completion, tools=[{"type": "function"}]))
    assert completion(tools=[], tool_choice="none") == completion()


WHOLE: dict[str, Any] = {
    "max_tokens": 9,
    "min_tokens": 2,
    "top_k": 7,
    "seed": 3,
    "stop_token_ids": [4, 5],
    "logprobs": 5,
    "prompt_logprobs": 3,
    "prompt": [1, 2, 3],
    "n": 3,
    "priority": -2,
}


def as_floats(value: Any) -> Any:
    return list(map(as_floats, value)) if isinstance(value, list) else float(value)


@pytest.mark.parametrize("field", WHOLE)
def test_a_whole_number_may_be_written_as_a_float(field: str) -> None:
    whole = completion(**{field: WHOLE[field]})
    assert repr(completion(**{field: as_floats(WHOLE[field])})) == repr(whole)


def test_whole_numbers_of_a_chat_may_be_written_as_floats() -> None:
    whole = chat(logprobs=True, top_logprobs=2, max_completion_tokens=6)
    assert repr(chat(logprobs=True, top_logprobs=2.0, max_completion_tokens=6.0)) == repr(whole)


@pytest.mark.parametrize("value", [4.5, 1e30, -1e30, 1e308])
@pytest.mark.parametrize(
    "field", ["max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "n", "priority"]
)
def test_a_number_that_is_no_integer_or_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    error = refused(parse_completion, **{field: value})
    assert error.param == field
    assert str(error).startswith(f"{field}: ")


def test_parts_of_a_list_are_refused_with_its_name() -> None:
    assert refused(parse_completion, prompt=[1, 2.5]).param == "prompt"
    assert refused(parse_completion, stop_token_ids=[1, 2.5]).param == "stop_token_ids[1]"


def test_the_likeliest_token_alone_may_be_asked_for_with_top_p() -> None:
    assert completion(top_p=0).params.top_p == 0
