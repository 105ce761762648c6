"""CSV: whatever a writer can write is read, each bad record is refused alone, and a column is added without a byte lost."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.jobs.input.csv_table import DELIMITERS, CsvTable, csv_delimiter, write_extended_csv
from shoal.jobs.input.rows import MAX_LINE_BYTES, Line

HEADER = ["id", "prompt", "note"]


def table(data: bytes, limit: int = MAX_LINE_BYTES, delimiter: str = ",") -> CsvTable:
    return CsvTable(Path("in.csv"), io.BytesIO(data), delimiter, limit=limit)


def records(data: bytes, limit: int = MAX_LINE_BYTES) -> list[list[str] | str]:
    """The records after the header; of a bad one, what is said of it."""
    return [item if isinstance(item, list) else str(item) for item in table(data, limit)]


def extended(folder: Path, data: bytes, texts: dict[int, str]) -> bytes:
    path = folder / "in.csv"
    path.write_bytes(data)
    target = io.BytesIO()
    write_extended_csv(path, texts.get, target, "output")
    return target.getvalue()


def written(rows: list[list[str]], delimiter: str, line_end: str, mark: bool) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode("utf-8-sig" if mark else "utf-8")


_ROWS = st.lists(
    st.lists(st.text(max_size=8) | st.sampled_from(['"', "\r\n", "\n\n", ",;", "\0"]), min_size=3, max_size=3)
)
_FORM = st.tuples(st.sampled_from(DELIMITERS), st.sampled_from(["\n", "\r\n"]), st.booleans())


# Reading --------------------------------------------------------------------------------------------------------------


@given(_ROWS, _FORM)
def test_what_was_written_is_read(rows: list[list[str]], form: tuple[str, str, bool]) -> None:
    read = table(written([HEADER, *rows], *form), delimiter=form[0])
    assert read.header == HEADER
    assert list(read) == rows


def test_a_record_is_a_plain_row() -> None:
    lines = list(table(b'id,prompt\n1,"two\nlines, ""quoted"" \xc3\xa9"\n2,\n').lines("prompt"))
    assert [(line.number, json.loads(line.data or b"")) for line in lines] == [
        (1, {"prompt": 'two\nlines, "quoted" \u00e9'}),
        (2, {"prompt": ""}),
    ]


def test_tables_with_byte_order_marks_may_be_joined() -> None:
    mark = b"\xef\xbb\xbf"
    data = mark + b"id,prompt\n1,a\n" + mark + b'2,"b\n' + mark + b'c"\n' + mark + b'"3",d\n'
    assert records(data) == [["1", "a"], ["2", "b\n\ufeffc"], ["3", "d"]]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"a,b", "the record has 2 cells, the header 3"),
        (b"a,b,c,d", "the record has 4 cells, the header 3"),
        (b"a,\xff,c", "the record is not valid UTF-8 at its byte 2"),
        (b'a,"x\n\xff\n",c', "the record is not valid UTF-8 at its byte 5"),
        (b'a,"b"c,d', "',' expected after '\"'"),
        (b"a,b\rc,d", "new-line character seen in unquoted field"),
        (b'a,"' + b"x" * 100 + b'",c', "the record is longer than 50 bytes"),
        (b'a,"' + b'x""\n' * 30 + b'",c', "the record is longer than 50 bytes"),
        (b"x" * 3_000_000, "the record is longer than 50 bytes"),
    ],
)
def test_a_bad_record_is_refused_alone(record: bytes, says: str) -> None:
    found = records(b"id,prompt,note\n1,2,3\n" + record + b'\n\n4,"5\n",6\n', limit=50)
    assert found[::2] == [["1", "2", "3"], ["4", "5\n", "6"]]
    assert isinstance(found[1], str)
    assert found[1].startswith(says)
    assert len(found) == 3


def test_a_bad_record_is_a_line_without_data() -> None:
    assert list(table(b"prompt,x\na\nb,c\n").lines("prompt")) == [
        Line(1, None, "the record has 1 cells, the header 2"),
        Line(2, b'{"prompt":"b"}'),
    ]


def test_a_quote_that_is_never_closed_costs_the_record_it_opens() -> None:
    assert records(b'a,b\n1,2\n3,"4\n') == [["1", "2"], "unexpected end of data"]
    found = records(b'a,b\n1,"2\n' + b"3,4\n" * 100, limit=50)
    assert len(found) == 1
    assert "is a closing quote missing?" in found[0]
    assert records(b'a,b\n1,"2\n3,"4"\n5,6\n')[1:] == [["5", "6"]]


def test_nul_bytes_and_stray_quotes_are_text() -> None:
    assert records(b'a,b\n\0,5" pipe\n') == [["\0", '5" pipe']]


def test_a_record_may_be_as_long_as_the_limit() -> None:
    cell = "x" * (1 << 20)  # far above the limit of 131072 that the csv module starts with
    assert records(b"a,b\n1," + cell.encode() + b"\n") == [["1", cell]]
    assert records(b"a,b\n1,4567\n", limit=7) == [["1", "4567"]]
    assert records(b"a,b\n1,45678\n", limit=7) == ["the record is longer than 7 bytes; is a closing quote missing?"]


@pytest.mark.parametrize("data", [b"", b"\n\r\n", b'"a"b,c\n1,2\n', b"\xff,a\n", b"a,b\rc\n", b'"a,b\n'])
def test_a_table_without_a_readable_header_is_refused(data: bytes) -> None:
    with pytest.raises(JobError, match=r"in\.csv: the header of the table cannot be read: "):
        table(data)


@pytest.mark.parametrize(
    ("header", "says"),
    [(b"id,text\n", "is not in the header: .'id', 'text'."), (b"prompt,prompt\n", "is more than once")],
)
def test_the_prompt_column_must_be_there_once(header: bytes, says: str) -> None:
    with pytest.raises(JobError, match=r"in\.csv: the prompt column 'prompt' " + says):
        table(header).lines("prompt")


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [
        (b"prompt\n", ","),
        (b"", ","),
        (b"id;prompt\r\n1,2,3,4;x\r\n", ";"),
        (b"\n\nid\tprompt\n", "\t"),
        (b'\xef\xbb\xbf"a; b; c",prompt\n', ","),
        (b"a|b|c,d\n", "|"),
    ],
)
def test_the_delimiter_is_that_of_the_header(tmp_path: Path, header: bytes, delimiter: str) -> None:
    (tmp_path / "in.csv").write_bytes(header)
    assert csv_delimiter(tmp_path / "in.csv") == delimiter


def test_memory_does_not_grow_with_the_table() -> None:
    class Endless:
        left = 4000

        def readline(self, size: int, /) -> bytes:
            self.left -= 1
            return b'"' + b"x" * 5000 + b'",y\n' if self.left >= 0 else b""

    tracemalloc.start()
    try:
        count = sum(line.data is not None for line in CsvTable(Path("in.csv"), Endless(), ",").lines("y"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3999
    assert peak < 1e6


# One column more ------------------------------------------------------------------------------------------------------


@given(rows=_ROWS, form=_FORM, texts=st.dictionaries(st.integers(1, 5), st.text(max_size=8)))
def test_an_extended_table_has_all_cells_and_the_texts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], form: tuple[str, str, bool], texts: dict[int, str]
) -> None:
    data = extended(tmp_path_factory.mktemp("table"), written([HEADER, *rows], *form), texts)
    read = table(data, delimiter=form[0])
    assert read.header == [*HEADER, "output"]
    assert list(read) == [[*row, texts.get(number, "")] for number, row in enumerate(rows, start=1)]


def test_an_extended_table_keeps_the_bytes_it_had(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfid;"prompt"\r\n\r\n1; "x"\r\n\xff;"2"\r\nonly one\r\n3;"a\r\nb"\n\n4;d'
    texts = {1: "plain", 2: 'a;b "c"', 4: "", 5: "two\nlines"}
    assert extended(tmp_path, data, texts) == (
        b'\xef\xbb\xbfid;"prompt";output\r\n\r\n1; "x";plain\r\n\xff;"2";"a;b ""c"""\r\nonly one;\r\n'
        b'3;"a\r\nb";""\n\n4;d;"two\nlines"'
    )


def test_a_record_above_the_limit_is_kept_too(tmp_path: Path) -> None:
    long = b'"' + b"x" * MAX_LINE_BYTES + b'\n",y\r\n'
    assert extended(tmp_path, b"prompt,b\r\n" + long + b"1,2", {2: "z"}) == (
        b"prompt,b,output\r\n" + long.removesuffix(b"\r\n") + b",\r\n1,2,z"
    )
