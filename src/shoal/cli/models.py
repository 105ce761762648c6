"""``shoal list`` and ``shoal rm``: the models in the cache folder."""

from __future__ import annotations

import click

from shoal.cli.results import write_result


@click.command("list")
def list_() -> None:
    """List the downloaded models: name, size, path."""
    from shoal import hub

    models = hub.list_models()
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        write_result(f"{model.name:{width}}  {model.size / 1e6:8.1f} MB  {model.path}")
    if not models:
        click.echo(f"no models in {hub.models_folder()}; `shoal pull {hub.DEFAULT_MODEL}` gets one", err=True)


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
def rm(models: tuple[str, ...]) -> None:
    """Delete downloaded models."""
    from shoal import hub

    for name in models:
        removed = hub.remove(name)
        click.echo(f"removed {removed.name} ({removed.size / 1e6:.1f} MB)", err=True)
