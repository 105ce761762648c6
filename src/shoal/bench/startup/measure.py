"""``shoal bench startup``: from nothing to the first token, with kernels to compile and with kernels in the cache.

Each start is a process of its own. A round is a cold start, with an empty kernel cache, and a warm one after it. Python's byte code
and the model's file are in their caches, as after an installation and a first look at the file.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.bench.machine import cpu_name
from shoal.bench.markdown import span, table
from shoal.errors import EngineError
from shoal.version import __version__

_TOTAL = "to the first token"


@dataclass(frozen=True, kw_only=True, slots=True)
class StartupPlan:
    """What to start, how often, and the engine's flags."""

    model: Path
    rounds: int = 3
    prompt_len: int = 16
    threads: int | None = None
    device: str = "cpu"
    skip_tokenizer_init: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds of its ``stages`` and in all, kernels that had to be ``compiled``, peak memory in bytes."""

    stages: dict[str, float]
    total: float
    compiled: int
    peak_rss: int


@dataclass(frozen=True, slots=True)
class StartupReport:
    """All starts of a model, cold and warm ones in the order of the rounds."""

    model: str
    file_bytes: int
    cpu: str
    cold: Sequence[Start]
    warm: Sequence[Start]

    def as_markdown(self) -> str:
        """A line a stage: seconds, median and range."""
        head = (
            f"{self.model} ({self.file_bytes / 1e6:.0f} MB), shoal {__version__}, {self.cpu}; seconds, medians (min-max) of"
            f" {len(self.cold)} rounds."
        )
        both = (self.cold, self.warm)
        rows = [
            [stage, *(span([start.stages[stage] for start in starts], 3) for starts in both)]
            for stage in self._stages()
        ]
        rows.append(
            ["the rest", *(span([start.total - sum(start.stages.values()) for start in starts], 3) for starts in both)]
        )
        rows.append([f"**{_TOTAL}**", *(span([start.total for start in starts], 3) for starts in both)])
        rows.append(["kernels compiled", *(str(max(start.compiled for start in starts)) for starts in both)])
        rows.append(["peak memory", *(f"{max(start.peak_rss for start in starts) / 1e6:.0f} MB" for starts in both)])
        return f"{head}\n\n{table(['stage', 'cold kernel cache', 'warm'], rows)}"

    def as_json(self) -> dict[str, Any]:
        """All starts, and the medians that matter."""
        medians = {
            "import_shoal_seconds": statistics.median(start.stages["import shoal"] for start in self.warm),
            "cold_seconds": statistics.median(start.total for start in self.cold),
            "warm_seconds": statistics.median(start.total for start in self.warm),
        }
        return {"version": __version__, **medians, **asdict(self)}

    def _stages(self) -> list[str]:
        return list(self.cold[0].stages)


def measure_startup(plan: StartupPlan, say: Callable[[str], None]) -> StartupReport:
    """Start again and again; ``say`` hears how it goes. Raises EngineError where a start fails."""
    cold: list[Start] = []
    warm: list[Start] = []
    for number in range(1, plan.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="shoal-kernels-") as kernels:
            for name, starts in (("cold", cold), ("warm", warm)):
                start = _start(plan, kernels)
                say(f"round {number}/{plan.rounds}, {name}: {start.total:.2f} s {_TOTAL}")
                starts.append(start)
    return StartupReport(plan.model.name, plan.model.stat().st_size, cpu_name(), cold, warm)


def _start(plan: StartupPlan, kernels: str) -> Start:
    """One process; ``kernels`` is the folder of its kernel cache."""
    environment = {**os.environ, "SHOAL_KERNEL_CACHE": kernels}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its byte code
    flags = {"threads": plan.threads, "device": plan.device, "skip_tokenizer_init": plan.skip_tokenizer_init}
    settings = {"spawned": time.monotonic(), "model": str(plan.model), "prompt_len": plan.prompt_len, **flags}
    script = Path(__file__).with_name("worker.py")
    command = [sys.executable, "-P", str(script), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise EngineError(f"starting {plan.model.name} failed: {reason[0]}")
    return Start(**json.loads(done.stdout))
