"""What a run says: vLLM's figures, by its names in JSON and in its table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.bench.markdown import span, table
from shoal.bench.serve.client import Outcome
from shoal.bench.serve.load import Health, Run
from shoal.errors import ParameterError

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
_GOALS = ("ttft", "tpot", "e2el")  # those that a request has one of
_DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "latencies", "errors")
_WIDTH = 50
_SHOWN_ERRORS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which ``metrics`` to report, with which ``percentiles``; ``goals``: milliseconds within which a request is a good one.

    Raises ParameterError.
    """

    metrics: Sequence[str] = tuple(METRICS)
    percentiles: Sequence[float] = (99.0,)
    goals: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise ParameterError("percentile_metrics", name, f"some of {', '.join(METRICS)}")
        for share in self.percentiles:
            if not 0 <= share <= 100:
                raise ParameterError("metric_percentiles", share, "from 0 to 100")
        for name, limit in self.goals.items():
            if name not in _GOALS or not limit >= 0:
                raise ParameterError(
                    "goodput", f"{name}:{limit}", f"some of {', '.join(_GOALS)}, each with milliseconds"
                )


@dataclass(frozen=True, slots=True)
class ServeResult:
    """One run against one server."""

    run: Run
    selection: Selection

    @property
    def completed(self) -> list[Outcome]:
        """Requests that were answered whole."""
        return [outcome for outcome in self.run.outcomes if outcome.success]

    @property
    def good(self) -> int:
        """How many of them were answered within every goal. Requests of one token have a TPOT of 0, as vLLM has it."""
        goals = self.selection.goals
        return sum(all(1e3 * getattr(one, goal) <= goals[name] for name, goal in _of(goals)) for one in self.completed)

    def as_json(self, *, detailed: bool = True) -> dict[str, Any]:
        """vLLM's keys, and the client's CPU time and /health. Without ``detailed`` nothing of single requests."""
        done, run = self.completed, self.run
        inputs, outputs = (sum(getattr(one, name) for one in done) for name in ("prompt_len", "output_len"))
        found: dict[str, Any] = {
            "duration": run.duration,
            "completed": len(done),
            "failed": len(run.outcomes) - len(done),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(done) / run.duration,
            "request_goodput": self.good / run.duration if self.selection.goals else None,
            "output_throughput": outputs / run.duration,
            "total_token_throughput": (inputs + outputs) / run.duration,
            "max_output_tokens_per_s": _peak_tokens(done),
            "max_concurrent_requests": _peak_requests(done),
            "client_cpu_seconds": run.cpu_seconds,
            "client_cpu_share": run.cpu_seconds / run.duration,
            **self._latencies(done),
            **(health_json(run.health) if run.health else {}),
        }
        return found | (self._details() if detailed else {})

    def errors(self) -> list[str]:
        """What went wrong, a line a kind, most frequent first, at most ten."""
        counted = Counter(one.error for one in self.run.outcomes if not one.success)
        return [f"{count} failed: {error}" for error, count in counted.most_common(_SHOWN_ERRORS)]

    def table(self, settings: Mapping[str, Any]) -> str:
        """vLLM's table; ``settings`` are lines of the configuration."""
        found = self.as_json(detailed=False)
        lines = [_title(" Serving Benchmark Result ", "=")]
        lines += [_line("Successful requests:", found["completed"]), _line("Failed requests:", found["failed"])]
        lines += [_line(name, value) for name, value in settings.items()]
        lines += [
            _line("Benchmark duration (s):", found["duration"]),
            _line("Total input tokens:", found["total_input_tokens"]),
            _line("Total generated tokens:", found["total_output_tokens"]),
            _line("Request throughput (req/s):", found["request_throughput"]),
        ]
        if self.selection.goals:
            lines.append(_line("Request goodput (req/s):", found["request_goodput"]))
        lines += [
            _line("Output token throughput (tok/s):", found["output_throughput"]),
            _line("Peak output token throughput (tok/s):", found["max_output_tokens_per_s"]),
            _line("Peak concurrent requests:", float(found["max_concurrent_requests"])),
            _line("Total token throughput (tok/s):", found["total_token_throughput"]),
            _line("Client CPU (% of one core):", 100 * found["client_cpu_share"]),
        ]
        for name in self.selection.metrics:
            lines += self._lines_of(name, found)
        if self.run.health:
            lines.append(_title("Health", "-"))
            lines += [_line(f"Failed of {found['health_probes']} probes:", found["health_failed"])]
            lines += [
                _line(f"{word} /health (ms):", found[f"{key}_health_ms"])
                for word, key in (("Median", "median"), ("P99", "p99"), ("Max", "max"))
            ]
        return "\n".join([*lines, "=" * _WIDTH])

    def _latencies(self, done: Sequence[Outcome]) -> dict[str, float]:
        found: dict[str, Any] = {}
        values = {
            "ttft": [one.ttft for one in done],
            "tpot": [one.tpot for one in done if one.output_len > 1],
            "itl": [gap for one in done for gap in one.itls],
            "e2el": [one.latency for one in done],
        }
        for name in self.selection.metrics:
            ms = 1e3 * np.array(values[name] or [0.0])
            found |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
            found |= {f"{_p(share)}_{name}_ms": np.percentile(ms, share) for share in self.selection.percentiles}
        return {key: float(value) for key, value in found.items()}

    def _details(self) -> dict[str, Any]:
        names = ("prompt_len", "output_len", "start", "ttft", "itls", "latency", "error")
        return {
            key: [getattr(one, name) for one in self.run.outcomes] for key, name in zip(_DETAILS, names, strict=True)
        }

    def _lines_of(self, name: str, found: Mapping[str, Any]) -> list[str]:
        short, long = METRICS[name]
        keys = [("Mean", "mean"), ("Median", "median")]
        keys += [(_p(share).upper(), _p(share)) for share in self.selection.percentiles]
        return [
            _title(long, "-"),
            *(_line(f"{word} {short} (ms):", found[f"{key}_{name}_ms"]) for word, key in keys),
        ]


