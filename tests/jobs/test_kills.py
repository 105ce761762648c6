"""A job that is killed at random moments gives what it gives undisturbed; and the harness that says so would say otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.kills import Job, Tally, look_at, records_of, run_kills


def test_25_kills(tmp_path: Path) -> None:
    tally = run_kills(tmp_path, 25)
    assert tally == Tally(kills=25, jobs=tally.jobs, resumed=tally.resumed), tally.line()
    assert tally.resumed >= 5  # not all of them came before the first commit or when all was done


def record(name: str, answer: str) -> bytes:
    """One with ids and times that are its own."""
    body = {"id": f"{name}{answer}", "created": len(answer), "text": answer}
    response = {"status_code": 200, "request_id": f"{name}{answer}", "body": body}
    return json.dumps({"id": name, "custom_id": name, "response": response, "error": None}).encode()


WHOLE = (b"".join(record(name, "yes") + b"\n" for name in "abc"), record("d", "no") + b"\n")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path / "job", tmp_path, tmp_path)
    write(job, *WHOLE)
    return job


def write(job: Job, *contents: bytes) -> None:
    for path, content in zip(job.outputs, contents, strict=True):
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("results", "errors", "found"),
    [
        (WHOLE[0], WHOLE[1], Tally()),
        (WHOLE[0].replace(b'"created": 3', b'"created": 4'), WHOLE[1], Tally()),
        (WHOLE[0].split(b"\n", 1)[1], WHOLE[1], Tally(lost=1)),
        (WHOLE[0], b"", Tally(lost=1)),
        (WHOLE[0] + record("b", "yes") + b"\n", WHOLE[1], Tally(duplicated=1)),
        (WHOLE[0], WHOLE[1] + record("a", "yes") + b"\n", Tally(duplicated=1, differing=1)),
        (WHOLE[0], WHOLE[1][:-1], Tally(torn=1)),
        (WHOLE[0], WHOLE[1][:-9], Tally(torn=1, lost=1)),
        (WHOLE[0] + b"\n", WHOLE[1], Tally(torn=1)),
        (WHOLE[0].replace(b'"text": "yes"', b'"text": "no"'), WHOLE[1], Tally(differing=3)),
        (WHOLE[0] + record("e", "yes") + b"\n", WHOLE[1], Tally(differing=1)),
    ],
)
def test_what_is_wrong_is_found(job: Job, results: bytes, errors: bytes, found: Tally) -> None:
    expected = dict(records_of(job.outputs))
    assert expected.keys() == set("abcd")
    write(job, results, errors)
    assert look_at(job.outputs, expected) == found
