"""``shoal bench soak``: a server under as much load as it takes, with readers that go away, and what that does to its process.

There are four parts: warming up under the load, a pause, the load again, a pause. Memory is compared between the two loads, at its
most; open files and threads between the two pauses, as under load they come and go with the connections.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from shoal.bench.markdown import table
from shoal.bench.serve.client import Client, Outcome
from shoal.bench.serve.dataset import RandomShape, Sampling, body_of, random_samples, vocabulary_of
from shoal.bench.serve.load import Health, Prepared, watched_health
from shoal.bench.serve.measure import Target, allow_open_files, model_name, vocabulary_size
from shoal.bench.serve.report import health_json
from shoal.errors import EngineError, ParameterError

_POOL = 512  # different requests
_REFUSED = (429, 503)  # what a server that is full may say
_BACK_OFF_SECONDS = 0.05
_PATIENCE_SECONDS = 120.0  # for an answer that is not to be given up


@dataclass(frozen=True, kw_only=True, slots=True)
class SoakPlan:
    """``seconds`` of load after ``warmup`` seconds of it, ``concurrency`` requests at once of which ``cut_share`` are given up at a
    random moment; the process ``pid`` is looked at every ``interval`` seconds, and after ``pause`` seconds of quiet."""

    pid: int
    seconds: float = 600.0
    warmup: float = 120.0
    concurrency: int = 64
    cut_share: float = 0.3
    interval: float = 5.0
    pause: float = 5.0
    shape: RandomShape = field(default_factory=lambda: RandomShape(input_len=64, output_len=64, range_ratio=0.9))
    vocab_size: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process holds, ``seconds`` after the soak began: resident bytes, open files and sockets, threads."""

    seconds: float
    rss: int
    handles: int
    threads: int


@dataclass(slots=True)
class Tally:
    """How requests ended: answered, given up by us, refused because the server was full, and anything else."""

    completed: int = 0
    cut: int = 0
    refused: int = 0
    failed: int = 0
    output_tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        """One that we did not give up."""
        if outcome.success:
            self.completed += 1
            self.output_tokens += outcome.output_len
        elif outcome.status in _REFUSED:
            self.refused += 1
        else:
            self.failed += 1
            if outcome.error not in self.errors[:10]:
                self.errors = [*self.errors, outcome.error][:10]


@dataclass(frozen=True, slots=True)
class SoakResult:
    """The process in quiet ``before`` and ``after`` the load, and under it; what came of the requests; /health meanwhile."""

    warming_up: Sequence[Usage]
    before: Usage
    under_load: Sequence[Usage]
    after: Usage
    tally: Tally
    health: Health

    @property
    def growth(self) -> float:
        """Most memory under load after warming up over the most while warming up, less one."""
        return _most(self.under_load).rss / _most(self.warming_up).rss - 1

    @property
    def verdicts(self) -> dict[str, bool]:
        """What a server must keep to."""
        return {
            "rss_within_1_percent": 100 * _most(self.under_load).rss <= 101 * _most(self.warming_up).rss,
            "handles_flat": self.after.handles <= self.before.handles,
            "threads_flat": self.after.threads <= self.before.threads,
            "requests_answered": self.tally.completed > 0,
            "no_failures": not self.tally.failed,
        }

    @property
    def held(self) -> bool:
        """Whether it kept to all of it."""
        return all(self.verdicts.values())

    def as_json(self) -> dict[str, Any]:
        """All looks at the process, and what follows from them."""
        return {
            "held": self.held,
            **self.verdicts,
            "rss_growth": self.growth,
            "warming_up": [asdict(usage) for usage in self.warming_up],
            "before": asdict(self.before),
            "under_load": [asdict(usage) for usage in self.under_load],
            "after": asdict(self.after),
            **asdict(self.tally),
            **health_json(self.health),
        }

    def as_markdown(self) -> str:
        """The process, the requests, and the verdict."""
        seconds = self.under_load[-1].seconds - self.under_load[0].seconds
        stages = {
            "warming up, most": _most(self.warming_up),
            "quiet, before": self.before,
            "load, first": self.under_load[0],
            "load, last": self.under_load[-1],
            "load, most": _most(self.under_load),
            "quiet, after": self.after,
        }
        rows = [[name, f"{one.rss / 1e6:.1f}", one.handles, one.threads] for name, one in stages.items()]
        tally, health = self.tally, health_json(self.health)
        said = [f"{'yes' if kept else 'NO'}: {name.replace('_', ' ')}" for name, kept in self.verdicts.items()]
        return "\n".join(
            [
                table(["", "RSS MB", "handles", "threads"], rows),
                "",
                f"{tally.completed} requests answered, {tally.cut} given up, {tally.refused} refused, {tally.failed} failed;"
                f" {tally.output_tokens} tokens in {seconds:.0f} s.",
                f"/health: p99 {health['p99_health_ms']:.1f} ms, most {health['max_health_ms']:.1f} ms, {health['health_failed']} of"
                f" {health['health_probes']} failed. Memory grew by {self.growth:.2%}.",
                *said,
            ]
        )


