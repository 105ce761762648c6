"""Where caches lie: what the environment says, the user's folder, or nowhere."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import platformdirs
import pytest

from shoal.system.folders import cache_folder, can_write


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def nobody(uid: int) -> pwd.struct_passwd:
    raise KeyError(uid)


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder("SHOAL_CACHE", "models") == Path("/home/somebody/.cache/shoal/models")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder("SHOAL_CACHE", "models") == Path("/elsewhere/shoal/models")
    monkeypatch.setenv("SHOAL_CACHE", "~/kept")
    assert cache_folder("SHOAL_CACHE", "models") == Path("/home/somebody/kept")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_CACHE", "kept")
    assert cache_folder("SHOAL_CACHE", "models") == tmp_path / "kept"


def test_a_user_without_home_and_account_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_folder("SHOAL_CACHE", "models") is None
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert cache_folder("SHOAL_CACHE", "models") == tmp_path


def test_an_account_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    account = pwd.struct_passwd(("me", "", os.getuid(), 0, "", "/home/me", ""))
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    assert cache_folder("SHOAL_CACHE", "models") == Path("/home/me/.cache/shoal/models")


def test_a_home_that_is_left_as_it_is_written_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    assert cache_folder("SHOAL_CACHE", "models") is None


def test_whether_a_folder_can_be_written_is_told_without_trying(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert can_write(tmp_path / "a" / "b")
    assert not can_write(tmp_path / "file")
    assert not can_write(tmp_path / "file" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
