"""What the prefix cache gains: a job whose rows share a system prompt, with the cache and without, in turns from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shoal import jobs
from shoal.bench.markdown import span, table
from shoal.bench.rates import Ratio
from shoal.errors import EngineError
from shoal.jobs.running.summary import Summary

_CHANGING = {"id", "request_id", "created", "cached_tokens"}  # fields of records that differ from run to run


@dataclass(frozen=True, slots=True)
class PrefixRound:
    """Seconds of the whole job, loading the model included, with the cache and ``without``."""

    cache: float
    without: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixGain:
    """All rounds of a batch file of so many rows."""

    rows: int
    prompt_tokens: int
    generated_tokens: int
    rounds: Sequence[PrefixRound]

    @property
    def ratio(self) -> Ratio:
        """How many times as long a job takes without the cache."""
        return Ratio.of([found.cache for found in self.rounds], [found.without for found in self.rounds])

    def as_markdown(self) -> str:
        """Both sides, and how far they are apart."""
        lines = [
            ["with the prefix cache", span([found.cache for found in self.rounds], 2)],
            ["without", span([found.without for found in self.rounds], 2)],
        ]
        cached = span([found.cached_tokens for found in self.rounds], 0)
        return "\n\n".join(
            [
                f"**Shared prefix**: {self.rows} rows, {self.prompt_tokens} prompt and {self.generated_tokens} generated tokens",
                table(["", "seconds"], lines),
                f"{self.ratio} times as fast; {cached} cached tokens; equal contents in all rounds.",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """All rounds, and what they come to."""
        return {"ratio": self.ratio.of_medians} | asdict(self)


def measure_prefix(
    model: Path, source: Path, folder: Path, rounds: int, say: Callable[[str], None], **engine: Any
) -> PrefixGain:
    """Run the batch file ``source`` with the prefix cache and without, into ``folder``; ``say`` hears how it goes.

    Each run is a whole job with an engine of its own, so that the cache is empty at first. Which side is first changes from
    round to round. ``engine``: fields of EngineConfig. Raises EngineError where a row fails, or where the sides differ in what
    they answer.
    """
    warm_up = _run(model, source, folder / "warm-up.jsonl", engine)  # the kernels are compiled, if need be
    found: list[PrefixRound] = []
    for number in range(1, rounds + 1):
        runs = {
            cache: _run(model, source, folder / f"{number}-{cache}.jsonl", engine | {"enable_prefix_caching": cache})
            for cache in ((True, False) if number % 2 else (False, True))
        }
        _check_equal(runs[True].output, runs[False].output)
        found.append(PrefixRound(runs[True].seconds, runs[False].seconds, runs[True].summary.cached_tokens))
        say(f"prefix {number}/{rounds}: {found[-1].cache:.2f} s, without the cache {found[-1].without:.2f} s")
    summary = warm_up.summary
    return PrefixGain(summary.done, summary.prompt_tokens, summary.generated_tokens, found)


def contents(output: Path) -> dict[str, Any]:
    """What the lines of a results file say, by custom_id: without what differs from run to run."""
    with output.open("rb") as lines:
        records = map(msgspec.json.decode, lines)
        return {record["custom_id"]: _lasting(record) for record in records}


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(item) for name, item in value.items() if name not in _CHANGING}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _check_equal(one: Path, other: Path) -> None:
    left, right = contents(one), contents(other)
    if left != right:
        custom_id = next(name for name in left | right if left.get(name) != right.get(name))
        raise EngineError(f"row {custom_id!r}: the prefix cache changes its answer")


class _Run(NamedTuple):
    """A job that is done."""

    seconds: float
    summary: Summary
    output: Path


def _run(model: Path, source: Path, output: Path, engine: Mapping[str, Any]) -> _Run:
    start = time.perf_counter()
    summary = jobs.run(model, source, output, show_progress=False, **engine)
    seconds = time.perf_counter() - start
    if summary.state != "finished" or summary.failed:
        raise EngineError(f"the job ended {summary.state}, and {summary.failed} of its rows failed")
    return _Run(seconds, summary, output)
