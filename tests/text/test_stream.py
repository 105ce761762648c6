from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.text.stream import StreamDecoder

PIECES = st.lists(st.binary(max_size=4) | st.text(max_size=3).map(lambda text: text.encode("utf-8", "replace")))


def decoder(pieces: list[bytes]) -> StreamDecoder:
    return StreamDecoder(lambda token: pieces[token])


def test_a_split_character_waits_for_its_end() -> None:
    stream = decoder([b"a\xf0", b"\x9f\x98", b"\x80b"])
    assert [stream.push(0), stream.push(1), stream.push(2), stream.flush()] == ["a", "", "\U0001f600b", ""]


def test_bad_bytes_come_out_once_that_is_certain() -> None:
    stream = decoder([b"\xf0\x9f", b"x", b"\xff", b"\xc3"])
    assert stream.push(0) == ""
    assert stream.push(1) == "\ufffdx"
    assert stream.push(2) == "\ufffd"
    assert stream.push(3) == ""
    assert stream.flush() == "\ufffd"


def test_after_flush_it_starts_anew() -> None:
    stream = decoder([b"\xc3", b"\xa9"])
    stream.push(0)
    stream.flush()
    assert stream.push(1) == "\ufffd"


@given(PIECES)
def test_joined_it_is_the_whole_decoded_at_once(pieces: list[bytes]) -> None:
    stream = decoder(pieces)
    text = "".join([stream.push(token) for token in range(len(pieces))]) + stream.flush()
    assert text == b"".join(pieces).decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_no_replacement_character_for_any_cut_of_real_text(text: str, data: st.DataObject) -> None:
    raw = text.replace("\ufffd", "").encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    stream = decoder(pieces)
    out = [stream.push(token) for token in range(len(pieces))]
    assert "\ufffd" not in "".join(out)
    assert "".join(out).encode() == raw
