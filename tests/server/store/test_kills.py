"""A server process that is killed at random moments while it works batches off: each row ends with one record all the same, and with
that which an undisturbed server gives."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from shoal.jobs.durable import journal, ledger
from shoal.llm import LLM
from shoal.server.store.runner import BatchRunner
from shoal.server.store.store import Store
from tests.jobs.kills import FORKS, Tally, look_at, records_of
from tests.server.store.served import row, served, submit, wait
from tests.support.tiny_model import write_tiny_model

KILLS = 8
ROWS = 80


def serve(model: Path, folder: Path) -> None:
    """Work off the batches in ``folder`` and end. Commits come often, so that more of them are cut off in the middle."""
    ledger._SHORTEST_INTERVAL, ledger._INTERVAL_PER_COST = 0.02, 1
    store = Store(folder)
    runner = BatchRunner(store)
    with LLM(model, device="reference", max_num_seqs=4) as llm:
        runner.start(served(llm))
        for batch in runner.unfinished():
            wait(store, batch)
        runner.stop()
    store.close()
    sys.exit(0)


def start(model: Path, folder: Path) -> ForkServerProcess:
    process = FORKS.Process(target=serve, args=(model, folder))
    process.start()
    return process


def batch_of(folder: Path, rng: random.Random) -> None:
    """Wait for a server to come, with a batch whose rows are of many kinds."""
    store = Store(folder)
    data = bytearray()
    for i in range(ROWS):
        body: dict[str, Any] = {
            "prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(1, 60))),
            "max_tokens": rng.choice((1, 3, 8)),
        }
        kinds: list[dict[str, Any]] = [{"temperature": 0}, {"seed": i}, {"temperature": 0.8}, {"no_such_field": 1}]
        body |= rng.choice(kinds)
        data += row(f"row-{i}", body)
    submit(store, BatchRunner(store), bytes(data))
    store.close()


def outputs(folder: Path) -> tuple[Path, Path]:
    """The files that the only batch in ``folder`` ended with, under the names that they had."""
    batch = json.loads(next(folder.glob("batches/*/batch.json")).read_bytes())["batch"]
    assert batch["status"] == "completed"
    counts = batch["request_counts"]
    assert counts["completed"] + counts["failed"] == counts["total"] == ROWS
    found = []
    for kind in ("output", "error"):
        path = folder / f"{kind}.jsonl"
        path.write_bytes((folder / "files" / f"{batch[f'{kind}_file_id']}.data").read_bytes())
        found.append(path)
    assert len(list(folder.glob("files/*"))) == 6  # with the input, and nothing that nobody knows of
    return found[0], found[1]


def kill(process: ForkServerProcess, folder: Path, seconds: float | None, rng: random.Random) -> bool:
    """Kill it at some moment within so many seconds or, without them, right after rows have got into a journal. False if it ended
    before."""
    if seconds is None:
        before = max(journal.HEADER_SIZE, size_of_journal(folder))
        while process.exitcode is None and size_of_journal(folder) <= before:
            threading.Event().wait(0.001)
        process.join(rng.uniform(0, 0.005))
    else:
        process.join(rng.uniform(0, seconds))
    if process.exitcode is not None:
        return False
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def size_of_journal(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("batches/*/output.jsonl.shoal/journal"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


def test_8_kills(model: Path, tmp_path: Path) -> None:
    batch_of(tmp_path / "whole", random.Random(1))
    begun = time.monotonic()
    whole = start(model, tmp_path / "whole")
    whole.join()
    seconds = time.monotonic() - begun
    assert whole.exitcode == 0
    expected = dict(records_of(outputs(tmp_path / "whole")))
    assert len(expected) == ROWS
    rng, kills, resumed, folders = random.Random(0), 0, 0, 0
    while kills < KILLS:
        folders += 1
        folder = tmp_path / str(folders)
        batch_of(folder, random.Random(1))
        ended = False
        while not ended:
            resumed += size_of_journal(folder) > journal.HEADER_SIZE
            process = start(model, folder)
            ended = kills == KILLS or not kill(process, folder, seconds if kills % 2 else None, rng)
            kills += not ended
            if ended:
                process.join()
                assert process.exitcode == 0
        assert look_at(outputs(folder), expected) == Tally()
    assert resumed >= 3
