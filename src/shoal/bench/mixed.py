"""Requests that decode while long prompts come in beside them: how long they wait for a token, and what the machine gets done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.bench.workload import fixed_length, random_prompts
from shoal.llm import LLM
from shoal.requests.outputs import RequestOutput

PERCENTAGES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """At any time ``decoding`` requests with prompts of ``input_len`` and answers of ``output_len`` tokens; beside them ``prefills``
    prompts of ``prefill_len`` tokens, one every ``interval`` seconds, that are answered by one token. With ``fixed_work`` only so many
    requests decode in all, and they are waited for: the tokens are the same however fast they come."""

    decoding: int = 8
    input_len: int = 32
    output_len: int = 1024
    prefills: int = 20
    prefill_len: int = 2000
    interval: float = 1.0
    fixed_work: bool = False


@dataclass(frozen=True, slots=True)
class MixedResult:
    """Seconds from one token to the next of each decoding request; ``tokens`` computed, of prompts and answers, in ``seconds``."""

    gaps: tuple[float, ...]
    tokens: int
    seconds: float

    @property
    def percentiles(self) -> dict[int, float]:
        """Seconds for each of ``PERCENTAGES``, interpolated linearly."""
        return dict(zip(PERCENTAGES, np.percentile(self.gaps, PERCENTAGES).tolist(), strict=True))

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers together."""
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Percentiles in seconds, not the gaps themselves."""
        return {
            "inter_token_latency": self.percentiles,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    def __str__(self) -> str:
        shown = ", ".join(f"p{share} {1000 * seconds:.1f} ms" for share, seconds in self.percentiles.items())
        return f"inter-token latency {shown}; {self.tokens_per_second:.1f} tokens/s, prompts and answers together"


def measure_mixed(llm: LLM, load: MixedLoad, clock: Callable[[], float] = time.perf_counter) -> MixedResult:
    """From the first long prompt until all of them are answered and, with ``fixed_work``, all others too."""
    run = _Run(llm, load, clock)
    while not run.all_decode:
        run.step()
    start = run.begin()
    while run.answered < load.prefills or (load.fixed_work and run.decoding):
        run.submit_due(clock() - start)
        run.step()
    return MixedResult(tuple(run.gaps), run.tokens, clock() - start)


class _Run:
    """What is under way, and the time of each request's last token."""

    def __init__(self, llm: LLM, load: MixedLoad, clock: Callable[[], float]) -> None:
        self._llm, self._load, self._clock = llm, load, clock
        self._last: dict[str, float | None] = {}  # of those that decode
        self._prefills = random_prompts(llm, load.prefills, load.prefill_len)
        self._submitted = 0
        self._prompts = random_prompts(llm, load.decoding, load.input_len)
        self.answered, self.tokens, self.gaps = 0, 0, list[float]()
        for _ in range(load.decoding):
            self._submit_decoding()

    @property
    def all_decode(self) -> bool:
        """Whether each has had a token."""
        return all(last is not None for last in self._last.values())

    @property
    def decoding(self) -> int:
        """How many are under way."""
        return len(self._last)

    def begin(self) -> float:
        """Count from now on; the time."""
        now = self._clock()
        self.tokens, self.gaps = 0, []
        self._last = dict.fromkeys(self._last, now)
        return now

    def submit_due(self, passed: float) -> None:
        """Long prompts whose time has come."""
        while self._submitted < self._load.prefills and passed >= self._submitted * self._load.interval:
            self._llm.submit(self._prefills[self._submitted], fixed_length(1))
            self._submitted += 1

    def step(self) -> None:
        """One step, and what it brought."""
        outputs, now = self._llm.step(), self._clock()
        for output in outputs:
            self._note(output, now)

    def _note(self, output: RequestOutput, now: float) -> None:
        self.tokens += 1
        if output.request_id not in self._last:
            self.tokens += self._load.prefill_len
            self.answered += 1
            return
        last = self._last[output.request_id]
        if last is not None:
            self.gaps.append(now - last)
        self._last[output.request_id] = now
        if output.finished:
            del self._last[output.request_id]
            if not self._load.fixed_work:
                self._submit_decoding()

    def _submit_decoding(self) -> None:
        prompt = self._prompts[len(self._last) % len(self._prompts)]
        self._last[self._llm.submit(prompt, fixed_length(self._load.output_len))] = None
