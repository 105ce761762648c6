"""``shoal bench scale``: how many workers one driver of a job keeps busy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import POSITIVE, numbers, output_json_option, show


@click.command()
@click.option("--rows", type=POSITIVE, default=1_000_000_000, show_default=True, help="Of the job.")
@click.option(
    "--workers", type=numbers(1, 100_000), metavar="N,N,...", default="1,10,100,1000", show_default=True, help="Sizes."
)
@click.option(
    "--row-rates",
    type=numbers(1, 1_000_000),
    metavar="N,N,...",
    default="20,200",
    show_default=True,
    help="Rows a second of one worker.",
)
@click.option(
    "--sample-rows", type=POSITIVE, default=200_000, show_default=True, help="Measured for each number of workers."
)
@click.option(
    "--call-us",
    type=POSITIVE,
    default=210,
    show_default=True,
    help="Microseconds of the driver for one call of a worker and its answer, through Ray.",
)
@click.option(
    "--worker-us",
    type=POSITIVE,
    default=3,
    show_default=True,
    help="Microseconds for each worker whenever the driver looks for answers, through Ray.",
)
@output_json_option
def scale(output_json: Path | None, **settings: Any) -> None:
    """From the measured costs of a row, the throughput of simulated clusters of one driver and many workers; prints Markdown.

    No model and no Ray are needed: workers answer at once, what Ray costs is given. Files go to the system's temporary folder
    ($TMPDIR), which should be on a disk.
    """
    from shoal.bench.scale.report import ScalePlan, measure_scale

    report = measure_scale(ScalePlan(**settings), lambda line: click.echo(line, err=True))
    show(report.as_markdown(), report.as_json(), output_json)
