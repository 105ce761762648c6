"""What ``shoal bench peers`` found: the mathematics of its tables, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.machine import Machine
from shoal.bench.rates import Ratio, Speed
from shoal.bench.roofline import Work


@dataclass(frozen=True, slots=True)
class Phase:
    """What one row of a table measures: ``passes`` times ``work``, for ``tokens`` tokens of ``batch`` sequences in all."""

    batch: int
    prompt_len: int
    tokens: int
    work: Work
    passes: int = 1


@dataclass(frozen=True, slots=True)
class PeerSpeed:
    """A peer in one phase, with whichever ``setting`` suits it best there."""

    speed: Speed
    setting: str
    ratio: Ratio

    @classmethod
    def of(cls, tokens: int, shoal: Sequence[float], peer: Mapping[str, Sequence[float]]) -> PeerSpeed:
        """From seconds a round: shoal's, and the peer's for each of its settings."""
        best = min(peer, key=lambda setting: statistics.median(peer[setting]))
        return cls(Speed.of(tokens, peer[best]), best, Ratio.of(shoal, peer[best]))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row: the speed of all sides in one phase.

    ``roofline`` is the most tokens a second that the machine allows (see roofline.py).
    """

    phase: Phase
    shoal: Speed
    peers: Mapping[str, PeerSpeed]
    roofline: float

    @classmethod
    def of(
        cls,
        phase: Phase,
        shoal: Sequence[float],
        peers: Mapping[str, Mapping[str, Sequence[float]]],
        machine: Machine,
    ) -> Comparison:
        """From seconds a round: shoal's, and for each setting of each peer."""
        speeds = {name: PeerSpeed.of(phase.tokens, shoal, seconds) for name, seconds in peers.items()}
        floor = phase.passes * phase.work.floor_seconds(machine)
        return cls(phase, Speed.of(phase.tokens, shoal), speeds, phase.tokens / floor)

    @property
    def reached(self) -> float:
        """shoal's share of the roofline."""
        return self.shoal.median / self.roofline

    def cells(self, peers: Sequence[str]) -> list[str]:
        """The row of a table with ``_columns(peers)``; a peer that was not measured has dashes."""
        phase = self.phase
        cells = [str(phase.batch), str(phase.prompt_len), str(self.shoal)]
        for name in peers:
            peer = self.peers.get(name)
            cells += [str(peer.speed), str(peer.ratio), peer.setting] if peer else ["-"] * 3
        work = [f"{phase.work.num_bytes / 1e6:.0f}", f"{phase.work.macs / 1e9:.2f}"]
        return [*cells, *work, f"{self.roofline:.0f}", f"{self.reached:.0%}"]

    def as_json(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        return asdict(self) | {"reached": self.reached}


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
    """Everything, with what one needs to repeat it.

    ``formats``: how many matrices of the file have each. ``not_run``: why a peer is missing, or some of its rounds.
    ``other_load``: share of the machine that others used meanwhile.
    """

    model: str
    formats: Mapping[str, int]
    machine: Machine
    threads: int
    rounds: int
    versions: Mapping[str, str]
    not_run: Mapping[str, str]
    decode: Sequence[Comparison]
    prefill: Sequence[Comparison]
    memory: Memory
    other_load: float

    def as_markdown(self) -> str:
        """For docs/benchmarks.md."""
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.model} ({formats}), {versions}, {self.threads} threads each, medians (min-max) of {self.rounds}"
            " alternating rounds.",
            *(f"Not measured: {reason}." for reason in self.not_run.values()),
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


def _columns(peers: Sequence[str]) -> list[str]:
    beside = [column for name in peers for column in (f"{name} tokens/s", "ratio", f"{name} settings")]
    return ["sequences", "prompt", "shoal tokens/s", *beside, "MB", "GMAC", "roofline tokens/s", "reached"]


def _table(title: str, rows: Sequence[Comparison]) -> list[str]:
    """A title and a table with a column group for each peer that was measured; nothing without rows."""
    if not rows:
        return []
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    columns = _columns(peers)
    cells = [columns, ["---:"] * len(columns), *(row.cells(peers) for row in rows)]
    return [f"**{title}**", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
