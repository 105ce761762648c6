"""Many engine halves as one: actors of a Ray cluster that come and go while the job runs.

A worker is asked again and again what it has done, and given rows with the question; two questions are always on their way, so that
it never waits for the driver. It commits nothing: a worker that is lost, or only out of reach, has rows that another one computes
again, and whatever it may say later is not listened to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from shoal.errors import EngineError, JobError, ShoalError
from shoal.jobs.durable.ledger import NO_USAGE
from shoal.jobs.input.rows import Line, custom_id_of
from shoal.jobs.running.engine_half import EngineHalf, Finished, Steps, window
from shoal.jobs.running.records import failed
from shoal.jobs.running.task import Task
from shoal.ray.metrics import FleetMetrics
from shoal.ray.row_line import CONDEMNED, RowLine
from shoal.ray.worker import Begun, Load, Nature, Reply, Worker

Say = Callable[[str], None]

_CALLS_AHEAD = 2
_SECONDS_A_NOTE = 0.5
_WAIT = 0.25  # seconds for an answer of any worker
_PATIENCE = 15.0  # seconds without a worker until that is said
_PAUSES = (0.0, 1.0, 5.0, 15.0, 30.0)  # seconds before a worker is started again that could not start so many times
_MOST_FAILED_STARTS = 5  # in a row, of all, where none has ever started


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How many ``workers`` there are to be, and what each has: ``threads`` (CPUs to Ray) and ``gpus``. A worker that does not answer
    within ``stalled_after`` seconds is given up."""

    workers: int
    threads: int = 1
    gpus: float = 0
    stalled_after: float = 600.0


@dataclass(slots=True)
class _Worker:
    """One incarnation of a worker. ``calls``: questions on their way, and when they were asked."""

    name: str
    epoch: int
    actor: Any
    start: Any  # the answer to begin
    begun: Begun | None = None
    calls: dict[Any, float] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Slot:
    """A place for a worker: who has it now, and when the next one may start if nobody has."""

    worker: _Worker | None = None
    not_before: float = 0.0
    failures: int = 0


