"""A look at the whole input of a job before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from shoal.errors import JobError
from shoal.jobs.input.ids import DuplicateIdError, IdIndex
from shoal.jobs.input.rows import BadRow, Line, RowReader, custom_id_of

Place = Callable[[int], str]


def check_input(
    lines: Iterable[Line], index: IdIndex, strict: RowReader | None = None, *, place: Place = lambda number: ""
) -> int:
    """The number of rows in ``lines``, once each custom_id (put into ``index``) is found to be in one of them only.

    Without ``strict``, no more than the custom_id is read of a row, and what has none to read is passed over: it gets its
    error record when its turn comes. With it, every row is read in full.
    ``place``: as ``Source.place``.
    Raises DuplicateIdError (a JobError) naming both rows, and JobError that counts the bad rows and quotes the first.
    """
    check = _Check(strict)
    try:
        index.add_all(check.custom_ids(lines))
    except DuplicateIdError as error:
        places = (place(error.first_row), place(error.second_row))
        raise DuplicateIdError(error.custom_id, error.first_row, error.second_row, places) from None
    if check.first_bad is not None:
        raise JobError(f"{check.num_bad} bad lines, nothing was run; {check.first_bad}")
    return check.num_rows


class _Check:
    """Counts rows, and bad ones, as their custom_ids pass through."""

    def __init__(self, reader: RowReader | None) -> None:
        self.num_rows = 0
        self.num_bad = 0
        self.first_bad: str | None = None
        self._reader = reader

    def custom_ids(self, lines: Iterable[Line]) -> Iterator[tuple[str, int]]:
        """The custom_ids that can be read, with their rows."""
        for line in lines:
            self.num_rows += 1
            if self._reader is not None:
                self._read(self._reader, line)
            custom_id = custom_id_of(line)
            if custom_id is not None:
                yield custom_id, line.number

    def _read(self, reader: RowReader, line: Line) -> None:
        row = reader.read(line)
        if isinstance(row, BadRow):
            self.num_bad += 1
            self.first_bad = self.first_bad or f"{line.place or f'line {line.number}'}: {row.error}"
