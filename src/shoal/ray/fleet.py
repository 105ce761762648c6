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
from ray.exceptions import RayError, RayTaskError

from shoal.errors import EngineError, JobError, ShoalError
from shoal.jobs.durable.ledger import NO_USAGE
from shoal.jobs.input.rows import Line, custom_id_of
from shoal.jobs.running.engine_half import EngineHalf, Finished, Steps, window
from shoal.jobs.running.records import failed
from shoal.jobs.running.task import Task
from shoal.ray.connection import Lifeline
from shoal.ray.metrics import FleetMetrics
from shoal.ray.row_line import CONDEMNED, RowLine
from shoal.ray.worker import Begun, Load, Nature, Reply, Worker

Say = Callable[[str], None]

_CALLS_AHEAD = 2
_SECONDS_A_NOTE = 0.5
_MOST_NAMED = 8  # workers whose speed is shown one by one
_WAIT = 0.25  # seconds for an answer of any worker
_TOGETHER = 2.0  # seconds for other workers to start after the first
_PATIENCE = 15.0  # seconds without a worker until that is said
_PAUSES = (0.0, 0.0, 1.0, 1.0, 5.0, 15.0, 30.0)  # seconds until the next worker after so many in a row that did nothing
_MOST_FAILED_STARTS = 5  # in a row, in one place, where none has ever started
_MOST_BROKEN = 6  # times the number of workers: broken engines, and no row done in between; a bad row makes 5


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
    since: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Slot:
    """A place for a worker: who has it now, and when the next one may start if nobody has. ``failures``: how many there were since one
    did a row."""

    worker: _Worker | None = None
    not_before: float = 0.0
    failures: int = 0

    def wait(self) -> float:
        """Stay empty for a while after a failure: for how many seconds."""
        pause = _PAUSES[min(self.failures, len(_PAUSES) - 1)]
        self.failures += 1
        self.not_before = time.monotonic() + pause
        return pause


