"""The table at the end of a job: all of it or the old one, the same whatever was done first, refused before any work."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.tables import assemble, check_target
from tests.jobs.compress import COMPRESS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CSV = b"id,prompt\n1,a\n2,b\n"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_bytes(CSV)
    return path


def answers(*known: int) -> Callable[[int], str | None]:
    return {number: f"answer {number}" for number in known}.get


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_csv_table_gets_its_answers(tmp_path: Path, suffix: str) -> None:
    source, target = tmp_path / f"in.csv{suffix}", tmp_path / "out.csv"
    source.write_bytes(COMPRESS[suffix](CSV))
    target.write_bytes(b"old")
    assemble(source, answers(2), target, "output")
    assert target.read_bytes() == b"id,prompt,output\n1,a,\n2,b,answer 2\n"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_parquet_table_gets_its_answers(parquet: Path, tmp_path: Path) -> None:
    assemble(parquet, answers(1), tmp_path / "out.parquet", "reply")
    assert pq.read_table(tmp_path / "out.parquet").to_pydict() == {"prompt": ["a", "b"], "reply": ["answer 1", None]}


def test_the_file_depends_on_nothing_but_table_and_answers(parquet: Path, source: Path, tmp_path: Path) -> None:
    for table in (parquet, source):
        files = []
        for order in ((1, 2), (2, 1)):
            target = tmp_path / f"out{table.suffix}"
            assemble(table, answers(*order), target, "output")
            files.append(target.read_bytes())
        assert files[0] == files[1]


def test_answers_are_asked_for_in_the_order_of_rows(source: Path, parquet: Path, tmp_path: Path) -> None:
    for table in (source, parquet):
        asked: list[int] = []
        assemble(table, asked.append, tmp_path / "out", "output")
        assert asked == [1, 2]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", ["in.csv", "in.parquet"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    source: Path, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, kind: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            assemble(tmp_path / kind, answers(1), tmp_path / "out", "output")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "in.parquet", "out"]
    assemble(tmp_path / kind, answers(1), tmp_path / "out", "output")
    assert (tmp_path / "out").read_bytes() != b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("kind", ["in.csv", "in.parquet"])
def test_a_full_disk_is_not_taken_for_a_damaged_input(source: Path, parquet: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "out.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        assemble(tmp_path / kind, lambda number: "x" * 100_000, tmp_path / "out", "output")
    assert not (tmp_path / "out").exists()


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        calls.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}")
        sync(fd)

    def rename(old: Path, new: Path) -> None:
        assert Path(old).read_bytes() == b"id,prompt,output\n1,a,\n2,b,\n"
        calls.append("replace")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    assemble(source, answers(), tmp_path / "out.csv", "output")
    assert calls == [f"fsync {tmp_path}/out.csv.tmp", "replace", f"fsync {tmp_path}"]


def test_a_link_leads_to_the_file_that_is_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "out.csv")
    assemble(source, answers(1), tmp_path / "link.csv", "output")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "out.csv").read_bytes() == b"id,prompt,output\n1,a,answer 1\n2,b,\n"


@pytest.mark.parametrize(
    ("kind", "target"),
    [("in.csv", "out.CSV"), ("in.parquet", "out.parquet"), ("in.csv", "out.jsonl"), ("in.jsonl", "out"), ("-", "-")],
)
def test_a_target_that_can_be_written_passes_the_check(
    source: Path, parquet: Path, tmp_path: Path, kind: str, target: str
) -> None:
    check_target(Inputs.of(tmp_path / kind), Path(target), "reply")


@pytest.mark.parametrize(
    ("kind", "target", "says"),
    [
        ("in.csv", "out.csv", r"in\.csv: has a column 'prompt' already"),
        ("in.parquet", "out.parquet", r"in\.parquet: has a column 'prompt' already"),
        ("in.csv", "out.parquet", r"out\.parquet: only a \.parquet input can become this table, not .*in\.csv"),
        ("in.parquet", "out.csv", r"out\.csv: only a \.csv input can become this table, not .*in\.parquet"),
        ("in.jsonl", "out.csv", r"out\.csv: only a \.csv input can become this table, not .*in\.jsonl"),
        ("in.csv", "out.csv.gz", r"out\.csv\.gz: results are appended uncompressed; leave \.gz away"),
        ("in.jsonl", "out.zst", r"out\.zst: results are appended uncompressed; leave \.zst away"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    source: Path, parquet: Path, tmp_path: Path, kind: str, target: str, says: str
) -> None:
    with pytest.raises(JobError, match=says):
        check_target(Inputs.of(tmp_path / kind), tmp_path / target, "prompt")


def test_a_table_is_written_where_files_cannot_be_synced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    assemble(source, answers(1, 2), tmp_path / "out.csv", "output")
    assert (tmp_path / "out.csv").read_bytes() == b"id,prompt,output\n1,a,answer 1\n2,b,answer 2\n"
