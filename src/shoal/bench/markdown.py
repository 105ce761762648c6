"""Tables for reports and docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of whatever the cells print as; all but the first column to the right."""
    alignment = [":---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, alignment, *rows))
