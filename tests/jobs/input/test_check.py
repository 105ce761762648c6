"""The look at the whole input before any work."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import JobError
from shoal.jobs.input import ids
from shoal.jobs.input.check import check_input
from shoal.jobs.input.ids import DuplicateIdError, IdIndex
from shoal.jobs.input.rows import Line, RowReader

TOO_LONG = None


@pytest.fixture
def index(tmp_path: Path) -> Iterator[IdIndex]:
    with IdIndex(tmp_path / "ids.sqlite") as opened:
        yield opened


def row(custom_id: str | None, **body: Any) -> bytes:
    """A batch line, or without a custom_id a plain row."""
    fields = {"prompt": "x", **body}
    if custom_id is None:
        return json.dumps(fields).encode()
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": fields}
    return json.dumps(line).encode()


def lines(*texts: bytes | None) -> Iterable[Line]:
    return [Line(number, text) for number, text in enumerate(texts, start=1)]


def reader() -> RowReader:
    return RowReader(["tiny"])


def test_rows_are_counted_whatever_they_are(index: IdIndex) -> None:
    assert check_input([], index) == 0
    assert check_input(lines(row("a"), b"not json", TOO_LONG, row(None), row("b", n=99)), index) == 5


def test_a_duplicate_names_the_id_and_both_rows(index: IdIndex) -> None:
    with pytest.raises(DuplicateIdError, match=r"custom_id 'a' is in rows 2 and 5"):
        check_input(lines(b"{}", row("a"), row("b"), b"[]", row("a")), index)


def test_an_id_may_not_be_the_one_that_a_plain_row_gets(index: IdIndex) -> None:
    with pytest.raises(DuplicateIdError, match=r"custom_id 'row-3' is in rows 1 and 3"):
        check_input(lines(row("row-3"), row(None), row(None)), index)


def test_numbers_are_those_of_the_lines(index: IdIndex) -> None:
    with pytest.raises(DuplicateIdError, match="rows 7 and 90"):
        check_input([Line(7, row("a")), Line(8, row("b")), Line(90, row("a"))], index)


def test_of_several_files_both_places_are_named(index: IdIndex) -> None:
    with pytest.raises(DuplicateIdError, match=r"custom_id 'a' is in x 1 and x 3, must be in one"):
        check_input(lines(row("a"), row("b"), row("a")), index, place=lambda number: f"x {number}")


def test_of_several_files_the_first_bad_line_is_named(index: IdIndex) -> None:
    with pytest.raises(JobError, match=r"^2 bad lines, nothing was run; x 2: ."):
        check_input([Line(number, b"{}", place=f"x {number}") for number in (2, 3)], index, strict=reader())


def test_a_strict_check_passes_good_rows(index: IdIndex) -> None:
    assert check_input(lines(row("a"), row("b"), row(None)), index, strict=reader()) == 3


def test_a_strict_check_counts_the_bad_lines_and_quotes_the_first(index: IdIndex) -> None:
    texts = (row("a"), b"{}", TOO_LONG, row("b"), row("c", n=17))
    with pytest.raises(JobError, match=r"^3 bad lines, nothing was run; line 2: .") as caught:
        check_input(lines(*texts), index, strict=reader())
    assert not isinstance(caught.value, DuplicateIdError)


def test_a_strict_check_finds_duplicates_too(index: IdIndex) -> None:
    with pytest.raises(DuplicateIdError, match="rows 1 and 2"):
        check_input(lines(row("a"), row("a")), index, strict=reader())


@pytest.mark.parametrize("good", [True, False])
def test_a_check_holds_no_rows(index: IdIndex, monkeypatch: pytest.MonkeyPatch, good: bool) -> None:
    """30 MB pass through."""
    monkeypatch.setattr(ids, "_BATCH", 500)
    many = (Line(number, row(str(number), n=1 if good else 99) + b" " * 5000) for number in range(6000))
    tracemalloc.start()
    try:
        with nullcontext() if good else pytest.raises(JobError, match="6000 bad lines"):
            check_input(many, index, strict=reader())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6
