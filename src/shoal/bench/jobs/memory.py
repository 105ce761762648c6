"""Whether the memory of a job grows with its rows: ``shoal run-batch`` as a process of its own, on inputs of several sizes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from shoal import jobs
from shoal.bench.jobs.batch_files import write_batch
from shoal.bench.markdown import table
from shoal.bench.models.networks import Shape
from shoal.bench.models.random_model import write_random_model
from shoal.errors import EngineError

_SMALLEST = Shape(
    n_embd=32,
    n_layers=1,
    n_heads=1,
    n_kv_heads=1,
    head_dim=32,
    n_ff=32,
    vocab_size=0,  # that of the tokenizer
    context_length=64,
    rope_base=10000.0,
)


class RowKind(NamedTuple):
    """Rows that are quickly done: what they do, and the body of all of them."""

    name: str
    fails: bool
    body: dict[str, Any]


FAIL = RowKind("fail", True, {"prompt": "one", "no_such_field": 1})
ONE_TOKEN = RowKind("generate one token", False, {"prompt": "one", "max_tokens": 1, "temperature": 0})

# The verb as the command line runs it; then the most memory that this process has held.
_CHILD = """
import sys
from shoal.cli.main import main
status = main(sys.argv[1:])
from shoal.bench.shoal_worker import peak_rss
print(peak_rss())
sys.exit(status)
"""


@dataclass(frozen=True, slots=True)
class JobSize:
    """One process: the ``kind`` of its rows, how many, seconds and peak memory in bytes from start to end."""

    kind: str
    rows: int
    seconds: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class JobMemory:
    """All processes, by kind of row and then by size."""

    sizes: Sequence[JobSize]

    def as_markdown(self) -> str:
        """A line a process."""
        lines = [
            [
                size.kind,
                f"{size.rows:,}",
                f"{size.peak_rss / 1e6:.1f}",
                f"{size.seconds:.1f}",
                f"{size.rows / size.seconds:.0f}",
            ]
            for size in self.sizes
        ]
        title = "**Memory**: whole processes, on a network of 1 layer with random weights"
        return f"{title}\n\n{table(['rows that', 'rows', 'peak MB', 'seconds', 'rows/s'], lines)}"

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return asdict(self)


def measure_memory(tokenizer_from: Path, folder: Path, rows: Sequence[int], say: Callable[[str], None]) -> JobMemory:
    """Run jobs of so many ``rows`` of each kind on the CPU; ``say`` hears how it goes.

    The model is written to ``folder``, with the tokenizer of another. Raises EngineError where a job does not end as it should.
    """
    model = folder / "random.gguf"
    write_random_model(model, _SMALLEST, "Q8_0", tokenizer_from)
    return JobMemory(list(_sizes(model, rows, say)))


def _sizes(model: Path, rows: Sequence[int], say: Callable[[str], None]) -> Iterator[JobSize]:
    _run(model, ONE_TOKEN, 1)  # the kernels are compiled, if need be
    for kind in (FAIL, ONE_TOKEN):
        for count in rows:
            size = _run(model, kind, count)
            say(f"memory: {count} rows that {kind.name}: {size.peak_rss / 1e6:.1f} MB, {size.seconds:.1f} s")
            yield size


def _run(model: Path, kind: RowKind, rows: int) -> JobSize:
    with tempfile.TemporaryDirectory(prefix="shoal-job-") as folder:
        output = Path(folder) / "out.jsonl"
        source = write_batch(Path(folder) / "in.jsonl", repeat(kind.body, rows))
        arguments = ["run-batch", model, "-i", source, "-o", output, "--device", "cpu"]
        command = [sys.executable, "-P", "-c", _CHILD, *map(str, arguments)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise EngineError(f"run-batch failed: {done.stderr.strip().splitlines()[-1]}")
        found = jobs.status(output)
    if (found.state, found.failed, found.done) != ("finished", rows * kind.fails, rows * (not kind.fails)):
        raise EngineError(f"{rows} rows that {kind.name}: {found.lines()[0]}")
    return JobSize(kind.name, rows, seconds, int(done.stdout))
