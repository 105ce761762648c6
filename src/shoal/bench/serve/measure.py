"""``shoal bench serve``: the same load on one server, or on several in turns."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.bench.serve.client import Client
from shoal.bench.serve.dataset import (
    ENDPOINTS,
    RandomShape,
    Sample,
    Sampling,
    body_of,
    random_samples,
    vocabulary_of,
)
from shoal.bench.serve.load import Arrivals, Prepared, run_load, watched_health
from shoal.bench.serve.report import Selection, ServeResult
from shoal.bench.serve.wire import WireError
from shoal.errors import EngineError

Say = Callable[[str], None]
Results = dict[str, list[ServeResult]]

_DEFAULT_VOCABULARY = 1000  # there is no smaller one in use
_RETRY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A server: what to call it, where it is, and what to ask it for. ``model`` None: its first one."""

    name: str
    base_url: str
    backend: str = "openai"
    endpoint: str | None = None  # None: the backend's
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """The endpoint."""
        return "/" + (self.endpoint or ENDPOINTS[self.backend]).lstrip("/")

    def client(self) -> Client:
        """A client of it."""
        return Client(self.base_url, self.api_key)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """The load, and how often each server has its turn."""

    num_prompts: int = 1000
    shape: RandomShape = field(default_factory=RandomShape)
    sampling: Sampling = field(default_factory=Sampling)
    arrivals: Arrivals = field(default_factory=Arrivals)
    vocab_size: int | None = None
    seed: int = 0
    num_warmups: int = 0
    ready_check_timeout: float = 0.0
    health_probe: bool = False
    rounds: int = 1
    selection: Selection = field(default_factory=Selection)


def measure_serve(plan: ServePlan, targets: Sequence[Target], say: Say) -> tuple[dict[str, str], Results]:
    """By the servers' names, in their order: the model that each was asked for, and its results, one a round.

    ``say`` hears how it goes.

    Raises EngineError where a server cannot be reached, or answers none of the requests of a round.
    """
    return asyncio.run(_measure(plan, targets, say))


async def _measure(plan: ServePlan, targets: Sequence[Target], say: Say) -> tuple[dict[str, str], Results]:
    allow_open_files()
    async with contextlib.AsyncExitStack() as stack:
        sides = [_Side(target, await stack.enter_async_context(target.client())) for target in targets]
        for side in sides:
            await side.begin(plan.ready_check_timeout)
        vocabulary = vocabulary_of(
            targets[0].backend, plan.vocab_size or await vocabulary_size(targets[0], sides[0].client, say)
        )
        warm_up = random_samples(plan.num_warmups, plan.shape, vocabulary, plan.seed + plan.rounds)
        results: Results = {side.target.name: [] for side in sides}
        for side in sides:
            await side.warm_up(warm_up, plan)
        for number in range(plan.rounds):
            # Other prompts in each round: those that a server has seen may be in its prefix cache.
            samples = random_samples(plan.num_prompts, plan.shape, vocabulary, plan.seed + number)
            for side in sides:
                result = await side.measure(samples, plan)
                say(f"round {number + 1}/{plan.rounds}, {side.target.name}: {_in_short(result)}")
                for error in result.errors():
                    say(error)
                results[side.target.name].append(result)
    return {side.target.name: side.model for side in sides}, results


class _Side:
    """One server's part in a measurement."""

    def __init__(self, target: Target, client: Client) -> None:
        self.target = target
        self.client = client
        self.model = target.model or ""

    async def begin(self, timeout: float) -> None:
        """Learn the model's name; if there is a ``timeout`` in seconds, wait until a request for one token is answered."""
        give_up = time.monotonic() + timeout
        while True:
            error = await self._try(ask=timeout > 0)
            if not error:
                return
            if time.monotonic() >= give_up:
                raise EngineError(f"{self.target.name} ({self.target.base_url}) is not ready: {error}")
            await asyncio.sleep(_RETRY_SECONDS)

    async def _try(self, *, ask: bool) -> str:
        """What keeps it from serving; empty if nothing does."""
        try:
            self.model = self.model or await model_name(self.client)
        except EngineError as error:
            return str(error)
        if not ask:
            return ""
        sample = Sample([1], 1)
        return (await self.client.generate(*self._request(sample, Sampling()))).error

    async def warm_up(self, samples: Sequence[Sample], plan: ServePlan) -> None:
        """Prompts that are not measured, as many at once as in the load."""
        requests = [self._prepared(sample, plan.sampling) for sample in samples]
        run = await run_load(self.client, requests, [0.0] * len(requests), plan.arrivals.max_concurrency)
        for outcome in run.outcomes:
            if outcome.error:
                raise EngineError(f"{self.target.name}: warming up failed: {outcome.error}")

    async def measure(self, samples: Sequence[Sample], plan: ServePlan) -> ServeResult:
        """One turn."""
        requests = [self._prepared(sample, plan.sampling) for sample in samples]
        due = plan.arrivals.times(len(requests), plan.seed)
        async with contextlib.AsyncExitStack() as stack:
            probing = plan.health_probe
            prober = await stack.enter_async_context(self.target.client()) if probing else None
            health = await stack.enter_async_context(watched_health(prober)) if prober else None
            run = await run_load(self.client, requests, due, plan.arrivals.max_concurrency)
        if not any(outcome.success for outcome in run.outcomes):
            raise EngineError(f"{self.target.name} answered none of {len(requests)} requests: {run.outcomes[0].error}")
        return ServeResult(run if health is None else run.with_health(health), plan.selection)

    def _prepared(self, sample: Sample, sampling: Sampling) -> Prepared:
        return Prepared(*self._request(sample, sampling))

    def _request(self, sample: Sample, sampling: Sampling) -> tuple[bytes, int]:
        body = body_of(sample, self.target.backend, self.model, sampling)
        return self.client.request("POST", self.target.path, body), len(sample.numbers)


async def model_name(client: Client) -> str:
    """The id of the first model of a server. Raises EngineError."""
    name = (await first_model(client)).get("id")
    if not isinstance(name, str):
        raise EngineError("/v1/models names no model: --model NAME")
    return name


async def vocabulary_size(target: Target, client: Client, say: Say) -> int:
    """How many token ids the model has; a thousand where the server does not say, which ``say`` hears. Raises EngineError."""
    if target.backend == "openai-chat":
        return _DEFAULT_VOCABULARY  # words are sent
    meta = (await first_model(client)).get("meta")
    size = meta.get("n_vocab") if isinstance(meta, dict) else None
    if isinstance(size, int) and size > 0:
        return size
    say(f"{target.name} does not say its vocabulary: token ids are below {_DEFAULT_VOCABULARY} (--vocab-size)")
    return _DEFAULT_VOCABULARY


async def first_model(client: Client) -> dict[str, Any]:
    """What ``/v1/models`` says of the first model; empty if it says nothing. Raises EngineError where there is no answer."""
    try:
        reply = await client.send(client.request("GET", "/v1/models"))
    except (OSError, WireError) as error:
        raise EngineError(f"GET /v1/models: {error}") from error
    if reply.reader.status != 200:
        raise EngineError(f"GET /v1/models: HTTP {reply.reader.status}")
    models = reply.json().get("data")
    first = models[0] if isinstance(models, list) and models else {}
    return first if isinstance(first, dict) else {}


def allow_open_files() -> None:
    """As many connections as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says unlimited and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _in_short(result: ServeResult) -> str:
    found = result.as_json(detailed=False)
    return (
        f"{found['completed']} requests in {found['duration']:.2f} s, {found['output_throughput']:.1f} output tokens/s"
    )
