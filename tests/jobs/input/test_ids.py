"""The on-disk index of custom_ids."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.jobs.input import ids
from shoal.jobs.input.ids import DuplicateIdError, IdIndex


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ids.sqlite"


def test_ids_are_added_once(path: Path) -> None:
    with IdIndex(path) as index:
        assert index.add("a", 1) is None
        assert index.add("b", 2) is None
        assert index.add("a", 3) == 1
        assert index.add("a", 4) == 1
        index.add_all([("c", 5), ("d", 6)])
        assert index.add("d", 7) == 6
        assert index.add("A", 8) is None


@pytest.mark.parametrize("apart", [1, 2, 3, 4, 8], ids=lambda apart: f"{apart} rows apart")
def test_a_duplicate_in_one_batch_and_over_batches_names_both_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    monkeypatch.setattr(ids, "_BATCH", 4)
    pairs = [(f"id {row}", row) for row in range(10, 30)]
    pairs[3 + apart] = ("id 13", 13 + apart)
    with IdIndex(path) as index, pytest.raises(DuplicateIdError) as caught:
        index.add_all(pairs)
    error = caught.value
    assert (error.custom_id, error.first_row, error.second_row) == ("id 13", 13, 13 + apart)
    assert str(error) == f"custom_id 'id 13' is in rows 13 and {13 + apart}, must be in one"
    assert isinstance(error, JobError)


def test_the_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(DuplicateIdError("a", 3, 7)))
    assert (error.custom_id, error.first_row, error.second_row) == ("a", 3, 7)
    assert str(error) == str(DuplicateIdError("a", 3, 7))


def test_an_id_that_was_added_alone_is_found_in_a_batch(path: Path) -> None:
    with IdIndex(path) as index:
        index.add("a", 1)
        with pytest.raises(DuplicateIdError, match="rows 1 and 3"):
            index.add_all([("b", 2), ("a", 3)])


@given(st.lists(st.text(alphabet="abc\0\u00e9", max_size=2), max_size=20), st.integers(1, 6))
def test_the_first_row_that_repeats_an_id_is_the_one_named(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], batch: int
) -> None:
    first_rows: dict[str, int] = {}
    expected = None
    for row, name in enumerate(names, start=1):
        if first_rows.setdefault(name, row) != row:
            expected = (name, first_rows[name], row)
            break
    found = None
    with pytest.MonkeyPatch.context() as patch, IdIndex(tmp_path_factory.mktemp("ids") / "ids") as index:
        patch.setattr(ids, "_BATCH", batch)
        try:
            index.add_all((name, row) for row, name in enumerate(names, start=1))
        except DuplicateIdError as error:
            found = (error.custom_id, error.first_row, error.second_row)
    assert found == expected


def test_what_an_earlier_run_left_is_not_read(path: Path) -> None:
    path.write_bytes(b"half a database")
    with IdIndex(path) as index:
        assert index.add("a", 1) is None
    assert not path.exists()


def test_memory_does_not_grow_with_the_number_of_ids(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of 1 MiB, 300,000 ids take many times that on disk."""
    monkeypatch.setattr(ids, "_CACHE_KIB", 1024)
    monkeypatch.setattr(ids, "_BATCH", 4096)
    process = psutil.Process()
    with IdIndex(path) as index:
        index.add_all((f"request {row}", row) for row in range(50_000))
        before = process.memory_info().rss
        index.add_all((f"request {row}", row) for row in range(50_000, 300_000))
        grown = process.memory_info().rss - before
        assert path.stat().st_size > 8e6
        assert grown < 3e6
        assert index.add("request 299999", 300_000) == 299_999
        assert index.add("request 0", 300_000) == 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow over ``size`` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_CACHE_KIB", 64)
    with (
        IdIndex(path) as index,
        files_of_at_most(256 << 10),
        pytest.raises(JobError, match=r"ids\.sqlite: cannot keep the index of custom_ids: "),
    ):
        index.add_all((str(row), row) for row in range(100_000))
    assert not path.exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=str(tmp_path / "absent" / "ids")):
        IdIndex(tmp_path / "absent" / "ids")


LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_index_needs_no_file_locks(path: Path) -> None:
    """On file systems without them SQLite's fail, as they do where another process holds them."""
    with (
        IdIndex(path) as index,
        subprocess.Popen(
            [sys.executable, "-c", LOCK, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert index.add("a", 1) is None
        assert index.add("a", 2) == 1


@pytest.mark.parametrize("name", ["with blank", "50%", "a?nolock=0", "#1", "\udcff"])
def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    path = tmp_path / name / "ids.sqlite"
    with IdIndex(path) as index:
        index.add("a", 1)
        assert path.exists()
    assert not path.exists()
