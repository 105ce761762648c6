"""``shoal job``: looking at a batch job, and cancelling it."""

from __future__ import annotations

import click

from shoal.cli.results import write_result
from shoal.system.streams import say

_OUTPUT = click.argument("output", type=click.Path(), metavar="OUTPUT")


@click.group()
def job() -> None:
    """Look at a batch job, or cancel it, by its output file or folder, from any machine that reaches it."""


@job.command()
@_OUTPUT
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(output: str, as_json: bool) -> None:
    """How far the job that writes OUTPUT is."""
    import msgspec

    from shoal.jobs.running.control import status

    found = status(output)
    write_result(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else "\n".join(found.lines()))


@job.command()
@_OUTPUT
def cancel(output: str) -> None:
    """End the job that writes OUTPUT: rows that are not finished get the error batch_cancelled."""
    from shoal.jobs.running.control import ask_to_end

    owner = ask_to_end(output)
    if owner is None:
        say("no process works on this job; its next run cancels what is left at once")
    else:
        say(f"{owner} will cancel what is left")
