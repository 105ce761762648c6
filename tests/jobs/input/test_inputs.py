"""Which files an input is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ParameterError
from shoal.jobs.durable.fingerprint import file_fingerprint
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.remote import RemoteFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``in`` with three inputs and what is none."""
    folder = tmp_path / "in"
    (folder / "deeper.jsonl").mkdir(parents=True)
    for name in ("b.jsonl.zst", "a.jsonl", "c.csv", ".hidden.jsonl", "readme.txt", "_SUCCESS"):
        (folder / name).write_text(name)
    (folder / "deeper.jsonl" / "d.jsonl").write_text("d")
    return folder


def names(*given: str | Path) -> list[str]:
    return Inputs.of(given).names()


def test_a_folder_is_its_files_that_are_known_in_order(folder: Path) -> None:
    assert names(folder) == ["a.jsonl", "b.jsonl.zst", "c.csv"]
    assert names(f"{folder}/") == ["a.jsonl", "b.jsonl.zst", "c.csv"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl*", ["a.jsonl", "b.jsonl.zst"]),
        ("[bc]*", ["b.jsonl.zst", "c.csv"]),
        ("*.txt", ["readme.txt"]),
        ("**/*.jsonl", ["a.jsonl", "deeper.jsonl/d.jsonl"]),
    ],
)
def test_a_glob_is_what_it_matches(folder: Path, pattern: str, expected: list[str]) -> None:
    assert names(folder / pattern) == expected


def test_the_order_in_which_files_are_given_does_not_matter(folder: Path) -> None:
    one, other = (Inputs.of(given) for given in ([folder / "c.csv", folder / "a.jsonl"], [folder / "[ac].*"]))
    assert one.files == other.files
    assert one.fingerprint() | {"path": ""} == other.fingerprint() | {"path": ""}


def test_a_name_that_is_there_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text("x")
    (tmp_path / "a1.jsonl").write_text("y")
    assert names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


def test_a_url_of_a_local_file_is_that_file(folder: Path) -> None:
    assert Inputs.of(f"file://{folder}/a.jsonl") == Inputs.of(folder / "a.jsonl")


def test_one_file_is_known_by_its_content_alone(folder: Path) -> None:
    path = folder / "a.jsonl"
    assert Inputs.of(path).fingerprint() == Inputs.of(folder / "a*").fingerprint() == file_fingerprint(path)
    assert str(Inputs.of(path)) == str(path)


def test_stdin_is_known_by_nothing() -> None:
    stdin = Inputs.of("-")
    assert stdin.is_stdin
    assert (stdin.fingerprint(), stdin.local) == ({}, [])


def fingerprint(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in Inputs.of(folder).fingerprint().items() if name != "path"}


def test_several_files_are_known_by_names_sizes_and_contents(folder: Path) -> None:
    before = fingerprint(folder)
    assert (before["files"], before["bytes"]) == (3, len("a.jsonlb.jsonl.zstc.csv"))
    folder.rename(folder.with_name("moved"))
    folder = folder.with_name("moved")
    assert fingerprint(folder) == before
    (folder / "a.jsonl").write_text("A.jsonl")
    changed = fingerprint(folder)
    assert [name for name in before if changed[name] != before[name]] == ["blake2b"]
    (folder / "a.jsonl").rename(folder / "aa.jsonl")
    renamed = fingerprint(folder)
    assert [name for name in before if renamed[name] != changed[name]] == ["blake2b"]
    (folder / "d.jsonl").write_text("more")
    more = fingerprint(folder)
    assert [name for name in before if more[name] != renamed[name]] == ["files", "bytes", "blake2b"]


def test_remote_files_are_known_by_their_marks() -> None:
    def of(mark: str, size: int = 5) -> dict[str, Any]:
        return Inputs((RemoteFile("s3://b/in/a.jsonl", size, mark),), ("s3://b/in/*",)).fingerprint()

    assert of("x") == of("x")
    assert len({of("x")["blake2b"], of("y")["blake2b"], of("x", 6)["blake2b"]}) == 3
    assert (of("x")["path"], of("x")["files"], of("x")["bytes"]) == ("s3://b/in/*", 1, 5)


