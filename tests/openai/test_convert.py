"""Bodies to requests: every field is used, refused by name, or known to be harmless. Outputs to bodies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ContextLengthError, ParameterError, RequestError, TemplateError
from shoal.llm import CompletionOutput, Logprob, RequestOutput
from shoal.openai.convert import (
    Call,
    answer,
    check_model,
    completions_answer,
    failure,
    parse_chat,
    parse_completion,
    parse_completions,
    refusal,
)
from shoal.openai.schema import APIError
from shoal.params import SamplingParams
from shoal.text.stream import StreamDecoder
from shoal.text.tokenizer import Tokenizer
from tests.openai.test_schema import VALUES
from tests.text.tiny import byte_level, sentencepiece

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> Call:
    return parse_chat({"messages": USER, **fields})


def completion(**fields: Any) -> Call:
    return parse_completion({"prompt": "hi", **fields})


def refused(parse: Any, body: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


# Fields that are used -------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_openai() -> None:
    assert chat() == Call("chat", None, {"messages": USER}, SamplingParams(max_tokens=None))
    assert completion() == Call("completion", None, "hi", SamplingParams(max_tokens=16))


def test_every_sampling_field_arrives() -> None:
    shared: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "min_tokens": 2,
        "max_tokens": 9,
        "seed": 3,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    shared["prompt_logprobs"] = 3
    assert completion(**shared, logprobs=5).params == SamplingParams(**shared, logprobs=5)
    assert chat(**shared, logprobs=True, top_logprobs=5).params == SamplingParams(**shared, logprobs=5)


def test_stop_may_be_one_string_and_integers_may_stand_for_floats() -> None:
    params = completion(stop="END", temperature=1, top_p=1).params
    assert params.stop == ("END",)
    assert params.temperature == 1.0


def test_a_chat_is_limited_by_either_name() -> None:
    assert chat(max_tokens=5).params.max_tokens == 5
    assert chat(max_completion_tokens=6).params.max_tokens == 6
    assert chat(max_completion_tokens=6, max_tokens=6).params.max_tokens == 6
    assert refused(parse_chat, {"messages": USER, "max_completion_tokens": 6, "max_tokens": 5}).param == "max_tokens"


def test_logprobs_of_a_chat() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=False).params.logprobs is None
    assert refused(parse_chat, {"messages": USER, "top_logprobs": 2}).param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "prompt_logprobs", "shown"),
    [
        ({}, None, False),
        ({"logprobs": 2}, None, False),
        ({"echo": True}, None, False),
        ({"echo": True, "logprobs": 2}, 2, False),
        ({"echo": True, "logprobs": 2, "max_tokens": 0}, 2, False),
        ({"echo": True, "max_tokens": 0}, 0, False),
        ({"echo": True, "logprobs": 2, "prompt_logprobs": 5}, 5, True),
        ({"prompt_logprobs": 0, "max_tokens": 0}, 0, True),
    ],
)
def test_log_probabilities_of_the_prompt(fields: dict[str, Any], prompt_logprobs: int | None, shown: bool) -> None:
    call = completion(**fields)
    assert call.params == SamplingParams(
        max_tokens=fields.get("max_tokens", 16), logprobs=fields.get("logprobs"), prompt_logprobs=prompt_logprobs
    )
    assert (call.echo, call.prompt_logprobs) == (fields.get("echo", False), shown)


def test_a_chat_has_log_probabilities_of_the_prompt() -> None:
    call = chat(prompt_logprobs=4)
    assert (call.params.prompt_logprobs, call.prompt_logprobs) == (4, True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", "text"),
        (["text"], "text"),
        ([1, 2], {"prompt_token_ids": [1, 2]}),
        ([[1, 2]], {"prompt_token_ids": [1, 2]}),
    ],
)
def test_forms_of_a_prompt(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


def test_how_a_text_becomes_ids() -> None:
    assert completion(parse_special=True).prompt == {"prompt": "hi", "add_special_tokens": True, "parse_special": True}
    assert completion(add_special_tokens=False).prompt == {
        "prompt": "hi",
        "add_special_tokens": False,
        "parse_special": False,
    }
    assert completion(add_special_tokens=True, parse_special=False).prompt == "hi"
    assert completion(prompt=[1], add_special_tokens=False, parse_special=True).prompt == {"prompt_token_ids": [1]}
    assert chat(add_special_tokens=False, parse_special=False).prompt == {"messages": USER}
    assert chat(add_special_tokens=True).prompt == {"messages": USER, "add_special_tokens": True}
    error = refused(parse_chat, {"messages": USER, "parse_special": True})
    assert str(error) == "parse_special: not supported: control tokens spelled in messages are always text"
    assert refused(parse_completion, {"prompt": "hi", "parse_special": 1}).param == "parse_special"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", "b"], [[1], [2]], [1, "a"], [1, True], [1.5], [{}], 5])
def test_a_prompt_that_is_none(prompt: Any) -> None:
    assert refused(parse_completion, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"], [[1], [2, 3]], ["a", [1]]])
def test_each_prompt_of_a_list_is_a_call(prompts: list[Any]) -> None:
    fields = {"n": 2, "seed": 3, "echo": True, "model": "m"}
    assert parse_completions({"prompt": prompts, **fields}) == [completion(prompt=one, **fields) for one in prompts]
    assert parse_completions({"prompt": prompts[0], **fields}) == [completion(prompt=prompts[0], **fields)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompt: is empty"),
        (["a", ""], "prompt[1]: is empty"),
        (["a", "b", [1, "c"]], "prompt[2]: must be a text or a list of token ids"),
        (["a", 5], "prompt[1]: must be a text or a list of token ids"),
        ([[1], [True]], "prompt[1]: must be a text or a list of token ids"),
        (["a"] * 2049, "prompt: has 2049 prompts, must have 1 to 2048"),
    ],
)
def test_a_list_of_prompts_that_is_refused(prompts: list[Any], message: str) -> None:
    error = refused(parse_completions, {"prompt": prompts})
    assert (error.param, str(error).startswith(message)) == ("prompt", True)


SAMPLING = {
    "presence_penalty": 0.5,
    "frequency_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 1.0, 7: -100.0},
    "bad_words": ("x", "a b"),
    "allowed_token_ids": (1, 2),
    "logprob_token_ids": (3,),
    "min_keep": 3,
    "typical_p": 0.9,
    "top_n_sigma": 1.5,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 2,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "repeat_last_n": 64,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("x",),
    "mirostat": 2,
    "mirostat_tau": 4,
    "mirostat_eta": 0.2,
    "samplers": ("top_k", "temperature"),
}


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_samplers_of_vllm_and_llama_cpp_are_taken(parse: Any) -> None:
    body = {"messages": USER} if parse is parse_chat else {"prompt": "hi"}
    sent = json.loads(json.dumps(SAMPLING))  # lists, and ids as text
    params = parse({**body, **sent}).params
    assert {name: getattr(params, name) for name in SAMPLING} == SAMPLING
    assert parse({**body, **dict.fromkeys(SAMPLING)}).params == parse(body).params
    assert parse({**body, "repeat_penalty": 1.25}).params.repetition_penalty == 1.25
    assert parse({**body, "samplers": "kt"}).params.samplers == ("top_k", "temperature")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.5),
        ("repetition_penalty", 0),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("logit_bias", {"5": "1"}),
        ("bad_words", [""]),
        ("typical_p", 1.5),
        ("mirostat", 3),
        ("samplers", ["top_k", "infill"]),
        ("samplers", "kq"),
        ("dry_base", 0.5),
        ("dry_sequence_breakers", ["x" * 41]),
        ("repeat_last_n", -2),
    ],
)
def test_samplers_that_are_refused(field: str, value: Any) -> None:
    assert refused(parse_chat, {"messages": USER, field: value}).param.startswith(field)  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [1, 1.5])
def test_two_names_of_one_penalty_are_refused(value: float) -> None:
    body = {"prompt": "hi", "repeat_penalty": 1.5, "repetition_penalty": value}
    assert refused(parse_completion, body).param == "repeat_penalty"


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("min_p", 2),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**63),
        ("max_tokens", 10**30),
        ("max_tokens", 1e30),
        ("max_tokens", 4.5),
        ("min_tokens", 17),
        ("seed", 2**64),
        ("seed", "x"),
        ("seed", 0.5),
        ("stop", ["x"] * 100_000),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["\ud800"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "x"),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("echo", 1),
        ("ignore_eos", 1),
        ("model", 5),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    error = refused(parse_completion, {"prompt": "hi", field: value})
    assert error.param == field
    assert str(error).startswith(f"{field}: ")


def test_a_parameter_is_called_what_the_body_calls_it() -> None:
    assert refused(parse_chat, {"messages": USER, "max_completion_tokens": 0}).param == "max_completion_tokens"
    error = refused(parse_chat, {"messages": USER, "logprobs": True, "top_logprobs": 21})
    assert error.param == "top_logprobs"
    assert str(error).startswith("top_logprobs: ")


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_must_be_an_object(body: Any) -> None:
    assert refused(parse_chat, body).param is None


@given(st.dictionaries(st.sampled_from(["prompt", "messages", "stop", "seed", "n", "zzz"]) | st.text(), VALUES))
def test_any_object_is_a_call_or_a_refusal(body: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            call = parse(body)
        except APIError as error:
            msgspec.json.encode(error.body())
        else:
            assert call.prompt


def test_a_body_may_name_a_served_model_or_none() -> None:
    check_model(None, ["a"])
    check_model("a", ["a", "b"])
    with pytest.raises(APIError, match="'c' is not served here; there is a, b") as caught:
        check_model("c", ["a", "b"])
    error = caught.value
    assert (error.status, error.kind, error.param, error.code) == (
        404,
        "invalid_request_error",
        "model",
        "model_not_found",
    )


def test_what_the_model_refuses_names_the_field_of_the_body() -> None:
    too_long = ContextLengthError("too long", "prompt_token_ids")
    assert refusal(chat(), too_long).param == "messages"
    assert refusal(completion(), too_long).param == "prompt"
    assert refusal(completion(), too_long).code == "context_length_exceeded"
    assert refusal(completion(), RequestError("empty", "prompt")).code is None
    assert refusal(chat(), TemplateError("no")).param == "messages"
    assert refusal(chat(), ParameterError("seed", 1, "2")).param == "seed"
    assert refusal(chat(), RequestError("full")).param is None


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [
        (["stop", "length"], None),
        ([None, "stop"], None),
        ([None, "timeout"], (504, "timeout_error", "request_timeout", "the request was not finished in time")),
        (["stop", "error"], (500, "server_error", None, "NaN logits")),
        (["abort", "abort"], (503, "server_error", None, "the request was aborted")),
    ],
)
def test_a_request_fails_with_one_of_its_answers(reasons: list[str | None], expected: Any) -> None:
    given = [CompletionOutput(index, "", [], finish_reason=reason) for index, reason in enumerate(reasons)]
    error = failure(RequestOutput("r", None, [1], given, finished=True, error="NaN logits"))
    assert (error and (error.status, error.kind, error.code, str(error))) == expected


# Responses ------------------------------------------------------------------------------------------------------------

TOKENS = {1: b"He", 2: b"\xe2\x82", 3: b"\xac", 4: b"!"}


class Spelling:
    """What ``answer`` needs of a tokenizer."""

    vocab_size = 5
    token_bytes = staticmethod(TOKENS.__getitem__)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        return StreamDecoder(self.token_bytes)


def output(*, finish_reason: str = "stop", logprobs: list[dict[int, Logprob]] | None = None) -> RequestOutput:
    given = CompletionOutput(0, "He\u20ac", [1, 2, 3], logprobs=logprobs, finish_reason=finish_reason)
    return RequestOutput("r", None, [7, 8], [given], finished=True)


def as_json(call: Call, out: RequestOutput) -> Any:
    body = answer(call, out, response_id="x", model="m", tokenizer=cast(Tokenizer, Spelling()))
    return json.loads(msgspec.json.encode(body))


def test_the_body_of_a_chat() -> None:
    body = as_json(chat(), output())
    assert body.pop("created") > 1.7e9
    assert body == {
        "id": "chatcmpl-x",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "He\u20ac", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_body_of_a_completion() -> None:
    body = as_json(completion(), output(finish_reason="length"))
    assert (body["id"], body["object"]) == ("cmpl-x", "text_completion")
    assert body["choices"] == [{"index": 0, "text": "He\u20ac", "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("call", [chat(n=3), completion(n=3)])
def test_all_samples_are_choices_and_count(call: Call) -> None:
    assert call.params.n == 3
    out = output()
    out.outputs += [CompletionOutput(index, f"text {index}", [4, 5], finish_reason="length") for index in (1, 2)]
    body = as_json(call, out)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length", "length"]
    texts = [choice["message"]["content"] if call.kind == "chat" else choice["text"] for choice in body["choices"]]
    assert texts == ["He\u20ac", "text 1", "text 2"]
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 7, 9)


def test_answers_to_many_prompts_are_choices_of_one_body() -> None:
    calls = parse_completions({"prompt": ["a", "b"], "n": 2})
    outputs = [output(), output(finish_reason="length")]
    for number, out in enumerate(outputs):
        out.outputs.append(CompletionOutput(1, f"text {number}", [4], finish_reason="stop"))
        out.num_cached_tokens = 1
    body = completions_answer(
        list(zip(calls, outputs, strict=True)),
        response_id="x",
        model="m",
        tokenizer=cast(Tokenizer, Spelling()),
    )
    assert [(choice.index, choice.text, choice.finish_reason) for choice in body.choices] == [
        (0, "He\u20ac", "stop"),
        (1, "text 0", "stop"),
        (2, "He\u20ac", "length"),
        (3, "text 1", "stop"),
    ]
    usage = body.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, 8, 12)
    assert usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("build", [chat, completion])
def test_a_priority_is_taken_over(build: Any) -> None:
    assert (build().priority, build(priority=-3).priority) == (0, -3)


@pytest.mark.parametrize("value", [2**63, 0.5, True, "1"])
@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_a_priority_out_of_range_is_refused(parse: Any, value: Any) -> None:
    body = {"messages": USER} if parse is parse_chat else {"prompt": "hi"}
    assert refused(parse, {**body, "priority": value}).param == "priority"


LOGPROBS = [
    {1: Logprob(-0.5, 1, "He"), 4: Logprob(-1.0, 2, "!")},
    {2: Logprob(-3.0, 9, "?"), 4: Logprob(-0.25, 1, "!"), 1: Logprob(-1.5, 2, "He")},
    {3: Logprob(float("-inf"), 3, "?"), 4: Logprob(0.0, 1, "!"), 1: Logprob(-8.0, 2, "He")},
]


def test_logprobs_of_a_chat_hold_the_best_k() -> None:
    body = as_json(chat(logprobs=True, top_logprobs=2), output(logprobs=LOGPROBS))
    first, second, third = body["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "He",
        "logprob": -0.5,
        "bytes": [72, 101],
        "top_logprobs": [
            {"token": "He", "logprob": -0.5, "bytes": [72, 101]},
            {"token": "!", "logprob": -1.0, "bytes": [33]},
        ],
    }
    assert (second["token"], second["bytes"]) == ("\ufffd", [0xE2, 0x82])
    assert [top["token"] for top in second["top_logprobs"]] == ["!", "He"]
    assert third["logprob"] == -9999.0


def test_logprobs_of_a_chat_without_top() -> None:
    content = as_json(chat(logprobs=True), output(logprobs=LOGPROBS))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in content] == [[], [], []]


def test_logprobs_of_a_completion_are_parallel_lists() -> None:
    assert as_json(completion(logprobs=2), output(logprobs=LOGPROBS))["choices"][0]["logprobs"] == {
        "tokens": ["He", "bytes:\\xe2\\x82", "bytes:\\xac"],
        "token_logprobs": [-0.5, -3.0, -9999.0],
        "top_logprobs": [
            {"He": -0.5, "!": -1.0},
            {"bytes:\\xe2\\x82": -3.0, "!": -0.25, "He": -1.5},
            {"bytes:\\xac": -9999.0, "!": 0.0, "He": -8.0},
        ],
        "text_offset": [0, 2, 2],
    }


def place(token: int, logprob: float, rank: int = 1, **others: float) -> dict[int, Logprob]:
    """A token and its likelier neighbours, best first, as ``t5=-0.5``."""
    best = {int(name[1:]): Logprob(value, i, "") for i, (name, value) in enumerate(others.items(), start=1)}
    return {token: Logprob(logprob, rank, "x"), **best}


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Puts BOS and a space in front of what it encodes."""
    return Tokenizer.from_gguf(sentencepiece(tmp_path_factory.mktemp("spm") / "spm.gguf"))


