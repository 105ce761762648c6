"""Ends a job's driver at every request that it sends to an S3 store, and looks at what becomes of the job.

    python -m tests.jobs.stores.kills --every 1

A job of 60 rows on a fake engine runs once undisturbed into files. Then the same rows run into a folder of parts in S3 (moto), once
for each number k of a request (every K-th of them) and for two moments, before and after the request takes effect:

- *kill*: the driver is killed (SIGKILL) at its k-th request, is started again and killed again at its k-th, until the job has ended
  or it was killed often enough;
- *sleep*: the driver is stopped (SIGSTOP) at its k-th request; another takes the job over and ends it; then the first one wakes.

And two drivers are started at once, over and over. The valid parts are compared with the files of the undisturbed job.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from zlib import crc32

from shoal.errors import JobError, ParameterError
from shoal.jobs.durable import parts
from shoal.jobs.durable.lease import LEASE
from shoal.jobs.durable.numbered import TakenOverError
from shoal.jobs.durable.parts import FOLDERS, MANIFEST
from shoal.jobs.durable.store import Store, open_store
from shoal.jobs.running.engine_half import LocalHalf
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import Host, local_half, run_task
from shoal.jobs.running.task import JobOptions, Task
from shoal.params import EngineConfig
from tests.jobs.fake import FakeLLM
from tests.jobs.kills import look_at, records_of
from tests.jobs.stores.s3 import S3, Moment
from tests.support.tiny_model import write_tiny_model

ROWS = 60
BYTES_PER_COMMIT = 8192  # of lines: about sixteen rows
KILLS_PER_JOB = 2
TAKEN_OVER, REFUSED = 3, 4  # exit codes of a driver
MOMENTS: tuple[Moment, Moment] = ("before", "after")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "shoal.jobs.running.launch", "s3fs", __name__])


class _Engine(FakeLLM):
    def close(self) -> None:
        """There is nothing to close."""


def _load(task: Task) -> LocalHalf:
    return local_half(task, _Engine(max_num_seqs=4).as_llm)


def _task(model: Path, source: Path, output: str) -> Task:
    return Task.of(model, JobFiles.named(source, output), JobOptions(), EngineConfig(device="reference"))


def _drive(environment: dict[str, str], model: Path, source: Path, output: str, stderr: Path) -> None:
    """A driver, in a process of its own: commits follow from the bytes that wait, so that each run sends the same requests."""
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    parts._REMOTE_INTERVAL, parts._INTERVAL_PER_COST, parts._MOST_WAITING = 3600.0, 0, BYTES_PER_COMMIT
    try:
        run_task(_task(model, source, output), Host(_load, lambda text: None, lambda progress: None))
    except TakenOverError:
        sys.exit(TAKEN_OVER)
    except (JobError, ParameterError) as error:  # whatever it had found before it slept
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


@dataclass
class Tally:
    """What was found. ``stopped``: drivers that learnt that they had lost the job; ``lost``, ``doubled`` and ``unequal`` rows;
    ``wrong``: lists of parts that do not fit the parts, and drivers that ended in no way they should."""

    jobs: int = 0
    kills: int = 0
    sleeps: int = 0
    stopped: int = 0
    lost: int = 0
    doubled: int = 0
    unequal: int = 0
    wrong: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def faults(self) -> int:
        return self.lost + self.doubled + self.unequal + self.wrong

    def line(self) -> str:
        """For people."""
        return (
            f"{self.jobs} jobs, {self.kills} drivers killed, {self.sleeps} woke when another had the job, {self.stopped} stopped"
            f" as they had lost it: {self.lost} rows lost, {self.doubled} doubled, {self.unequal} unequal, {self.wrong} wrong"
        )


class Harness:
    """Jobs of the same rows in ``folder`` and on ``s3``, each compared with the one that ran undisturbed into files."""

    def __init__(self, folder: Path, s3: S3) -> None:
        self.num_requests = 0  # of a driver that is not disturbed
        self._folder = folder
        self._s3 = s3
        self._model = write_tiny_model(folder / "tiny.gguf", context=128)
        self._source = folder / "in.jsonl"
        self._source.write_text("".join(f"{_row(number)}\n" for number in range(ROWS)))
        whole = folder / "out.jsonl"
        task = _task(self._model, self._source, str(whole))
        run_task(task, Host(_load, lambda text: None, lambda progress: None))
        self._expected = dict(records_of((whole, folder / "out.jsonl.errors.jsonl")))
        assert len(self._expected) == ROWS

    def undisturbed(self) -> Tally:
        """One driver, whose requests are counted."""
        url = self._s3.new_folder()
        self._s3.gate.disarm()
        wrong = self._end(self._start(url)) != 0
        self.num_requests = len(self._s3.gate.requests)
        return self._look(url, Tally(jobs=1, wrong=wrong))

    def kill(self, at: int, moment: Moment) -> Tally:
        """Kill the driver at request ``at`` of each of its lives."""
        url, tally, code = self._s3.new_folder(), Tally(jobs=1), -int(signal.SIGKILL)
        while code == -signal.SIGKILL:
            if tally.kills < KILLS_PER_JOB:
                self._s3.gate.arm(at, moment, "kill")
            else:
                self._s3.gate.disarm()
            code = self._end(self._start(url))
            tally.kills += code == -signal.SIGKILL
        tally.wrong += code != 0
        return self._look(url, tally)

    def sleep(self, at: int, moment: Moment) -> Tally:
        """Stop the driver at request ``at``, let another do its work, and wake it."""
        url, gate = self._s3.new_folder(), self._s3.gate
        gate.arm(at, moment, "sleep")
        sleeper = self._start(url)
        while not gate.asleep.wait(0.01) and sleeper.is_alive():
            pass
        if not gate.asleep.is_set():  # it had no more than ``at`` requests
            return self._look(url, Tally(jobs=1, wrong=self._end(sleeper) != 0))
        self._store(url).delete(LEASE)
        wrong = self._end(self._start(url)) != 0
        gate.wake()
        code = self._end(sleeper)
        tally = Tally(
            jobs=1, sleeps=1, stopped=code == TAKEN_OVER, wrong=wrong + (code not in (0, TAKEN_OVER, REFUSED))
        )
        self._s3.gate.disarm()
        if not self._store(url).exists(MANIFEST):  # it was about to take away the one from before
            tally.wrong += self._end(self._start(url)) != 0
        return self._look(url, tally)

    def race(self, rng: random.Random) -> Tally:
        """Two drivers, of which the second does not see the lease of the first, begin at about the same time, until all is done."""
        url, tally = self._s3.new_folder(), Tally(jobs=1)
        self._s3.gate.disarm()
        done = False
        while not done:
            first = self._start(url)
            time.sleep(rng.uniform(0, 1.5))
            self._store(url).delete(LEASE)
            codes = [self._end(process) for process in (first, self._start(url))]
            tally.stopped += codes.count(TAKEN_OVER)
            tally.wrong += sum(code not in (0, TAKEN_OVER, REFUSED) for code in codes)
            done = 0 in codes or bool(tally.wrong)
        return self._look(url, tally)

    def _start(self, url: str) -> ForkServerProcess:
        arguments = (self._s3.environment, self._model, self._source, url, self._folder / "stderr")
        process = FORKS.Process(target=_drive, args=arguments)
        process.start()
        assert process.pid is not None
        if not self._s3.gate.asleep.is_set():  # else it is the one that takes over
            self._s3.gate.tell(process.pid)
        return process

    def _end(self, process: ForkServerProcess) -> int:
        connection.wait([process.sentinel], 120)
        code = process.exitcode
        assert code is not None, "it hangs"
        if code > 0 and code not in (TAKEN_OVER, REFUSED):
            print((self._folder / "stderr").read_text(), file=sys.stderr)
        return code

    def _store(self, url: str) -> Store:
        os.environ.update(self._s3.environment)
        return open_store(url)

    def _look(self, url: str, tally: Tally) -> Tally:
        """Fetch the valid parts, as the list in the folder names them, and compare."""
        store = self._store(url)
        listed = json.loads(store.read(MANIFEST))
        outputs = []
        for folder, name in zip(FOLDERS.values(), ("out.jsonl", "out.jsonl.errors.jsonl"), strict=True):
            content = {part["name"]: store.read(part["name"]) for part in listed[folder]}
            tally.wrong += sum(crc32(content[part["name"]]) != part["crc32"] for part in listed[folder])
            tally.wrong += store.list(folder).keys() != content.keys()
            outputs.append(self._folder / "found" / name)
            outputs[-1].parent.mkdir(exist_ok=True)
            outputs[-1].write_bytes(b"".join(content.values()))
        found = look_at(outputs, self._expected)
        return tally + Tally(lost=found.lost, doubled=found.duplicated, unequal=found.differing + found.torn)


def _row(number: int) -> str:
    text = "long" if number % 9 == 4 else f"row {number} " + "x" * (number % 7 * 20)
    return json.dumps({"custom_id": f"row-{number}", "prompt": text, "max_tokens": 1 + number % 5})


def run(folder: Path, s3: S3, *, every: int, first: int = 0, races: int = 4) -> Tally:
    """All of it, at every ``every``-th request from ``first``."""
    harness, rng = Harness(folder, s3), random.Random(0)
    tally = harness.undisturbed()
    for at in range(first, harness.num_requests, every):
        print(f"request {at} of {harness.num_requests}: {tally.line()}", file=sys.stderr)
        for moment in MOMENTS:
            for disturbed in (harness.kill, harness.sleep):
                found = disturbed(at, moment)
                if found.faults:
                    print(f"{disturbed.__name__} {moment} request {at}: {found.line()}", file=sys.stderr)
                tally += found
    return sum((harness.race(rng) for _ in range(races)), tally)


def main() -> int:
    """Print what was found; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.jobs.stores.kills", description="End drivers of jobs in S3 at their requests."
    )
    parser.add_argument("--every", type=int, default=1, help="only every so many-th request")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--races", type=int, default=10, help="times two drivers begin at once")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, S3() as s3:
        tally = run(Path(name), s3, every=options.every, first=options.first, races=options.races)
    print(tally.line())
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
