"""What ``shoal bench sweep`` found, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.bench.markdown import table
from shoal.bench.sweep.measure import Cell

_COLUMNS = (
    "prompt",
    "sequences",
    "prefill tokens/s",
    "decode tokens/s",
    "times one",
    "step ms",
    "p90 ms",
    "CPU",
    "peak MB",
    "KV MB",
)


def as_markdown(cells: Sequence[Cell]) -> str:
    """A table for each model."""
    models = dict.fromkeys(cell.setup.model for cell in cells)
    return "\n\n".join(_model([cell for cell in cells if cell.setup.model == model]) for model in models)


def _model(cells: Sequence[Cell]) -> str:
    setup = cells[0].setup
    head = (
        f"**{setup.model}**, shoal {setup.version}, {setup.backend}, {setup.cpu}; {setup.output_len} decode steps,"
        f" medians (min-max) of {setup.rounds} rounds."
    )
    alone = {cell.setup.prompt_len: cell.decode.median for cell in cells if cell.setup.batch == 1}
    return f"{head}\n\n{table(_COLUMNS, [_row(cell, alone.get(cell.setup.prompt_len)) for cell in cells])}"


def _row(cell: Cell, alone: float | None) -> list[str]:
    """``alone``: decode tokens a second of one sequence with the same prompt length, if that was measured."""
    return [
        str(cell.setup.prompt_len),
        str(cell.setup.batch),
        str(cell.prefill),
        str(cell.decode),
        "" if alone is None else f"{cell.decode.median / alone:.2f}",
        f"{1000 * cell.step_median:.2f}",
        f"{1000 * cell.step_p90:.2f}",
        f"{cell.cpu_share:.0%}",
        f"{cell.peak_rss / 1e6:.0f}",
        f"{cell.kv_bytes / 1e6:.0f}",
    ]