def echoed(tokenizer: Tokenizer, prompt: str | None, ids: list[int], answer_ids: list[int], **fields: Any) -> Any:
    """The choice of an echoing completion whose every token has log-probability -1."""
    call = completion(prompt=prompt or ids, echo=True, **fields)
    given = CompletionOutput(0, tokenizer.decode(answer_ids), answer_ids, finish_reason="length")
    out = RequestOutput("r", prompt, ids, [given], finished=True)
    if "logprobs" in fields:
        given.logprobs = [place(token, -1.0) for token in answer_ids]
        out.prompt_logprobs = [None, *(place(token, -1.0) for token in ids[1:])]
    return json.loads(msgspec.json.encode(answer(call, out, response_id="x", model="m", tokenizer=tokenizer)))[
        "choices"
    ][0]


def test_an_echo_is_the_prompt_and_the_answer(spm: Tokenizer) -> None:
    text = "hello\u00e9 \u20ac"
    ids, more = spm.encode(text), spm.encode("hell", add_special=False)
    assert echoed(spm, text, ids, more)["text"] == text + spm.decode(more)
    assert echoed(spm, text, ids, more)["logprobs"] is None
    assert echoed(spm, None, ids[1:], more)["text"] == text + spm.decode(more)
    assert echoed(spm, None, ids, [], skip_special_tokens=False)["text"] == "<s> " + text


