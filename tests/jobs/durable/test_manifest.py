"""The manifest of a job: written, read, compared."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.errors import JobError
from shoal.jobs.durable.manifest import Identity, Manifest, differences, load, save

IDENTITY = Identity(
    input={"path": "/data/in.jsonl", "bytes": 5, "blake2b": "aa"},
    model={"bytes": 100, "blake2b": "bb"},
    parameters={"max_tokens": 16, "stop": ("x", "y"), "logit_bias": {7: 1.5}, "top_p": 0.1},
    numerics={"kv_cache_dtype": "f16"},
    shoal="0.1.0",
)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "identity": IDENTITY,
        "created": 1.5,
        "since": 2.5,
        "output": "/data/out.jsonl",
        "errors": "/data/err.jsonl",
    }
    return Manifest(**(fields | changes))


def changed(**parts: Any) -> Identity:
    return msgspec.structs.replace(IDENTITY, **parts)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    save(tmp_path, manifest())
    found = load(tmp_path)
    assert found is not None
    assert (found.version, found.created, found.output, found.errors) == (1, 1.5, "/data/out.jsonl", "/data/err.jsonl")
    assert (found.rows, found.ends, found.deadline, found.runs) == (None, None, None, 0)
    assert (found.state, found.summary) == ("running", None)
    assert differences(found.identity, IDENTITY) == []
    full = manifest(rows=3, ends=[1, 3], deadline=2.5, runs=4, state="cancelled", summary={"done": 2, "rates": [1.0]})
    save(tmp_path, full)
    found = load(tmp_path)
    assert found is not None
    assert msgspec.structs.replace(found, identity=IDENTITY) == full
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_job_was_begun_at_one_moment_by_one_clock_wherever_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = datetime(2024, 3, 1, 0, 30, 0, 250000, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    save(tmp_path, manifest(created=begun.timestamp(), utc_offset=19800.0))
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        found = load(tmp_path)
        assert found is not None
        assert found.begun.isoformat() == begun.isoformat()
        found.utc_offset = None  # an older shoal's
        assert found.begun.isoformat() == "2024-02-29T14:00:00.250000-05:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_it_is_json_that_can_be_read_by_people(tmp_path: Path) -> None:
    save(tmp_path, manifest())
    text = (tmp_path / "manifest.json").read_text()
    assert json.loads(text)["identity"]["model"] == {"bytes": 100, "blake2b": "bb"}
    assert text.endswith("\n}\n")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": "one"}',
        b'{"version": 1, "identity": "\xff"}',
        b'{"version": 1, "x": ' + b"[" * 100_000,
    ],
    ids=["empty", "torn", "list", "no version", "no fields", "version", "not utf-8", "deep"],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(JobError, match=r"manifest\.json: not the manifest of a job .*; --restart begins the job anew"):
        load(tmp_path)


def test_a_state_that_there_is_not_is_refused(tmp_path: Path) -> None:
    save(tmp_path, manifest())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"running"', '"asleep"'))
    with pytest.raises(JobError, match="asleep"):
        load(tmp_path)


def test_a_manifest_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(JobError, match=str(tmp_path / "manifest.json")):
        load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_version_is_refused_whatever_else_is_there(tmp_path: Path, version: int) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"version": version, "identity": "of another kind"}))
    with pytest.raises(JobError, match=f"version {version}, this shoal reads 1; --restart"):
        load(tmp_path)


def test_a_file_that_has_moved_is_the_same() -> None:
    assert differences(IDENTITY, changed(input={**IDENTITY.input, "path": "/elsewhere/in.jsonl"})) == []


def test_each_difference_is_named_with_both_values() -> None:
    new = Identity(
        input={"path": "/other", "bytes": 6, "blake2b": "aa"},
        model={"bytes": 100, "blake2b": "cc"},
        parameters={"stop": ["x"], "logit_bias": {"7": 2}, "top_p": 0.1, "system": "Be brief."},
        numerics={"kv_cache_dtype": "f16"},
        shoal="0.2.0",
    )
    assert differences(IDENTITY, new) == [
        "input.bytes: was 5, is 6",
        'model.blake2b: was "bb", is "cc"',
        "parameters.max_tokens: was 16, is absent",
        'parameters.stop: was ["x","y"], is ["x"]',
        "parameters.logit_bias.7: was 1.5, is 2",
        'shoal: was "0.1.0", is "0.2.0"',
        'parameters.system: was absent, is "Be brief."',
    ]


def test_what_is_absent_is_not_null() -> None:
    found = differences(changed(numerics={}), changed(numerics={"threads": None}))
    assert found == ["numerics.threads: was absent, is null"]


def test_a_long_value_is_cut_short() -> None:
    (line,) = differences(changed(numerics={"x": "a" * 1000}), changed(numerics={"x": "b"}))
    assert line == f'numerics.x: was "{"a" * 76}..., is "b"'
