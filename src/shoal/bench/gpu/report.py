"""The results as Markdown: how the checks went in a few lines, one table of speeds."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.bench.gpu.parts import Results
from shoal.bench.markdown import table

_CHECK = "check"
_COLUMNS = {  # of the table: heading, key of a row, format
    "tokens/s": ("tokens_per_second", "{:.0f}"),
    "ms": ("ms", "{:.3f}"),
    "of bandwidth": ("bandwidth_share", "{:.0%}"),
    "TFLOP/s": ("tflops", "{:.1f}"),
    "GPU busy": ("gpu_busy", "{:.0%}"),
    "torch f16 products, ms": ("torch_f16_matmul_ms", "{:.3f}"),
}


def as_markdown(results: Results) -> str:
    """Everything that people want to see at once; the rest is in the JSON."""
    return "\n\n".join(_blocks(results))


def _blocks(results: Results) -> Iterator[str]:
    yield "\n".join(f"{key}: {value}" for key, value in results.about.items())
    copy = results.rows.get("device", {}).get("copy", {}).get("bytes_per_second")
    if copy is not None:
        yield f"copies {copy / 1e9:.0f} GB/s (read and written)"
    checks = results.rows.get(_CHECK, {})
    failed = results.errors.get(_CHECK, {})
    worst = max((row["nmse"] for row in checks.values()), default=0.0)
    yield f"{len(checks)} checks passed (largest NMSE {worst:.1e}), {len(failed)} failed"
    lines = [
        [group, name, *(_cell(row.get(key), form) for key, form in _COLUMNS.values())]
        for group, rows in results.rows.items()
        for name, row in rows.items()
        if "tokens_per_second" in row
    ]
    if lines:
        yield table(["model", "step", *_COLUMNS], lines)
    for group, rows in results.rows.items():
        if rows.get("same bits", {}).get("equal"):
            yield f"{group}: the same bits alone and in batches of {rows['same bits']['batches']}"
    for group, errors in results.errors.items():
        yield from (f"FAILED {group}: {name}: {error}" for name, error in errors.items())
    if results.not_run:
        yield f"no time was left for {len(results.not_run)}: {', '.join(results.not_run)}"


def _cell(value: object, form: str) -> str:
    return form.format(value) if isinstance(value, float) else ""
