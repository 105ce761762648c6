"""Answers of a chat as they grow: marks stay in the text, stop strings sleep while the model thinks."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.chat.reply import ReplyFormat
from shoal.engine.engine import Metrics, Output
from shoal.params import SamplingParams
from shoal.requests.outputs import CompletionOutput, Generation, RequestOutput
from shoal.text.tokenizer import Tokenizer
from tests.chat.replies import form
from tests.chat.templates import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.gguf")


def generated(tokenizer: Tokenizer, text: str, reply: ReplyFormat | None, **params: Any) -> CompletionOutput:
    """The answer after the engine has brought the tokens of a text, one a step, and then its end."""
    generation = Generation("r", None, [1], SamplingParams(max_tokens=None, **params), tokenizer, [], reply)
    for token in tokenizer.encode(text, add_special=False, parse_special=True):
        if not generation.finished:
            generation.take(Output("r", Metrics(0.0), new_token_ids=(token,)))
    if not generation.finished:
        generation.take(Output("r", Metrics(0.0), finished=True, finish_reason="length"))
    return generation.snapshot().outputs[0]


def test_marks_that_are_control_tokens_stay_in_the_text_and_others_do_not(tokenizer: Tokenizer) -> None:
    text = '<think>a</think>[INST]<tool_call>{"name": "now"}</tool_call>'
    answer = generated(tokenizer, text, form("hermes", "think"))
    assert answer.text == text.replace("[INST]", "")
    assert (answer.reply.reasoning, [call.name for call in answer.reply.tool_calls]) == ("a", ["now"])
    assert generated(tokenizer, text, None).text == 'a{"name": "now"}'
    assert generated(tokenizer, text, None, skip_special_tokens=False).text == text


def test_outside_of_a_chat_all_is_content(tokenizer: Tokenizer) -> None:
    assert generated(tokenizer, "a", None).reply.content == "a"
    assert RequestOutput.failed("r", None, "no").outputs[0].reply.content == ""


@pytest.mark.parametrize(
    ("text", "opened", "expected", "stopped"),
    [
        ("<think>a.b</think>c.d", False, "<think>a.b</think>c", True),
        ("a.b</think>c.d", True, "a.b</think>c", True),
        ("a.b", False, "a", True),
        ("<think>a.b", False, "<think>a.b", False),
        (" <think>.</think>.", False, " <think>.</think>", True),
        ("<thin.", False, "<thin", True),
        ("<thin", False, "<thin", False),
        ("", False, "", False),
    ],
)
@pytest.mark.parametrize("min_tokens", [0, 1])
def test_stop_strings_sleep_while_the_model_thinks(
    tokenizer: Tokenizer, text: str, opened: bool, expected: str, stopped: bool, min_tokens: int
) -> None:
    answer = generated(tokenizer, text, form(reasoning="think", opened=opened), stop=".", min_tokens=min_tokens)
    assert answer.text == expected
    assert (answer.finish_reason, answer.stop_reason) == (("stop", ".") if stopped else ("length", None))


def test_a_stop_string_may_begin_like_the_mark(tokenizer: Tokenizer) -> None:
    for stop, text, expected in (
        ("<", "<b", ""),
        ("<t", "<table>", ""),
        ("k>", "<think>k></think>ak>", "<think>k></think>a"),
    ):
        answer = generated(tokenizer, text, form(reasoning="think"), stop=stop)
        assert (answer.text, answer.stop_reason) == (expected, stop)


def test_calls_of_different_samples_have_different_ids(tokenizer: Tokenizer) -> None:
    generation = Generation("r", None, [1], SamplingParams(n=2), tokenizer, [], form("hermes"))
    for sample in range(2):
        for token in tokenizer.encode('<tool_call>{"name": "now"}</tool_call>', False, True):
            generation.take(Output("r", Metrics(0.0), new_token_ids=(token,), sample=sample))
    first, second = (answer.reply.tool_calls[0].id for answer in generation.snapshot().outputs)
    assert first != second
    assert generation.snapshot().outputs[0].reply.tool_calls[0].id == first, "the same whenever it is read"