def health_json(health: Health) -> dict[str, Any]:
    """How long /health took beside a load."""
    ms = 1e3 * np.array(health.latencies or [0.0])
    return {
        "health_probes": len(health.latencies),
        "health_failed": health.failed,
        "median_health_ms": float(np.median(ms)),
        "p99_health_ms": float(np.percentile(ms, 99)),
        "max_health_ms": float(ms.max()),
    }


def comparison(results: Mapping[str, Sequence[ServeResult]]) -> dict[str, dict[str, list[float]]]:
    """Figures of the first server over those of each other one, a ratio a round: of output tokens a second more is better, of times
    less is. A figure that is 0 in a round (nothing was measured) has no ratio there."""
    (_, first), *others = results.items()
    return {name: _ratios(first, rounds) for name, rounds in others}


def comparison_table(results: Mapping[str, Sequence[ServeResult]]) -> str:
    """Markdown: medians and ranges over rounds, and the median of the rounds' ratios."""
    names = list(results)
    ratios = comparison(results)
    figures = {name: [_figures(one) for one in rounds] for name, rounds in results.items()}
    rows = []
    for key in figures[names[0]][0]:
        measured = [span([one[key] for one in figures[name]], 2) for name in names]
        rows.append([key, *measured, *(span(of[key], 2) if of[key] else "-" for of in ratios.values())])
    return table(["", *names, *(f"{names[0]} over {name}" for name in names[1:])], rows)


def _ratios(first: Sequence[ServeResult], other: Sequence[ServeResult]) -> dict[str, list[float]]:
    pairs = [(_figures(ours), _figures(theirs)) for ours, theirs in zip(first, other, strict=True)]
    return {key: [ours[key] / theirs[key] for ours, theirs in pairs if theirs[key]] for key in pairs[0][0]}


def _figures(result: ServeResult) -> dict[str, float]:
    """What servers are compared by."""
    found = result.as_json(detailed=False)
    keys = ["output_throughput", "request_throughput"]
    keys += ["request_goodput"] if result.selection.goals else []
    shares = ["median", *map(_p, result.selection.percentiles)]
    keys += [f"{share}_{name}_ms" for name in result.selection.metrics for share in shares]
    return {key: found[key] for key in keys}


def _of(goals: Mapping[str, float]) -> list[tuple[str, str]]:
    """Each goal, and the attribute of an outcome that it limits."""
    return [(name, "latency" if name == "e2el" else name) for name in goals]


def _peak_requests(done: Sequence[Outcome]) -> int:
    """Most requests under way at any moment."""
    changes = sorted([(one.start, 1) for one in done] + [(one.start + one.latency, -1) for one in done])
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _peak_tokens(done: Sequence[Outcome]) -> float:
    """Most events with text in any whole second from the first request on."""
    begin = min((one.start for one in done), default=0.0)
    seconds: Counter[int] = Counter()
    for one in done:
        times = one.start - begin + one.ttft + np.cumsum([0.0, *one.itls])
        seconds.update(times.astype(int).tolist())
    return float(max(seconds.values(), default=0))


def _p(share: float) -> str:
    return f"p{int(share) if share == int(share) else share}"


def _title(text: str, fill: str) -> str:
    return f"{text:{fill}^{_WIDTH}}"


def _line(name: str, value: Any) -> str:
    return f"{name:<40} {value:<10.2f}".rstrip() if isinstance(value, float) else f"{name:<40} {value:<10}".rstrip()
