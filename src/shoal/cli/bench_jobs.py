"""``shoal bench jobs``: what batch jobs cost and gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import POSITIVE, numbers, output_json_option, show
from shoal.cli.options import model_argument

_WHAT = ("journal", "prefix", "memory")


def _chosen(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(_WHAT):
        raise click.BadParameter(f"{text!r} is not some of {', '.join(_WHAT)} with commas between them.")
    return names


@click.command()
@model_argument()
@click.option(
    "--what",
    callback=_chosen,
    metavar="NAME,...",
    default="journal,prefix",
    show_default=True,
    help="Some of journal, prefix, memory.",
)
@click.option("--rounds", type=POSITIVE, default=3, show_default=True, help="Turns of each side: journal, prefix.")
@click.option("--journal-rows", type=POSITIVE, default=400, show_default=True, help="Requests: journal.")
@click.option(
    "--prompt-len", type=POSITIVE, default=32, show_default=True, help="About so many tokens a prompt: journal."
)
@click.option("--output-len", type=POSITIVE, default=32, show_default=True, help="Tokens of each answer: journal.")
@click.option("--prefix-rows", type=POSITIVE, default=200, show_default=True, help="Requests: prefix.")
@click.option(
    "--system-len", type=POSITIVE, default=500, show_default=True, help="About so many tokens shared: prefix."
)
@click.option(
    "--rows",
    type=numbers(1, 1 << 30),
    metavar="N,N,...",
    default="1000,10000,100000,1000000",
    show_default=True,
    help="Requests of each job: memory.",
)
@click.option("--threads", type=POSITIVE, help="Threads that compute: journal, prefix.  [default: the usable cores]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "reference"]),
    default="cpu",
    show_default=True,
    help="What computes: journal, prefix.",
)
@output_json_option
def jobs(model: str, output_json: Path | None, **settings: Any) -> None:
    """What the journal of a job costs, what the prefix cache gains, and whether memory grows with the input; prints Markdown.

    Results go to files in the system's temporary folder ($TMPDIR), which should be on a disk.
    """
    from shoal import hub
    from shoal.bench.jobs.measure import JobsPlan, measure_jobs

    plan = JobsPlan(model=hub.resolve(model), **settings)
    report = measure_jobs(plan, lambda line: click.echo(line, err=True))
    show(report.as_markdown(), report.as_json(), output_json)
