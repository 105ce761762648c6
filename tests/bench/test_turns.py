"""Worker processes: questions and answers, ends good and bad."""

from __future__ import annotations

import sys

import pytest

from shoal.bench.turns import OtherLoad, Worker
from shoal.errors import EngineError

ECHO = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    turn = json.loads(line)
    if turn.get("spin"):
        while sum(__import__("os").times()[:2]) < turn["spin"]: pass
    if turn.get("die"):
        sys.exit("no more memory")
    print(json.dumps({"heard": turn}), flush=True)
"""


def worker(code: str) -> Worker:
    return Worker("echo", [sys.executable, "-c", code])


def test_turns_are_answered_in_order() -> None:
    with worker(ECHO) as echo:
        assert echo.facts == {"version": "1"}
        assert [echo.ask({"prompts": [[n]]}) for n in range(3)] == [{"heard": {"prompts": [[n]]}} for n in range(3)]


def test_a_worker_that_ends_says_why() -> None:
    with worker(ECHO) as echo, pytest.raises(EngineError, match="the echo worker ended: no more memory"):
        echo.ask({"die": True})


def test_a_worker_that_has_ended_is_not_asked_in_vain() -> None:
    with worker("print('{}', flush=True); import sys; sys.exit(3)") as echo:
        echo._process.wait()
        with pytest.raises(EngineError, match="exit status 3"):
            echo.ask({})


def test_a_worker_that_never_starts_says_why() -> None:
    with pytest.raises(EngineError, match="ModuleNotFoundError: No module named 'nowhere'"):
        worker("import nowhere")


def test_what_the_worker_itself_uses_is_not_other_load() -> None:
    load = OtherLoad()
    with worker(ECHO) as echo:
        load.watch(echo, {"spin": 0.6})
        assert echo.cpu_seconds() >= 0.6
    assert 0.0 <= load.share <= 1.0


def test_what_others_use_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([(100.0, 1000.0), (103.0, 1010.0)])  # busy and all: 3 of 10 seconds, of which the worker 1
    own = iter([7.0, 8.0])
    monkeypatch.setattr("shoal.bench.turns._machine_seconds", lambda: next(machine))
    load = OtherLoad()
    with worker(ECHO) as echo:
        monkeypatch.setattr(Worker, "cpu_seconds", lambda self: next(own))
        load.watch(echo, {})
    assert load.share == pytest.approx(0.2)
