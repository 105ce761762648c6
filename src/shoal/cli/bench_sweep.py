"""``shoal bench sweep``: speed over the number of sequences and the length of prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from shoal.cli.bench_options import POSITIVE, disable_detokenize_option, numbers
from shoal.cli.results import write_result

_NO_PLOTS = "no plots: they need matplotlib (pip install 'shoal[bench]'); run this again once it is installed"


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--batch",
    "batches",
    type=numbers(1, 256),
    metavar="N,N,...",
    default="1,2,4,8,16,32",
    show_default=True,
    help="Sequences at once.",
)
@click.option(
    "--prompt-len",
    "prompt_lens",
    type=numbers(1, 1 << 20),
    metavar="N,N,...",
    default="1,16,128,512",
    show_default=True,
    help="Tokens of each prompt.",
)
@click.option("--output-len", type=POSITIVE, default=32, show_default=True, help="Decode steps.")
@click.option("--rounds", type=POSITIVE, default=3, show_default=True, help="Times that each cell is measured.")
@click.option("--threads", type=POSITIVE, help="Threads that compute.  [default: the usable cores]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Chooses the token ids.")
@click.option("--device", type=click.Choice(["cpu", "reference"]), default="cpu", show_default=True)
@disable_detokenize_option
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default="shoal-sweep",
    show_default=True,
    help="Folder for results; what is there already is not measured again.",
)
def sweep(
    models: tuple[str, ...], threads: int | None, disable_detokenize: bool, output_dir: Path, **settings: Any
) -> None:
    """Tokens a second, step times, memory and CPU use of every batch with every prompt length.

    Prints Markdown; writes sweep.json, sweep.md and plots. A run that was stopped goes on where it was. The throughput factors
    that it finds are shown by `shoal inspect`.
    """
    from shoal import hub
    from shoal.bench.sweep import measure as bench
    from shoal.bench.sweep.report import as_markdown
    from shoal.system.machine_limits import usable_cores

    plan = bench.SweepPlan(
        models=tuple(hub.resolve(model) for model in models),
        threads=threads or usable_cores(),
        skip_tokenizer_init=disable_detokenize,
        **settings,
    )
    cells = bench.sweep(plan, output_dir, _say)
    text = as_markdown(cells)
    (output_dir / "sweep.md").write_text(text + "\n", encoding="utf-8")
    write_result(text)
    if importlib.util.find_spec("matplotlib") is None:
        _say(_NO_PLOTS)
        return
    from shoal.bench.sweep.plots import draw

    for path in draw(cells, output_dir):
        _say(f"plot: {path}")


def _say(line: str) -> None:
    click.echo(line, err=True)
