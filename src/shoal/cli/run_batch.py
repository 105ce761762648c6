"""``shoal run-batch``: a file of requests in, a file of results out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.cli.main import INTERRUPTED
from shoal.cli.options import engine_options, model_argument
from shoal.errors import ParameterError
from shoal.params import EngineConfig

if TYPE_CHECKING:
    from shoal.jobs.files import JobFiles
    from shoal.jobs.progress import JobCounts

FAILED_ROWS = 1

_PATH = click.Path(path_type=Path, allow_dash=True)


@click.command("run-batch")
@model_argument()
@click.option("-i", "--input-file", type=_PATH, required=True, help="Requests, one JSON object a line; - is stdin.")
@click.option("-o", "--output-file", type=_PATH, required=True, help="Where results go; - is stdout.")
@click.option(
    "--error-file", type=_PATH, help="Where failures go.  [default: OUTPUT.errors.jsonl, or stdout with -o -]"
)
@click.option("--strict", is_flag=True, help="Check every line first, and run nothing if one is bad.")
@click.option("--overwrite", is_flag=True, help="Replace output and error files that hold something.")
@click.option("--fail-on-errors", is_flag=True, help="Exit with 1 if a row failed.")
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    help="What requests may call the model; may be repeated.  [default: MODEL, its path, file name and general.name]",
)
@engine_options
def run_batch(
    model: str,
    input_file: Path,
    output_file: Path,
    error_file: Path | None,
    strict: bool,
    overwrite: bool,
    fail_on_errors: bool,
    names: tuple[str, ...],
    engine_config: EngineConfig,
) -> int:
    """Run a file of chat and completion requests (OpenAI Batch format).

    Results are appended as they finish; custom_id says which is whose.
    """
    from shoal.jobs.files import JobFiles

    files = JobFiles.named(input_file, output_file, error_file)
    files.check(overwrite=overwrite)
    path = _resolved(model)
    served = list(names) or _names_of(model, path)
    if strict:
        _check_strictly(files, served)
    counts = _run(path, engine_config, files, served)
    _say_summary(counts, files)
    if counts.interrupted:
        return INTERRUPTED
    return FAILED_ROWS if fail_on_errors and counts.failed else 0


def _resolved(model: str) -> Path:
    """The model's file, downloaded first if it has to be."""
    from shoal import hub

    return hub.resolve(model)


def _names_of(model: str, path: Path) -> list[str]:
    """What a model is called: the reference as given, its path and file name, and the name in its metadata."""
    from shoal.gguf.reader import GGUFFile

    with GGUFFile.open(path) as file:
        name = file.get("general.name", str, default="")
    return list(dict.fromkeys(filter(None, (model, str(path), path.name, name))))


def _check_strictly(files: JobFiles, served: list[str]) -> None:
    from shoal.jobs.job import check_strictly
    from shoal.jobs.records import STANDARD_STREAM
    from shoal.jobs.source import open_source

    if files.requests == STANDARD_STREAM:
        raise ParameterError("--strict", "-i -", "used with a file: stdin cannot be read twice")
    with open_source(files.requests) as source:
        check_strictly(source, served)


def _run(path: Path, config: EngineConfig, files: JobFiles, served: list[str]) -> JobCounts:
    from shoal.jobs.job import Job
    from shoal.jobs.progress import JobProgress
    from shoal.jobs.source import open_source
    from shoal.llm import LLM

    with (
        open_source(files.requests) as source,
        LLM(path, config=config) as llm,
        files.writers() as (results, errors),
        JobProgress(sys.stderr) as progress,
    ):
        return Job(llm, served, results, errors).run(source, progress.update)


def _say_summary(counts: JobCounts, files: JobFiles) -> None:
    click.echo(f"shoal: {counts.summary()}", err=True)
    if counts.failed and files.errors != files.results:
        click.echo(f"shoal: failures are in {files.errors}", err=True)