def measure_soak(plan: SoakPlan, target: Target, say: Callable[[str], None]) -> SoakResult:
    """Soak the server; ``say`` hears each look at its process.

    Raises ParameterError if there is no such process, EngineError if it ends or cannot be reached.
    """
    try:
        process = psutil.Process(plan.pid)
    except psutil.NoSuchProcess:
        raise ParameterError("pid", plan.pid, "the id of the server's process") from None
    try:
        return asyncio.run(_soak(plan, target, _Watch(process, say)))
    except psutil.NoSuchProcess:
        raise EngineError(f"the server's process {plan.pid} ended during the soak") from None


class _Watch:
    """Looks at the process."""

    def __init__(self, process: psutil.Process, say: Callable[[str], None]) -> None:
        self.say = say
        self._process, self._start = process, time.monotonic()

    def look(self, stage: str) -> Usage:
        with self._process.oneshot():
            usage = Usage(
                time.monotonic() - self._start,
                self._process.memory_info().rss,
                self._process.num_fds(),
                self._process.num_threads(),
            )
        self.say(
            f"{usage.seconds:.0f} s, {stage}: {usage.rss / 1e6:.1f} MB, {usage.handles} handles, {usage.threads} threads"
        )
        return usage


async def _soak(plan: SoakPlan, target: Target, watch: _Watch) -> SoakResult:
    allow_open_files()
    async with target.client() as client, target.client() as prober:
        requests = await _requests(plan, target, client, watch)
        load = _Load(client, requests, plan)
        warming_up = await load.run(plan.warmup, watch, "warming up")
        client.close()
        await asyncio.sleep(plan.pause)
        before = watch.look("quiet")
        load.tally = Tally()
        async with watched_health(prober) as health:
            under_load = await load.run(plan.seconds, watch, "load")
        client.close()
        prober.close()
        await asyncio.sleep(plan.pause)
        return SoakResult(warming_up, before, under_load, watch.look("quiet"), load.tally, health)


async def _requests(plan: SoakPlan, target: Target, client: Client, watch: _Watch) -> list[Prepared]:
    """Half of them streamed."""
    model = target.model or await model_name(client)
    vocab_size = plan.vocab_size or await vocabulary_size(target, client, watch.say)
    samples = random_samples(_POOL, plan.shape, vocabulary_of(target.backend, vocab_size), plan.seed)
    sampling = Sampling(ignore_eos=True)
    return [
        Prepared(
            client.request(
                "POST", target.path, body_of(sample, target.backend, model, sampling, stream=bool(number % 2))
            ),
            len(sample.numbers),
        )
        for number, sample in enumerate(samples)
    ]


class _Load:
    """As many requests at once as are asked for, one after the other, until the time is over."""

    def __init__(self, client: Client, requests: Sequence[Prepared], plan: SoakPlan) -> None:
        self.tally = Tally()
        self._client, self._requests, self._plan = client, requests, plan
        self._random = random.Random(plan.seed)
        self._usual = 1.0  # seconds of an answer, as they have been of late

    async def run(self, seconds: float, watch: _Watch, stage: str) -> list[Usage]:
        """Keep it up for so many seconds; looks at the process. What is under way at the end is given up."""
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._requests_on_end()) for _ in range(self._plan.concurrency)]
            usages = []
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(left, self._plan.interval))
                usages.append(watch.look(stage))
            for task in tasks:
                task.cancel()
        return usages

    async def _requests_on_end(self) -> None:
        while True:
            request = self._random.choice(self._requests)
            start = time.perf_counter()
            cut = self._random.random() < self._plan.cut_share
            try:
                async with asyncio.timeout(self._random.uniform(0, 1.2 * self._usual) if cut else _PATIENCE_SECONDS):
                    outcome = await self._client.generate(request.content, request.prompt_len)
            except TimeoutError:
                if cut:
                    self.tally.cut += 1
                    continue
                outcome = Outcome(start, _PATIENCE_SECONDS, error=f"no answer within {_PATIENCE_SECONDS:g} s")
            self.tally.note(outcome)
            if outcome.success:
                self._usual += 0.1 * (outcome.latency - self._usual)
            else:
                await asyncio.sleep(_BACK_OFF_SECONDS)


def _most(usages: Sequence[Usage]) -> Usage:
    """The largest of each figure, whenever it was."""
    return Usage(
        usages[-1].seconds,
        max(usage.rss for usage in usages),
        max(usage.handles for usage in usages),
        max(usage.threads for usage in usages),
    )
