"""When requests are sent: at random times (open loop), or so many at once (closed loop). And a look at /health meanwhile."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace

import numpy as np

from shoal.bench.serve.client import Client, Outcome
from shoal.bench.serve.wire import WireError
from shoal.errors import ParameterError

_PROBE_SECONDS = 0.05  # from one look at /health to the next
_PROBE_TIMEOUT = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """``rate`` requests a second (infinite: all at once), with ``burstiness`` 1 a Poisson process, below it in bursts, above it more
    evenly; never more than ``max_concurrency`` under way: the others wait at the client. Raises ParameterError."""

    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("request_rate", self.rate), ("burstiness", self.burstiness)):
            if not value > 0:
                raise ParameterError(name, value, "above 0")

    def times(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which each request is due. They are stretched so that the last comes at ``count / rate``, as
        vLLM's are: runs with other seeds then offer the same load."""
        if math.isinf(self.rate):
            return [0.0] * count
        if math.isinf(self.burstiness):
            return [(number + 1) / self.rate for number in range(count)]
        gaps = np.random.default_rng(seed).gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)
        times = np.cumsum(gaps)
        stretched: list[float] = (times * (count / self.rate / times[-1])).tolist()
        return stretched


@dataclass(frozen=True, slots=True)
class Prepared:
    """The bytes of a request, and how many tokens its prompt has as far as we know."""

    content: bytes
    prompt_len: int


@dataclass(slots=True)
class Health:
    """How long each GET /health took, in seconds, and how many were not answered by 200 within ten seconds."""

    latencies: list[float] = field(default_factory=list)
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What came of each request, in their order, the seconds from the first to the end of the last, and the client's CPU time."""

    outcomes: list[Outcome]
    duration: float
    cpu_seconds: float
    health: Health | None = None

    def with_health(self, health: Health) -> Run:
        """The same, with what /health did meanwhile."""
        return replace(self, health=health)


async def run_load(
    client: Client, requests: Sequence[Prepared], due: Sequence[float], max_concurrency: int | None = None
) -> Run:
    """Send each request when it is due, and wait for all answers."""
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def one(request: Prepared) -> Outcome:
        async with gate:
            return await client.generate(request.content, request.prompt_len)

    cpu, start = time.process_time(), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, when in zip(requests, due, strict=True):
            wait = start + when - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(one(request)))
    return Run([task.result() for task in tasks], time.perf_counter() - start, time.process_time() - cpu)


@asynccontextmanager
async def watched_health(client: Client) -> AsyncIterator[Health]:
    """Look at /health every 50 ms until the block ends; a slow answer does not keep the next look waiting."""
    health, stopped = Health(), asyncio.Event()
    task = asyncio.create_task(_looks(client, health, stopped))
    try:
        yield health
    except BaseException:
        task.cancel()
        raise
    stopped.set()
    await task  # those under way count too


async def _looks(client: Client, health: Health, stopped: asyncio.Event) -> None:
    request = client.request("GET", "/health")
    async with asyncio.TaskGroup() as group:
        while not stopped.is_set():
            group.create_task(_look(client, request, health))
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_SECONDS):
                    await stopped.wait()


async def _look(client: Client, request: bytes, health: Health) -> None:
    start, status = time.perf_counter(), 0
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT):
            status = (await client.send(request)).reader.status
    except (OSError, WireError):  # TimeoutError is an OSError
        pass
    health.latencies.append(time.perf_counter() - start)
    health.failed += status != 200
