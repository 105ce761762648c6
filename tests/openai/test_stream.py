"""Streams: whatever pieces an answer comes in, its chunks add up to the body that it has as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.chat.reply import Delta, ReplyFormat
from shoal.engine.sequence import Metrics, Output, TokenLogprobs
from shoal.llm import LLM, RequestOutput
from shoal.openai.convert import Call, answer, completions_answer, parse_chat, parse_completion, parse_completions
from shoal.openai.schema import APIError
from shoal.openai.stream import (
    DONE,
    AnswerStream,
    ChatChunks,
    StreamOptions,
    TextChunks,
    sse,
    take_stream_options,
)
from shoal.requests.outputs import Generation
from shoal.text.tokenizer import Tokenizer
from tests.chat.replies import form
from tests.chat.templates import write_tokenizer
from tests.support.tiny_model import write_tiny_model

USER = [{"role": "user", "content": "hi"}]
CONTINUED = [*USER, {"role": "assistant", "content": "Well"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
PLAIN = StreamOptions(stream=True)
USAGE = StreamOptions(stream=True, include_usage=True)

TEXTS = (
    "",
    "Hello",
    "h\u00e9llo \u20ac \U0001f41f!  ",
    "<think>\nhm \u20ac\n</think>\n\nIt is so.\n",
    "<think>cut off",
    '<tool_call>{"name": "get_weather", "arguments": {"city": "\u00c5rhus"}}</tool_call>',
    '<think>a</think>Look: <tool_call>\n{"name": "now"}\n</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get_weather", "arguments": {"ci',
    "no </think> <tool_call> here",
    "one STOP two",
    "one STO",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte: every character but ASCII comes in pieces."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.gguf")


def chat(**fields: Any) -> Call:
    return parse_chat({"messages": USER, **fields})


def completion(**fields: Any) -> Call:
    return parse_completion({"prompt": "hi", **fields})


# A request whose answers are known ------------------------------------------------------------------------------------


def scored(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(token) / 7, 3, ((104, -0.25), (105, -0.5)))


def outputs_of(
    call: Call,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    reply: ReplyFormat | None = None,
    reason: str | Sequence[str] = "stop",
    turns: Sequence[int] = (),
) -> Iterator[RequestOutput]:
    """The outputs of a request after each token. ``turns``: which answer gets the next token; afterwards all, each in its turn."""
    text = call.prompt if isinstance(call.prompt, str) else None
    prompt = tokenizer.encode(text or "hi")
    made = Generation("r", text, prompt, call.params, tokenizer, [], reply)
    left = [list(tokenizer.encode(text)) for text in texts]
    reasons = [reason] * len(texts) if isinstance(reason, str) else reason
    metrics = Metrics(0.0, num_cached=1)
    places: Any = tuple(map(scored, prompt[1:])) if call.params.prompt_logprobs is not None else None
    order = [*(turn % len(texts) for turn in turns), *(index for index in range(len(texts)) for _ in range(200))]
    for index in order:
        if made.answers[index].finished:
            continue
        if left[index]:
            token = left[index].pop(0)
            logprobs = (scored(token),) if call.params.reports_logprobs else None
            step = Output("r", metrics, (token,), logprobs, prompt_logprobs=places, sample=index)
        else:
            ends: Any = reasons[index]
            failed = "NaN logits" if ends == "error" else None
            step = Output("r", metrics, (), None, True, ends, prompt_logprobs=places, sample=index, error=failed)
        places = None
        made.take(step)
        yield made.snapshot()
        if made.finished:
            return


# What a client makes of chunks ----------------------------------------------------------------------------------------


def plain(body: Any) -> Any:
    return json.loads(msgspec.json.encode(body))


def added(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Add a delta: texts and lists grow, calls are told apart by their number, all else is said once."""
    for name, value in piece.items():
        if name == "tool_calls":
            calls = whole.setdefault(name, [])
            for call in value:
                if call["index"] == len(calls):
                    calls.append({})
                added(calls[call["index"]], {key: item for key, item in call.items() if key != "index"})
        elif isinstance(value, dict):
            added(whole.setdefault(name, {}), value)
        elif isinstance(value, list) or name in ("arguments", "content", "reasoning", "reasoning_content", "text"):
            whole[name] = whole[name] + value if whole.get(name) else value
        elif value is not None:
            assert name not in whole or whole[name] == value, f"{name} is said once"
            whole[name] = value


