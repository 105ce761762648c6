"""A job whose output is a folder of parts, on a disk or in object storage. All that is kept of it is in that folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import JobError, ParameterError
from shoal.jobs.durable import lease
from shoal.jobs.durable import manifest as manifests
from shoal.jobs.durable.fingerprint import printable
from shoal.jobs.durable.journal import ERRORS, RESULTS, Totals
from shoal.jobs.durable.lease import Lease
from shoal.jobs.durable.manifest import Manifest
from shoal.jobs.durable.parts import (
    CANCEL,
    FOLDERS,
    JOB,
    MANIFEST,
    PartLedger,
    last_number,
    part_name,
    parts_in,
    read_totals,
)
from shoal.jobs.durable.store import STAGED, Store, is_url, local_path, open_store
from shoal.jobs.durable.urls import shown
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.running.place import Owner

_OF_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst")


@dataclass(frozen=True, slots=True)
class PartsPlace:
    """The folder at ``url``, a path too. ``errors_file`` is what somebody gave as a file for failures. Otherwise as Place says."""

    url: str
    errors_file: str | Path | None = None

    @property
    def output(self) -> str:
        """As Place says."""
        return printable(shown(self.url))

    @property
    def errors(self) -> str:
        """As Place says."""
        return f"{self.output.rstrip('/')}/{self.error_file}"

    @property
    def error_file(self) -> str:
        """As Place says."""
        return f"{FOLDERS[ERRORS]}/"

    @property
    def written(self) -> Mapping[str, Path | str]:
        """As Place says."""
        folder, url = local_path(self.url), self.url.rstrip("/")
        folders = {f"folder {name}/": name for name in (*FOLDERS.values(), "_shoal")}
        files = {
            "output file": part_name(RESULTS, 1),
            "error file": part_name(ERRORS, 1),
            "manifest": MANIFEST,
            "job": JOB,
        }
        return {what: f"{url}/{name}" if folder is None else folder / name for what, name in (folders | files).items()}

    @property
    def has_journal(self) -> bool:
        """As Place says."""
        return True

    @property
    def is_table(self) -> bool:
        """As Place says."""
        return False

    def check(self) -> None:
        """As Place says."""
        if self.errors_file is not None:
            raise ParameterError(
                "error file",
                str(self.errors_file),
                f"left out where the output is a folder: failures go to {self.errors}",
            )
        if is_url(self.url) and self.url.endswith(_OF_FILES):
            raise ParameterError(
                "output file", self.output, "a folder, whose name ends in /: tables and single files are local"
            )
        folder = local_path(self.url)
        if folder is not None and not (folder.is_dir() or folder.absolute().parent.is_dir()):
            raise ParameterError("output file", self.url, "a folder in a folder that exists")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ParameterError("output file", self.url, "a folder, or without the slash at its end")

    def check_source(self, source: Inputs, column: str) -> None:
        """As Place says: any input can have its results here."""

    def manifest(self) -> Manifest | None:
        """As Place says."""
        try:
            return manifests.decode(f"{self.output.rstrip('/')}/{JOB}", self._store().read(JOB))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"{self.output}: {error.strerror or error}") from error

    def totals(self, manifest: Manifest) -> Totals:
        """As Place says."""
        return read_totals(self._store())

    def owner(self) -> Owner | None:
        """As Place says."""
        found = lease.holder(self._store())
        return None if found is None else Owner(found.pid, None if found.is_here else found.host)

    def ask_to_end(self) -> None:
        """As Place says."""
        self._store().replace(CANCEL, b"1")

    @contextmanager
    def held(self) -> Iterator[HeldParts]:
        """As Place says."""
        with scratch_folder() as scratch, _leaving_nothing_empty(local_path(self.url)), ExitStack() as stack:
            try:
                store = self._store()
                held = HeldParts(store, stack.enter_context(Lease(store)), scratch)
            except OSError as error:
                raise JobError(f"{self.output}: {error.strerror or error}") from error
            yield held

    def _store(self) -> Store:
        return open_store(self.url)


class HeldParts:
    """As HeldPlace says."""

    def __init__(self, store: Store, held: Lease, scratch: Path) -> None:
        self.scratch = scratch
        self._store = store
        self._held = held
        self._last = last_number(store)
        self._ledger: PartLedger | None = None

    def save(self, manifest: Manifest) -> None:
        """As HeldPlace says. Raises TakenOverError where another process has the job by now."""
        assert self._ledger is not None, "the job was claimed"
        self._ledger.check_owned()
        self._store.replace(JOB, manifests.encode(manifest))

    def leftovers(self) -> list[tuple[str, int]]:
        """As HeldPlace says."""
        return [(f"{self._store.place}/{name}", size) for name, size in parts_in(self._store).items()]

    def has_records(self) -> bool:
        """As HeldPlace says."""
        return bool(parts_in(self._store))

    def is_complete(self, manifest: Manifest) -> bool:
        """As HeldPlace says."""
        return self._store.exists(MANIFEST)

    def give_up(self) -> None:
        """As HeldPlace says: the ledger does that once it has the job."""

    def ledger(self, manifest: Manifest) -> PartLedger:
        """As HeldPlace says. A job is begun anew only if nobody has claimed it meanwhile."""
        is_new = not manifest.runs
        anew_after = self._last if is_new else None
        self._ledger = PartLedger.open(self._store, manifests.digest(manifest.identity), anew_after=anew_after)
        if is_new:
            self.withdraw_cancel()  # it was the old job that was asked to end
        return self._ledger

    def is_cancelled(self) -> bool:
        """As HeldPlace says."""
        return self._held.cancelled

    def withdraw_cancel(self) -> None:
        """As HeldPlace says."""
        self._held.withdraw_cancel()

    def conclude(self, source: Inputs, column: str) -> None:
        """As HeldPlace says: the list of valid parts."""
        assert self._ledger is not None, "the job was claimed"
        self._ledger.write_manifest()


@contextmanager
def _leaving_nothing_empty(folder: Path | None) -> Iterator[None]:
    """Folders on a disk that come into being and that nothing is put into, as no job was begun, do not stay."""
    if folder is None:
        yield
        return
    new = [path for path in (folder / STAGED, folder / "_shoal", folder) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for files that nobody needs afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="shoal-")
    except OSError as error:
        raise JobError(f"no folder for temporary files: {error}; set TMPDIR to one that can be written to") from error
    with folder as name:
        yield Path(name)
