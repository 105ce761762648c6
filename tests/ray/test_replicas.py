from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from shoal.openai.schema import APIError
from shoal.ray.replica import State
from shoal.ray.replicas import Replicas

APP = "0123456789abcdef"


class Engines:
    """Ray Serve's handle: ``answers`` is what a broadcast gives or raises."""

    def __init__(self, *answers: Any) -> None:
        self.answers: Any = list(answers)

    def broadcast(self, method: str) -> Engines:
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: list[Any] = answer
        return found


def state(name: str, in_flight: int = 0, health: str = "ok", app: str = APP) -> State:
    return State(name, "127.0.0.1", 1, in_flight, health, app)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


async def chosen(replicas: Replicas, *keys: bytes) -> str:
    return (await replicas.choose(keys, 0.0)).name


def test_it_is_the_one_that_has_least() -> None:
    async def work() -> None:
        replicas = Replicas(Engines(), 4, APP)
        replicas.update([state("a", 2), state("b", 1), state("c", 0, "draining")], {})
        assert await chosen(replicas) == "b"
        (await replicas.choose((), 0.0)).in_flight += 2
        assert await chosen(replicas) == "a"

    run(work)


def test_requests_from_here_are_not_counted_twice() -> None:
    async def work() -> None:
        replicas = Replicas(Engines(), 4, APP)
        replicas.update([state("a")], {})
        known = await replicas.choose((), 0.0)
        known.in_flight = 3
        replicas.update([state("a", 5)], {"a": 3})
        assert known.load == 5
        known.in_flight = 1  # two have ended since it was asked
        replicas.update([state("a", 3)], {"a": 3})
        assert known.load == 1

    run(work)


def test_one_that_is_gone_gets_nothing_until_it_is_heard_of_again() -> None:
    async def work() -> None:
        replicas = Replicas(Engines(), 4, APP)
        replicas.update([state("a"), state("b", 9)], {})
        replicas.lose(await replicas.choose((), 0.0))
        assert await chosen(replicas) == "b"
        replicas.update([state("a"), state("b", 9)], {})
        assert await chosen(replicas) == "a"
        replicas.update([state("b", 9)], {})
        assert (await chosen(replicas), len(replicas)) == ("b", 1)

    run(work)


def test_one_of_another_deployment_would_refuse_and_is_left_out() -> None:
    async def work() -> None:
        replicas = Replicas(Engines(), 4, APP)
        replicas.update([state("a", app="another"), state("b", 9)], {})
        assert (await chosen(replicas), len(replicas)) == ("b", 1)
        replicas.update([state("a", app="another")], {})
        with pytest.raises(APIError, match="no replica"):
            await chosen(replicas)

    run(work)


def test_without_any_a_request_waits_until_its_deadline() -> None:
    async def work() -> None:
        replicas, loop = Replicas(Engines(), 4, APP), asyncio.get_running_loop()
        with pytest.raises(APIError, match="no replica") as refused:
            await replicas.choose((), loop.time() + 0.05)
        assert refused.value.status == 503
        waiting = asyncio.ensure_future(replicas.choose((), loop.time() + 60))
        await asyncio.sleep(0)
        replicas.update([state("a")], {})
        assert (await waiting).name == "a"

    run(work)


def test_those_that_cannot_be_asked_are_left_out() -> None:
    async def work() -> None:
        engines = Engines(
            [state("a"), RuntimeError("it has died")],
            DeploymentUnavailableError(None),
            TimeoutError(),
        )
        replicas = Replicas(engines, 4, APP)
        assert await replicas.ask_all("state") == [state("a")]
        assert await replicas.ask_all("state") == []
        with pytest.raises(TimeoutError):
            await replicas.ask_all("state")

    run(work)
