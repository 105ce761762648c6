"""The data folder of a server: files and batches, for one process at a time."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from shoal.errors import JobError
from shoal.jobs.durable.lock import JobLock
from shoal.jobs.durable.storage import AppendFile
from shoal.openai.schema import APIError
from shoal.server.store.batches import Batch, BatchStore
from shoal.server.store.files import MAX_FILE_SIZE, FileInfo, FileStore
from shoal.system.folders import data_folder

INPUT = "input.jsonl"  # in the folder of a batch


def default_folder(port: int) -> Path | None:
    """Where the server on ``port`` keeps its files: in SHOAL_DATA, else among the user's data; None for a user without a home.

    The same port finds the same files again, and servers side by side keep theirs apart.
    """
    folder = data_folder("SHOAL_DATA", "server")
    return None if folder is None else folder / str(port)


class Store:
    """``files`` and ``batches`` in ``folder``, created if need be, readable by this user alone.

    Raises JobError where another process serves from it, or it cannot be used.
    """

    def __init__(self, folder: Path, *, max_file_size: int = MAX_FILE_SIZE, max_total: int | None = None) -> None:
        with ExitStack() as opened:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                opened.enter_context(JobLock(folder, "serving from this folder; give this server another --data-dir"))
                self.files = FileStore(folder / "files", max_file_size=max_file_size, max_total=max_total)
                self.batches = BatchStore(folder / "batches")
            except OSError as error:
                raise JobError(f"{folder}: cannot keep files there: {error}; see --data-dir") from error
            self._opened = opened.pop_all()

    def create_batch(self, owner: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> Batch:
        """A new batch of the rows in a file, which may be deleted afterwards. Raises APIError for one that cannot be its input."""
        file = self._input(owner, input_file_id)
        if file.purpose != "batch":
            raise APIError(f"input_file_id: has the purpose {file.purpose!r}, must have 'batch'", "input_file_id")
        source = self.files.path(owner, input_file_id)
        return self.batches.create(
            owner, input_file_id, endpoint, metadata, lambda folder: _link(source, folder / INPUT)
        )

    def close(self) -> None:
        """Let another process have the folder."""
        self._opened.close()

    def _input(self, owner: str, file_id: str) -> FileInfo:
        try:
            return self.files.get(owner, file_id)
        except APIError:
            raise APIError(f"input_file_id: there is no file {file_id!r}", "input_file_id") from None


def _link(source: Path, target: Path) -> None:
    """A second name where file systems have that, else a copy, durably."""
    try:
        os.link(source, target)
    except FileNotFoundError:  # deleted just now
        raise APIError("input_file_id: the file is gone", "input_file_id") from None
    except OSError:
        shutil.copyfile(source, target)
        with AppendFile(target, target.stat().st_size):
            pass
