"""Files that fsspec reads, from its file system in memory."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shoal.errors import JobError, ParameterError
from shoal.jobs.input import remote
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.remote import RemoteFile, open_remote, remote_files
from shoal.jobs.input.source import open_inputs
from tests.jobs.compress import COMPRESS

LINES = b"".join(json.dumps({"prompt": f"{number}"}).encode() + b"\n" for number in range(20_000))


class ShakyFile(io.BytesIO):
    """Fails at every third read, and gives little at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        ShakyStore.reads += 1
        if ShakyStore.reads % 3 == 0 or ShakyStore.broken:
            raise ConnectionError("the connection was reset")
        return super().read(min(size or -1, 10_000))


class ShakyStore(MemoryFileSystem):  # type: ignore[misc]
    """A store on a bad network; ``broken``: there is none any more."""

    protocol = "shaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[int] = 0
    broken: ClassVar[bool] = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("shaky://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return ShakyFile(self.store[path].getvalue()) if mode == "rb" else super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty ones; nothing waits."""
    fsspec.register_implementation("shaky", ShakyStore, clobber=True)
    monkeypatch.setattr(remote, "_PAUSES", (0.0,) * 5)
    monkeypatch.setattr(ShakyStore, "broken", False)
    yield
    for system in (MemoryFileSystem, ShakyStore):
        system.store.clear()
        system.pseudo_dirs[:] = [""]


def put(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def names(*given: str | Path) -> list[str]:
    return Inputs.of(given).names()


def test_a_file_a_glob_and_a_folder() -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "c.txt", ".d.jsonl", "deeper/e.jsonl"):
        put(f"memory://in/{name}", b"{}")
    assert names("memory://in/b.jsonl") == ["b.jsonl"]
    assert names("memory://in/c.txt") == ["c.txt"]
    assert names("memory://in/*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert names("memory://in/**/e.jsonl") == ["e.jsonl"]
    assert names("memory://in", "memory://in/deeper") == ["a.jsonl.gz", "b.jsonl", "deeper/e.jsonl"]
    assert [file.size for file in remote_files("memory://in/", lambda name: True)] == [2, 2, 2, 2]


def test_a_name_that_is_there_is_no_glob() -> None:
    put("memory://in/a[1].jsonl", b"{}")
    put("memory://in/a1.jsonl", b"{}")
    assert names("memory://in/a[1].jsonl") == ["a[1].jsonl"]


@pytest.mark.parametrize("url", ["memory://in/absent", "memory://in/*.csv", "memory://a::memory://b"])
def test_what_leads_to_no_file_is_refused(url: str) -> None:
    with pytest.raises(ParameterError, match=r"input file: got .*must be"):
        Inputs.of(url)


def test_a_file_is_given_once() -> None:
    put("memory://in/a.jsonl", b"{}")
    with pytest.raises(ParameterError, match="given once"):
        Inputs.of(["memory://in/a.jsonl", "memory://in/*"])


@pytest.mark.parametrize("url", ["memory://me:secret@in/*.csv", "memory://me:secret@a::memory://b"])
def test_a_url_that_is_refused_is_told_without_its_login(url: str) -> None:
    with pytest.raises(ParameterError, match=r"input file: got 'memory://(in/\*.csv|a::memory://b)'"):
        Inputs.of(url)


def test_a_store_that_cannot_be_asked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, path: str) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(JobError, match="memory://in/a: cannot be looked up: no credentials"):
        Inputs.of("memory://in/a")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(JobError, match=r"s3://b/a: .*: pip install 'shoal\[s3\]'"):
        Inputs.of("s3://b/a")


def test_a_protocol_that_nobody_knows_is_named() -> None:
    with pytest.raises(JobError, match="nothing://in/a: cannot be opened: Protocol not known: nothing"):
        Inputs.of("nothing://in/a")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_of_a_bad_network_are_those_of_the_file(suffix: str) -> None:
    put(f"shaky://in/a.jsonl{suffix}", COMPRESS[suffix](LINES))
    with open_inputs(Inputs.of(f"shaky://in/a.jsonl{suffix}")) as source:
        assert b"".join(line.data or b"" for line in source) == LINES


def test_a_table_is_read_from_its_end() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = io.BytesIO()
    pq.write_table(pa.table({"prompt": [str(number) * 50 for number in range(5000)]}), data)
    put("shaky://in/a.parquet", data.getvalue())
    with open_inputs(Inputs.of("shaky://in/a.parquet")) as source:
        lines = [json.loads(line.data or b"") for line in source]
    assert lines == [{"prompt": str(number) * 50} for number in range(5000)]


def test_a_network_that_is_gone_ends_the_read() -> None:
    put("shaky://in/a.jsonl", LINES)
    with open_inputs(Inputs.of("shaky://in/a.jsonl")) as source:
        lines = iter(source)
        next(lines)
        ShakyStore.broken = True
        with pytest.raises(JobError, match=r"shaky:.*a.jsonl: cannot be read on at byte \d+: the connection was reset"):
            list(lines)


def test_a_file_that_was_changed_is_not_read() -> None:
    put("memory://in/a.jsonl", LINES)
    (file,) = remote_files("memory://in/a.jsonl", lambda name: True)
    put("memory://in/a.jsonl", LINES + LINES)
    with pytest.raises(JobError, match=r"in/a.jsonl: was changed after this run began"):
        open_remote(file)


def test_a_file_that_is_gone_is_named() -> None:
    with pytest.raises(JobError, match=r"memory://in/a.jsonl: cannot be read on at byte 0: .*in/a.jsonl"):
        open_remote(RemoteFile("memory://in/a.jsonl", 5, ""))


def test_reading_from_any_place() -> None:
    put("memory://in/a", bytes(range(200)))
    (file,) = remote_files("memory://in/a", lambda name: True)
    with open_remote(file) as stored:
        assert (stored.seek(-10, io.SEEK_END), stored.read()) == (190, bytes(range(190, 200)))
        assert (stored.seek(5), stored.read(3), stored.tell()) == (5, b"\5\6\7", 8)
        assert (stored.seek(2, io.SEEK_CUR), stored.read(1)) == (10, b"\12")
        assert (stored.seek(500), stored.read(1)) == (500, b"")


def test_what_is_shown_of_a_url_is_no_secret() -> None:
    signed = RemoteFile("https://host/in/a.jsonl.gz?X-Signature=abc", 5, "")
    assert (str(signed), signed.name) == ("https://host/in/a.jsonl.gz", "a.jsonl.gz")
    login = RemoteFile("ftp://me:secret@host/in/a?.csv", 5, "")
    assert (str(login), login.name) == ("ftp://host/in/a?.csv", "a?.csv")
    both = Inputs((login, signed), (login.url, signed.url))
    assert both.fingerprint()["path"] == "ftp://host/in/a?.csv, https://host/in/a.jsonl.gz"
    assert "secret" not in f"{both} {both.names()}"


def test_a_file_that_is_packed_otherwise_is_refused() -> None:
    put("memory://in/a.jsonl", gzip.compress(LINES))
    with (
        pytest.raises(JobError, match=r"in/a.jsonl: this is gzip data, not JSON lines"),
        open_inputs(Inputs.of("memory://in/a.jsonl")),
    ):
        pass
