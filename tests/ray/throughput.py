"""How much of the speed of plain processes a job on Ray has, with as many workers on the same cores.

    python -m tests.ray.throughput smollm2:135m --workers 2 --pairs 3

Plain: each of N processes runs ``shoal.jobs.run`` with one thread on rows of its own. Ray: one driver, a local cluster, N workers with
one thread each. What is compared are the generated tokens of rows that end within a window of time that begins when all are
at work; the process is ended after it. Both take turns, and which is first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import run_job
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions
from shoal.params import EngineConfig
from shoal.ray import launch
from shoal.ray.connection import connected
from tests.ray.machines import ROOT

MAX_NUM_SEQS = 16
WARM_UP = 4.0  # seconds from the first rows to the window
ROWS = 4000


@dataclass(frozen=True)
class Series:
    """Tokens of all rows that had ended at each moment."""

    times: list[float]
    tokens: list[int]

    @classmethod
    def read(cls, path: Path) -> Series:
        """What a process has written."""
        text = path.read_text().rpartition("\n")[0] if path.exists() else ""
        pairs = [line.split() for line in text.splitlines()]
        return cls([float(when) for when, _ in pairs], [int(tokens) for _, tokens in pairs])

    def at(self, when: float) -> float:
        """On the line between the moments before and after."""
        after = bisect(self.times, when)
        if after == len(self.times):
            raise SystemExit("the process ended before the window did: more rows are needed")
        since, until = self.times[after - 1], self.times[after]
        fewer, more = self.tokens[after - 1], self.tokens[after]
        return fewer + (more - fewer) * (when - since) / (until - since)


def write_rows(path: Path, seed: int) -> None:
    """Prompts of some words; answers of 16 to 80 tokens, so that rows do not end together."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            words = " ".join(rng.choices(("river", "stone", "seven", "green", "under", "often"), k=rng.randint(5, 40)))
            row = {
                "custom_id": f"{seed}-{number}",
                "prompt": words,
                "max_tokens": rng.randint(16, 80),
                "ignore_eos": True,
            }
            file.write(json.dumps(row) + "\n")


def work(folder: Path, model: str, workers: int) -> None:
    """Run the job in ``folder``, on so many workers of Ray or, with 0, here; write down how far it is."""
    files = JobFiles.named(folder / "in.jsonl", folder / "out.jsonl")
    options, config = JobOptions(), EngineConfig(device="cpu", max_num_seqs=MAX_NUM_SEQS, threads=1)
    last = -1
    with (folder / "series").open("w", buffering=1) as series:

        def report(progress: JobProgress) -> None:
            nonlocal last
            if progress.totals.generated_tokens != last:
                last = progress.totals.generated_tokens
                series.write(f"{time.time()} {last}\n")

        if not workers:
            run_job(model, files, options, config, say=print, report=report)
            return
        cluster = launch.Cluster(address="local", workers=workers)
        launch.run_job(model, files, options, config, cluster, say=print, report=report)


def rate(model: str, kind: str, workers: int, seconds: float) -> float:
    """Tokens a second of all together."""
    folders = workers if kind == "plain" else 1
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        paths = [Path(name) / str(number) for number in range(folders)]
        for number, path in enumerate(paths):
            path.mkdir()
            write_rows(path / "in.jsonl", number)
            stack.callback(_end, _start(path, model, 0 if kind == "plain" else workers))
        begun = max(_begun(path) for path in paths) + WARM_UP
        time.sleep(max(0, begun + seconds + 2 - time.time()))
        found = [Series.read(path / "series") for path in paths]
        return sum(series.at(begun + seconds) - series.at(begun) for series in found) / seconds


def _start(folder: Path, model: str, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.ray.throughput", model, "--work", str(folder), "--workers", str(workers)]
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _begun(folder: Path) -> float:
    """When the first rows had ended."""
    for _ in range(1200):
        if times := Series.read(folder / "series").times:
            return times[0]
        time.sleep(0.1)
    raise SystemExit((folder / "said").read_text())


def start_up() -> None:
    """Print what it takes to start a cluster here."""
    start = time.monotonic()
    with connected("local", print):
        print(f"a local cluster is there after {time.monotonic() - start:.1f} s")


def main() -> None:
    """Print the pairs."""
    parser = argparse.ArgumentParser(prog="python -m tests.ray.throughput")
    parser.add_argument("model")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--first", choices=("plain", "ray"), default="plain", help="of the first pair")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the window")
    parser.add_argument("--start-up", action="store_true", help="only what it takes to start a cluster")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.model, options.workers)
        return
    if options.start_up:
        start_up()
        return
    order, shares = ["plain", "ray"], []
    if options.first == "ray":
        order.reverse()
    for _ in range(options.pairs):
        rates = {kind: rate(options.model, kind, options.workers, options.seconds) for kind in order}
        shares.append(rates["ray"] / rates["plain"])
        print(*(f"{kind}: {rates[kind]:.1f} tokens/s," for kind in order), f"ray/plain {shares[-1]:.3f}", flush=True)
        order.reverse()
    print(f"{options.workers} workers: {median(shares):.3f} of plain processes (median of {len(shares)} pairs)")


if __name__ == "__main__":
    # Ray's workers are nice to others by 15, plain processes are not.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    main()
