"""A job whose output is a file, or two: answers and failures. The journal is in a folder beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import JobError, ParameterError
from shoal.jobs.durable import journal, lock
from shoal.jobs.durable import manifest as manifests
from shoal.jobs.durable.fingerprint import printable
from shoal.jobs.durable.ledger import Ledger, Totals
from shoal.jobs.durable.lock import JobLock
from shoal.jobs.durable.manifest import Manifest
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.lookup import answers
from shoal.jobs.input.streams import STANDARD_STREAM, table_format
from shoal.jobs.input.tables import assemble, check_target
from shoal.jobs.running.place import Owner


@dataclass(frozen=True, slots=True)
class FilePlace:
    """The files ``output_file`` and ``errors_file``, which may be the same; ``-`` is stdout. Otherwise as Place says.

    A table (CSV, Parquet) is written whole when all rows are done; until then its answers are lines of ``results``, in the
    journal's folder.
    """

    output_file: Path
    errors_file: Path

    @classmethod
    def named(cls, output: str | Path, errors: str | Path | None = None) -> FilePlace:
        """``errors`` None is OUTPUT.errors.jsonl beside the output, or the output itself if it is a stream."""
        output = Path(output)
        if errors is None:
            errors = output if _is_stream(output) else output.with_name(output.name + ".errors.jsonl")
        errors = Path(errors)
        return cls(output, output if same_file(errors, output) else errors)

    @property
    def output(self) -> str:
        """As Place says."""
        return str(self.output_file)

    @property
    def errors(self) -> str:
        """As Place says."""
        return str(self.errors_file)

    @property
    def error_file(self) -> str:
        """As Place says."""
        return printable(os.path.relpath(self.errors_file, self.output_file.parent))

    @property
    def written(self) -> Mapping[str, Path]:
        """As Place says."""
        return {**self._files, **({"manifest": self.folder / manifests.NAME} if self.has_journal else {})}

    @property
    def folder(self) -> Path:
        """Where the journal is."""
        return self.output_file.with_name(self.output_file.name + ".shoal")

    @property
    def is_table(self) -> bool:
        """As Place says."""
        return table_format(self.output_file) is not None

    @property
    def results(self) -> Path:
        """The file that answers are appended to."""
        return self.folder / "results.jsonl" if self.is_table else self.output_file

    @property
    def has_journal(self) -> bool:
        """As Place says."""
        return not _is_stream(self.output_file)

    def check(self) -> None:
        """As Place says."""
        for name, path in self._files.items():
            if path.is_dir() or not path.parent.is_dir():
                raise ParameterError(name, str(path), "a file in a folder that exists")
        if self.has_journal and _is_stream(self.errors_file):
            raise ParameterError("error file", self.errors, "a regular file, as the output file is")
        if self.is_table and (self.errors_file == self.output_file or not self.has_journal):
            raise ParameterError("output file", self.output, "a regular file, and another than the error file")

    def check_source(self, source: Inputs, column: str) -> None:
        """As Place says."""
        check_target(source, self.output_file, column)

    def manifest(self) -> Manifest | None:
        """As Place says."""
        return manifests.load(self.folder)

    def totals(self, manifest: Manifest) -> Totals:
        """As Place says."""
        path = self.folder / "journal"
        if not path.exists():  # begun a moment ago
            return Totals()
        return journal.read(path, errors_apart=manifest.errors != manifest.output).state.totals

    def owner(self) -> Owner | None:
        """As Place says."""
        pid = lock.owner(self.folder)
        return None if pid is None else Owner(pid)

    @property
    def _files(self) -> Mapping[str, Path]:
        return {"output file": self.output_file, "error file": self.errors_file}

    def ask_to_end(self) -> None:
        """As Place says."""
        (self.folder / "cancel").touch()

    @contextmanager
    def held(self) -> Iterator[HeldFiles]:
        """As Place says. A folder in which no job was begun does not stay."""
        with JobLock(self.folder):
            try:
                yield HeldFiles(self)
            except BaseException:
                with suppress(OSError):  # NFS keeps the name of an open file; and what went wrong before is what counts
                    if {path.name for path in self.folder.iterdir()} <= {"lock", "ids.sqlite"}:
                        shutil.rmtree(self.folder)
                raise


class HeldFiles:
    """As HeldPlace says."""

    def __init__(self, place: FilePlace) -> None:
        self.scratch = place.folder
        self._place = place
        self._cancel = place.folder / "cancel"

    def save(self, manifest: Manifest) -> None:
        """As HeldPlace says."""
        manifests.save(self._place.folder, manifest)

    def leftovers(self) -> list[tuple[str, int]]:
        """As HeldPlace says."""
        paths = held(self._place.output_file, self._place.errors_file)
        return [(str(path), path.stat().st_size) for path in paths]

    def has_records(self) -> bool:
        """As HeldPlace says."""
        return bool(held(self._place.results, self._place.errors_file))

    def is_complete(self, manifest: Manifest) -> bool:
        """As HeldPlace says."""
        if not self._place.output_file.exists():
            gone = f"is gone, though this job is {manifest.state} (--restart begins anew)"
            raise JobError(f"{self._place.output_file}: {gone}")
        return True

    def give_up(self) -> None:
        """As HeldPlace says: what is said of the old job ends before its files do."""
        manifests.drop(self._place.folder)
        self.withdraw_cancel()
        if self._place.is_table:
            self._place.output_file.unlink(missing_ok=True)  # an old one; it is whole or not there

    def ledger(self, manifest: Manifest) -> Ledger:
        """As HeldPlace says."""
        place = self._place
        return Ledger.open(place.folder, place.results, place.errors_file, restart=manifest.runs == 0)

    def is_cancelled(self) -> bool:
        """As HeldPlace says."""
        return self._cancel.exists()

    def withdraw_cancel(self) -> None:
        """As HeldPlace says."""
        self._cancel.unlink(missing_ok=True)

    def conclude(self, source: Inputs, column: str) -> None:
        """As HeldPlace says."""
        if self._place.is_table:
            with answers(self._place.folder, self._place.results) as answer:
                assemble(source.files[0], answer, self._place.output_file, column)


def held(*paths: Path) -> list[Path]:
    """Those that hold something."""
    return [path for path in paths if path.is_file() and path.stat().st_size > 0]


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths are of one file, or would be."""
    if STANDARD_STREAM in (one, other):
        return False
    return os.path.realpath(one) == os.path.realpath(other) or (
        one.exists() and other.exists() and os.path.samefile(one, other)
    )


def _is_stream(path: Path) -> bool:
    return path == STANDARD_STREAM or (path.exists() and not path.is_file())
