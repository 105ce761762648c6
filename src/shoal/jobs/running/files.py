"""The files of a job: which they are, and whether they may be used."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ParameterError
from shoal.jobs.input.inputs import Given, Inputs
from shoal.jobs.input.streams import STANDARD_STREAM, table_format


@dataclass(frozen=True, slots=True)
class JobFiles:
    """Where requests come from, and where answers and failures go; an output ``-`` is stdout.

    ``errors`` may be ``output`` itself: then every row has its record there. A table (CSV, Parquet) is written whole when
    all rows are done; until then its answers are lines of ``results``, in the journal's folder.
    """

    input: Inputs
    output: Path
    errors: Path

    @classmethod
    def named(cls, input: Given, output: str | Path, errors: str | Path | None = None) -> JobFiles:
        """``input``: as of ``Inputs.of``, which raises for what leads to no file. ``errors`` None is OUTPUT.errors.jsonl beside the
        output, or the output itself if it is a stream."""
        output = Path(output)
        if errors is None:
            errors = output if _is_stream(output) else output.with_name(output.name + ".errors.jsonl")
        errors = Path(errors)
        return cls(Inputs.of(input), output, output if _same_file(errors, output) else errors)

    @property
    def folder(self) -> Path:
        """Where the journal is."""
        return self.output.with_name(self.output.name + ".shoal")

    @property
    def is_table(self) -> bool:
        """Whether the output is the input table with one more column."""
        return table_format(self.output) is not None

    @property
    def results(self) -> Path:
        """The file that answers are appended to."""
        return self.folder / "results.jsonl" if self.is_table else self.output

    @property
    def has_journal(self) -> bool:
        """Whether the output can be kept in step with a journal: not stdout, a pipe or a device."""
        return not _is_stream(self.output)

    @property
    def can_go_on(self) -> bool:
        """Whether a job that was stopped can be taken up again."""
        return self.has_journal and not self.input.is_stdin

    def check(self) -> None:
        """Raise ParameterError for an input that cannot be read twice, and for outputs that would write over it or each other."""
        for path in self.input.local:
            _check_input(path)
        for name, path in {"output file": self.output, "error file": self.errors}.items():
            if path != STANDARD_STREAM and self.input.would_hold(path):
                raise ParameterError(name, str(path), "another file than the input")
            if path.is_dir() or not path.parent.is_dir():
                raise ParameterError(name, str(path), "a file in a folder that exists")
        if self.has_journal and _is_stream(self.errors):
            raise ParameterError("error file", str(self.errors), "a regular file, as the output file is")
        if self.is_table and (self.errors == self.output or not self.has_journal):
            raise ParameterError("output file", str(self.output), "a regular file, and another than the error file")


def _check_input(path: Path) -> None:
    if not path.exists():
        raise ParameterError("input file", str(path), "a file that exists")
    if not path.is_file():  # a pipe: the check of its rows would use them up
        raise ParameterError("input file", str(path), "a regular file, or - for stdin")


def _is_stream(path: Path) -> bool:
    return path == STANDARD_STREAM or (path.exists() and not path.is_file())


def _same_file(one: Path, other: Path) -> bool:
    if STANDARD_STREAM in (one, other):
        return False
    return os.path.realpath(one) == os.path.realpath(other) or (
        one.exists() and other.exists() and os.path.samefile(one, other)
    )
