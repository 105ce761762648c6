"""``shoal bench kernels``: the speed of the matrix products, type by type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import POSITIVE, numbers, output_json_option, show


def _shape(text: str) -> tuple[int, int]:
    """A type of option: ROWSxCOLUMNS."""
    rows, by, columns = text.partition("x")
    if not by or not all(side.isdecimal() and 1 <= int(side) <= 1 << 20 for side in (rows, columns)):
        raise click.BadParameter(f"{text!r} is not ROWSxCOLUMNS such as 4096x4096.")
    return int(rows), int(columns)


def _names(text: str) -> tuple[str, ...]:
    """A type of option: names with commas between them."""
    return tuple(name.strip().upper() for name in text.split(",") if name.strip())


@click.command()
@click.option("--type", "types", type=_names, default="", metavar="NAME,...", help="Weight types.  [default: all]")
@click.option(
    "--rows",
    type=numbers(1, 4096),
    default="1,2,4,8,16,32,128",
    show_default=True,
    metavar="N,N,...",
    help="Tokens that are multiplied at once.",
)
@click.option("--shape", type=_shape, default="4096x4096", show_default=True, help="Of matrices read from memory.")
@click.option(
    "--cached-shape", type=_shape, default="512x512", show_default=True, help="Of one that stays in the cache."
)
@click.option("--rounds", type=POSITIVE, default=5, show_default=True, help="Times that each is measured.")
@click.option("--threads", type=POSITIVE, help="Threads, ours and NumPy's.  [default: the usable cores]")
@click.option("--device", type=click.Choice(["auto", "cpu", "reference"]), default="auto", show_default=True)
@output_json_option
def kernels(threads: int | None, output_json: Path | None, **settings: Any) -> None:
    """Matrix products with every weight type, beside the machine's peaks and NumPy's; prints Markdown."""
    from shoal.bench.kernels import Plan, measure_kernels
    from shoal.bench.machine import usable_cores

    plan = Plan(threads=threads or usable_cores(), **settings)
    report = measure_kernels(plan, lambda line: click.echo(line, err=True))
    show(report.as_markdown(), report.as_json(), output_json)
