"""``shoal pull``: download a model."""

from __future__ import annotations

import click

from shoal.cli.options import model_argument
from shoal.cli.results import write_result


@click.command()
@model_argument(default=None)
@click.option("--verify", is_flag=True, help="Read the whole file and compare its checksum (short names).")
def pull(model: str, verify: bool) -> None:
    """Download a model into the cache folder and print its path."""
    from shoal import hub

    path = hub.resolve(model)
    if verify:
        hub.verify(model)
    write_result(str(path))
