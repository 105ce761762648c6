"""Kills a batch job at random moments, over and over, and looks at what becomes of it.

    python -m tests.jobs.kills --kills 200

A job of 150 rows runs once undisturbed. Then the same command runs in a process that is killed (SIGKILL), is started
again and killed again, until it comes to its end; and so with one job after the other, some at a time, until there were enough
kills. Of every job that has ended the files are compared with those of the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from shoal.cli.main import main as shoal
from shoal.jobs.durable import journal, ledger
from tests.support.tiny_model import write_tiny_model

ROWS = 150
CONTEXT = 128
KILLS_PER_JOB = 6
# Processes are forked from one that has imported all and has the kernels, and is no job: most of the time of a job that is killed
# would go to that.
FORKS = multiprocessing.get_context("forkserver")
_ASKING = threading.Lock()  # to start a process asks all others how they ended, which each can tell once
FORKS.set_forkserver_preload(["__main__", "shoal.cli.main", "shoal.jobs.running.launch", "tests.jobs.warm", __name__])


def _shoal(arguments: list[str], interval: float, stderr: Path) -> None:
    """The command line, but for commits that come more often: then more of them are cut off in the middle."""
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    ledger._SHORTEST_INTERVAL, ledger._INTERVAL_PER_COST = interval, 1
    sys.exit(shoal(arguments))


@dataclass(frozen=True)
class Job:
    """A batch job in a ``folder`` of its own. ``interval``: seconds between its commits."""

    folder: Path
    model: Path
    source: Path
    interval: float = 0.02

    def __post_init__(self) -> None:
        self.folder.mkdir()

    @property
    def outputs(self) -> tuple[Path, Path]:
        """Where results and failures go."""
        return self.folder / "out.jsonl", self.folder / "out.jsonl.errors.jsonl"

    @property
    def journal(self) -> Path:
        return self.folder / "out.jsonl.shoal" / "journal"

    @property
    def stderr(self) -> Path:
        """What the last process wrote."""
        return self.folder / "stderr"

    def start(self) -> ForkServerProcess:
        """The same command each time."""
        flags = ["--device", "cpu", "--threads", "1", "--max-num-seqs", "4"]
        files = ["-i", str(self.source), "-o", str(self.outputs[0])]
        command = ["run-batch", str(self.model), *flags, *files]
        process = FORKS.Process(target=_shoal, args=(command, self.interval, self.stderr))
        with _ASKING:
            process.start()
        return process

    def manifest(self) -> dict[str, Any]:
        """As it stands now; empty before there is one."""
        path = self.journal.with_name("manifest.json")
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return found

    def vouched(self) -> list[bytes]:
        """What the journal vouches for of both files: never to be changed again."""
        ends = journal.read(self.journal, errors_apart=True).state.ends if self.journal.exists() else [0, 0]
        found = [_content(path)[:end] for path, end in zip(self.outputs, ends, strict=True)]
        assert [len(data) for data in found] == ends
        return found


@dataclass
class Tally:
    """What was found. ``resumed``: runs that went on from finished rows; ``lost`` and ``duplicated`` rows, ``torn`` lines, and rows
    whose record is not that of the undisturbed job (``differing``); ``wrong``: summaries, and finished rows that changed."""

    kills: int = 0
    jobs: int = 0
    resumed: int = 0
    lost: int = 0
    duplicated: int = 0
    torn: int = 0
    differing: int = 0
    wrong: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def faults(self) -> int:
        return self.lost + self.duplicated + self.torn + self.differing + self.wrong

    def line(self) -> str:
        """For people."""
        return (
            f"{self.kills} kills of {self.jobs} jobs, {self.resumed} runs went on from finished rows: {self.lost} lost,"
            f" {self.duplicated} duplicated, {self.torn} torn, {self.differing} differing, {self.wrong} wrong"
        )


@dataclass(frozen=True)
class Undisturbed:
    """What a job gives that runs in one go, and how long it takes."""

    records: dict[str, bytes]
    summary: dict[str, Any]
    seconds: float


# The input -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rng: random.Random, count: int = ROWS) -> Path:
    """Chats and completions of mixed lengths, with seeds, without and greedy; each seventh row is wrong in some way."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            file.write(_bad_line(i) if i % 7 == 3 else json.dumps(_good_row(i, rng)))
            file.write("\n")
    return path


def _good_row(i: int, rng: random.Random) -> dict[str, Any]:
    text = "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60)))
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 3, 8, 40))}
    body |= rng.choice(({"temperature": 0}, {"seed": i}, {"temperature": 0.8, "top_k": 20}, {"ignore_eos": True}))
    if i % 2:
        return _row(f"row-{i}", "completions", {"prompt": text, **body})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text[:30]}]
    return _row(f"row-{i}", "chat/completions", {"messages": messages, **body})


def _bad_line(i: int) -> str:
    bodies = ({"prompt": "x" * 2 * CONTEXT}, {"prompt": "x", "no_such_field": 1}, {"prompt": "x", "temperature": -1})
    return "no json" if i % 4 == 0 else json.dumps(_row(f"row-{i}", "completions", bodies[i % 4 - 1]))


