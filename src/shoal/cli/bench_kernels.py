"""``shoal bench kernels``: the speed of the matrix products, type by type, and of attention and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.bench_options import POSITIVE, numbers, output_json_option, show

if TYPE_CHECKING:
    from shoal.bench.kernels.measure import KernelReport
    from shoal.bench.kernels.step_ops import StepOpsReport

_OPS = ("linear", "attention", "sample")


def _shape(text: str) -> tuple[int, int]:
    """A type of option: ROWSxCOLUMNS."""
    rows, by, columns = text.partition("x")
    if not by or not all(side.isdecimal() and 1 <= int(side) <= 1 << 20 for side in (rows, columns)):
        raise click.BadParameter(f"{text!r} is not ROWSxCOLUMNS such as 4096x4096.")
    return int(rows), int(columns)


def _names(text: str) -> tuple[str, ...]:
    """A type of option: names with commas between them."""
    return tuple(name.strip().upper() for name in text.split(",") if name.strip())


def _ops(text: str) -> tuple[str, ...]:
    """A type of option: some of ``_OPS``."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not set(names) <= set(_OPS):
        raise click.BadParameter(f"{text!r} is not some of {', '.join(_OPS)} with commas between them.")
    return names


def _heads(text: str) -> tuple[int, int, int]:
    """A type of option: HEADSxKV_HEADSxSIZE."""
    sides = text.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and 1 <= int(side) <= 1024 for side in sides):
        raise click.BadParameter(f"{text!r} is not HEADSxKV_HEADSxSIZE such as 9x3x64.")
    heads, kv_heads, size = map(int, sides)
    if heads % kv_heads:
        raise click.BadParameter(f"{text!r}: {heads} heads cannot share {kv_heads} KV heads evenly.")
    return heads, kv_heads, size


@click.command()
@click.option(
    "--op",
    "ops",
    type=_ops,
    default="linear",
    show_default=True,
    metavar="NAME,...",
    help="linear: products. attention: decode over filled pages. sample: choosing tokens.",
)
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
@click.option("--heads", type=_heads, default="9x3x64", show_default=True, help="Of attention: heads, KV heads, size.")
@click.option(
    "--context",
    "contexts",
    type=numbers(1, 1 << 20),
    default="128,512,2048",
    show_default=True,
    metavar="N,N,...",
    help="Of attention: positions of each sequence; there are as many sequences as --rows says.",
)
@click.option("--vocab", type=POSITIVE, default=262144, show_default=True, help="Of sample: logits of a row.")
@click.option("--rounds", type=POSITIVE, default=5, show_default=True, help="Times that each is measured.")
@click.option("--threads", type=POSITIVE, help="Threads, ours and NumPy's.  [default: the usable cores]")
@click.option("--device", type=click.Choice(["cpu", "reference"]), default="cpu", show_default=True)
@output_json_option
def kernels(ops: tuple[str, ...], threads: int | None, output_json: Path | None, **settings: Any) -> None:
    """Matrix products with every weight type, beside the machine's peaks and NumPy's; attention; sampling. Prints Markdown."""
    from shoal.system.machine_limits import usable_cores

    settings["threads"] = threads or usable_cores()
    reports: list[KernelReport | StepOpsReport] = []
    if "linear" in ops:
        reports.append(_measure_products(settings))
    if {"attention", "sample"} & set(ops):
        reports.append(_measure_step_ops(ops, settings))
    results: dict[str, Any] = {}
    for report in reports:
        results |= report.as_json()
    show("\n\n".join(report.as_markdown() for report in reports), results, output_json)


def _measure_products(settings: dict[str, Any]) -> KernelReport:
    from shoal.bench.kernels.measure import Plan, measure_kernels

    names = ("types", "rows", "shape", "cached_shape", "rounds", "threads", "device")
    plan = Plan(**{name: settings[name] for name in names})
    return measure_kernels(plan, lambda line: click.echo(line, err=True))


def _measure_step_ops(ops: tuple[str, ...], settings: dict[str, Any]) -> StepOpsReport:
    from shoal.bench.kernels.step_ops import StepOpsPlan, measure_step_ops
    from shoal.kernels.base import AttentionShape

    heads, kv_heads, size = settings["heads"]
    return measure_step_ops(
        StepOpsPlan(
            sequences=settings["rows"],
            contexts=settings["contexts"] if "attention" in ops else (),
            vocab=settings["vocab"] if "sample" in ops else 0,
            shape=AttentionShape(heads, kv_heads, size, size**-0.5),
            rounds=settings["rounds"],
            threads=settings["threads"],
            device=settings["device"],
        )
    )
