"""What Prometheus reads at /metrics, under vLLM's names with our prefix, and the last two minutes for the page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shoal.engine.engine import EngineStats
from shoal.requests.outputs import RequestOutput
from shoal.server.worker import Tracked

REASONS = ("stop", "length", "abort", "error", "timeout")

_LATENCIES = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUESTS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
_STEPS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

# name, what it says, buckets
_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _LATENCIES),
    "inter_token_latency_seconds": ("From a token to the next one of the same request.", _LATENCIES),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _REQUESTS),
    "request_queue_time_seconds": ("From a request's arrival until it first ran.", _REQUESTS),
    "request_prefill_time_seconds": ("From when a request first ran to its first token.", _REQUESTS),
    "request_decode_time_seconds": ("From a request's first token to its last.", _REQUESTS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of all answers of a request.", _TOKENS),
    "step_batch_size": ("Sequences in a step.", _SIZES),
    "step_seconds": ("How long a step took.", _STEPS),
}
_COUNTERS = {
    "num_preemptions": "Sequences that lost their KV pages and were computed again.",
    "prompt_tokens": "Tokens of prompts, those of the prefix cache among them.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Tokens of prompts that were looked for in the prefix cache.",
    "prefix_cache_hits": "Tokens of prompts that were in the prefix cache.",
    "spec_decode_num_draft_tokens": "Tokens that were computed on a guess.",
    "spec_decode_num_accepted_tokens": "Of these, tokens that were guessed right.",
    "admission_rejections": "Requests that were refused because too many waited.",
    "aborts": "Requests whose client went away before their end.",
}
_GAUGES = {
    "num_requests_running": "Sequences that run.",
    "num_requests_waiting": "Sequences that wait for a place or for KV pages.",
    "kv_cache_usage_perc": "Share of KV pages in use, 0 to 1.",
}

_KEPT = 4096  # latencies for percentiles
_RECENT = 60.0  # seconds
_HISTORY = 120  # seconds, one entry each


class Moment(NamedTuple):
    """One second: when it ended (Unix time), tokens a second, where the engine stood."""

    time: float
    prompt_rate: float
    generation_rate: float
    running: int
    waiting: int
    kv_share: float
    step_seconds: float


class Metrics:
    """An ``Observer`` of the worker. ``stats`` gives the engine's, or None before there is one; ``rejections`` the waiting room's
    count.

    The engine's thread writes, the event loop reads.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None], rejections: Callable[[], int]) -> None:
        self._stats, self._rejections = stats, rejections
        self.registry = CollectorRegistry()
        self._totals = dict.fromkeys(_COUNTERS, 0)
        made: dict[str, Any] = {}
        for name, (text, buckets) in _HISTOGRAMS.items():
            made[name] = self._labelled(Histogram, name, text, model_name, buckets=buckets)
        for name, text in _COUNTERS.items():
            made[name] = self._labelled(Counter, name, text, model_name)
        for name, text in _GAUGES.items():
            made[name] = self._labelled(Gauge, name, text, model_name)
        self._made = made
        success = Counter(
            "shoal:request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._ended = {reason: success.labels(model_name, reason) for reason in REASONS}
        self.ended = dict.fromkeys(REASONS, 0)
        self.recent = {name: Recent() for name in ("ttft", "itl", "e2e", "queue")}
        self.history: deque[Moment] = deque(maxlen=_HISTORY)
        self._moment = (time.monotonic(), 0, 0)
        self.step_seconds = 0.0

    def _labelled(self, kind: Any, name: str, text: str, model_name: str, **how: Any) -> Any:
        return kind(f"shoal:{name}", text, ["model_name"], registry=self.registry, **how).labels(model_name)

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def stepped(self, stats: EngineStats, seconds: float) -> None:
        """After each step."""
        self._made["step_batch_size"].observe(stats.batch_sequences)
        self._made["step_seconds"].observe(seconds)
        self.step_seconds = seconds

    def progressed(self, tracked: Tracked, output: RequestOutput, now: float) -> None:
        """A request has got something, or ended."""
        tokens = sum(len(answer.token_ids) for answer in output.outputs)
        new, tracked.num_output = tokens - tracked.num_output, tokens
        if new and not tracked.last_token:
            self._observe("time_to_first_token_seconds", "ttft", now - tracked.arrived, now)
        elif new:
            self._observe("inter_token_latency_seconds", "itl", now - tracked.last_token, now)
        if new:
            tracked.last_token = now
        if output.finished:
            self._note_end(tracked, output, now)

    def aborted(self, tracked: Tracked) -> None:
        """A request was given up by its client."""
        self._count("aborts", self._totals["aborts"] + 1)
        self._end("abort")

    def _note_end(self, tracked: Tracked, output: RequestOutput, now: float) -> None:
        self._observe("e2e_request_latency_seconds", "e2e", now - tracked.arrived, now)
        self._made["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        self._made["request_generation_tokens"].observe(tracked.num_output)
        times = output.metrics
        if times is not None and times.begun_time is not None:
            self._observe("request_queue_time_seconds", "queue", times.begun_time - tracked.arrived, now)
            if times.first_token_time is not None:
                self._made["request_prefill_time_seconds"].observe(times.first_token_time - times.begun_time)
                self._made["request_decode_time_seconds"].observe(now - times.first_token_time)
        reasons = [answer.finish_reason for answer in output.outputs]
        self._end(next((reason for reason in ("error", "timeout", "abort", "length") if reason in reasons), "stop"))

    def _end(self, reason: str) -> None:
        self._ended[reason].inc()
        self.ended[reason] += 1

    def _observe(self, name: str, short: str, seconds: float, now: float) -> None:
        self._made[name].observe(seconds)
        self.recent[short].add(seconds, now)

    # -- the event loop ----------------------------------------------------------------------------------------------

    def exposition(self) -> bytes:
        """The text that Prometheus reads; gauges are those of this moment."""
        stats = self._stats()
        if stats is not None:
            self._made["num_requests_running"].set(stats.running)
            self._made["num_requests_waiting"].set(stats.waiting)
            self._made["kv_cache_usage_perc"].set(kv_share(stats))
            self._count("num_preemptions", stats.preemptions)
            self._count("prompt_tokens", stats.prompt_tokens)
            self._count("generation_tokens", stats.generation_tokens)
            self._count("prefix_cache_queries", stats.prompt_tokens)
            self._count("prefix_cache_hits", stats.cached_tokens)
            self._count("spec_decode_num_draft_tokens", stats.spec_decode_num_draft_tokens)
            self._count("spec_decode_num_accepted_tokens", stats.spec_decode_num_accepted_tokens)
        self._count("admission_rejections", self._rejections())
        return generate_latest(self.registry)

    def tick(self) -> None:
        """Once a second: the next entry of ``history``."""
        stats = self._stats()
        if stats is None:
            return
        before, prompt, generated = self._moment
        now = time.monotonic()
        seconds = max(now - before, 1e-3)
        self.history.append(
            Moment(
                time.time(),
                (stats.prompt_tokens - prompt) / seconds,
                (stats.generation_tokens - generated) / seconds,
                stats.running,
                stats.waiting,
                kv_share(stats),
                self.step_seconds,
            )
        )
        self._moment = now, stats.prompt_tokens, stats.generation_tokens

    def _count(self, name: str, total: int) -> None:
        more, self._totals[name] = total - self._totals[name], total
        if more > 0:
            self._made[name].inc(more)


class Recent:
    """Latencies of the last minute, the newest few thousand of them."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def add(self, seconds: float, now: float) -> None:
        """One more, on the monotonic clock."""
        self._seen.append((now, seconds))

    def percentile(self, share: float) -> float | None:
        """The least latency that ``share`` of them do not exceed, None if there are none."""
        since = time.monotonic() - _RECENT
        found = sorted(seconds for at, seconds in tuple(self._seen) if at >= since)
        return found[max(0, math.ceil(share * len(found)) - 1)] if found else None


def kv_share(stats: EngineStats) -> float:
    """Share of KV pages in use, of the group that has the least left."""
    return max(1 - free / total for free, total in zip(stats.free_pages, stats.num_pages, strict=True))