def _row(custom_id: str, verb: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{verb}", "body": body}


# The killing ---------------------------------------------------------------------------------------------------------


def run_kills(folder: Path, kills: int, *, seed: int = 0, lanes: int = 2, interval: float = 0.02) -> Tally:
    """Kill jobs in ``folder`` that many times, ``lanes`` jobs at once. The folders of jobs with faults stay."""
    model = write_tiny_model(folder / "tiny.gguf", context=CONTEXT)
    source = write_rows(folder / "in.jsonl", random.Random(seed))
    warm_up = Job(folder / "warm-up", model, source)
    _end(warm_up.start(), warm_up)  # to compile kernels is no part of the length of a run
    whole = run_undisturbed(Job(folder / "whole", model, source, interval))

    def lane(number: int) -> Tally:
        rng, tally = random.Random(f"{seed} {number}"), Tally()
        quota = len(range(number, kills, lanes))
        while tally.kills < quota:
            job = Job(folder / f"lane {number} job {tally.jobs}", model, source, interval)
            tally += kill_job(job, whole, min(KILLS_PER_JOB, quota - tally.kills), rng)
        return tally

    with ThreadPoolExecutor(lanes) as pool:
        return sum(pool.map(lane, range(lanes)), Tally())


def run_undisturbed(job: Job) -> Undisturbed:
    """Run it in one go."""
    start = time.monotonic()
    _end(job.start(), job)
    seconds = time.monotonic() - start
    records = dict(records_of(job.outputs))
    assert len(records) == ROWS
    return Undisturbed(records, job.manifest()["summary"], seconds)


def kill_job(job: Job, whole: Undisturbed, kills: int, rng: random.Random) -> Tally:
    """Run it until it has ended, which may be before it was killed so often; and look at it."""
    tally, ended = Tally(jobs=1), False
    while not ended:
        before, manifest = job.vouched(), job.manifest()
        process = job.start()
        killed = tally.kills < kills and _kill(process, job, whole.seconds, rng)
        ended = not killed
        if ended:
            tally.wrong += not _summary_is_right(_end(process, job), job, whole, manifest)
        tally.kills += killed
        tally.resumed += any(before) and job.manifest()["runs"] > manifest["runs"]
        tally.wrong += sum(not _content(path).startswith(old) for path, old in zip(job.outputs, before, strict=True))
    tally += look_at(job.outputs, whole.records)
    if not tally.faults:
        shutil.rmtree(job.folder)
    return tally


def _kill(process: ForkServerProcess, job: Job, seconds: float, rng: random.Random) -> bool:
    """Kill it at some moment of its life or, one time of three, right after its journal has grown. False if it ended before."""
    if rng.random() < 1 / 3:
        _wait_for_growth(process, job.journal)
        moment = rng.uniform(0, 0.005)
    else:
        moment = rng.uniform(0, seconds)
    if _exit_code(process, moment) is not None:
        return False
    process.kill()
    return _exit_code(process) == -signal.SIGKILL


def _wait_for_growth(process: ForkServerProcess, path: Path) -> None:
    size = _size(path)
    while _size(path) <= size and _exit_code(process, 0.001) is None:
        pass


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else journal.HEADER_SIZE


def _end(process: ForkServerProcess, job: Job) -> str:
    """Wait until it ends well; what it wrote to stderr."""
    code = _exit_code(process, 120)
    stderr = job.stderr.read_text(encoding="utf-8")
    assert code == 0, stderr
    return stderr


def _exit_code(process: ForkServerProcess, seconds: float | None = None) -> int | None:
    """None if it has not ended within that time."""
    connection.wait([process.sentinel], seconds)
    with _ASKING:
        return process.exitcode


# The looking ---------------------------------------------------------------------------------------------------------


def look_at(outputs: Iterable[Path], expected: dict[str, bytes]) -> Tally:
    """Compare the output files of a job that has ended with the records of the undisturbed one."""
    outputs = tuple(outputs)
    tally = Tally(torn=sum(map(_torn_lines, outputs)))
    found = list(records_of(outputs))
    counts = Counter(name for name, _ in found)
    tally.lost = len(expected.keys() - counts.keys())
    tally.duplicated = sum(count - 1 for count in counts.values())
    tally.differing = sum(expected.get(name) != content for name, content in found)
    return tally


def _torn_lines(path: Path) -> int:
    lines = _content(path).split(b"\n")
    return sum(not _is_record(line) for line in lines[:-1]) + bool(lines[-1])


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def records_of(outputs: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each record: the file it stands in and its JSON, but for ids, times and what was cached."""
    for path in outputs:
        for line in filter(_is_record, _content(path).split(b"\n")):
            record = json.loads(line)
            del record["id"]
            response = record["response"] or {"body": {}}
            body = response["body"]
            name = record["custom_id"] or f"line {body['error']['line']}"
            for container, key in (response, "request_id"), (body, "id"), (body, "created"):
                container.pop(key, None)
            body.get("usage", {}).pop("prompt_tokens_details", None)
            yield name, f"{path.name}: {json.dumps(record)}".encode()


def _summary_is_right(stderr: str, job: Job, whole: Undisturbed, before: dict[str, Any]) -> bool:
    """Every row counts once, whichever run it was finished in. ``before``: the manifest before the last run, which had nothing to do
    if the kill came when all was done."""
    found = job.manifest()["summary"]
    same = ("state", "rows", "done", "failed", "retried", "prompt_tokens", "generated_tokens")
    resumed = before.get("runs", 0) - (before.get("state") == "finished")
    times = {0: "", 1: ", resumed once"}.get(resumed, f", resumed {resumed} times")
    return (
        found["resumed"] == resumed
        and all(found[name] == whole.summary[name] for name in same)
        and f"{found['done']} rows done, {found['failed']} failed of {ROWS}{times}\n" in stderr
    )


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def main() -> int:
    """Print what was found; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.jobs.kills", description="Kill batch jobs at random moments."
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--lanes", type=int, default=2, help="jobs at once")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between the commits of a job")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tally = run_kills(Path(name), options.kills, seed=options.seed, lanes=options.lanes, interval=options.interval)
    print(tally.line())
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
