"""``shoal run-batch``: a file of requests in, a file of results out."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.cli.main import INTERRUPTED
from shoal.cli.options import Command, engine_options, integer, model_argument
from shoal.params import EngineConfig
from shoal.system.streams import say

if TYPE_CHECKING:
    from shoal.jobs.running.files import JobFiles
    from shoal.jobs.running.summary import Summary

FAILED_ROWS = 1

_PATH = click.Path(path_type=Path, allow_dash=True)
_RESUME = {"interrupted": "the same command", "stopped": "a larger --max-errors"}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

# Sampling parameters of rows that do not give them.
_DEFAULTS: dict[str, tuple[Any, str]] = {
    "max_tokens": (integer, "Most tokens to generate."),
    "temperature": (float, "0 always takes the most likely token."),
    "top_p": (float, "Keep the most likely tokens with this much probability together."),
    "top_k": (int, "Keep this many of the most likely tokens."),
    "min_p": (float, "Drop tokens less likely than this share of the most likely one."),
    "min_tokens": (integer, "Do not end before this many tokens."),
}

_TEXT_DEFAULTS = {
    "add_special_tokens": ("--add-special/--no-add-special", "BOS and EOS where the model asks for them."),
    "parse_special": ("--parse-special/--no-parse-special", "Spelled control tokens become control tokens."),
}


def _duration(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Seconds in ``90``, ``90s``, ``30m``, ``2h`` or ``1d``."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a time such as 90s, 30m or 2h.")
    return float(match[1]) * _UNITS[match[2]]


def _row_defaults(command: Command) -> Command:
    """Add a flag for each default of a row; the command gets those that are given as ``defaults``."""

    @functools.wraps(command)
    def with_defaults(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in (*_DEFAULTS, *_TEXT_DEFAULTS)}
        return command(*args, defaults={name: value for name, value in values.items() if value is not None}, **kwargs)

    decorated: Command = with_defaults
    for name, (flag, text) in reversed(_TEXT_DEFAULTS.items()):
        decorated = click.option(flag, name, default=None, help=f"{text} For prompts of rows that do not say.")(
            decorated
        )
    for name, (kind, text) in reversed(_DEFAULTS.items()):
        decorated = click.option(f"--{name.replace('_', '-')}", type=kind, help=f"{text} For rows that do not say.")(
            decorated
        )
    return decorated


@click.command("run-batch")
@model_argument()
@click.option(
    "-i",
    "--input-file",
    multiple=True,
    required=True,
    help="Requests: JSON lines, CSV or Parquet, .gz and .zst too; a folder, a glob or a URL of them; - is stdin. May be repeated.",
)
@click.option(
    "-o",
    "--output-file",
    type=click.Path(allow_dash=True),
    required=True,
    help="Where results go: a file, a folder or URL for many parts (out/, s3://bucket/out/), or - for stdout.",
)
@click.option(
    "--error-file", type=_PATH, help="Where failures go.  [default: OUTPUT.errors.jsonl, or stdout with -o -]"
)
@click.option("--strict", is_flag=True, help="Check every row first, and run nothing if one is bad.")
@click.option("--restart", is_flag=True, help="Drop what an earlier run left, and begin anew.")
@click.option("--retry-errors", is_flag=True, help="Run the rows again that failed.")
@click.option("--max-errors", type=integer, metavar="N", help="Stop when more than N rows have failed.")
@click.option(
    "--deadline",
    callback=_duration,
    metavar="TIME",
    help="When rows that are not finished expire: 90s, 30m, 2h after the job was begun or failed rows put back.",
)
@click.option(
    "--timeout", callback=_duration, metavar="TIME", help="Most time for one row, from when the engine has it."
)
@click.option("--fail-on-errors", is_flag=True, help="Exit with 1 if a row failed.")
@click.option("--chat", is_flag=True, help="Send prompts of plain rows through the model's chat template.")
@click.option("--system", metavar="TEXT", help="A system message in front of each; with --chat.")
@click.option("--prompt-column", metavar="NAME", help="Of a table.  [default: prompt]")
@click.option("--output-column", metavar="NAME", default="output", show_default=True, help="Added to a table.")
@click.option(
    "--served-model-name",
    "served",
    multiple=True,
    help="What requests may call the model; may be repeated.  [default: MODEL, its path, file name and general.name]",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Run the job on a Ray cluster: auto is the one that this machine belongs to, local one that is started for the job.",
)
@click.option(
    "--workers", type=integer, metavar="N", help="With --ray: how many.  [default: as many as there is room for]"
)
@click.option("--threads-per-worker", type=integer, metavar="T", help="With --ray.  [default: 1]")
@click.option("--gpus-per-worker", type=float, metavar="G", help="With --ray.  [default: 0]")
@_row_defaults
@engine_options
def run_batch(
    model: str,
    input_file: tuple[str, ...],
    output_file: str,
    error_file: Path | None,
    fail_on_errors: bool,
    address: str | None,
    workers: int | None,
    threads_per_worker: int | None,
    gpus_per_worker: float | None,
    engine_config: EngineConfig,
    **options: Any,
) -> int:
    """Run a file of chat and completion requests (OpenAI Batch format), or of plain prompts.

    Results are appended as they finish; custom_id says which is whose. The same command again goes on where it was
    stopped, whatever stopped it.
    """
    from shoal.jobs.running.files import JobFiles
    from shoal.jobs.running.progress import ProgressDisplay
    from shoal.jobs.running.task import JobOptions

    files = JobFiles.named(input_file, output_file, error_file)
    of_workers = {
        "workers": workers,
        "threads_per_worker": threads_per_worker,
        "gpus_per_worker": gpus_per_worker,
    }
    run_job = _runner(address, {name: value for name, value in of_workers.items() if value is not None})
    with ProgressDisplay(sys.stderr) as progress:
        summary = run_job(model, files, JobOptions(**options), engine_config, say=say, report=progress.update)
    _say_summary(summary, files)
    if summary.state == "interrupted":
        return INTERRUPTED
    failed = summary.failed and (fail_on_errors or summary.state == "stopped")
    return FAILED_ROWS if failed else 0


def _runner(address: str | None, of_workers: dict[str, Any]) -> Callable[..., Summary]:
    """What runs the job: this process, or workers of a Ray cluster."""
    from shoal.jobs.running import launch

    if address is not None:
        from shoal import ray

        return functools.partial(ray.run_job, cluster=ray.Cluster(address=address, **of_workers))
    for name in of_workers:
        raise click.UsageError(f"--{name.replace('_', '-')} is used with --ray.")
    return launch.run_job


def _say_summary(summary: Summary, files: JobFiles) -> None:
    for line in summary.lines():
        say(line)
    if summary.failed and files.place.errors != files.place.output:
        say(f"failures are in {files.place.errors}")
    if summary.state in _RESUME and files.can_go_on:
        say(f"finished rows are safe: resume with {_RESUME[summary.state]}")
