"""Running a job from its files: begun, taken up again where an earlier run ended, or found to be done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shoal.errors import EngineError, JobError, ParameterError
from shoal.jobs.durable import manifest as manifests
from shoal.jobs.durable.fingerprint import place_text, printable
from shoal.jobs.durable.ledger import RowSet, StreamLedger, Totals
from shoal.jobs.durable.manifest import Identity, Manifest, State
from shoal.jobs.input.check import check_input
from shoal.jobs.input.ids import IdIndex
from shoal.jobs.input.inputs import Given
from shoal.jobs.input.rows import BadRow, Line, custom_id_of
from shoal.jobs.input.source import Source, open_inputs
from shoal.jobs.running.engine_half import EngineHalf, LocalHalf
from shoal.jobs.running.file_place import FilePlace, held
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.interrupts import sigterm_interrupts
from shoal.jobs.running.job import AnyLedger, Job, JobLimits, Report, Rows, close
from shoal.jobs.running.model import JobModel
from shoal.jobs.running.parts_place import scratch_folder
from shoal.jobs.running.place import HeldPlace
from shoal.jobs.running.progress import ProgressDisplay
from shoal.jobs.running.summary import OVER, Summary
from shoal.jobs.running.task import JobOptions, Task
from shoal.llm import LLM
from shoal.openai.schema import APIError
from shoal.params import EngineConfig
from shoal.system import streams
from shoal.system.notices import notices_to

Say = Callable[[str], None]
Load = Callable[[Task], EngineHalf]


@dataclass(frozen=True, slots=True)
class Host:
    """Who runs a job. ``load`` gives the engine half once there is a use for it; it is closed afterwards. ``say`` hears what a user
    should know, ``report`` how far the job is. ``cancelled`` and ``interrupted`` are asked as JobLimits says."""

    load: Load
    say: Say
    report: Report
    cancelled: Callable[[], bool] = lambda: False
    interrupted: Callable[[], bool] = lambda: False


def run(
    model: str | Path,
    input: Given,
    output: str | Path,
    *,
    error_file: str | Path | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> Summary:
    """Run the batch file ``input`` into ``output``, durably: the same call again goes on where an earlier one ended.

        summary = shoal.jobs.run("smollm2:135m", "requests.jsonl", "results.jsonl", max_errors=100, max_num_seqs=32)

    ``input`` may also be a folder, a glob, a URL ("s3://bucket/in/*.jsonl.zst") or a list of these: their files are one input.
    ``settings`` are fields of JobOptions and of EngineConfig. ``show_progress`` writes to stderr how far it is. Raises JobError,
    ParameterError, and what LLM(model) raises.
    """
    options, config = settings_of(settings)
    files = JobFiles.named(input, output, error_file)
    if not show_progress:
        return run_job(model, files, options, config, say=lambda text: None, report=lambda progress: None)
    with ProgressDisplay(sys.stderr) as display:
        return run_job(model, files, options, config, say=streams.say, report=display.update)


def settings_of(settings: dict[str, Any]) -> tuple[JobOptions, EngineConfig]:
    """Keywords, sorted by what they are for. Raises ParameterError for wrong values, TypeError for unknown names."""
    names = {field.name for field in fields(JobOptions)}
    of_job = {name: value for name, value in settings.items() if name in names}
    return JobOptions(**of_job), EngineConfig(**{name: settings[name] for name in settings.keys() - names})


def run_job(
    model: str | Path, files: JobFiles, options: JobOptions, config: EngineConfig, *, say: Say, report: Report
) -> Summary:
    """As ``run``; ``say`` hears what a user should know, ``report`` how far the job is."""
    files.check()
    task = Task.of(model, files, options, config)
    return run_here(task, Host(_load, say, report))


def run_here(task: Task, host: Host) -> Summary:
    """Run a job whose files have been checked, with or without a journal, in a process of its own."""
    with notices_to(host.say):
        if not task.files.place.has_journal:
            return _run_without_journal(task, host)
        with sigterm_interrupts():
            return run_task(task, host)


def _load(task: Task) -> LocalHalf:
    return local_half(task, LLM(task.path, config=task.config))


def local_half(task: Task, model: JobModel) -> LocalHalf:
    """The engine half of a job on a model that is here."""
    return LocalHalf(model, task.reader(), task.served, task.options.timeout)


# With a journal -------------------------------------------------------------------------------------------------------


def run_task(task: Task, host: Host) -> Summary:
    """Begin a job that has a journal, or go on with it, on the engine of ``host``. Its files have been checked.

    Raises JobError for a job that is not to be gone on with (one by OSError, its cause, can be once the disk is well again), and
    EngineError where the engine is broken.
    """
    with task.files.place.held() as held:
        return _run_with_journal(task, held, host)


def _run_with_journal(task: Task, held: HeldPlace, host: Host) -> Summary:
    retry, say = task.options.retry_errors, host.say
    manifest = _begin(task, held, say)
    task = replace(task, begun=manifest.begun)
    if manifest.state in OVER and manifest.summary is not None and not retry and held.is_complete(manifest):
        say(f"this job is {manifest.state} already; its files stay as they are (--retry-errors, --restart)")
        return msgspec.convert(manifest.summary, Summary)
    with (
        _engine_of_new(task, held, manifest, host.load) as engine,
        _promising_to_go_on(say),
        held.ledger(manifest) as ledger,
    ):
        manifest.runs += 1
        manifest.state = "running"
        held.save(manifest)  # after the ledger: a new manifest never stands beside an old journal
        if retry:
            held.withdraw_cancel()
            say(f"{ledger.retry_errors()} failed rows run again")
        for path, surplus in ledger.cut_off.items():
            say(f"{path}: {surplus} bytes after the last finished row were cut off")
        if len(ledger.finished):
            of = "" if manifest.rows is None else f" of {manifest.rows}"
            say(f"going on: {len(ledger.finished)}{of} rows are finished")
        state = _work(task, held, manifest, ledger, host, engine)
        return _end(task, held, manifest, ledger, state)


def _begin(task: Task, held: HeldPlace, say: Say) -> Manifest:
    """The manifest of the job that is there, if it is this one; else a new one, not saved yet and with no runs."""
    place, options = task.files.place, task.options
    old = None if options.restart else place.manifest()
    identity = task.identity()
    if old is None:
        if not options.restart:
            _refuse_to_replace(held)
        return _begun(task, held, identity, say)
    changes = manifests.differences(old.identity, identity)
    if changes and not held.has_records():  # nothing is done: nobody's work is lost
        return _begun(task, held, identity, say)
    if changes:
        raise manifests.ChangedError(place.output, changes)
    if task.from_stdin:
        raise JobError(f"{place.output}: its requests came from stdin and cannot be read again (--restart begins anew)")
    if options.retry_errors and place.errors == place.output:
        raise JobError(f"{place.output}: the failed rows in it cannot be put back (--restart begins anew)")
    if options.retry_errors:
        old.since, old.deadline = time.time(), None  # that of the first run may have been the reason for the errors
    if options.deadline is not None:
        old.deadline = old.since + options.deadline
    return old


def _begun(task: Task, held: HeldPlace, identity: Identity, say: Say) -> Manifest:
    """A new job, whose input has been checked."""
    place, options, now, offset = task.files.place, task.options, task.begun.timestamp(), task.begun.utcoffset()
    if task.from_stdin:
        say("the input is stdin: finished rows are safe, but a job that is stopped cannot go on")
    counted = _checked(task, held.scratch)
    return Manifest(
        identity=identity,
        created=now,
        utc_offset=None if offset is None else offset.total_seconds(),
        since=now,
        output=place_text(place.output),
        errors=place_text(place.errors),
        rows=counted.rows,
        ends=counted.ends,
        deadline=None if options.deadline is None else now + options.deadline,
    )


@contextmanager
def _engine_of_new(task: Task, held: HeldPlace, manifest: Manifest, load: Load) -> Iterator[EngineHalf | None]:
    """The engine half of a new job, which then takes the place of an old one: what cannot start leaves everything as it was.

    None for a job that goes on: how much there is to do is not known yet.
    """
    if manifest.runs:
        yield None
        return
    with closing(load(task)) if manifest.rows != 0 else nullcontext() as engine:
        held.give_up()
        yield engine


class _Counted(NamedTuple):
    """Rows of the input, None for stdin; and of several files ``Source.ends``."""

    rows: int | None
    ends: list[int] | None


def _checked(task: Task, folder: Path) -> _Counted:
    """Counts the rows, none of which has the custom_id of another; stdin shows that only row by row."""
    task.files.place.check_source(task.files.input, task.options.output_column)
    if task.from_stdin:
        if task.options.strict:
            raise ParameterError("--strict", "-i -", "used with a file: stdin cannot be read twice")
        with _source(task):  # refuses what is not JSON lines, and takes nothing of it
            return _Counted(None, None)
    with _source(task) as source, IdIndex(folder / "ids.sqlite") as index:
        rows = check_input(source, index, task.reader() if task.options.strict else None, place=source.place)
    if rows == 0:
        raise JobError(f"{task.files.input}: has no rows: there is nothing to run")
    return _Counted(rows, source.ends)


def _work(
    task: Task, held: HeldPlace, manifest: Manifest, ledger: AnyLedger, host: Host, engine: EngineHalf | None
) -> State:
    """Bring all rows to their end, or as many as can be; the state that the job is in then."""
    if manifest.rows == len(ledger.finished):
        return "finished"
    limits = JobLimits(
        manifest.deadline,
        task.options.max_errors,
        cancelled=lambda: host.cancelled() or held.is_cancelled(),
        interrupted=host.interrupted,
    )
    reader = task.reader()
    with _rows(task, _Counted(manifest.rows, manifest.ends), ledger.finished, held.scratch) as rows:
        state = limits.reached()
        if state is None:
            with closing(engine or host.load(task)) as half:  # closed before results are put together
                return Job(half, reader, ledger, limits).run(rows, manifest.rows, host.report)
        close(rows, reader, ledger, state)
        ledger.commit()
        return state


def _end(task: Task, held: HeldPlace, manifest: Manifest, ledger: AnyLedger, state: State) -> Summary:
    """What is left to do when no row runs any more."""
    if state in OVER:
        _check_unchanged(task, manifest, len(ledger.finished))
        held.conclude(task.files.input, task.options.output_column)
    summary = _summary(task, ledger.totals, state, manifest.rows, resumed=manifest.runs - 1)
    manifest.state, manifest.summary = state, msgspec.to_builtins(summary)
    held.save(manifest)
    held.withdraw_cancel()
    return summary


def _check_unchanged(task: Task, manifest: Manifest, finished: int) -> None:
    """Rows that the input has lost since they were counted have no record; a table is read once more for its answers."""
    source = task.files.input
    same = manifest.rows in (None, finished)
    if same and task.files.place.is_table:
        same = source.fingerprint()["blake2b"] == manifest.identity.input["blake2b"]
    if not same:
        counted = f"{finished} of its {manifest.rows} rows are finished"
        advice = "put it back as it was, or begin anew with --restart if rows were changed in place"
        raise JobError(f"{source}: was changed while the job ran ({counted}); {advice}")


@contextmanager
def _promising_to_go_on(say: Say) -> Iterator[None]:
    """A job that fails half way says that nothing is lost."""
    promise = "finished rows are safe, resume with the same command"
    try:
        yield
    except OSError as error:
        raise JobError(f"{error}; {promise}") from error
    except EngineError as error:
        raise EngineError(f"{error}; {promise}") from error
    except KeyboardInterrupt:
        say(promise)
        raise


def _refuse_to_replace(held: HeldPlace) -> None:
    for name, size in held.leftovers():
        raise ParameterError(name, f"{size} bytes", "empty or not there: it has no journal (--restart replaces it)")


# Without --------------------------------------------------------------------------------------------------------------


def _run_without_journal(task: Task, host: Host) -> Summary:
    """Results go to stdout, a pipe or a device: what has left cannot be taken back, and nothing is known of it later."""
    place, options = task.files.place, task.options
    assert isinstance(place, FilePlace), "only files can be streams"
    if options.retry_errors:
        raise ParameterError("--retry-errors", place.output, "used where results go to a file")
    if not options.restart:
        for path in held(place.errors_file):
            raise ParameterError("error file", str(path), "empty or not there yet (--restart replaces it)")
    host.say("results go to a stream: there is no journal, and a job that is stopped cannot go on")
    with scratch_folder() as folder:
        return _run_into_stream(task, place, folder, host)


def _run_into_stream(task: Task, place: FilePlace, folder: Path, host: Host) -> Summary:
    options = task.options
    counted = _checked(task, folder)
    deadline = None if options.deadline is None else time.time() + options.deadline
    limits = JobLimits(deadline, options.max_errors)
    with (
        closing(host.load(task)) as engine,  # what cannot start opens no file
        _naming_output(place),
        StreamLedger.open(place.output_file, place.errors_file) as ledger,
        _rows(task, counted, ledger.finished, folder) as rows,
    ):
        state = Job(engine, task.reader(), ledger, limits).run(rows, counted.rows, host.report)
    return _summary(task, ledger.totals, state, counted.rows, resumed=0)


@contextmanager
def _naming_output(place: FilePlace) -> Iterator[None]:
    """A pipe that nobody reads any more is a failure like others here, and no reason to end in silence."""
    try:
        yield
    except OSError as error:
        raise JobError(f"{place.output}: {error}; the job ends here") from error


# Both -----------------------------------------------------------------------------------------------------------------


def _source(task: Task, ends: list[int] | None = None) -> AbstractContextManager[Source]:
    return open_inputs(task.files.input, task.options.prompt_column, ends)


@contextmanager
def _rows(task: Task, counted: _Counted, finished: RowSet, folder: Path) -> Iterator[Rows]:
    """The rows that are not ``finished``, of those that were counted: what is written behind them later is not of this job.

    Those of stdin are compared with each other as they come, in an index in ``folder``.
    """
    with _source(task, counted.ends) as source:
        limit = (
            counted.rows if counted.ends is None else None
        )  # else more rows than were counted are found out at the end
        rows = (line for line in islice(source, limit) if line.number not in finished)
        if not task.from_stdin:
            yield rows
            return
        with IdIndex(folder / "ids.sqlite") as index:
            yield (_claimed(line, index) for line in rows)


def _claimed(line: Line, index: IdIndex) -> Line | BadRow:
    """``line`` itself, or what is wrong with it where an earlier one has its custom_id."""
    custom_id = custom_id_of(line)
    earlier = None if custom_id is None else index.add(custom_id, line.number)
    if earlier is None:
        return line
    return BadRow(line.number, custom_id, APIError(f"custom_id: {custom_id!r} was used by line {earlier}", "custom_id"))


def _summary(task: Task, totals: Totals, state: State, rows: int | None, *, resumed: int) -> Summary:
    return Summary.of(
        totals,
        state=state,
        rows=rows,
        resumed=resumed,
        output=printable(task.files.place.output),
        errors=printable(task.files.place.errors),
    )
