"""Answers cut at every byte, and what is no answer; events of streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.bench.serve.wire import EventTimes, ResponseReader, WireError
from tests.bench.serve.stub import STREAM_HEAD, chat_events, chunk, completion_events, event

ANSWERS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Other: a: b\r\n\r\nhello",
    "no body": b"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n",
    "empty": b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nhe\r\n3;x=1\r\nllo\r\n0\r\nX-Sum: 1\r\n\r\n",
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200\r\nContent-Length: 5\r\n\r\nhello",
    "CRLF in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n\r\n0\r\n\r\n0\r\n\r\n",
}
BODIES = {"no body": b"", "empty": b"", "CRLF in a chunk": b"\r\n0\r\n"}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_may_be_cut_anywhere(name: str) -> None:
    answer, body = ANSWERS[name], BODIES.get(name, b"hello")
    for cut in range(len(answer)):
        reader = ResponseReader()
        first = reader.feed(answer[:cut])
        assert not reader.complete
        assert first + reader.feed(answer[cut:]) == body
        assert reader.complete


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_may_come_byte_by_byte(name: str) -> None:
    reader = ResponseReader()
    found = b"".join(reader.feed(bytes([byte])) for byte in ANSWERS[name])
    assert (found, reader.complete) == (BODIES.get(name, b"hello"), True)


def test_headers_are_found_by_lower_case() -> None:
    reader = ResponseReader()
    reader.feed(ANSWERS["length"])
    assert reader.headers == {b"content-length": b"5", b"x-other": b"a: b"}
    assert (reader.status, reader.keep_alive) == (200, True)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhe") + reader.feed(b"llo") == b"hello"
    assert not reader.complete
    assert reader.close()
    assert not reader.keep_alive


def test_an_answer_that_is_cut_short_is_not_complete() -> None:
    reader = ResponseReader()
    reader.feed(ANSWERS["chunks"][:-1])
    assert not reader.close()


def test_more_than_was_asked_for_is_not_kept_alive() -> None:
    reader = ResponseReader()
    reader.feed(ANSWERS["length"] + b"HTTP/1.1 400 ")
    assert reader.complete
    assert not reader.keep_alive


@pytest.mark.parametrize(
    "bad",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
    ],
)
def test_what_is_not_http_is_refused(bad: bytes) -> None:
    with pytest.raises(WireError):
        ResponseReader().feed(bad)


def times_of(content: bytes, cut: int | None = None) -> EventTimes:
    """Each event at the time that its number is, or ``content`` in two parts."""
    events = EventTimes()
    if cut is None:
        for number, block in enumerate(content.split(b"\n\n")[:-1]):
            events.feed(block + b"\n\n", float(number))
    else:
        events.feed(content[:cut], 1.0)
        events.feed(content[cut:], 2.0)
    return events


@pytest.mark.parametrize(("events", "first"), [(chat_events, 1.0), (completion_events, 0.0)])
def test_events_with_text_count_and_no_others(events: Callable[[], list[bytes]], first: float) -> None:
    found = times_of(b"".join(events()))
    assert found.text_times == [first, first + 1, first + 2]
    assert found.done
    assert [said["usage"]["completion_tokens"] for said in found.last if said.get("usage")] == [3]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_stream_may_be_cut_anywhere(end: bytes) -> None:
    content = (b": ping\n\n" + b"".join(chat_events())).replace(b"\n", end)
    for cut in range(len(content)):
        found = times_of(content, cut)
        assert (len(found.text_times), found.done) == (3, True)


def test_a_stream_through_chunks_of_http_may_be_cut_anywhere() -> None:
    answer = b"".join([STREAM_HEAD, *map(chunk, completion_events()), chunk(b"")])
    for cut in range(len(answer)):
        reader, events = ResponseReader(), EventTimes()
        for part in (answer[:cut], answer[cut:]):
            events.feed(reader.feed(part), 1.0)
        assert (reader.complete, events.done, len(events.text_times)) == (True, True, 3)


def test_comments_and_names_of_events_do_not_count() -> None:
    text = event({"choices": [{"text": "a"}]})
    found = times_of(b": keep-alive\n\nevent: token\n" + text + b": keep-alive\n\nid: 3\n\n" + event(b"[DONE]"))
    assert (found.text_times, found.done) == ([1.0], True)


@pytest.mark.parametrize(
    "delta", [{"content": "a"}, {"reasoning_content": "a"}, {"reasoning": "a"}, {"tool_calls": [{"index": 0}]}]
)
def test_reasoning_and_tool_calls_are_text(delta: dict[str, object]) -> None:
    role, said = ({"choices": [{"delta": one}]} for one in ({"role": "assistant"}, delta))
    assert times_of(event(role) + event(said)).text_times == [1.0]


def test_without_any_text_the_first_event_counts() -> None:
    silent = event({"choices": [{"text": "", "finish_reason": "stop"}]})
    assert times_of(silent + silent).text_times == [0.0]
    assert times_of(b": nothing\n\n").text_times == []


def test_what_is_not_json_is_an_event_without_text() -> None:
    assert times_of(event(b"{oops") + event(b"[1]") + event({"choices": [{"text": "a"}]})).text_times == [2.0]