def joined(chunks: Sequence[Any]) -> Any:
    """A body made of all chunks, in the form that ``bare`` gives one."""
    body: dict[str, Any] = {"choices": {}}
    for chunk in map(plain, chunks):
        for choice in chunk.pop("choices"):
            added(body["choices"].setdefault(choice["index"], {}), choice)
        assert not chunk.keys() & body.keys() & {"prompt_logprobs", "prompt_token_ids"}
        body.update(chunk)
    body["choices"] = [body["choices"][index] for index in sorted(body["choices"])]
    for choice in body["choices"]:
        if "delta" in choice:
            choice["message"] = choice.pop("delta")
    body["object"] = body["object"].removesuffix(".chunk")
    return bare(body)


def bare(body: Any) -> Any:
    """A body without what says nothing: null, what is empty, and the time."""
    if isinstance(body, dict):
        kept = {name: bare(item) for name, item in body.items() if name != "created"}
        return {name: item for name, item in kept.items() if item not in (None, "", [], {})}
    return [bare(item) for item in body] if isinstance(body, list) else body


CHATS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": True, "top_logprobs": 1},
    {"logprobs": True, "return_token_ids": True, "prompt_logprobs": 1},
    {"include_reasoning": False, "logprobs": True},
    {"stop": ["STOP"], "logprobs": True, "return_token_ids": True},
    {"messages": CONTINUED, "continue_final_message": True, "echo": True},
    {"messages": CONTINUED, "continue_final_message": True},
)
COMPLETIONS: tuple[dict[str, Any], ...] = (
    {},
    {"logprobs": 1},
    {"logprobs": 0, "echo": True, "prompt": "h\u00e9 \u20ac"},
    {"echo": True, "return_token_ids": True, "prompt": [104, 105]},
    {"logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True},
    {"logprobs": 1, "stop": "STOP", "include_stop_str_in_output": True},
)


@settings(max_examples=150)
@given(data=st.data())
def test_chunks_of_a_chat_add_up_to_its_body(tokenizer: Tokenizer, data: st.DataObject) -> None:
    fields = data.draw(st.sampled_from(CHATS))
    texts = data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3))
    call = chat(n=len(texts), **fields)
    reply = form("hermes", "think", opened=data.draw(st.booleans())) if data.draw(st.booleans()) else None
    turns = data.draw(st.lists(st.integers(0, 2), max_size=60))
    reason = data.draw(st.sampled_from(["stop", "length"]))
    outputs = list(outputs_of(call, texts, tokenizer, reply, reason, turns))
    seen = [output for output in outputs[:-1] if data.draw(st.booleans())] + outputs[-1:]
    chunks = ChatChunks(call, response_id="x", model="m", tokenizer=tokenizer, options=USAGE)
    made = [chunk for output in seen for chunk in chunks.push(output)]
    body = bare(plain(answer(call, outputs[-1], response_id="x", model="m", tokenizer=tokenizer)))
    assert joined(made) == body
    assert (chunks.finished, chunks.error) == (True, None)


@settings(max_examples=150)
@given(data=st.data())
def test_chunks_of_completions_add_up_to_their_body(tokenizer: Tokenizer, data: st.DataObject) -> None:
    fields = {"prompt": "hi", **data.draw(st.sampled_from(COMPLETIONS))}
    texts = data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3))
    many = data.draw(st.integers(1, 3))
    calls = parse_completions({**fields, "n": len(texts), "prompt": [fields["prompt"]] * many})
    outputs = [
        list(outputs_of(call, [f"{number}{text}" for text in texts], tokenizer, turns=range(20)))
        for number, call in enumerate(calls)
    ]
    chunks = TextChunks(calls, response_id="x", model="m", tokenizer=tokenizer, options=USAGE)
    waiting = [list(each) for each in outputs]
    made = []
    while any(waiting):
        number = data.draw(st.sampled_from([number for number, each in enumerate(waiting) if each]))
        taken = data.draw(st.integers(1, len(waiting[number])))
        made += chunks.push(waiting[number][taken - 1], number)
        del waiting[number][:taken]
    answered = [(call, each[-1]) for call, each in zip(calls, outputs, strict=True)]
    body = completions_answer(answered, response_id="x", model="m", tokenizer=tokenizer)
    assert joined(made) == bare(plain(body))
    assert [choice.index for choice in body.choices] == list(range(many * len(texts)))


