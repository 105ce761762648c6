"""Which files a job reads: what a user names, made a list of files in the order in which they are read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from shoal.errors import ParameterError
from shoal.jobs.durable.fingerprint import file_fingerprint, files_fingerprint, printable
from shoal.jobs.durable.store import is_url, local_path
from shoal.jobs.durable.urls import shown
from shoal.jobs.input.remote import RemoteFile, remote_files
from shoal.jobs.input.streams import STANDARD_STREAM, InputFile, is_known

_ALLOWED = "a file, a folder or a glob of files that exist"

Given = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of one input: their rows are numbered on from one to the next.

    ``files`` are in the order of their names. ``given`` is what named them: of several files, which may come and go, what a later run
    of the job would find.
    """

    files: tuple[InputFile, ...]
    given: tuple[str, ...]

    @classmethod
    def of(cls, given: Given) -> Inputs:
        """Of paths, folders (their files with a suffix that is known, but hidden ones), globs, and URLs of any of these; ``-`` is
        stdin. A name that is there is that file, whatever signs it holds. Raises ParameterError for what leads to no file, for an empty
        text, for a file that is there twice and for stdin beside others; JobError for URLs that cannot be looked up.
        """
        texts = [_text(each) for each in ([given] if isinstance(given, str | Path) else given)]
        if len(texts) > 1 and str(STANDARD_STREAM) in texts:
            raise ParameterError("input file", "-", "the only one where it is given")
        files = sorted((file for text in texts for file in _named(text)), key=str)
        if not files:
            raise ParameterError("input file", given, "at least one file")
        _refuse_doubles(files)
        return cls(tuple(files), tuple(texts))

    def __str__(self) -> str:
        return (
            str(self.files[0])
            if len(self.files) == 1
            else f"{len(self.files)} files ({', '.join(map(shown, self.given))})"
        )

    @property
    def is_stdin(self) -> bool:
        """Whether it can be read only once."""
        return self.files == (STANDARD_STREAM,)

    @property
    def local(self) -> list[Path]:
        """Those of the files that are on this machine."""
        return [file for file in self.files if isinstance(file, Path) and file != STANDARD_STREAM]

    def names(self) -> list[str]:
        """What the files are called in messages and in the fingerprint: from the last folder that holds all of them."""
        paths = [str(file).split("/") for file in self.files]
        # All between the first and the last in order begin with what these two share.
        shared = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(paths[0][:-1], paths[-1][:-1], strict=False))
        )
        return [printable("/".join(path[shared:])) for path in paths]

    def fingerprint(self) -> dict[str, int | str]:
        """What the content is known by: of one local file its ``file_fingerprint``, else ``files_fingerprint``; empty for stdin."""
        if self.is_stdin:
            return {}
        if len(self.files) == 1 and isinstance(self.files[0], Path):
            return file_fingerprint(self.files[0])
        entries = ((name, *_content(file)) for name, file in zip(self.names(), self.files, strict=True))
        return files_fingerprint(printable(", ".join(map(shown, self.given))), entries)

    def would_hold(self, path: Path | str) -> bool:
        """Whether a file at ``path``, a path or a URL, would be one of the files, at the latest when the job goes on."""
        if isinstance(path, str):
            return any(_would_list(shown(text), shown(path)) for text in self.given if is_url(text))
        if STANDARD_STREAM in (path, *self.files):
            return False
        if path.exists() and any(file.exists() and os.path.samefile(file, path) for file in self.local):
            return True
        real = Path(os.path.realpath(path))
        return any(_would_match(text, real) for text in self.given if not is_url(text))

    def are_in(self, folder: str | Path) -> bool:
        """Whether a file is anywhere in a folder, which is a path, or the URL of one for remote files."""
        if is_url(folder):
            return any(
                file.url.startswith(f"{str(folder).rstrip('/')}/")
                for file in self.files
                if isinstance(file, RemoteFile)
            )
        real = os.path.realpath(folder)
        parents = {os.path.realpath(parent) for parent in {file.parent for file in self.local}}
        return any(parent == real or parent.startswith(f"{real}/") for parent in parents)


def _text(given: str | Path) -> str:
    if not str(given):  # as a path it would be the current folder
        raise ParameterError("input file", "", _ALLOWED)
    return str(local_path(given) or given)


def _named(text: str) -> list[InputFile]:
    files = list(_found(text))
    if not files:
        raise ParameterError("input file", shown(text), _ALLOWED)
    return files


def _found(text: str) -> Iterator[InputFile]:
    """The files that one path, folder, glob or URL leads to. A single path is not looked up."""
    if is_url(text):
        yield from remote_files(text, is_known)
    elif os.path.isdir(text):
        yield from (Path(entry.path) for entry in os.scandir(text) if is_known(entry.name) and entry.is_file())
    elif _is_glob(text):
        matched = [Path(name) for name in glob.iglob(text, recursive=True)]
        yield from (path for path in matched if path.is_file())
    else:
        yield Path(text)


def _is_glob(text: str) -> bool:
    return glob.has_magic(text) and not os.path.lexists(text)


def _refuse_doubles(files: Sequence[InputFile]) -> None:
    seen: dict[str, InputFile] = {}
    for file in files:
        first = seen.setdefault(file.url if isinstance(file, RemoteFile) else os.path.realpath(file), file)
        if first is not file:
            raise ParameterError("input file", str(file), f"given once, and is the same file as {first}")


def _content(file: InputFile) -> tuple[int, str]:
    """The size of a file, and what changes when it does."""
    if isinstance(file, RemoteFile):
        return file.size, file.mark
    found = file_fingerprint(file)
    return int(found["bytes"]), str(found["blake2b"])


def _would_match(text: str, path: Path) -> bool:
    """Whether what was given, were it looked up again, had the file ``path`` (real) among its files."""
    if os.path.isdir(text):
        return os.path.realpath(text) == str(path.parent) and is_known(path.name)
    if not _is_glob(text):
        return os.path.realpath(text) == str(path)
    parts = text.split("/")
    fixed = list(takewhile(lambda part: not glob.has_magic(part), parts))
    folder = Path(os.path.realpath("/".join([*fixed, ""]) or "."))
    return path.is_relative_to(folder) and _matches(parts[len(fixed) :], path.relative_to(folder).parts)


def _would_list(text: str, url: str) -> bool:
    """The same of URLs."""
    if glob.has_magic(text):
        return _matches(text.split("/"), url.split("/"))
    folder, _, name = url.rpartition("/")
    return text == url or (text.rstrip("/") == folder and is_known(name))


def _matches(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a glob matches a path, both as their parts; ``**`` is any number of them."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(pattern[1:], path[skipped:]) for skipped in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])
