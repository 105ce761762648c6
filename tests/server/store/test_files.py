"""Files: whole or not there, within their limits, and nobody else's."""

from __future__ import annotations

import errno
import itertools
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from shoal.openai.schema import APIError
from shoal.server.store.files import FileInfo, FileStore
from shoal.server.store.paging import PageQuery
from tests.jobs.disk import Disk, FaultyCalls, Stopped, intercepted

ALL = PageQuery(100)


def put(store: FileStore, data: bytes, owner: str = "me", name: str = "in.jsonl") -> FileInfo:
    upload = store.upload(owner)
    try:
        for i in range(0, len(data), 4):
            upload.write(data[i : i + 4])
        return upload.finish(name, "batch")
    finally:
        upload.close()


def names(store: FileStore, owner: str = "me") -> list[str]:
    return [file.id for file in store.page(owner, ALL).data]


def test_a_file_is_what_was_uploaded_also_after_a_restart(tmp_path: Path) -> None:
    file = put(FileStore(tmp_path), b"0123456789")
    store = FileStore(tmp_path)
    assert store.get("me", file.id) == file
    assert (file.bytes, file.filename, file.purpose) == (10, "in.jsonl", "batch")
    assert store.path("me", file.id).read_bytes() == b"0123456789"
    assert put(store, b"").id > file.id


def test_nobody_else_has_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file = put(store, b"abc")
    for call in (store.get, store.path, store.delete):
        with pytest.raises(APIError, match="No such File") as caught:
            call("you", file.id)
        assert caught.value.status == 404
    assert names(store, "you") == []
    assert names(store) == [file.id]


@pytest.mark.parametrize("name", ["../../etc/passwd", "file-", "", "file-" + "0" * 28])
def test_names_that_are_no_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(APIError, match="No such File"):
        FileStore(tmp_path).path("me", name)


def test_what_is_deleted_is_gone(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file, other = put(store, b"abc"), put(store, b"def")
    store.delete("me", file.id)
    assert names(store) == names(FileStore(tmp_path)) == [other.id]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(APIError):
        store.delete("me", file.id)


def test_an_upload_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path, max_total=4)
    upload = store.upload("me")
    upload.write(b"abcd")
    upload.close()
    assert list(tmp_path.iterdir()) == []
    assert put(store, b"abcd").bytes == 4


def test_files_have_limits(tmp_path: Path) -> None:
    store = FileStore(tmp_path, max_file_size=8, max_total=14)
    with pytest.raises(APIError, match="larger than 8 bytes") as caught:
        put(store, b"123456789")
    assert caught.value.status == 413
    first = put(store, b"12345678")
    with pytest.raises(APIError, match="more than 14 bytes"):
        put(store, b"1234567")
    with pytest.raises(APIError, match="more than 14 bytes"):
        put(FileStore(tmp_path, max_total=14), b"1234567")
    put(store, b"123456")
    store.delete("me", first.id)
    assert put(store, b"12345678").bytes == 8


def test_a_file_of_the_server_itself_takes_the_place_it_was_made_for(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files")
    path = tmp_path / "out"
    path.write_bytes(b"abc")
    early, late = store.new_id(), put(store, b"x")
    file = FileInfo(id=early, bytes=3, created_at=1, filename="out.jsonl", purpose="batch_output")
    store.adopt("me", path, file)
    assert store.path("me", early).read_bytes() == b"abc"
    assert names(store) == names(FileStore(tmp_path / "files")) == [late.id, early]
    assert [found.id for found in store.page("me", ALL, "batch_output").data] == [early]
    assert not path.exists()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    store = FileStore(tmp_path, max_total=100)
    upload = store.upload("me")
    with intercepted(FaultyCalls(["write"], 0, errno.ENOSPC)), pytest.raises(APIError, match="disk is full") as caught:
        upload.write(b"abc")
    assert caught.value.status == 507
    upload.close()
    assert list(tmp_path.iterdir()) == []
    assert put(store, b"x" * 100).bytes == 100


@pytest.mark.parametrize("how", ["power", "kill"])
def test_a_crash_leaves_a_file_or_none(tmp_path: Path, how: str) -> None:
    """At each call that changes the disk: a file that was acknowledged is whole, any other is whole or not there at all."""
    for at in itertools.count():
        root = tmp_path / str(at)
        root.mkdir()
        kept, made = put(FileStore(root), b"kept"), None
        disk = Disk(root)
        with disk.running(at, failing=False), suppress(Stopped):
            upload = FileStore(root).upload("me")  # never closed: a process that dies does not
            upload.write(b"new data")
            made = upload.finish("in.jsonl", "batch")
        if how == "power":
            disk.power_failure(Random(at))
        disk.close()
        store = FileStore(root)
        found = {name: store.path("me", name).read_bytes() for name in names(store)}
        assert found.pop(kept.id) == b"kept"
        assert set(found.values()) <= {b"new data"}
        assert made is None or set(found) == {made.id}
        assert len(list(root.iterdir())) == 2 + 2 * len(found)
        if made is not None:
            break
    assert at > 5