@pytest.mark.parametrize("given", ["absent*.jsonl", "empty", ["a*.x", "b*.x"], "", ["there.jsonl", ""]])
def test_what_leads_to_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=r"input file: got '.*', must be a file, a folder or a glob"):
        Inputs.of(given)


def test_an_input_has_files() -> None:
    with pytest.raises(ParameterError, match="input file: got \\[\\], must be at least one file"):
        Inputs.of([])


def test_one_of_several_that_leads_to_no_file_is_named(folder: Path) -> None:
    with pytest.raises(ParameterError, match=r"input file: got '.*nothing\*', must be a file, a folder or a glob"):
        Inputs.of([folder / "a.jsonl", folder / "nothing*"])


def test_stdin_is_alone(folder: Path) -> None:
    with pytest.raises(ParameterError, match="input file: got '-', must be the only one"):
        Inputs.of(["-", folder / "a.jsonl"])


def test_no_file_is_read_twice(folder: Path) -> None:
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    with pytest.raises(ParameterError, match=r"link.jsonl', must be given once, and is the same file as .*a.jsonl"):
        Inputs.of(folder)
    with pytest.raises(ParameterError, match="given once"):
        Inputs.of([folder / "a.jsonl", folder / "*.jsonl"])


def test_an_output_that_would_be_an_input_is_known_before_it_is_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    whole, some = Inputs.of(folder), Inputs.of(folder / "*.jsonl")
    for path in (folder / "out.jsonl", folder / "a.jsonl", tmp_path / "link" / "out.jsonl"):
        assert whole.would_hold(path)
        assert some.would_hold(path)
    assert whole.would_hold(folder / "out.csv")
    assert not some.would_hold(folder / "out.csv")
    for path in (folder / "out.txt", tmp_path / "out.jsonl", folder / "deeper.jsonl" / "out.jsonl"):
        assert not whole.would_hold(path)
        assert not some.would_hold(path)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("**/*.jsonl", "out/results/part.jsonl", True),
        ("**/*.jsonl", "out.jsonl", True),
        ("**/*.jsonl", "out.csv", False),
        ("*.jsonl", "out/part.jsonl", False),
        ("*/*.jsonl", "out/part.jsonl", True),
        ("*/*.jsonl", "out/results/part.jsonl", False),
        ("o*/**/part.jsonl", "out/part.jsonl", True),
        ("out/**", "out/results/part.jsonl", True),
        ("other/**", "out/results/part.jsonl", False),
    ],
)
def test_an_output_that_a_glob_would_find_is_known_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, path: str, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    first = RemoteFile("memory://b/in/a.jsonl", 2, "")
    for given in (pattern, f"{tmp_path}/{pattern}"):
        assert Inputs((first,), (given,)).would_hold(tmp_path / path) == expected
    assert Inputs((first,), (f"memory://me@b/{pattern}",)).would_hold(f"memory://b/{path}") == expected


def test_an_output_that_a_folder_in_a_store_would_hold() -> None:
    for given, expected in {"memory://b/out": True, "memory://b/out/": True, "memory://b": False, "out": False}.items():
        inputs = Inputs((RemoteFile("memory://b/out/a.jsonl", 2, ""),), (given,))
        assert inputs.would_hold("memory://b/out/manifest.json") == expected
        assert not inputs.would_hold("memory://b/out/part")


def test_an_output_that_is_an_input_by_another_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(folder / "a.jsonl", folder / "other.name")
    assert Inputs.of(folder / "a.jsonl").would_hold(folder / "other.name")
    monkeypatch.chdir(folder)
    assert Inputs.of("a.jsonl").would_hold(folder / "a.jsonl")
    assert not Inputs.of("-").would_hold(folder / "a.jsonl")


def test_many_are_named_by_what_was_given(folder: Path) -> None:
    assert str(Inputs.of(folder)) == f"3 files ({folder})"
