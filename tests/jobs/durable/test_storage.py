"""Bytes that are said to be on the disk are there, and a failure says which file it hit."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from random import Random

import pytest

from shoal.jobs.durable.storage import AppendFile, write_atomically
from tests.jobs.disk import CALLS, Disk, FaultyCalls, Stopped, intercepted

SEEDS = range(20)


def test_appends_to_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"onetwo")
    with AppendFile(path, keep=3) as file:
        assert path.read_bytes() == b"one"
        file.append(b"three")
        file.sync()
        assert file.size == 8
    assert path.read_bytes() == b"onethree"


def test_keeps_nothing_unless_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with AppendFile(tmp_path / "file") as file:
        assert file.size == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_never_fills_up_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(AssertionError, match="can be kept"):
        AppendFile(tmp_path / "file", keep=6)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.9])
def test_a_write_that_takes_only_a_part_is_continued(tmp_path: Path, part: float) -> None:
    data = bytes(range(256))
    with AppendFile(tmp_path / "file") as file, intercepted(FaultyCalls(["write"], 0, 0, part)):
        file.append(data)
    assert (tmp_path / "file").read_bytes() == data


def test_what_was_synced_survives_a_power_failure(tmp_path: Path) -> None:
    for seed in SEEDS:
        path, disk = new_disk(tmp_path / str(seed))
        with disk.running(1000), AppendFile(path) as file:
            file.append(b"safe")
            file.sync()
            file.append(b"lost?")
        disk.power_failure(Random(seed))
        disk.close()
        assert path.read_bytes().startswith(b"safe")


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    for seed in SEEDS:
        path, disk = new_disk(tmp_path / str(seed))
        with disk.running(1000), AppendFile(path) as file:
            file.append(b"old lines")
            file.sync()
            file.cut(3)
        disk.power_failure(Random(seed))
        disk.close()
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("again", [False, True])
def test_bytes_whose_sync_failed_reach_the_disk_only_if_written_again(tmp_path: Path, again: bool) -> None:
    found = set()
    for seed in SEEDS:
        path, disk = new_disk(tmp_path / str(seed))
        with disk.running(1000):
            file = AppendFile(path)
            file.append(b"first ")
            file.sync()
            file.append(b"second")
        with disk.running(0, failing=True), pytest.raises(OSError, match="injected"):
            file.sync()
        file.close()
        assert path.read_bytes() == b"first second", "it can be read all the same"
        with disk.running(1000), AppendFile(path, keep=12) as file:
            if again:
                file.write_again(6)
        disk.power_failure(Random(seed))
        disk.close()
        found.add(path.read_bytes())
    assert (found == {b"first second"}) == again


def test_writing_again_changes_nothing_and_goes_on_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with AppendFile(path, keep=8) as file:
        file.write_again(3)
        assert path.read_bytes() == b"01234567"
        file.append(b"x")
        assert file.size == 9
    assert path.read_bytes() == b"01234567x"


def test_the_folder_behind_a_link_is_synced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    disk = Disk(tmp_path)
    with disk.running(1000), AppendFile(tmp_path / "link") as file:
        file.append(b"safe")
        file.sync()
    assert disk.durable_names(tmp_path / "there") == {"file"}
    disk.close()


@pytest.mark.parametrize("call", ["write", "fsync", "ftruncate"])
def test_an_error_names_the_file(tmp_path: Path, call: str) -> None:
    path = tmp_path / "file"
    error = pytest.raises(OSError, match=r"No space left on device: '.*file'")
    with AppendFile(path) as file, intercepted(FaultyCalls([call], 0, errno.ENOSPC)), error:
        append_and_cut(file)


def append_and_cut(file: AppendFile) -> None:
    file.append(b"x")
    file.cut(0)


def test_two_cannot_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "link").symlink_to(path)
    with AppendFile(path) as file:
        file.append(b"line")
        with pytest.raises(OSError, match=r"another job writes to it: '.*file'"):
            AppendFile(tmp_path / "link")
    assert path.read_bytes() == b"line"
    with AppendFile(path, keep=4):
        pass


def test_a_file_that_was_moved_away_is_not_synced(tmp_path: Path) -> None:
    with AppendFile(tmp_path / "file") as file:
        (tmp_path / "file").rename(tmp_path / "moved")
        file.append(b"line")
        with pytest.raises(FileNotFoundError, match="file"):
            file.sync()
        (tmp_path / "file").write_bytes(b"of an editor")
        with pytest.raises(OSError, match="replaced by another file"):
            file.sync()


@pytest.mark.parametrize("name", CALLS)
def test_atomic_writing_fails_with_one_or_the_other_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    for at in itertools.count():
        path.write_bytes(b"old")
        calls = FaultyCalls([name], at, errno.EIO)
        with intercepted(calls):
            error = error_of_writing(path, b"new")
        assert (error is None) == (not calls.reached)
        assert path.read_bytes() in ([b"old", b"new"] if error else [b"new"])
        if not calls.reached:
            break
    assert at > 0


def error_of_writing(path: Path, data: bytes) -> OSError | None:
    try:
        write_atomically(path, data)
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_atomic_writing_survives_a_power_failure_at_any_call(tmp_path: Path, seed: int) -> None:
    for at in itertools.count():
        path, disk = new_disk(tmp_path / str(at), b"old")
        with disk.running(at):
            stopped = stops_writing(path, b"new")
        disk.power_failure(Random(seed))
        disk.close()
        assert path.read_bytes() in ([b"old", b"new"] if stopped else [b"new"])
        if not stopped:
            break
    assert at > 5


def stops_writing(path: Path, data: bytes) -> bool:
    try:
        write_atomically(path, data)
    except Stopped:
        return True
    return False


def new_disk(folder: Path, data: bytes | None = None) -> tuple[Path, Disk]:
    """A file in a folder of its own, there already if it has ``data``, and the disk of that folder."""
    folder.mkdir()
    path = folder / "file"
    if data is not None:
        path.write_bytes(data)
    return path, Disk(folder)
