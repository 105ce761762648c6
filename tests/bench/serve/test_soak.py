"""A soak in short, and its verdicts."""

from __future__ import annotations

import os
from typing import Any

import pytest

from shoal.bench.serve.dataset import RandomShape
from shoal.bench.serve.load import Health
from shoal.bench.serve.measure import Target
from shoal.bench.serve.soak import SoakPlan, SoakResult, Tally, Usage, measure_soak
from shoal.errors import EngineError, ParameterError
from tests.bench.serve.stub import HANG, STREAM_HEAD, Request, Stub, chunk, completion_events, good, whole

SHORT = {
    "seconds": 0.4,
    "warmup": 0.3,
    "interval": 0.1,
    "pause": 0.05,
    "concurrency": 3,
    "shape": RandomShape(input_len=4, output_len=3),
}


def soak(stub: Stub, **changes: Any) -> tuple[SoakResult, list[str]]:
    said: list[str] = []
    plan = SoakPlan(**{"pid": os.getpid(), **SHORT, **changes})
    return measure_soak(plan, Target(name="a", base_url=stub.url), said.append), said


def test_a_server_that_answers() -> None:
    with Stub(good) as stub:
        result, said = soak(stub, cut_share=0.0)
    tally = result.tally
    assert (tally.cut, tally.refused, tally.failed) == (0, 0, 0)
    assert tally.output_tokens == 3 * tally.completed > 0
    assert {bool(body.get("stream")) for body in stub.posts} == {True, False}
    assert stub.most_at_once <= 4  # and /health
    assert len(result.warming_up) >= 1
    assert len(result.under_load) >= 1
    assert min(result.before.rss, result.before.handles, result.before.threads) > 0
    assert [line.split(": ")[0].split(", ")[1] for line in said[-2:]] == ["load", "quiet"]
    assert len(result.health.latencies) >= 1


def test_answers_that_take_too_long_are_given_up() -> None:
    def answer(request: Request) -> list[bytes]:
        slow = [STREAM_HEAD, chunk(completion_events()[0]), HANG]
        return slow if request.body.get("stream") else good(request)

    with Stub(answer) as stub:
        result, _ = soak(stub, cut_share=1.0, seconds=1.5)
        assert stub.gone.wait(10)
    assert result.tally.cut > 0
    assert result.tally.failed == 0


@pytest.mark.parametrize(("status", "kept"), [(429, True), (503, True), (500, False)])
def test_a_server_that_is_full_may_refuse(status: int, kept: bool) -> None:
    with Stub(lambda request: [whole({}, status)] if request.method == "POST" else good(request)) as stub:
        result, _ = soak(stub, cut_share=0.0)
    assert result.tally.completed == 0
    assert (result.tally.refused > 0) == kept
    assert (result.tally.failed == 0) == kept == result.verdicts["no_failures"]
    assert result.tally.errors == ([] if kept else [f"HTTP {status}: {{}}"])


def test_a_server_that_never_answers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.bench.serve.soak._PATIENCE_SECONDS", 0.1)
    with Stub(lambda request: [HANG] if request.method == "POST" else good(request)) as stub:
        result, _ = soak(stub, cut_share=0.0)
    assert result.tally.failed > 0
    assert result.tally.errors == ["no answer within 0.1 s"]
    assert not result.held


def test_a_process_that_is_not_there() -> None:
    with Stub(good) as stub, pytest.raises(ParameterError, match="pid: got 2147483646"):
        soak(stub, pid=2**31 - 2)


def test_a_server_that_is_not_there() -> None:
    with Stub(good) as stub:
        pass
    with pytest.raises(EngineError, match="GET /v1/models"):
        soak(stub)


def usage(rss: int, handles: int = 10, threads: int = 4) -> Usage:
    return Usage(0.0, rss, handles, threads)


def verdicts(
    *, load: tuple[int, ...] = (1000, 1005), after: Usage | None = None, tally: Tally | None = None
) -> SoakResult:
    warming_up = [usage(900), usage(1000)]
    under_load = [usage(rss, handles=90, threads=9) for rss in load]
    return SoakResult(
        warming_up, usage(950), under_load, after or usage(950), tally or Tally(completed=1), Health([0.001])
    )


@pytest.mark.parametrize(
    ("result", "broken"),
    [
        (verdicts(), set()),
        (verdicts(load=(1000, 1010)), set()),
        (verdicts(load=(1000, 1011, 1000)), {"rss_within_1_percent"}),
        (verdicts(after=usage(950, handles=11)), {"handles_flat"}),
        (verdicts(after=usage(950, threads=5)), {"threads_flat"}),
        (verdicts(after=usage(950, handles=9, threads=3)), set()),
        (verdicts(tally=Tally(completed=5, failed=1)), {"no_failures"}),
        (verdicts(tally=Tally(completed=5, cut=2, refused=7)), set()),
        (verdicts(tally=Tally(refused=7)), {"requests_answered"}),
    ],
)
def test_verdicts(result: SoakResult, broken: set[str]) -> None:
    assert {name for name, kept in result.verdicts.items() if not kept} == broken
    assert result.held == (not broken)
    assert result.as_json()["held"] == result.held
    assert result.as_markdown().count("\nNO: ") == len(broken)


def test_memory_at_its_most_is_compared() -> None:
    assert verdicts(load=(500, 1100, 700)).growth == pytest.approx(0.1)
    assert verdicts(load=(500,)).growth == pytest.approx(-0.5)
