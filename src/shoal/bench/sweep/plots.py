"""Pictures of a sweep. Needs matplotlib, an optional extra: ``pip install 'shoal[bench]'``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from shoal.bench.rates import Speed
from shoal.bench.sweep.measure import Cell

_SIZE = (10, 4.2)  # inches
_DPI = 120


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One picture a model (decode and prefill), and with several models one that compares them; the PNG files."""
    models = list(dict.fromkeys(cell.setup.model for cell in cells))
    paths = [_draw_model([cell for cell in cells if cell.setup.model == model], folder) for model in models]
    return [*paths, _draw_models(cells, folder)] if len(models) > 1 else paths


def _draw_model(cells: Sequence[Cell], folder: Path) -> Path:
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    figure.suptitle(cells[0].setup.model)
    decode, prefill = figure.subplots(1, 2)
    _curves(decode, cells, _prompts, lambda cell: cell.decode)
    decode.set_title("decode")
    _curves(prefill, cells, _prompts, lambda cell: cell.prefill)
    prefill.set_title("prefill")
    return _save(figure, folder / f"{Path(cells[0].setup.model).stem}.png")


def _prompts(cell: Cell) -> str:
    return f"prompts of {cell.setup.prompt_len}"


def _draw_models(cells: Sequence[Cell], folder: Path) -> Path:
    """Decode at the longest prompt."""
    longest = max(cell.setup.prompt_len for cell in cells)
    figure = Figure(figsize=(_SIZE[0] / 1.5, _SIZE[1]), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    same = [cell for cell in cells if cell.setup.prompt_len == longest]
    _curves(axes, same, lambda cell: cell.setup.model, lambda cell: cell.decode)
    axes.set_title(f"decode, prompts of {longest} tokens")
    return _save(figure, folder / "models.png")


def _curves(axes: Any, cells: Sequence[Cell], name: Callable[[Cell], str], speed: Callable[[Cell], Speed]) -> None:
    """Tokens a second over the number of sequences: a curve for each name, with bars from the slowest to the fastest round."""
    for label in dict.fromkeys(map(name, cells)):
        points = [(cell.setup.batch, speed(cell)) for cell in cells if name(cell) == label]
        batches, medians = [batch for batch, _ in points], [found.median for _, found in points]
        below = [found.median - found.low for _, found in points]
        above = [found.high - found.median for _, found in points]
        axes.errorbar(batches, medians, (below, above), marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({cell.setup.batch for cell in cells}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences")
    axes.set_ylabel("tokens/s")
    axes.grid(alpha=0.3)
    axes.legend()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
