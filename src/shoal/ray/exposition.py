"""One text for Prometheus out of those of many servers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_SUMMED_FOR_EVER = ("counter", "histogram")
_MAY_RETURN = 100  # replicas that are gone and kept apart: one that could not be asked for a while counts on
_SHARES = ("shoal:kv_cache_usage_perc",)


@dataclass
class _Family:
    """A metric: its lines of comment, its type, and each sample's value by name and labels as they are written."""

    comments: list[str]
    kind: str = "untyped"
    samples: dict[str, float] = field(default_factory=dict)


class Totals:
    """The sum over all replicas, also over those that are gone: of these the counters stay as they were last seen."""

    def __init__(self) -> None:
        self._last: dict[str, dict[str, _Family]] = {}
        self._gone: dict[str, dict[str, _Family]] = {}
        self._long_gone: dict[str, _Family] = {}

    def exposition(self, texts: Mapping[str, str]) -> str:
        """What the replicas, by their names, say now, as one text. Shares are means over the replicas, all else is summed."""
        now = {name: _parsed(text) for name, text in texts.items()}
        self._gone |= {name: _lasting(last) for name, last in self._last.items()}
        for name in now:
            self._gone.pop(name, None)
        while len(self._gone) > _MAY_RETURN:
            longest = self._gone.pop(next(iter(self._gone)))
            self._long_gone = _merged([self._long_gone, longest])
        self._last = now
        return _written(_merged([*now.values(), *self._gone.values(), self._long_gone]))


def _parsed(text: str) -> dict[str, _Family]:
    found: dict[str, _Family] = {}
    family = _Family([])
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = found[line.split(" ", 3)[2]] = _Family([line])
        elif line.startswith("# TYPE "):
            family.comments.append(line)
            family.kind = line.rsplit(" ", 1)[1]
        elif line:
            sample, value = line.rsplit(" ", 1)
            family.samples[sample] = float(value)
    return found


def _lasting(families: Mapping[str, _Family]) -> dict[str, _Family]:
    return {name: family for name, family in families.items() if family.kind in _SUMMED_FOR_EVER}


def _merged(replicas: Iterable[Mapping[str, _Family]]) -> dict[str, _Family]:
    alike: dict[str, list[_Family]] = {}
    for families in replicas:
        for name, family in families.items():
            alike.setdefault(name, []).append(family)
    return {name: _one(name, families) for name, families in alike.items()}


def _one(name: str, families: list[_Family]) -> _Family:
    values: dict[str, list[float]] = {}
    for family in families:
        for sample, value in family.samples.items():
            values.setdefault(sample, []).append(value)
    samples = {sample: _together(name, given) for sample, given in values.items()}
    return _Family(families[0].comments, families[0].kind, samples)


def _together(name: str, values: list[float]) -> float:
    if name.endswith("_created"):
        return min(values)
    return sum(values) / len(values) if name in _SHARES else sum(values)


def _written(families: Mapping[str, _Family]) -> str:
    lines: list[str] = []
    for family in families.values():
        lines += family.comments
        lines += [f"{sample} {value!r}" for sample, value in family.samples.items()]
    return "\n".join([*lines, ""])