@pytest.mark.parametrize("skip", [True, False])
def test_an_echo_has_the_log_probabilities_of_both(spm: Tokenizer, skip: bool) -> None:
    text = "hello\u00e9 \u20ac"
    ids, more = spm.encode(text), spm.encode("hello", add_special=False)
    choice = echoed(spm, text, ids, more, logprobs=1, skip_special_tokens=skip)
    found = choice["logprobs"]
    assert found["token_logprobs"] == [None] + [-1.0] * (len(ids) + len(more) - 1)
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1:] == [{token: -1.0} for token in found["tokens"][1:]]
    pieces = ["<s>", " hello", "\u00e9", " ", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", " hello"]
    assert list(zip(found["tokens"], found["text_offset"], strict=True)) == list(
        zip(pieces, [0, 0, 5, 6, 7, 7, 7, 8], strict=True)
    )
    assert "prompt_logprobs" not in choice


def test_an_echo_of_parsed_control_tokens_knows_their_places(tmp_path: Path) -> None:
    bpe = Tokenizer.from_gguf(byte_level(tmp_path / "bpe.gguf"))
    text = "hello<|im_end|>ab"
    ids, more = bpe.encode(text, parse_special=True), bpe.encode("hello")
    choice = echoed(bpe, text, ids, more, logprobs=0, parse_special=True)
    assert choice["text"] == "hello<|im_end|>abhello"
    found = list(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
    assert found == [("hello", 0), ("<|im_end|>", 5), ("ab", 15), ("hello", 17)]


def test_a_scored_prompt_has_its_log_probabilities_alone(spm: Tokenizer) -> None:
    choice = echoed(spm, "hello", spm.encode("hello"), [], logprobs=0, max_tokens=0)
    assert choice["text"] == "hello"
    assert choice["logprobs"] == {
        "tokens": ["<s>", " hello"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {" hello": -1.0}],
        "text_offset": [0, 0],
    }


def test_ids_beyond_the_tokenizer_have_no_text(spm: Tokenizer) -> None:
    choice = echoed(spm, None, [*spm.encode("hello")[1:], spm.vocab_size], [spm.vocab_size - 1], logprobs=0)
    assert choice["text"] == "hello\u00e9"
    assert choice["logprobs"]["tokens"] == [" hello", "", "\u00e9"]
    assert choice["logprobs"]["text_offset"] == [0, 5, 5]


PROMPT_LOGPROBS = [None, place(4, float("-inf"), 60, t3=-0.5, t2=-1.0)]


def test_log_probabilities_of_a_prompt_in_the_field_of_vllm() -> None:
    out = output()
    out.prompt_logprobs = PROMPT_LOGPROBS
    expected = [
        None,
        {
            "4": {"logprob": -9999.0, "rank": 60, "decoded_token": "x"},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": ""},
            "2": {"logprob": -1.0, "rank": 2, "decoded_token": ""},
        },
    ]
    assert as_json(completion(prompt_logprobs=2), out)["choices"][0]["prompt_logprobs"] == expected
    assert as_json(chat(prompt_logprobs=2), out)["prompt_logprobs"] == expected
    assert "prompt_logprobs" not in as_json(chat(), out)


def test_an_echo_shows_no_more_than_its_own_number_of_best_tokens() -> None:
    out = output(logprobs=LOGPROBS)
    out.prompt, out.prompt_token_ids, out.prompt_logprobs = "!!", [4, 4], PROMPT_LOGPROBS
    found = as_json(completion(echo=True, logprobs=1, prompt_logprobs=2), out)["choices"][0]["logprobs"]
    assert found["top_logprobs"][:2] == [None, {"!": -9999.0, "bytes:\\xac": -0.5}]
