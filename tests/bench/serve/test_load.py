"""When requests are due, how many are under way at once, /health beside them."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import numpy as np
import pytest

from shoal.bench.serve.client import Client
from shoal.bench.serve.load import Arrivals, Health, Prepared, Run, run_load, watched_health
from shoal.errors import ParameterError
from tests.bench.serve.stub import Request, Stub, good, whole


def test_at_an_infinite_rate_all_are_due_at_once() -> None:
    assert Arrivals().times(3, seed=0) == [0.0, 0.0, 0.0]


def test_a_poisson_process_has_exponential_gaps() -> None:
    times = Arrivals(rate=50.0).times(20_000, seed=1)
    gaps = np.diff(times)
    assert times[-1] == pytest.approx(400.0)
    assert (gaps >= 0).all()
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.02)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_a_gamma_distribution(burstiness: float) -> None:
    gaps = np.diff(Arrivals(rate=50.0, burstiness=burstiness).times(20_000, seed=1))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_endless_burstiness_is_a_clock() -> None:
    assert Arrivals(rate=4.0, burstiness=math.inf).times(3, seed=0) == [0.25, 0.5, 0.75]


def test_times_are_the_seed_s() -> None:
    arrivals = Arrivals(rate=2.0)
    assert arrivals.times(9, seed=1) == arrivals.times(9, seed=1) != arrivals.times(9, seed=2)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": math.nan}, {"burstiness": 0.0}, {"burstiness": -1.0}])
def test_what_is_no_process_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"request_rate|burstiness"):
        Arrivals(**wrong)


async def _load(url: str, due: list[float], max_concurrency: int | None) -> Run:
    async with Client(url) as client:
        bodies = [{"stream": True, "number": number} for number in range(len(due))]
        requests = [Prepared(client.request("POST", "/v1/completions", body), 5) for body in bodies]
        return await run_load(client, requests, due, max_concurrency)


def test_no_more_are_under_way_than_allowed() -> None:
    with Stub(good) as stub:
        run = asyncio.run(_load(stub.url, [0.0] * 12, 3))
    assert [outcome.success for outcome in run.outcomes] == [True] * 12
    assert stub.connections == 3
    assert stub.most_at_once <= 3
    assert run.cpu_seconds > 0
    assert run.duration >= max(outcome.latency for outcome in run.outcomes)


def test_without_a_limit_all_are_sent_at_once() -> None:
    with Stub(good) as stub:
        asyncio.run(_load(stub.url, [0.0] * 12, None))
    assert stub.connections == 12


def test_none_is_sent_before_it_is_due() -> None:
    due = [0.0, 0.03, 0.06]
    before = time.perf_counter()
    with Stub(good) as stub:
        run = asyncio.run(_load(stub.url, due, None))
    assert all(outcome.start - before >= when - 1e-6 for outcome, when in zip(run.outcomes, due, strict=True))
    assert sorted(body["number"] for body in stub.posts) == [0, 1, 2]


def test_one_failure_harms_no_other() -> None:
    def answer(request: Request) -> list[bytes]:
        return [whole({}, 500)] if request.body["number"] == 1 else good(request)

    with Stub(answer) as stub:
        run = asyncio.run(_load(stub.url, [0.0] * 3, None))
    assert [outcome.error for outcome in run.outcomes] == ["", "HTTP 500: {}", ""]


async def _watch(url: str, stub: Stub) -> Health:
    async with Client(url) as client, watched_health(client) as health:
        while len(stub.requests) < 3:
            await asyncio.sleep(0.01)
    return health


@pytest.mark.parametrize(("status", "failed"), [(200, False), (503, True)])
def test_health_is_looked_at_meanwhile(status: int, failed: bool) -> None:
    with Stub(lambda request: [whole({}, status)]) as stub:
        health = asyncio.run(_watch(stub.url, stub))
    assert len(health.latencies) == len(stub.requests) >= 3
    assert all(seconds > 0 for seconds in health.latencies)
    assert health.failed == (len(health.latencies) if failed else 0)
    assert {request.path for request in stub.requests} == {"/health"}