class Fleet(EngineHalf):
    """``options.workers`` workers that compute the rows of ``task``. ``say`` hears who comes and goes.

    ``model``: its name, as every machine resolves it. ``load`` makes the engine half of a worker, there. The natures of all workers
    must be ``nature``, what the job's answers depend on: one that differs is turned away by name.
    """

    def __init__(self, model: str, task: Task, options: FleetOptions, *, load: Load, nature: Nature, say: Say) -> None:
        self._model, self._options, self._nature, self._say = model, options, nature, say
        self._shared = ray.put((task, load))
        self._timeout = task.options.timeout
        self._line = RowLine(window(task.config.max_num_seqs))
        self._slots = [_Slot() for _ in range(options.workers)]
        self._steps: list[Steps] = []
        self._finished: list[Finished] = []  # by the fleet itself
        self._epoch = 0
        self._lost = 0
        self._ever_began = False
        self._failed_starts = 0
        self._alone_since = time.monotonic()
        self._said_alone = False
        self._metrics = FleetMetrics(options.workers)
        self._note, self._note_due = "", 0.0

    # -- the engine half of the job ------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Whether a worker should be given one more row."""
        return self._line.has_room

    def submit(self, line: Line) -> Finished | None:
        """Put a row in line. It never comes back at once: only workers read it."""
        self._line.take(line)
        return None

    def step(self) -> list[Finished]:
        """Hear what the workers have done, and start those that are missing. Waits for a quarter of a second at most.

        Raises EngineError where no worker can be started, JobError where all are of another nature than the job.
        """
        self._fill_slots()
        for worker in self._workers():
            self._ask(worker)
        self._hear()
        self._give_up_stalled()
        self._look_for_workers()
        finished, self._finished = self._finished, []
        self._metrics.show(self._line.num_rows, self._lost, self._line.num_returned)
        return finished

    def steps(self) -> Steps:
        """Those that workers have told of since this was last asked."""
        steps, self._steps = self._steps, []
        return Steps.total(steps) if steps else Steps()

    def note(self) -> str:
        """How many workers there are, how fast they are, and what was lost; a moment ago: it is asked for with every row."""
        now = time.monotonic()
        if now >= self._note_due:
            self._note, self._note_due = self._new_note(now), now + _SECONDS_A_NOTE
        return self._note

    def _new_note(self, now: float) -> str:
        workers = [worker for worker in self._workers() if worker.begun]
        rates = [worker.tokens / max(now - worker.since, 1e-9) for worker in workers]
        note = f"{len(workers)} of {len(self._slots)} workers"
        if rates:
            note += f" ({min(rates):.0f} to {max(rates):.0f} tokens/s)"
        return f"{note}, {self._lost} lost" if self._lost else note

    def abort(self) -> None:
        """Drop all rows. Workers that compute some are given up: they are not waited for."""
        for slot in self._slots:
            if slot.worker is not None and slot.worker.calls:
                self._drop(slot)
        self._line.clear()

    def close(self) -> None:
        """End all workers."""
        if any(slot.worker for slot in self._slots):
            again = self._line.num_returned
            self._say(
                f"{self._epoch} workers were started, {self._lost} lost, rows were put back in line {again} times"
            )
        for slot in self._slots:
            self._drop(slot)

    # -- workers -------------------------------------------------------------------------------------------------------

    def _workers(self) -> Iterator[_Worker]:
        return (slot.worker for slot in self._slots if slot.worker is not None)

    def _fill_slots(self) -> None:
        now = time.monotonic()
        for number, slot in enumerate(self._slots):
            if slot.worker is None and now >= slot.not_before:
                slot.worker = self._start(number)

    def _start(self, number: int) -> _Worker:
        """A worker that Ray places when and where there is room for it."""
        self._epoch += 1
        options = self._options
        start = ray.remote(_Actor).options(num_cpus=options.threads, num_gpus=options.gpus, max_restarts=0)
        actor = start.remote(self._model, self._shared)
        return _Worker(f"worker {number}", self._epoch, actor, actor.begin.remote())

    def _ask(self, worker: _Worker) -> None:
        """See that two questions are on their way to a worker that has something to do."""
        while worker.begun is not None and len(worker.calls) < _CALLS_AHEAD:
            lines = self._line.give(worker.name)
            if not lines and not self._line.held(worker.name):
                return
            worker.calls[worker.actor.compute.remote(worker.epoch, lines)] = time.monotonic()

    def _hear(self) -> None:
        """Take in all answers that are there, or the first that comes."""
        owners = {ref: slot for slot in self._slots for ref in _refs(slot)}
        if not owners:
            time.sleep(_WAIT)
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=_WAIT)
        if ready:
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for ref in ready:
            slot = owners[ref]
            if slot.worker is not None and ref in _refs(slot):  # not lost by an answer before
                self._take_answer(slot, slot.worker, ref)

    def _take_answer(self, slot: _Slot, worker: _Worker, ref: Any) -> None:
        try:
            answer = ray.get(ref)
        except RayTaskError as error:  # raised by what we asked for
            self._lose(slot, worker, _cause(error))
        except (RayActorError, RayError) as error:
            self._lose(slot, worker, error)
        else:
            if isinstance(answer, Begun):
                self._welcome(slot, worker, answer)
            else:
                self._take_in(worker, ref, answer)

    def _welcome(self, slot: _Slot, worker: _Worker, begun: Begun) -> None:
        if begun.nature != self._nature:
            differs = _difference(self._nature, begun.nature)
            self._refuse(slot, JobError(f"{begun.place} cannot work on this job: {differs}"))
            return
        worker.begun, worker.start, worker.since = begun, None, time.monotonic()
        slot.failures = self._failed_starts = 0
        self._ever_began = True
        self._line.join(worker.name)
        self._say(f"{worker.name} is at work on {begun.place}, after {begun.seconds:.1f} s")

    def _take_in(self, worker: _Worker, ref: Any, reply: Reply) -> None:
        del worker.calls[ref]
        if reply.epoch != worker.epoch:
            return
        counted = self._line.take_back(worker.name, (row.row for row in reply.finished))
        rows = [row for row in reply.finished if row.row in counted]
        self._finished += rows
        self._steps.append(reply.steps)
        tokens = sum(row.usage.generated_tokens for row in rows)
        worker.rows += len(rows)
        worker.tokens += tokens
        self._metrics.count(worker.name, len(rows), sum(row.failed for row in rows), tokens)

    def _lose(self, slot: _Slot, worker: _Worker, error: BaseException) -> None:
        """A worker has ended, or what it was asked for has failed: its rows are for others, its place is for a new one."""
        if worker.begun is None:
            self._refuse(slot, error)
            return
        self._lost += 1
        for line in self._line.lose(worker.name):
            self._finished.append(_condemned(line))
        self._drop(slot)
        self._say(f"{worker.name} on {worker.begun.place} is lost: {_in_short(error)}; its rows go back in line")

    def _refuse(self, slot: _Slot, error: BaseException) -> None:
        """A worker could not start."""
        self._drop(slot)
        slot.failures += 1
        self._failed_starts += 1
        pause = _PAUSES[min(slot.failures, len(_PAUSES) - 1)]
        slot.not_before = time.monotonic() + pause
        if not self._ever_began and self._failed_starts >= _MOST_FAILED_STARTS:
            known = (
                error if isinstance(error, ShoalError) else EngineError(f"no worker could start: {_in_short(error)}")
            )
            raise known
        self._say(f"a worker could not start, the next try is in {pause:g} s: {_in_short(error)}")

    def _give_up_stalled(self) -> None:
        latest = time.monotonic() - self._options.stalled_after
        for slot in self._slots:
            worker = slot.worker
            if worker is not None and any(asked < latest for asked in worker.calls.values()):
                self._lose(slot, worker, EngineError(f"no answer within {self._options.stalled_after:g} s"))

    def _drop(self, slot: _Slot) -> None:
        """Nothing of the worker is listened to any more."""
        if slot.worker is not None:
            ray.kill(slot.worker.actor)
        slot.worker = None

    def _look_for_workers(self) -> None:
        """Say so where nobody works, and where somebody does again."""
        now = time.monotonic()
        if any(worker.begun for worker in self._workers()):
            self._alone_since, self._said_alone = now, False
        elif not self._said_alone and now - self._alone_since >= _PATIENCE:
            self._said_alone = True
            needs = f"{self._options.threads} CPUs" + (
                f" and {self._options.gpus:g} GPUs" if self._options.gpus else ""
            )
            self._say(f"no worker is there: the job waits until the cluster has {needs} free for one")


class _Actor:
    """A Worker that is made of what the driver put into the object store once for all of them."""

    def __init__(self, model: str, shared: tuple[Task, Load]) -> None:
        self._worker = Worker(model, *shared)

    def begin(self) -> Begun:
        return self._worker.begin()

    def compute(self, epoch: int, lines: list[Line]) -> Reply:
        return self._worker.compute(epoch, lines)


def _refs(slot: _Slot) -> list[Any]:
    """The answers that a slot waits for."""
    if slot.worker is None:
        return []
    return list(slot.worker.calls) if slot.worker.start is None else [slot.worker.start]


def _condemned(line: Line) -> Finished:
    message = f"{CONDEMNED} workers ended while they computed this row and nothing else"
    return Finished(line.number, failed(custom_id_of(line), "server_error", message).line(), True, NO_USAGE)


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, BaseException) else error


def _in_short(error: BaseException) -> str:
    """An error in one line: Ray's have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__


def _difference(job: Nature, there: Nature) -> str:
    pairs = zip(Nature._fields, job, there, strict=True)
    return ", ".join(f"{name} is {now}, the job's is {was}" for name, was, now in pairs if was != now)
