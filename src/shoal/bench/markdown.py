"""Tables for reports and docs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of whatever the cells print as; all but the first column to the right."""
    alignment = [":---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, alignment, *rows))


def span(values: Sequence[float], digits: int) -> str:
    """Median and range of what was measured several times."""
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})" if min(values) < 0 else f"{median} ({low}-{high})"
