"""The files of a job: which they are, and whether they may be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ParameterError
from shoal.jobs.records import STANDARD_STREAM, RecordWriter


@dataclass(frozen=True, slots=True)
class JobFiles:
    """Where requests come from, and where results and failures go; ``-`` is stdin or stdout.

    ``errors`` may be ``results`` itself: then every row has its record there.
    """

    requests: Path
    results: Path
    errors: Path

    @classmethod
    def named(cls, requests: Path, results: Path, errors: Path | None) -> JobFiles:
        """``errors`` None is RESULTS.errors.jsonl beside the results, or stdout where they go there."""
        if errors is None:
            errors = results if results == STANDARD_STREAM else results.with_name(results.name + ".errors.jsonl")
        return cls(requests, results, results if _same_file(errors, results) else errors)

    def check(self, *, overwrite: bool) -> None:
        """Raise ParameterError for files that are not there, that hold what would be lost, or an output that is the input."""
        if self.requests != STANDARD_STREAM and (self.requests.is_dir() or not self.requests.exists()):
            raise ParameterError("input file", str(self.requests), "a file that exists")
        outputs = {"output file": self.results, "error file": self.errors}
        for name, path in outputs.items():
            if _same_file(path, self.requests):
                raise ParameterError(name, str(path), "another file than the input")
            if not path.parent.is_dir():
                raise ParameterError(name, str(path), "in a folder that exists")
            if not overwrite and path.is_file() and path.stat().st_size > 0:
                raise ParameterError(name, str(path), "empty or not there yet (--overwrite replaces it)")

    @contextmanager
    def writers(self) -> Iterator[tuple[RecordWriter, RecordWriter]]:
        """Writers for results and failures. The results file is there at once, the error file with the first failure."""
        with RecordWriter(self.results) as results:
            results.open()
            if self.errors == self.results:
                yield results, results
                return
            if self.errors.is_file():
                self.errors.unlink()
            with RecordWriter(self.errors) as errors:
                yield results, errors


def _same_file(one: Path, other: Path) -> bool:
    if STANDARD_STREAM in (one, other):
        return False
    return os.path.realpath(one) == os.path.realpath(other) or (
        one.exists() and other.exists() and os.path.samefile(one, other)
    )