# The form of streams --------------------------------------------------------------------------------------------------


def pushed(chunks: ChatChunks | TextChunks, outputs: Iterator[RequestOutput]) -> list[Any]:
    return [plain(chunk) for output in outputs for chunk in chunks.push(output)]


def chat_chunks(call: Call, tokenizer: Tokenizer, options: StreamOptions = PLAIN) -> ChatChunks:
    return ChatChunks(call, response_id="x", model="m", tokenizer=tokenizer, options=options)


def text_chunks(calls: Sequence[Call], tokenizer: Tokenizer, options: StreamOptions = PLAIN) -> TextChunks:
    return TextChunks(calls, response_id="x", model="m", tokenizer=tokenizer, options=options)


def test_a_stream_of_a_chat(tokenizer: Tokenizer) -> None:
    made = pushed(chat_chunks(chat(), tokenizer), outputs_of(chat(), ["\u20ac!"], tokenizer))
    assert {(chunk.pop("id"), chunk.pop("object"), chunk.pop("model")) for chunk in made} == {
        ("chatcmpl-x", "chat.completion.chunk", "m")
    }
    assert len({chunk.pop("created") for chunk in made}) == 1
    deltas = [{"role": "assistant", "content": ""}, {"content": "\u20ac"}, {"content": "!"}, {}]
    reasons = [None, None, None, "stop"]
    assert made == [
        {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        for delta, reason in zip(deltas, reasons, strict=True)
    ]


def test_a_stream_of_a_completion(tokenizer: Tokenizer) -> None:
    call = completion(echo=True)
    made = pushed(text_chunks([call], tokenizer), outputs_of(call, ["yo"], tokenizer, reason="length"))
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in made} == {("cmpl-x", "text_completion", "m")}
    assert [chunk["choices"] for chunk in made] == [
        [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        for text, reason in (("hi", None), ("y", None), ("o", None), ("", "length"))
    ]
    assert all("usage" not in chunk for chunk in made)


def test_a_call_is_begun_with_its_name_and_filled_with_arguments(tokenizer: Tokenizer) -> None:
    call = chat(tools=[TOOL])
    reply = form("hermes")
    made = pushed(chat_chunks(call, tokenizer), outputs_of(call, [TEXTS[5]], tokenizer, reply))
    first, *more = [
        chunk["choices"][0]["delta"]["tool_calls"] for chunk in made if "tool_calls" in chunk["choices"][0]["delta"]
    ]
    function = {"name": "get_weather", "arguments": ""}
    assert first == [{"index": 0, "id": "call_" + first[0]["id"][5:], "type": "function", "function": function}]
    assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for (piece,) in more)
    assert made[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tokens_without_text_come_with_the_next_text(tokenizer: Tokenizer) -> None:
    call = completion(logprobs=0, return_token_ids=True, stop="ab")
    made = pushed(text_chunks([call], tokenizer), outputs_of(call, ["\u20acac"], tokenizer, reason="length"))
    choices = [chunk["choices"][0] for chunk in made]
    assert [choice["text"] for choice in choices] == ["\u20ac", "ac", ""]
    assert [choice.get("token_ids") for choice in choices] == [
        tokenizer.encode("\u20ac"),
        tokenizer.encode("ac"),
        None,
    ]
    assert [choice["logprobs"] and len(choice["logprobs"]["tokens"]) for choice in choices] == [3, 2, None]


def test_reasoning_may_be_left_out(tokenizer: Tokenizer) -> None:
    call = chat(include_reasoning=False)
    reply = form(reasoning="think")
    made = pushed(chat_chunks(call, tokenizer), outputs_of(call, ["<think>hm</think>ok"], tokenizer, reply))
    assert [chunk["choices"][0]["delta"] for chunk in made[1:]] == [{"content": "o"}, {"content": "k"}, {}]


def test_usage_comes_last_and_is_null_before(tokenizer: Tokenizer) -> None:
    call = chat(n=2)
    made = pushed(chat_chunks(call, tokenizer, USAGE), outputs_of(call, ["ab", "c"], tokenizer))
    assert [chunk["usage"] for chunk in made[:-1]] == [None] * (len(made) - 1)
    assert made[-1]["choices"] == []
    assert made[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_usage_may_come_with_every_chunk(tokenizer: Tokenizer, kind: str) -> None:
    options = StreamOptions(stream=True, include_usage=True, continuous_usage_stats=True)
    call = chat() if kind == "chat" else completion(echo=True)
    chunks = chat_chunks(call, tokenizer, options) if kind == "chat" else text_chunks([call], tokenizer, options)
    made = pushed(chunks, outputs_of(call, ["abc"], tokenizer))
    assert [chunk["usage"]["completion_tokens"] for chunk in made] == [0, 1, 2, 3, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in made} == {2}


def test_an_answer_that_has_not_grown_has_no_chunk(tokenizer: Tokenizer) -> None:
    call = chat()
    output = next(outputs_of(call, ["ab"], tokenizer))
    chunks, stream = chat_chunks(call, tokenizer), AnswerStream(call)
    assert (len(chunks.push(output)), len(chunks.push(output))) == (2, 0)
    (delta,) = stream.push(output)
    assert (delta.index, delta.deltas, delta.text, delta.finish_reason) == (0, [Delta("a")], "a", None)
    assert stream.push(output) == []


# Streams that fail ----------------------------------------------------------------------------------------------------

FAILURES = {
    "timeout": ("timeout_error", "request_timeout", "the request was not finished in time"),
    "error": ("server_error", None, "NaN logits"),
    "abort": ("server_error", None, "the request was aborted"),
}


@pytest.mark.parametrize("reason", FAILURES)
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_an_error_ends_a_stream_behind_the_text_so_far(tokenizer: Tokenizer, kind: str, reason: str) -> None:
    call = chat(stop="<") if kind == "chat" else completion(stop="<")
    chunks = chat_chunks(call, tokenizer, USAGE) if kind == "chat" else text_chunks([call], tokenizer, USAGE)
    *before, last = outputs_of(call, ["ab\u20ac"], tokenizer, reason=reason)
    data = [chunks.frames(output) for output in [*before, last]]
    kind_of, code, message = FAILURES[reason]
    error = {"error": {"message": message, "type": kind_of, "param": None, "code": code}}
    assert data[-1].endswith(sse(json.dumps(error, separators=(",", ":")).encode()))
    events = [json.loads(event[6:]) for event in b"".join(data).split(b"\n\n")[:-1]]
    assert events[-1] == error
    choices = [event["choices"][0] for event in events[:-1]]
    text = [choice["delta"].get("content", "") if kind == "chat" else choice["text"] for choice in choices]
    assert "".join(text) == "ab\u20ac"
    assert all(choice["finish_reason"] is None for choice in choices)
    assert chunks.finished
    assert chunks.error is not None
    assert chunks.frames(last) == b""


def test_the_last_text_stands_before_the_error(tokenizer: Tokenizer) -> None:
    """Half a stop string is held back, until it is known that it was none."""
    call = completion(stop="STOP")
    made = pushed(text_chunks([call], tokenizer), outputs_of(call, ["a ST"], tokenizer, reason="timeout"))
    assert [chunk["choices"][0]["text"] for chunk in made[:-1]] == ["a", " ", "ST"]
    assert made[-1]["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("call", [chat(echo=True), completion(echo=True, logprobs=0)])
def test_what_fails_before_it_begins_is_only_an_error(tokenizer: Tokenizer, call: Call) -> None:
    output = RequestOutput.failed("r", "hi", "no room")
    chunks = chat_chunks(call, tokenizer) if call.kind == "chat" else text_chunks([call], tokenizer)
    assert pushed(chunks, iter([output])) == [plain(APIError("no room", kind="server_error").body())]
    assert chunks.error is not None
    assert chunks.error.status == 500


def test_one_answer_that_fails_ends_the_stream_of_all(tokenizer: Tokenizer) -> None:
    call = completion(n=2)
    outputs = list(outputs_of(call, ["a", "bcd"], tokenizer, reason=["error", "stop"]))
    made = pushed(text_chunks([call], tokenizer), iter(outputs))
    assert [chunk["choices"][0]["text"] for chunk in made[:-1]] == ["a"]
    assert made[-1]["error"]["type"] == "server_error"


def test_one_prompt_that_fails_ends_the_stream_of_all(tokenizer: Tokenizer) -> None:
    calls = parse_completions({"prompt": ["a", "b"]})
    chunks = text_chunks(calls, tokenizer, USAGE)
    for output in outputs_of(calls[0], ["x"], tokenizer):
        chunks.push(output, 0)
    assert not chunks.finished
    (error,) = chunks.push(RequestOutput.failed("r", "b", "no room"), 1)
    assert plain(error)["error"]["message"] == "no room"
    assert chunks.finished


# Frames ---------------------------------------------------------------------------------------------------------------


def test_frames_of_server_sent_events(tokenizer: Tokenizer) -> None:
    assert sse(b"{}") == b"data: {}\n\n"
    assert sse(b"{}", "message_stop") == b"event: message_stop\ndata: {}\n\n"
    call = completion()
    chunks = text_chunks([call], tokenizer)
    data = b"".join(map(chunks.frames, outputs_of(call, ["a\nb\r\u2028"], tokenizer)))
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (DONE.strip(), b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event and b"\r" not in event for event in events)
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events) == "a\nb\r\u2028"


# What a body says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ({}, StreamOptions()),
        ({"stream": None, "stream_options": None}, StreamOptions()),
        ({"stream": False, "stream_options": {}}, StreamOptions()),
        ({"stream": "", "stream_options": {"include_usage": None}}, StreamOptions()),
        ({"stream": True}, PLAIN),
        ({"stream": True, "stream_options": {}}, PLAIN),
        ({"stream": True, "stream_options": {"include_usage": True}}, USAGE),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True, "include_obfuscation": False}},
            StreamOptions(stream=True, continuous_usage_stats=True),
        ),
    ],
)
def test_options_are_taken_out_of_a_body(said: dict[str, Any], options: StreamOptions) -> None:
    body = {"messages": USER, **said}
    assert take_stream_options(body) == options
    assert body == {"messages": USER}
    assert parse_chat(body) == chat()


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"include_usage": False}}, "stream_options"),
        ({"stream": False, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": "usage"}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(said: dict[str, Any], param: str) -> None:
    with pytest.raises(APIError) as caught:
        take_stream_options({"prompt": "hi", **said})
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).startswith(f"{param}: ")


@pytest.mark.parametrize("body", [None, [], "stream", 5])
def test_a_body_that_is_no_object_asks_for_nothing(body: Any) -> None:
    assert take_stream_options(body) == StreamOptions()


def test_rows_of_a_batch_are_not_streamed() -> None:
    for parse, body in ((parse_chat, {"messages": USER}), (parse_completion, {"prompt": "hi"})):
        with pytest.raises(APIError, match="stream: not supported: answers are given whole"):
            parse({**body, "stream": True})


# With a model ---------------------------------------------------------------------------------------------------------


def test_the_stream_of_a_model_adds_up(tmp_path: Path) -> None:
    """Noise of a tiny model: broken characters, control tokens, several samples, a scored prompt."""
    fields: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 24, "logprobs": 2, "echo": True}
    calls = parse_completions({"prompt": ["hello", [5, 6, 7], "h\u00e9"], "ignore_eos": True, **fields})
    with LLM(write_tiny_model(tmp_path / "tiny.gguf"), device="reference", max_num_batched_tokens=16) as llm:
        assert llm.tokenizer is not None
        chunks = text_chunks(calls, llm.tokenizer, USAGE)
        made: list[Any] = []
        last: dict[int, RequestOutput] = {}
        for output in llm.stream([call.prompt for call in calls], [call.params for call in calls]):
            made += chunks.push(output, int(output.request_id))
            last[int(output.request_id)] = output
        answered = [(call, last[number]) for number, call in enumerate(calls)]
        body = completions_answer(answered, response_id="x", model="m", tokenizer=llm.tokenizer)
    assert joined(made) == bare(plain(body))
    assert len(made) > 9 * 4
