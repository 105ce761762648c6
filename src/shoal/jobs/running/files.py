"""The files of a job: which they are, and whether they may be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ParameterError
from shoal.jobs.durable.store import is_url
from shoal.jobs.durable.urls import shown
from shoal.jobs.input.inputs import Given, Inputs
from shoal.jobs.running.file_place import FilePlace
from shoal.jobs.running.parts_place import PartsPlace
from shoal.jobs.running.place import Place


@dataclass(frozen=True, slots=True)
class JobFiles:
    """Where requests come from, and the place of answers and failures."""

    input: Inputs
    place: Place

    @classmethod
    def named(cls, input: Given, output: str | Path, errors: str | Path | None = None) -> JobFiles:
        """See ``Inputs.of``, which raises for an input that leads to no file, and ``place_of``."""
        return cls(Inputs.of(input), place_of(output, errors))

    @property
    def can_go_on(self) -> bool:
        """Whether a job that was stopped can be taken up again."""
        return self.place.has_journal and not self.input.is_stdin

    def check(self) -> None:
        """Raise ParameterError for an input that cannot be read twice, and for outputs that would write over it or each other."""
        for path in self.input.local:
            _check_input(path)
        for name, place in self.place.written.items():
            if self.input.are_in(place) or self.input.would_hold(place):
                raise ParameterError(name, shown(str(place)), "another file than the input")
        self.place.check()


def place_of(output: str | Path, errors: str | Path | None = None) -> Place:
    """The place that ``output`` names: a folder of parts if it is a URL, ends in a slash or is a folder, else a file (``-``: stdout).

    ``errors`` is where failures go, if not to where they do by themselves. Raises ParameterError for an empty text.
    """
    if not str(output):  # as a path it would be the current folder
        raise ParameterError("output file", "", "a file, a folder, a URL, or - for stdout")
    if is_url(output) or str(output).endswith("/") or Path(output).is_dir():
        return PartsPlace(str(output), errors)
    return FilePlace.named(output, errors)


def _check_input(path: Path) -> None:
    if path.is_dir():
        raise ParameterError("input file", str(path), "a file, not a folder")
    if not path.exists():
        raise ParameterError("input file", str(path), "a file that exists")
    if not path.is_file():  # a pipe: the check of its rows would use them up
        raise ParameterError("input file", str(path), "a regular file, or - for stdin")
