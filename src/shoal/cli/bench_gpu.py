"""``shoal bench gpu``: the GPU backend. Its flags are read by the module itself, which also runs where click is not installed."""

from __future__ import annotations

import click


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def gpu(arguments: tuple[str, ...]) -> int:
    """Check the GPU backend against the reference, then measure it."""
    from shoal.bench.gpu.main import main

    return main(arguments)