class Fleet(EngineHalf):
    """``options.workers`` workers that compute the rows of ``task``. ``say`` hears who comes and goes.

    ``model``: its name, as every machine resolves it. ``load`` makes the engine half of a worker, there. The natures of all workers
    must be ``nature``, what the job's answers depend on: one that differs is turned away by name.
    """

    def __init__(self, model: str, task: Task, options: FleetOptions, *, load: Load, nature: Nature, say: Say) -> None:
        self._model, self._options, self._nature, self._say = model, options, nature, say
        self._shared = ray.put((task, load))
        self._actor = ray.remote(_Actor).options(num_cpus=options.threads, num_gpus=options.gpus, max_restarts=0)
        self._lifeline: Lifeline | None = Lifeline.of_this_driver()
        self._line = RowLine(window(task.config.max_num_seqs))
        self._slots = [_Slot() for _ in range(options.workers)]
        self._steps: list[Steps] = []
        self._finished: list[Finished] = []
        self._doubtful: list[Finished] = []  # condemned where it may not have been their fault
        self._epoch = 0
        self._lost = 0
        self._broken = 0  # engines since a row was done
        self._why_broken = ""
        self._ever_began = self._ever_done = False
        self._said_last = ""
        self._alone_since = time.monotonic()
        self._said_alone = False
        self._metrics = FleetMetrics(options.workers)
        self._note, self._note_due = "", 0.0

    def open(self) -> None:
        """Wait for the first worker, so that a job that none can start for is not begun; but for no time without news. Then a moment
        for those that start together with it: the first one would take all rows of a small job.

        Raises as ``step``.
        """
        until = time.monotonic() + _PATIENCE
        try:
            while not self._ever_began and (time.monotonic() < until or any(slot.failures for slot in self._slots)):
                self.step()
            until = time.monotonic() + _TOGETHER
            while time.monotonic() < until and not all(worker.begun for worker in self._workers()):
                self.step()
        except BaseException:
            self.close()
            raise

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

        Raises EngineError where no worker can be started, all engines are broken or the cluster is gone, JobError where all workers are
        of another nature than the job.
        """
        self._look_for_the_cluster()
        self._fill_slots()
        for worker in self._workers():
            self._ask(worker)
        self._hear()
        self._give_up_stalled()
        self._settle_doubts()
        self._look_for_workers()
        finished, self._finished = self._finished, []
        self._metrics.show(self._line.num_rows, self._lost, self._line.num_returned)
        return finished

    def steps(self) -> Steps:
        """Those that workers have told of since this was last asked."""
        steps, self._steps = self._steps, []
        return Steps.total(steps) if steps else Steps()

    def note(self) -> str:
        """How many workers there are, how fast each is, and what was lost; a moment ago: it is asked for with every row."""
        now = time.monotonic()
        if now >= self._note_due:
            self._note, self._note_due = self._new_note(now), now + _SECONDS_A_NOTE
        return self._note

    def _new_note(self, now: float) -> str:
        workers = [worker for worker in self._workers() if worker.begun]
        rates = [worker.tokens / max(now - worker.since, 1e-9) for worker in workers]
        note = f"{len(workers)} of {len(self._slots)} workers"
        if 0 < len(rates) <= _MOST_NAMED:
            note += f" ({', '.join(f'{rate:.0f}' for rate in rates)} tokens/s)"
        elif rates:
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
        if self._slots:
            again = self._line.num_returned
            self._say(
                f"{self._epoch} workers were started, {self._lost} lost, rows were put back in line {again} times"
            )
        for slot in self._slots:
            self._drop(slot)
        self._slots = []

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
        actor = self._actor.remote(self._model, self._shared)
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
        except RayError as error:
            self._lose(slot, worker, error)
        else:
            if isinstance(answer, Begun):
                self._welcome(slot, worker, answer)
            else:
                self._take_in(slot, worker, ref, answer)

    def _welcome(self, slot: _Slot, worker: _Worker, begun: Begun) -> None:
        if begun.nature != self._nature:
            differs = _difference(self._nature, begun.nature)
            self._refuse(slot, JobError(f"{begun.place} cannot work on this job: {differs}"))
            return
        worker.begun, worker.start, worker.since = begun, None, time.monotonic()
        self._ever_began = True
        self._line.join(worker.name)
        self._say(f"{worker.name} is at work on {begun.place}, after {begun.seconds:.1f} s")

    def _take_in(self, slot: _Slot, worker: _Worker, ref: Any, reply: Reply) -> None:
        del worker.calls[ref]
        if reply.epoch != worker.epoch:
            return
        counted = self._line.take_back(worker.name, (row.row for row in reply.finished))
        rows = [row for row in reply.finished if row.row in counted]
        self._finished += rows
        self._steps.append(reply.steps)
        if not all(row.failed for row in rows):
            self._clear_of_doubt(slot)
        tokens = sum(row.usage.generated_tokens for row in rows)
        worker.tokens += tokens
        self._metrics.count(worker.name, len(rows), sum(row.failed for row in rows), tokens)

    def _clear_of_doubt(self, slot: _Slot) -> None:
        """A row was done: engines work, and a row that they broke of was its own fault."""
        slot.failures = self._broken = 0
        self._ever_done = True
        self._convict()

    def _settle_doubts(self) -> None:
        """No row is left that could show whether engines work: then an earlier one has, or none does."""
        if not self._doubtful or self._line.num_rows:
            return
        if not self._ever_done:
            raise EngineError(self._why_broken)
        self._convict()

    def _convict(self) -> None:
        self._finished += self._doubtful
        self._doubtful.clear()

    def _lose(self, slot: _Slot, worker: _Worker, error: BaseException) -> None:
        """A worker has ended, or what it was asked for has failed: its rows are for others, its place is for a new one."""
        if worker.begun is None:
            self._refuse(slot, error)
            return
        self._lost += 1
        before = self._line.num_returned
        condemned = [_condemned(line) for line in self._line.lose(worker.name)]
        returned = self._line.num_returned - before
        self._drop(slot)
        slot.wait()
        place = worker.begun.place
        self._say(f"{worker.name} on {place} is lost: {_in_short(error)}; {returned} rows go back in line")
        if isinstance(error, EngineError):
            self._doubtful += condemned
            self._count_broken(error)
        else:
            self._finished += condemned

    def _count_broken(self, error: EngineError) -> None:
        """As on one machine: a job ends whose engines fail, whatever the row, and no row is failed for it."""
        self._broken += 1
        self._why_broken = str(error)
        if self._broken >= _MOST_BROKEN * len(self._slots):
            raise error

    def _refuse(self, slot: _Slot, error: BaseException) -> None:
        """A worker could not start."""
        self._drop(slot)
        pause = slot.wait()
        if not self._ever_began and slot.failures >= _MOST_FAILED_STARTS:
            known = isinstance(error, ShoalError)
            raise error if known else EngineError(f"no worker could start: {_in_short(error)}")
        self._say_of_failed_start(_in_short(error), pause)

    def _say_of_failed_start(self, reason: str, pause: float) -> None:
        """Many workers that cannot start for one reason are one piece of news."""
        if reason != self._said_last:
            self._said_last = reason
            self._say(f"a worker could not start, the next try is in {pause:g} s: {reason}")

    def _give_up_stalled(self) -> None:
        latest = time.monotonic() - self._options.stalled_after
        for slot in self._slots:
            worker = slot.worker
            if worker is not None and any(asked < latest for asked in worker.calls.values()):
                self._lose(slot, worker, TimeoutError(f"no answer within {self._options.stalled_after:g} s"))

    def _drop(self, slot: _Slot) -> None:
        """Nothing of the worker is listened to any more."""
        if slot.worker is not None and self._lifeline is not None:
            ray.kill(slot.worker.actor)
        slot.worker = None

    def _look_for_the_cluster(self) -> None:
        """Raise EngineError where it is gone: Ray would wait for it in all that it is asked for then."""
        if self._lifeline is not None:
            try:
                self._lifeline.look()
            except EngineError:
                self._lifeline = None
                raise

    def _look_for_workers(self) -> None:
        """Say so where nobody works, and where somebody does again."""
        now = time.monotonic()
        if any(worker.begun for worker in self._workers()):
            self._alone_since, self._said_alone = now, False
        elif not self._said_alone and now - self._alone_since >= _PATIENCE:
            self._said_alone = True
            needs = needs_of(self._options.threads, self._options.gpus)
            self._say(f"no worker is there: the job waits until the cluster has {needs} free for one")


def needs_of(threads: int, gpus: float) -> str:
    """What a worker needs, for people."""
    cpus = f"{threads} CPU{'s' * (threads != 1)}"
    return f"{cpus} and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else cpus


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
