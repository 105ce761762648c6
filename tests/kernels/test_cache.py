"""The store of compiled kernels: what another process gets back, and that nothing else is ever taken for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shoal.kernels.cpu import cache
from shoal.kernels.cpu.cache import KernelStore

CONTENT = bytes(range(100))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(cache, "_TEMPORARY", str(folder))
    monkeypatch.delenv("TMPDIR", raising=False)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder that not even root can make."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "kernels"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_another_process_gets_what_was_saved(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = KernelStore(root, "key")
    assert store.load("one") is None
    store.save("one", CONTENT)
    store.save("two", b"")
    assert KernelStore(root, "key").load("one") == CONTENT
    assert KernelStore(root, "key").load("two") == b""
    assert files(root) == ["key/one", "key/two"]
    assert capsys.readouterr().err == ""


def test_what_others_write_at_the_same_time_is_whole(root: Path) -> None:
    stores = [KernelStore(root, "key") for _ in range(4)]
    for number, store in enumerate(stores):
        assert store.load("one") in (None, *(bytes([n]) * 1000 for n in range(number)))
        store.save("one", bytes([number]) * 1000)
    assert KernelStore(root, "key").load("one") == bytes([3]) * 1000


def test_a_file_is_of_no_use_with_any_byte_changed_or_missing(root: Path) -> None:
    KernelStore(root, "key").save("one", CONTENT)
    path = root / "key" / "one"
    good = path.read_bytes()
    store = KernelStore(root, "key")
    for at in range(len(good)):
        path.write_bytes(good[:at])
        assert store.load("one") is None
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert store.load("one") is None
    path.write_bytes(good + b"\0")
    assert store.load("one") is None
    path.write_bytes(good)
    assert store.load("one") == CONTENT


def test_a_damaged_file_is_named_once_and_replaced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        KernelStore(root, "key").save(name, CONTENT)
        (root / "key" / name).write_bytes(b"")
    store = KernelStore(root, "key")
    for name in ("one", "two"):
        assert store.load(name) is None
        store.save(name, CONTENT)
    error = capsys.readouterr().err
    assert error == f"shoal: compiled kernel {root}/key/one: is damaged; it is compiled again, and others like it\n"
    assert KernelStore(root, "key").load("two") == CONTENT


def test_a_file_stands_for_no_other_kernel_and_no_other_version(root: Path) -> None:
    KernelStore(root, "key").save("one", CONTENT)
    (root / "key" / "two").write_bytes((root / "key" / "one").read_bytes())
    (root / "newer").mkdir()
    (root / "newer" / "one").write_bytes((root / "key" / "one").read_bytes())
    assert KernelStore(root, "key").load("two") is None
    assert KernelStore(root, "newer").load("one") is None


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "circle"])
def test_what_is_no_file_is_no_kernel(root: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "key" / "one"
    path.parent.mkdir(parents=True)
    if kind == "folder":
        (path / "within").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "dangling link" else "one")
    store = KernelStore(root, "key")
    assert store.load("one") is None
    store.save("one", CONTENT)
    assert KernelStore(root, "key").load("one") == (None if kind == "folder" else CONTENT)
    assert all(line.startswith("shoal: ") for line in capsys.readouterr().err.splitlines())
    assert not list(path.parent.glob(".*"))


def test_a_folder_that_cannot_be_written_gives_way_to_a_temporary_one(
    unwritable: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = KernelStore(unwritable, "key")
    for name in ("one", "two"):
        assert store.load(name) is None
        store.save(name, CONTENT)
    private = temporary / f"shoal-kernels-{os.geteuid()}"
    assert files(temporary) == [f"{private.name}/key/one", f"{private.name}/key/two"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    said = f"shoal: cannot write to {unwritable}/key (Not a directory): kernels are kept in {private}/key; "
    assert capsys.readouterr().err == said + "set SHOAL_KERNEL_CACHE to a folder of yours\n"
    assert KernelStore(unwritable, "key").load("two") == CONTENT
    assert capsys.readouterr().err == ""  # nothing had to be compiled


def test_without_a_home_the_temporary_folder_has_to_do(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KernelStore(None, "key").save("one", CONTENT)
    assert KernelStore(None, "key").load("one") == CONTENT
    assert capsys.readouterr().err.startswith(f"shoal: this user has no home folder: kernels are kept in {temporary}")


def test_a_filled_cache_is_read_though_it_cannot_be_written(
    root: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KernelStore(root, "key").save("one", CONTENT)

    def refuse(folder: Path) -> None:
        if root in folder.parents:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_try_to_write", refuse)
    store = KernelStore(root, "key")
    assert store.load("one") == CONTENT
    assert not list(temporary.iterdir())
    assert store.load("two") is None
    store.save("two", CONTENT)
    again = KernelStore(root, "key")
    assert (again.load("one"), again.load("two")) == (CONTENT, CONTENT)
    assert files(root) == ["key/one"]


def test_a_warm_start_tries_to_write_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelStore(root, "key").save("one", CONTENT)

    def never(folder: Path) -> None:
        raise AssertionError(folder)

    monkeypatch.setattr(cache, "_try_to_write", never)
    assert KernelStore(root, "key").load("one") == CONTENT


@pytest.mark.parametrize("trap", ["link", "open to all", "file"])
def test_a_temporary_folder_that_others_had_a_hand_in_is_not_used(
    unwritable: Path, tmp_path: Path, temporary: Path, trap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    private = temporary / f"shoal-kernels-{os.geteuid()}"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(tmp_path / "elsewhere")
    elif trap == "open to all":
        private.mkdir()
        private.chmod(0o777)
    else:
        private.touch()
    before = files(tmp_path)
    KernelStore(unwritable, "key").save("one", CONTENT)
    assert KernelStore(unwritable, "key").load("one") is None
    assert files(tmp_path) == before
    assert "(Not a directory): kernels are compiled in every process; set SHOAL_KERNEL_CACHE" in capsys.readouterr().err


def test_a_temporary_folder_that_is_not_there_is_passed_over(
    unwritable: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    KernelStore(unwritable, "key").save("one", CONTENT)
    assert files(temporary) == [f"shoal-kernels-{os.geteuid()}/key/one"]
    temporary.joinpath("own").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary / "own"))
    KernelStore(unwritable, "key").save("one", CONTENT)
    assert files(temporary / "own") == [f"shoal-kernels-{os.geteuid()}/key/one"]


@needs_root
def test_files_of_other_users_are_not_used_where_anybody_could_have_put_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    KernelStore(root, "key").save("one", CONTENT)
    for path in (root, root / "key", root / "key" / "one"):
        os.chown(path, 12345, 12345)
    monkeypatch.setattr(cache, "_anybody_writes", lambda folder: True)
    assert KernelStore(root, "key").load("one") is None
    assert "belongs to user 12345; it is compiled again" in capsys.readouterr().err
    monkeypatch.setattr(cache, "_anybody_writes", lambda folder: False)
    assert KernelStore(root, "key").load("one") == CONTENT
    os.chown(root, 0, 0)  # somebody else wrote into root's folder
    assert KernelStore(root, "key").load("one") is None


def test_where_anybody_can_write_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    above = cache._anybody_writes(tmp_path)
    assert cache._anybody_writes(folder) == above
    folder.parent.chmod(0o1777)
    assert cache._anybody_writes(folder)


def test_a_full_disk_costs_the_file_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    store = KernelStore(root, "key")
    monkeypatch.setattr(os, "replace", full)
    for name in ("one", "two"):
        assert store.load(name) is None
        store.save(name, CONTENT)
    assert not files(root)
    error = capsys.readouterr().err
    assert error.startswith(f"shoal: cannot write {root}/key/one (No space left on device): ")
    assert error.count("\n") == 1


def test_nothing_is_said_where_stderr_is_closed(unwritable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for closed in (None, open(os.devnull, "w")):  # noqa: SIM115 - closed at once
        if closed is not None:
            closed.close()
        monkeypatch.setattr("sys.stderr", closed)
        KernelStore(unwritable, "key").save("one", CONTENT)
