"""The data folder: one process, one user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.server.store.batches import Batch
from shoal.server.store.store import Store, default_folder


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Store(tmp_path / "data")
    with pytest.raises(JobError, match=rf"process {os.getpid()} is serving from this folder; .*--data-dir"):
        Store(tmp_path / "data")
    first.close()
    Store(tmp_path / "data").close()


def test_others_cannot_look_into_it(tmp_path: Path) -> None:
    Store(tmp_path / "data").close()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "data", *tmp_path.glob("data/*/"))} == {0o700}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"file.*cannot keep files there.*--data-dir"):
        Store(tmp_path / "file" / "data")


def test_the_default_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder(8000) == tmp_path / "shoal" / "server" / "8000"
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path / "mine"))
    assert default_folder(8001) == tmp_path / "mine" / "8001"


def test_file_systems_without_links_get_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    store = Store(tmp_path)
    upload = store.files.upload("me")
    upload.write(b"content")
    file = upload.finish("in.jsonl", "batch")
    upload.close()
    found: list[Batch] = []
    for patched in (False, True):
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(os, "link", no_links)
            found.append(store.create_batch("me", file.id, "/v1/completions", None))
    store.files.delete("me", file.id)
    assert {(store.batches.folder(batch.id) / "input.jsonl").read_bytes() for batch in found} == {b"content"}
    store.close()
