"""An invented engine for the page: sequences come, wait, are computed and leave; nothing is true but the shape of its state."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

STEP_SECONDS = 0.025
CHUNK = 56  # rows of prompts in a step
PAGE = 16  # tokens
STEPS_PER_SECOND = round(1 / STEP_SECONDS)


@dataclass(eq=False)
class FakeSequence:
    """One request. ``owner`` is the name of its key."""

    id: str
    owner: str
    prompt_tokens: int
    max_tokens: int
    came_at: float
    state: str = "waiting"
    computed: int = 0
    output: int = 0
    rows: int = 0
    first_at: float | None = None

    @property
    def pages(self) -> int:
        return -(-(self.computed + self.output) // PAGE)


@dataclass
class FakeEngine:
    """Moves by ``step``; ``now`` is its own clock, in seconds since 1970."""

    max_num_seqs: int = 16
    total_pages: int = 640
    arrivals_per_second: float = 1.5
    seed: int = 7
    health: str = "ok"
    now: float = field(default_factory=time.time)
    sequences: list[FakeSequence] = field(default_factory=list)
    history: deque[list[float]] = field(default_factory=lambda: deque(maxlen=120))

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._began = self.now
        self.steps = self.preemptions = 0
        self.prompt_total = self.cached_total = self.generation_total = 0
        self.requests = {"stop": 0, "length": 0, "abort": 0, "error": 0, "timeout": 0}
        self._second = [0, 0]  # tokens of prompts and of answers since the last entry of the history
        self._times: dict[str, deque[float]] = {name: deque(maxlen=400) for name in ("ttft", "itl", "e2e", "queue")}
        self._step_seconds = STEP_SECONDS

    def run(self, seconds: float) -> None:
        """So much time at once, for a history."""
        for _ in range(int(seconds / STEP_SECONDS)):
            self.step()

    def add(self, owner: str, prompt_tokens: int, max_tokens: int) -> FakeSequence:
        number = f"chatcmpl-{self._random.getrandbits(48):012x}"
        sequence = FakeSequence(number, owner, prompt_tokens, max_tokens, self.now)
        if owner == "you":  # what is typed comes before what is only invented
            place = sum(one.state != "waiting" for one in self.sequences)
        else:
            place = len(self.sequences)
        self.sequences.insert(place, sequence)
        return sequence

    def remove(self, sequence: FakeSequence, reason: str) -> None:
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            self.requests[reason] += 1
            self._times["e2e"].append(self.now - sequence.came_at)

    def step(self) -> None:
        self.now += STEP_SECONDS
        self.steps += 1
        if self._random.random() < self.arrivals_per_second * STEP_SECONDS * (1.5 if self.now % 40 < 14 else 0.75):
            owner = self._random.choice(["search", "search", "mail", "nightly", "web"])
            self.add(owner, self._random.choice([60, 140, 300, 700, 1400]), self._random.choice([96, 160, 256, 384]))
        self._admit()
        for sequence in self._running:
            self._advance(sequence)
        self._preempt()
        rows = sum(sequence.rows for sequence in self._running)
        self._step_seconds = 0.011 + 0.00009 * rows + self._random.random() * 0.002
        if self.steps % STEPS_PER_SECOND == 0:
            self._remember()

    @property
    def _running(self) -> list[FakeSequence]:
        return [sequence for sequence in self.sequences if sequence.state in ("prefill", "decode")]

    @property
    def used_pages(self) -> int:
        return sum(sequence.pages for sequence in self._running)

    def _admit(self) -> None:
        for sequence in self.sequences:
            if len(self._running) >= self.max_num_seqs or self.used_pages > 0.9 * self.total_pages:
                return
            if sequence.state in ("waiting", "preempted"):
                self._times["queue"].append(self.now - sequence.came_at)
                sequence.computed = sequence.prompt_tokens // 4  # shared with others
                self.cached_total += sequence.computed
                sequence.state = "prefill"

    def _advance(self, sequence: FakeSequence) -> None:
        if sequence.state == "prefill":
            prefilling = sum(one.state == "prefill" for one in self.sequences)
            sequence.rows = min(max(1, CHUNK // prefilling), sequence.prompt_tokens - sequence.computed)
            sequence.computed += sequence.rows
            self._second[0] += sequence.rows
            self.prompt_total += sequence.rows
            if sequence.computed == sequence.prompt_tokens:
                sequence.state = "decode"
            return
        sequence.rows = 1
        sequence.output += 1
        self._second[1] += 1
        self.generation_total += 1
        self._times["itl"].append(self._step_seconds)
        if sequence.first_at is None:
            sequence.first_at = self.now
            self._times["ttft"].append(self.now - sequence.came_at)
        if sequence.output >= sequence.max_tokens:
            self.remove(sequence, self._random.choice(["stop", "stop", "length"]))

    def _preempt(self) -> None:
        if self.used_pages > self.total_pages:
            last = self._running[-1]
            last.state, last.computed, last.rows = "preempted", 0, 0
            self.preemptions += 1

    def _remember(self) -> None:
        waiting = len(self.sequences) - len(self._running)
        prompt, generated = self._second
        self._second = [0, 0]
        share = min(1.0, self.used_pages / self.total_pages)
        self.history.append([self.now, prompt, generated, len(self._running), waiting, share, self._step_seconds])

    def state(self) -> dict[str, Any]:
        """What GET /page/state answers."""
        running = self._running
        waiting = [sequence for sequence in self.sequences if sequence not in running]
        return {
            "model": "smollm2:135m",
            "version": "0.1.0",
            "health": self.health,
            "uptime_seconds": self.now - self._began + 93784.0,
            "step": {
                "number": self.steps,
                "seconds": self._step_seconds,
                "rows": sum(sequence.rows for sequence in running),
                "target_seconds": 0.05,
            },
            "slots": [self._slot(sequence) for sequence in self.sequences],
            "max_num_seqs": self.max_num_seqs,
            "running": len(running),
            "waiting": len(waiting),
            "waiting_tokens": sum(sequence.prompt_tokens for sequence in waiting),
            "kv_pages": {"used": self.used_pages, "total": self.total_pages},
            "preemptions": self.preemptions,
            "totals": {
                "prompt_tokens": self.prompt_total + self.cached_total,
                "cached_tokens": self.cached_total,
                "generation_tokens": self.generation_total,
                "requests": dict(self.requests),
            },
            "latency": {name: _quantiles(times) for name, times in self._times.items()},
            "history": list(self.history),
            "batches": self._batches(),
        }

    def _slot(self, sequence: FakeSequence) -> dict[str, Any]:
        return {
            "id": sequence.id,
            "state": sequence.state,
            "prompt_tokens": sequence.prompt_tokens,
            "computed_tokens": sequence.computed,
            "output_tokens": sequence.output,
            "max_tokens": sequence.max_tokens,
            "age_seconds": self.now - sequence.came_at,
            "rows": sequence.rows,
            "owner": sequence.owner,
        }

    def _batches(self) -> list[dict[str, Any]]:
        done = min(20_000, 8_412 + self.steps // 9)
        created = int(self._began) - 5_000
        return [
            _batch("batch_6a7c01f2", "in_progress", done, 3, 20_000, created),
            _batch("batch_91d0be44", "validating", 0, 0, 1_200, created + 4_700),
        ]


def _batch(name: str, status: str, completed: int, failed: int, total: int, created_at: int) -> dict[str, Any]:
    counts = {"completed": completed, "failed": failed, "total": total}
    return {"id": name, "status": status, **counts, "created_at": created_at}


def _quantiles(times: deque[float]) -> dict[str, float | None]:
    if len(times) < 2:
        return {"p50": None, "p95": None}
    cuts = quantiles(times, n=20)
    return {"p50": cuts[9], "p95": cuts[18]}
