"""The thread that owns the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.engine import EngineStats
from shoal.llm import LLM
from shoal.params import BeamSearchParams, SamplingParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.submission import Limits
from shoal.server.worker import AnyOutput, Asked, Tracked, Worker
from tests.server.conftest import CONFIG
from tests.server.test_connections import until

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Nobody:
    """Counts nothing."""

    def stepped(self, stats: EngineStats, seconds: float) -> None:
        pass

    def progressed(self, tracked: Tracked, output: RequestOutput, now: float) -> None:
        pass

    def aborted(self, tracked: Tracked) -> None:
        pass


class Ear:
    """Keeps all that it hears."""

    def __init__(self) -> None:
        self.heard: list[AnyOutput] = []
        self.error: Exception | None = None

    def put(self, output: AnyOutput) -> None:
        self.heard.append(output)

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.heard and self.heard[-1].finished)


@contextmanager
def working(path: Path, clock: Any = None, **changes: Any) -> Iterator[Worker]:
    """A worker with an event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    how = {} if clock is None else {"clock": clock}
    worker = Worker(lambda: LLM(path, config=CONFIG), Nobody(), **how)
    worker.start(loop)
    worker.ready.wait()
    try:
        yield worker
    finally:
        worker.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def ask(worker: Worker, name: str, prompt: str, params: SamplingParams = PARAMS, owner: str = "") -> Ear:
    ear = Ear()
    prepared = worker.own_session.prepare(prompt, params, Limits(), name)
    worker.submit(Asked(name, owner, 0.0, ear, prepared))
    return ear


def test_what_is_heard_is_what_the_model_says_and_more_each_time(tiny_path: Path) -> None:
    with working(tiny_path) as worker, LLM(tiny_path, config=CONFIG) as llm:
        ears = [ask(worker, str(number), f"prompt {number}") for number in range(20)]
        until(lambda: all(ear.ended for ear in ears))
        expected = llm.generate([f"prompt {number}" for number in range(20)], PARAMS, use_tqdm=False)
    for ear, output in zip(ears, expected, strict=True):
        last = ear.heard[-1]
        assert isinstance(last, RequestOutput)
        assert last.outputs == output.outputs
        lengths = [len(one.outputs[0].token_ids) for one in ear.heard if isinstance(one, RequestOutput)]
        assert lengths == sorted(lengths)


def test_a_beam_search_is_a_request_too(tiny_path: Path) -> None:
    with working(tiny_path) as worker:
        ear = Ear()
        worker.submit(Asked("r", "", 0.0, ear, search=("one", BeamSearchParams(2, 3), Limits())))
        until(lambda: ear.ended)
        assert len(ear.heard) == 1
        wrong = Ear()
        worker.submit(Asked("w", "", 0.0, wrong, search=("x" * 5000, BeamSearchParams(2, 3), Limits())))
        until(lambda: wrong.error is not None)


def test_keys_share_the_engine_in_tokens(tiny_path: Path) -> None:
    """Forty requests of one key, then two of another: these are among the first to end."""
    with working(tiny_path) as worker:
        done: list[str] = []
        release = threading.Event()
        original = worker.own_session.step

        def step() -> list[RequestOutput]:
            release.wait()
            outputs = original()
            done.extend(output.request_id for output in outputs if output.finished)
            return outputs

        worker.own_session.step = step  # type: ignore[method-assign]
        ears = [ask(worker, f"greedy {number}", "x" * 20, owner="greedy") for number in range(40)]
        ears += [ask(worker, f"modest {number}", "x" * 20, owner="modest") for number in range(2)]
        release.set()
        until(lambda: all(ear.ended for ear in ears))
        places = [done.index(f"modest {number}") for number in range(2)]
    assert max(places) < 20


def test_an_abort_may_come_at_any_time_and_twice(tiny_path: Path) -> None:
    with working(tiny_path) as worker:
        ears = [ask(worker, str(number), "x", SamplingParams(max_tokens=200, ignore_eos=True)) for number in range(12)]
        for name in ("3", "3", "nobody", "11"):
            worker.abort(name)
        until(lambda: sum(ear.ended for ear in ears) == 10)
        assert not ears[3].ended
        assert not ears[11].ended
        assert worker.llm is not None
        until(lambda: worker.llm is not None and not worker.llm.has_work)


def test_guests_wait_for_the_steps_of_the_worker(tiny_path: Path) -> None:
    with working(tiny_path) as worker, LLM(tiny_path, config=CONFIG) as llm:
        guest = worker.session("batch:")
        found: dict[str, RequestOutput] = {}
        for number in range(3):
            guest.submit(f"prompt {number}", PARAMS, request_id=str(number), priority=1000)
        guest.submit("beams", BeamSearchParams(2, 3), request_id="beams")
        while len(found) < 4:
            found |= {output.request_id: output for output in guest.step() if output.finished}
        expected = llm.generate([f"prompt {number}" for number in range(3)], PARAMS, use_tqdm=False)
        assert [found[str(number)].outputs for number in range(3)] == [output.outputs for output in expected]
        guest.submit_embedding("one", request_id="e")
        embeddings: list[Any] = []
        while not embeddings:
            guest.step()
            embeddings = guest.embeddings()
        assert embeddings[0].request_id == "e"


def test_it_is_wedged_when_it_has_work_and_takes_no_step(tiny_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    now, hold = [0.0], threading.Event()
    with working(tiny_path, lambda: now[0]) as worker:
        original = worker.own_session.step

        def step() -> list[RequestOutput]:
            hold.wait()
            return original()

        worker.own_session.step = step  # type: ignore[method-assign]
        ear = ask(worker, "r", "x")
        until(lambda: worker._busy)
        states = []
        for seconds in (29, 2):
            now[0] += seconds
            states.append(worker.state)
        assert states == ["ok", "wedged"]
        hold.set()
        until(lambda: ear.ended)
        until(lambda: not worker._busy)
        assert worker.state == "ok"
        now[0] += 1000  # it has nothing to do
        assert worker.state == "ok"
    assert str(worker.state) == "closed"
    assert "in step" in capfd.readouterr().err  # where its thread was


def test_who_asks_after_the_end_is_told(tiny_path: Path) -> None:
    with working(tiny_path) as worker:
        under_way = ask(worker, "r", "x", SamplingParams(max_tokens=200, ignore_eos=True))
        prepared = worker.own_session.prepare("late", PARAMS, Limits(), "late")
        worker.close()
        late = Ear()
        worker.submit(Asked("late", "", 0.0, late, prepared))
        until(lambda: under_way.ended and late.ended)
        assert "shutting down" in str(under_way.error)
        assert "shutting down" in str(late.error)
