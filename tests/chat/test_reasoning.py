"""Thoughts and answers stay apart, and nothing of either is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.chat.formats import REASONING_FORMATS
from shoal.chat.reply import ReplyStream
from tests.chat.replies import Case, check, form, streamed

MARKED = sorted(set(REASONING_FORMATS) - {"harmony"})


@pytest.mark.parametrize("name", MARKED)
def test_between_the_marks(name: str) -> None:
    start, end = REASONING_FORMATS[name].start, REASONING_FORMATS[name].end
    for case in (
        Case(f"{start}\nI wonder.\n{end}\n\nYes.", content="Yes.", reasoning="I wonder."),
        Case(f" \n{start}a{end}b {start}c{end} ", content=f"b {start}c{end} ", reasoning="a"),
        Case(f"{start}\n\n{end}\n\nYes.", content="Yes."),
        Case(f"{start}I won \n", reasoning="I won \n"),
        Case(f"{start}I {end[:3]}", reasoning=f"I {end[:3]}"),
        Case(start[:-1], content=start[:-1]),
        Case(f"No {start}a{end} ", content=f"No {start}a{end} "),
        Case(f"{start}a{end}\n", reasoning="a"),
    ):
        check(form(reasoning=name), case)


@pytest.mark.parametrize("name", MARKED)
def test_where_the_prompt_has_opened_the_thoughts(name: str) -> None:
    start, end = REASONING_FORMATS[name].start, REASONING_FORMATS[name].end
    for case in (
        Case(f"I wonder.\n{end}\n\nYes.", content="Yes.", reasoning="I wonder."),
        Case(f"{start}\nI wonder.{end}Yes.", content="Yes.", reasoning="I wonder."),
        Case(f"\nI won{end[:-1]}", reasoning=f"I won{end[:-1]}"),
        Case(f"{end}Yes.", content="Yes."),
    ):
        check(form(reasoning=name, opened=True), case)


def test_calls_follow_thoughts_and_are_not_found_in_them() -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    check(
        form("hermes", "think"),
        Case(f"<think>\nUse {call}?\n</think>\n\n{call}", [("now", "{}")], reasoning=f"Use {call}?"),
    )
    check(
        form("hermes", "think"),
        Case(f"<think>a</think>\n\nOne look.\n\n{call}\n", [("now", "{}")], content="One look.", reasoning="a"),
    )
    check(form("hermes", "think"), Case(f"<think>Use {call}", reasoning=f"Use {call}"))


@given(st.text("<think>/ \na", max_size=40), st.booleans(), st.integers(0, 40))
def test_every_character_arrives_in_one_channel(text: str, opened: bool, place: int) -> None:
    """But for the marks and the white space at them."""
    fmt = form(reasoning="think", opened=opened)
    reply = streamed(fmt, [text[:place], text[place:]])
    assert reply == fmt.parse(text)

    def letters(part: str) -> str:
        return "".join(part.split())

    rest = letters(text)
    if opened or rest.startswith("<think>"):
        thoughts, _, answer = rest.removeprefix("<think>").partition("</think>")
    else:
        thoughts, answer = "", rest
    assert (letters(reply.reasoning), letters(reply.content)) == (thoughts, answer)


def test_what_is_certain_is_not_held_back() -> None:
    stream = ReplyStream(form("hermes", "think"))
    shown = [
        [delta.reasoning or delta.content for delta in stream.push(piece)]
        for piece in ("<think>Hm", ".", "</think>", "So", " be")
    ]
    assert shown == [["Hm"], ["."], [], ["So"], [" be"]]


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ('<tool_call>{"name": "now"}</tool_call>', "stop", "tool_calls"),
        ('<tool_call>{"name": "now"}</tool_call>', "length", "length"),
        ('<tool_call>{"name": "now"}</tool_call>', "timeout", "timeout"),
        ('<tool_call>{"name": "now", "arguments": {', "length", "length"),
        ('<tool_call>{"name": "now", "arguments": {', "stop", "stop"),
        ('<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "run", "arguments": {', "length", "length"),
        ("Hello", "stop", "stop"),
        ("Hello", None, None),
    ],
)
def test_the_finish_reason_is_tool_calls_where_they_are_whole(text: str, reason: str | None, expected: str) -> None:
    stream = ReplyStream(form("hermes"))
    stream.push(text)
    stream.flush()
    assert stream.reply.finish_reason(reason) == expected
