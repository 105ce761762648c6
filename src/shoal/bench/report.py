"""What ``shoal bench peers`` found: the mathematics of its tables, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.machine import Machine
from shoal.bench.roofline import Work

_COLUMNS = (
    "sequences",
    "prompt",
    "shoal tokens/s",
    "llama.cpp tokens/s",
    "ratio",
    "llama.cpp settings",
    "MB",
    "GMAC",
    "roofline tokens/s",
    "reached",
)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second over some rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Speed:
        """From the seconds that each round took for ``tokens`` tokens."""
        rates = [tokens / taken for taken in seconds]
        return cls(statistics.median(rates), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.low:.0f}-{self.high:.0f})"


@dataclass(frozen=True, slots=True)
class Phase:
    """What one row of a table measures: ``passes`` times ``work``, for ``tokens`` tokens of ``batch`` sequences in all."""

    batch: int
    prompt_len: int
    tokens: int
    work: Work
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: both sides' speed in one phase, the peer with whichever ``setting`` suits it best there.

    ``roofline`` is the most tokens a second that the machine allows (see roofline.py).
    """

    phase: Phase
    shoal: Speed
    peer: Speed
    setting: str
    roofline: float

    @classmethod
    def of(
        cls, phase: Phase, shoal: Sequence[float], peer: Mapping[str, Sequence[float]], machine: Machine
    ) -> Comparison:
        """From seconds a round: shoal's, and the peer's for each of its settings."""
        speeds = {setting: Speed.of(phase.tokens, seconds) for setting, seconds in peer.items()}
        best = max(speeds, key=lambda setting: speeds[setting].median)
        floor = phase.passes * phase.work.floor_seconds(machine)
        return cls(phase, Speed.of(phase.tokens, shoal), speeds[best], best, phase.tokens / floor)

    @property
    def ratio(self) -> float:
        """shoal's median over the peer's."""
        return self.shoal.median / self.peer.median

    @property
    def reached(self) -> float:
        """shoal's share of the roofline."""
        return self.shoal.median / self.roofline

    def cells(self) -> list[str]:
        """The row of the table, as ``_COLUMNS``."""
        phase = self.phase
        return [
            str(phase.batch),
            str(phase.prompt_len),
            str(self.shoal),
            str(self.peer),
            f"{self.ratio:.2f}",
            self.setting,
            f"{phase.work.num_bytes / 1e6:.0f}",
            f"{phase.work.macs / 1e9:.2f}",
            f"{self.roofline:.0f}",
            f"{self.reached:.0%}",
        ]

    def as_json(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        return asdict(self) | {"ratio": self.ratio, "reached": self.reached}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: shoal's peak resident set over the whole run, the model's file, all KV pages."""

    peak_rss: int
    file: int
    kv: int

    def __str__(self) -> str:
        rest = self.peak_rss - self.file - self.kv
        return (
            f"shoal's peak memory: {self.peak_rss / 1e6:.0f} MB = file {self.file / 1e6:.0f} MB"
            f" + KV {self.kv / 1e6:.0f} MB + {rest / 1e6:.0f} MB"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """Everything, with what one needs to repeat it. ``other_load``: share of the machine that others used meanwhile."""

    model: str
    machine: Machine
    threads: int
    rounds: int
    versions: Mapping[str, str]
    decode: Sequence[Comparison]
    prefill: Sequence[Comparison]
    memory: Memory
    other_load: float

    def as_markdown(self) -> str:
        """For docs/benchmarks.md."""
        versions = " and ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.model}, {versions}, {self.threads} threads each, medians (min-max) of {self.rounds} alternating rounds.",
            f"Machine: {self.machine}. Other processes used {self.other_load:.1%} of it during the turns.",
            f"{self.memory}.",
            *_table("Decode (MB and GMAC: one step)", self.decode),
            *_table("Prefill (MB and GMAC: all prompts)", self.prefill),
        ]
        return "\n\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        tables = {name: [row.as_json() for row in getattr(self, name)] for name in ("decode", "prefill")}
        return asdict(self) | tables


def _table(title: str, rows: Sequence[Comparison]) -> list[str]:
    """A title and a table; nothing without rows."""
    if not rows:
        return []
    cells = [list(_COLUMNS), ["---:"] * len(_COLUMNS), *(row.cells() for row in rows)]
    return [f"**{title}**", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
