"""Work in parts: each fails alone, results are in a file as soon as they are there, and no part begins when the time is up."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.bench.store import write_json

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Some work: ``run`` gives a row of the table called ``group``, whose name in it is ``name``."""

    group: str
    name: str
    run: Callable[[], Row]


@dataclass(slots=True)
class Results:
    """What is known so far: rows and errors by group and name, and the parts for which no time was left."""

    path: Path | None
    say: Callable[[str], None]
    about: Row
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    errors: dict[str, dict[str, str]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything went wrong."""
        return any(self.errors.values())

    def as_json(self) -> Row:
        """All of it."""
        return {"about": self.about, "results": self.rows, "errors": self.errors, "not_run": self.not_run}

    def save(self) -> None:
        """The file, if one is wanted, is whole at any moment."""
        if self.path is not None:
            write_json(self.path, self.as_json())


def run_parts(
    parts: Iterable[Part], results: Results, budget: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """One after the other, until ``budget`` seconds have passed; what has begun is finished."""
    begin = clock()
    for part in parts:
        if clock() - begin > budget:
            results.not_run.append(f"{part.group}: {part.name}")
            continue
        started = clock()
        try:
            row = part.run()
        except Exception as problem:
            results.errors.setdefault(part.group, {})[part.name] = f"{type(problem).__name__}: {problem}"
            results.say(f"{part.group}: {part.name}: FAILED\n{traceback.format_exc()}")
        else:
            results.rows.setdefault(part.group, {})[part.name] = row
            shown = ", ".join(f"{key} {_short(value)}" for key, value in row.items())
            results.say(f"{part.group}: {part.name}: {shown} ({clock() - started:.1f} s)")
        results.save()
    results.save()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
