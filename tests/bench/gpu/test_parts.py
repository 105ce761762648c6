"""Parts of a long measurement fail alone, are in the file at once, and stop when the time is up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from shoal.bench.gpu.parts import Part, Results, Row, run_parts


def make(path: Path | None = None) -> tuple[Results, list[str]]:
    said: list[str] = []
    return Results(path, said.append, {"name": "a device"}), said


def fails() -> Row:
    raise ValueError("out of luck")


def test_a_part_fails_alone() -> None:
    results, said = make()
    run_parts([Part("a", "one", fails), Part("a", "two", lambda: {"ms": 2.0})], results, budget=60)
    assert results.rows == {"a": {"two": {"ms": 2.0}}}
    assert results.errors == {"a": {"one": "ValueError: out of luck"}}
    assert results.failed
    assert "Traceback" in said[0]


def test_each_result_is_in_the_file_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    seen: list[Row] = []

    def look() -> Row:
        seen.append(json.loads(path.read_text(encoding="utf-8")))
        return {"n": len(seen)}

    results, _ = make(path)
    run_parts([Part("a", "one", lambda: {"n": 0}), Part("a", "two", look)], results, budget=60)
    assert seen == [{"about": {"name": "a device"}, "results": {"a": {"one": {"n": 0}}}, "errors": {}, "not_run": []}]
    assert json.loads(path.read_text(encoding="utf-8"))["results"]["a"]["two"] == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_begins_when_the_time_is_up() -> None:
    now = [0.0]

    def slow() -> Row:
        now[0] += 40
        return {}

    def parts() -> Iterator[Part]:
        for name in ("one", "two", "three", "four"):
            yield Part("a", name, slow)

    results, _ = make()
    run_parts(parts(), results, budget=60, clock=lambda: now[0])
    assert list(results.rows["a"]) == ["one", "two"]
    assert results.not_run == ["a: three", "a: four"]
    assert not results.failed
