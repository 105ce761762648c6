"""Kills workers, drivers and nodes of a job on a Ray cluster, over and over, and looks at what becomes of it.

    python -m tests.ray.kills --kills 200 --drivers 20 --nodes 10 --zombies 3
    python -m tests.ray.kills --real smollm2:135m --kills 20 --drivers 5 --nodes 0 --zombies 0

A job runs once undisturbed on this machine, without Ray. Then the same job runs on a cluster of several nodes on this machine, and
is disturbed until it comes to its end; and so one job after the other, until all of these were there often enough:

- worker: the process of a worker is killed (SIGKILL);
- driver: the process of the driver is killed, and the job gone on with, one time of four without Ray;
- node: all processes of a node are killed; raylet: only its raylet is, and its workers live on for a while. Another node joins;
- zombie: a worker stands still (SIGSTOP) until it is given up, goes on (SIGCONT), and answers. It cannot be ended from afar.

Of every job the records are compared with those of the undisturbed one. As three workers that die with a row and nothing else
condemn it, after two with others, no driver loses more than two workers here that held one row; the rows "poison" do the rest by
themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.jobs.running.engine_half import window
from shoal.ray.row_line import CONDEMNED
from tests.jobs import kills as on_one
from tests.ray.driver import MAX_NUM_SEQS, Orders
from tests.ray.machines import ROOT, Machines, machines
from tests.support.tiny_model import write_tiny_model

WORKERS = 4
NODES = 3
ROWS = 500
CONTEXT = 128
SECONDS_A_STEP = 0.03
STALLED_AFTER = 3.0
MOST_LOST = 14  # workers, by one driver; so that there are many drivers
MOST_ALONE = CONDEMNED - 1  # ... of those that held one row
LOSES = {"worker": 1, "zombie": 1, "node": 2, "raylet": 2}  # workers at most
PATIENCE = 120.0
WINDOW = window(MAX_NUM_SEQS)
POISONED_JOBS = 5  # one of so many has rows that kill


@dataclass(frozen=True)
class Setting:
    """What is run. ``expected``: records of the undisturbed job, by name. ``poison``: custom_ids of rows that kill."""

    machines: Machines
    orders: Orders
    source: Path
    expected: dict[str, bytes]
    poison: frozenset[str] = frozenset()


@dataclass
class Tally:
    """What was done and found. ``again``: rows whose computing was finished more than once; ``seconds``: from a loss until the rows
    are back in line, by kind."""

    done: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    here: int = 0
    late: int = 0
    losses: int = 0
    returned: int = 0
    again: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    found: on_one.Tally = field(default_factory=on_one.Tally)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.jobs} jobs: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(self.done.items()))
        yield f"{self.here} times gone on with without Ray, {self.late} rows answered late and dropped"
        found = self.found
        yield f"{found.lost} lost, {found.duplicated} doubled, {found.differing} unequal, {found.torn} torn"
        bound = self.losses * WINDOW
        yield f"{self.losses} lost workers put {self.returned} rows back in line (at most {bound}); {self.again} were computed twice"
        for kind, seconds in sorted(self.seconds.items()):
            middle = sorted(seconds)[len(seconds) // 2]
            yield f"back in line after a {kind}: {middle:.2f} s (median), {max(seconds):.2f} s (most)"
        yield from self.faults


# A driver -------------------------------------------------------------------------------------------------------------


class Driver:
    """A process that works on the job in ``folder``."""

    def __init__(self, folder: Path, orders: Orders) -> None:
        self._said = folder / "said"
        self._begun = self._said.stat().st_size if self._said.exists() else 0
        command = [sys.executable, "-m", "tests.ray.driver", str(folder), orders.text()]
        with (folder / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr, cwd=ROOT)

    def said(self) -> list[tuple[float, str]]:
        """What it has said so far, and when."""
        if not self._said.exists():
            return []
        with self._said.open("rb") as file:
            file.seek(self._begun)
            whole = file.read().decode().rpartition("\n")[0].splitlines()
        parts = (line.partition(" ") for line in whole)
        return [(float(when), text) for when, _, text in parts]

    def at_work(self) -> list[int]:
        """The pids of workers that have come and not been lost."""
        pids: list[int] = []
        for _, text in self.said():
            if " is at work on " in text:
                pids.append(_pid(text.partition(" is at work on ")[2].partition(",")[0]))
            elif " is lost: " in text:
                pids.remove(_pid(text.partition(" is lost: ")[0]))
        return pids

    def lost(self, pid: int) -> tuple[float, int] | None:
        """When it said that the worker is lost, if it has, and how many rows went back in line."""
        return next(((when, _rows(text)) for when, text in self.said() if f"/{pid} is lost: " in text), None)

    def wait(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
        """Wait for a condition; False where the process has ended, or time is up."""
        until = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None or time.monotonic() > until:
                return bool(condition())
            time.sleep(0.01)
        return True

    @property
    def works(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> bool:
        """False where it ended before."""
        self._process.kill()
        return self._process.wait() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self._process.wait(PATIENCE * 4)


def _pid(place: str) -> int:
    return int(place.rpartition("/")[2])


def _rows(loss: str) -> int:
    return int(loss.rpartition("; ")[2].partition(" ")[0])


# What is done to it ---------------------------------------------------------------------------------------------------


def _kill_worker(driver: Driver, setting: Setting, tally: Tally, pid: int) -> list[int]:
    return _watch(driver, tally, "worker", [pid], lambda: os.kill(pid, signal.SIGKILL))


def _lose_node(driver: Driver, setting: Setting, tally: Tally, pid: int) -> list[int]:
    node = setting.machines.node_of(pid)
    if node is None:  # a row has ended the worker meanwhile
        return []
    pids = [pid for pid in driver.at_work() if setting.machines.node_of(pid) is node]
    done = _watch(driver, tally, "node", pids, lambda: setting.machines.remove(node))
    setting.machines.add()
    return done


def _lose_raylet(driver: Driver, setting: Setting, tally: Tally, pid: int) -> list[int]:
    node = setting.machines.node_of(pid)
    if node is None:  # a row has ended the worker meanwhile
        return []
    pids = [pid for pid in driver.at_work() if setting.machines.node_of(pid) is node]
    done = _watch(driver, tally, "raylet", pids, lambda: setting.machines.kill_raylet(node))
    setting.machines.remove(node)
    setting.machines.add()
    return done


def _make_zombie(driver: Driver, setting: Setting, tally: Tally, pid: int) -> list[int]:
    done = _watch(driver, tally, "zombie", [pid], lambda: os.kill(pid, signal.SIGSTOP))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    if not driver.wait(lambda: any(text.startswith("late: ") for _, text in driver.said()), 20):
        return []
    return done


FAULTS = {"worker": _kill_worker, "node": _lose_node, "raylet": _lose_raylet, "zombie": _make_zombie}


def _watch(driver: Driver, tally: Tally, kind: str, pids: list[int], act: Callable[[], object]) -> list[int]:
    """Do it, and wait until the workers are lost; those that were before the job ended."""
    start = time.time()
    with suppress(ProcessLookupError):  # a row killed it before
        act()
    lost = []
    for pid in pids:
        driver.wait(lambda pid=pid: driver.lost(pid))  # type: ignore[misc]
        if found := driver.lost(pid):
            lost.append(pid)
            tally.seconds.setdefault(kind, []).append(found[0] - start)
    return lost


# A job ----------------------------------------------------------------------------------------------------------------


def run_kills(folder: Path, wanted: Counter[str], rng: random.Random, real: str | None = None) -> Tally:
    """Disturb jobs in ``folder`` until all that is ``wanted`` was done so often. The folders of jobs with faults stay."""
    wanted, tally = +wanted, Tally()
    with machines(NODES) as found:
        settings = _settings(folder, found, real)
        while wanted and not tally.faults:
            setting = settings[tally.jobs % POISONED_JOBS == 1]
            before = tally.done.copy()
            disturb(folder / f"job {tally.jobs}", setting, wanted, rng, tally)
            wanted = wanted - (tally.done - before)
            print(f"{time.strftime('%H:%M:%S')} to do: {dict(wanted)}", file=sys.stderr)
    return tally


def _settings(folder: Path, found: Machines, real: str | None) -> tuple[Setting, Setting]:
    """Without rows that kill, and with them."""
    model = real or str(write_tiny_model(folder / "tiny.gguf", context=CONTEXT))
    orders = Orders(model, seconds_a_step=None if real else 0.0)
    source = on_one.write_rows(folder / "rows.jsonl", random.Random(0), ROWS)
    whole = _run_here(folder / "whole", orders, source)
    orders = replace(orders, address=found.address, workers=WORKERS, seconds_a_step=None if real else SECONDS_A_STEP)
    setting = Setting(found, orders, source, whole)
    return setting, setting if real else _poisoned(folder, setting)


def _poisoned(folder: Path, setting: Setting) -> Setting:
    """Two rows of it kill: what becomes of them is known, and the rest is as it was."""
    source, poison = folder / "poisoned.jsonl", []
    with source.open("wb") as file:
        for number, line in enumerate(setting.source.read_bytes().splitlines(keepends=True)):
            if number in (ROWS // 10, ROWS // 2):
                row = json.loads(line)
                poison.append(row["custom_id"])
                row["body"] = {"prompt": "poison", "max_tokens": 8}
                row["url"] = "/v1/completions"
                line = json.dumps(row).encode() + b"\n"
            file.write(line)
    assert len(poison) == 2, "rows that were right"
    return replace(setting, source=source, poison=frozenset(poison))


def _run_here(folder: Path, orders: Orders, source: Path) -> dict[str, bytes]:
    folder.mkdir()
    shutil.copy(source, folder / "in.jsonl")
    assert Driver(folder, orders).end() == 0, (folder / "stderr").read_text()
    records = dict(on_one.records_of(_outputs(folder)))
    assert len(records) == ROWS
    return records


def disturb(folder: Path, setting: Setting, wanted: Counter[str], rng: random.Random, tally: Tally) -> None:
    """Run one job until it has ended, killing drivers and what one driver may lose."""
    folder.mkdir()
    shutil.copy(setting.source, folder / "in.jsonl")
    tally.jobs += 1
    left = Counter(wanted)
    while _one_driver(folder, setting, left, rng, tally):
        pass
    _look(folder, setting, tally)
    if not tally.faults:
        shutil.rmtree(folder)


def _one_driver(folder: Path, setting: Setting, left: Counter[str], rng: random.Random, tally: Tally) -> bool:
    """Whether the job has to be gone on with."""
    to_die = bool(left["driver"]) and rng.random() < 0.7
    if to_die and not setting.poison and rng.random() < 0.25 and setting.orders.seconds_a_step:
        orders, faults = replace(setting.orders, address=None), []
    else:
        faults = _choose(left, MOST_LOST, rng)
        orders = replace(
            setting.orders, spare="zombie" in faults, stalled_after=STALLED_AFTER if "zombie" in faults else 600
        )
    driver = Driver(folder, orders)
    alone = 0
    for kind in faults:
        time.sleep(rng.uniform(0, 0.5))
        if not driver.wait(lambda: len(driver.at_work()) >= 2) or alone >= MOST_ALONE:
            break
        if lost := FAULTS[kind](driver, setting, tally, rng.choice(driver.at_work())):
            alone += sum((driver.lost(pid) or (0, 0))[1] == 1 for pid in lost)
            tally.done[kind] += 1
            left[kind] -= 1
    killed = to_die and _kill_driver(driver, rng, here=orders.address is None)
    if killed:
        tally.done["driver"] += 1
        tally.here += orders.address is None
        left["driver"] -= 1
    elif (code := driver.end()) != 0:
        tally.faults.append(f"{folder}: the driver ended with {code}")
    _count(driver, tally)
    return killed


def _choose(left: Counter[str], most: int, rng: random.Random) -> list[str]:
    """Faults that take no more than ``most`` workers."""
    chosen: list[str] = []
    rest = Counter({kind: left[kind] for kind in LOSES if left[kind] > 0})
    while rest := Counter({kind: count for kind, count in rest.items() if count and LOSES[kind] <= most}):
        kind = rng.choice(list(rest.elements()))
        chosen.append(kind)
        rest[kind] -= 1
        most -= LOSES[kind]
    return chosen


def _kill_driver(driver: Driver, rng: random.Random, *, here: bool) -> bool:
    """Kill it at some moment once workers are there. False if it ended before."""
    driver.wait(lambda: here or driver.at_work())
    time.sleep(rng.uniform(0, 3))
    return driver.kill()


# The looking ----------------------------------------------------------------------------------------------------------


def _count(driver: Driver, tally: Tally) -> None:
    for _, text in driver.said():
        if " rows go back in line" in text:
            tally.losses += 1
            rows = _rows(text)
            tally.returned += rows
            if rows > WINDOW:
                tally.faults.append(f"{rows} rows were in flight, {WINDOW} may be: {text}")
        elif text.startswith("late: "):
            tally.late += len(json.loads(text.partition(" ")[2]))


def _look(folder: Path, setting: Setting, tally: Tally) -> None:
    """Compare the job's records with those of the undisturbed one."""
    outputs = _outputs(folder)
    expected = setting.expected | {name: _condemned(name, outputs[1]) for name in setting.poison}
    found = on_one.look_at(outputs, expected)
    tally.found += found
    if found.faults:
        tally.faults.append(f"{folder}: {found.line()}")
    summary = json.loads((folder / "out.jsonl.shoal" / "manifest.json").read_bytes())["summary"]
    lines = [len(path.read_bytes().splitlines()) for path in outputs]
    if summary["state"] != "finished" or [summary["done"], summary["failed"]] != lines:
        tally.faults.append(f"{folder}: the summary does not agree with {lines}: {summary}")
    times = Counter(line.split()[0] for path in (folder / "log").iterdir() for line in path.read_text().splitlines())
    tally.again += sum(count - 1 for count in times.values())


def _condemned(custom_id: str, errors: Path) -> bytes:
    message = f"{CONDEMNED} workers ended while they computed this row and nothing else"
    error = {"code": "server_error", "message": message}
    return f"{errors.name}: {json.dumps({'custom_id': custom_id, 'response': None, 'error': error})}".encode()


def _outputs(folder: Path) -> tuple[Path, Path]:
    return folder / "out.jsonl", folder / "out.jsonl.errors.jsonl"


def main() -> int:
    """Print what was found; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.ray.kills", description="Kill jobs on a Ray cluster.")
    parser.add_argument("--kills", type=int, default=200, help="of workers")
    parser.add_argument("--drivers", type=int, default=20, help="kills of drivers")
    parser.add_argument("--nodes", type=int, default=10, help="losses of nodes; a fifth of them of raylets alone")
    parser.add_argument("--zombies", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", metavar="MODEL", help="with this model in place of the fake one")
    options = parser.parse_args()
    raylets = (options.nodes + 4) // 5
    wanted = Counter(
        worker=options.kills,
        driver=options.drivers,
        node=options.nodes - raylets,
        raylet=raylets,
        zombie=options.zombies,
    )
    with tempfile.TemporaryDirectory() as name:
        tally = run_kills(Path(name), wanted, random.Random(options.seed), options.real)
    print(*tally.lines(), sep="\n")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
