"""How many times as many tokens a second N sequences give as one alone: measured by ``shoal bench sweep``, never assumed.

What a sweep finds is kept in the user's cache folder, for one file, machine, backend (instruction set, threads) and version of
shoal; a change of any of them has to be measured anew.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal import hub
from shoal.bench.machine import cpu_name
from shoal.bench.store import read_json, write_json
from shoal.errors import NotMeasuredError
from shoal.jobs.durable.fingerprint import model_fingerprint
from shoal.kernels.load import load_backend
from shoal.system.folders import cache_folder
from shoal.version import __version__

Factors = Mapping[int, Mapping[int, float]]  # by prompt length and number of sequences


@dataclass(frozen=True, slots=True)
class BatchingFactors:
    """``factors[prompt_len][batch]``: decode tokens/s of ``batch`` sequences over those of one; ``date`` of the last sweep."""

    date: str
    factors: Factors

    def of(self, prompt_len: int | None = None) -> Mapping[int, float]:
        """The factors at one length of prompts (default: the longest that was measured)."""
        longest = max(self.factors, default=0)
        return self.factors.get(longest if prompt_len is None else prompt_len, {})


def throughput_factor(
    model: str | Path, batch: int, *, prompt_len: int | None = None, device: str = "cpu", threads: int | None = None
) -> float:
    """Decode tokens a second of ``batch`` sequences together over those of one, as ``shoal bench sweep`` last measured them here.

    ``prompt_len``: at which length of prompts (default: the longest that was measured).
    Raises NotMeasuredError, naming the command that measures it, where it was not; nothing is interpolated.
    """
    path = hub.resolve(model)
    backend = load_backend(device, threads)
    try:
        found = last_measured(path, backend.describe())
    finally:
        backend.close()
    factors = found.of(prompt_len) if found else {}
    if batch not in factors:
        raise NotMeasuredError(_not_measured(path, batch, prompt_len, factors))
    return factors[batch]


def last_measured(path: Path, backend: str) -> BatchingFactors | None:
    """What the last sweep of this file with this backend (``Backend.describe()``) found on this machine; None also where that can no
    longer be read."""
    try:
        found = read_json(_place(path, backend))
        factors = {
            int(length): {int(n): float(factor) for n, factor in row.items()}
            for length, row in found["factors"].items()
        }
        return BatchingFactors(str(found["date"]), factors)
    except (OSError, LookupError, ValueError, TypeError, AttributeError):
        return None


def remember(path: Path, backend: str, measured: BatchingFactors) -> None:
    """Keep what a sweep found; what it did not measure stays as it was. Raises OSError where there is no place for it."""
    before = last_measured(path, backend)
    kept = before.factors if before else {}
    lengths = sorted({*kept, *measured.factors})
    merged = {length: {**kept.get(length, {}), **measured.factors.get(length, {})} for length in lengths}
    facts = {"model": path.name, "cpu": cpu_name(), "backend": backend, "version": __version__}
    factors = {length: dict(sorted(row.items())) for length, row in merged.items()}
    write_json(_place(path, backend), facts | {"date": measured.date, "factors": factors})


def sweep_command(path: Path, batch: int | None = None) -> str:
    """The command that measures a file."""
    batches = "" if batch is None else f" --batch {','.join(map(str, sorted({1, batch})))}"
    return f"shoal bench sweep {shlex.quote(str(path))}{batches}"


def _place(path: Path, backend: str) -> Path:
    folder = cache_folder("SHOAL_BENCH_CACHE", "bench")
    if folder is None:
        raise FileNotFoundError("this user has no home folder")
    model = str(model_fingerprint(path)["blake2b"])
    digest = hashlib.sha256("\0".join((model, cpu_name(), backend, __version__)).encode())
    return folder / f"factors-{digest.hexdigest()[:20]}.json"


def _not_measured(path: Path, batch: int, prompt_len: int | None, factors: Mapping[int, float]) -> str:
    """What is missing, the measured batches on both sides of it, and what to do."""
    below, above = [n for n in factors if n < batch], [n for n in factors if n > batch]
    nearest = [str(n) for n in (*below[-1:], *above[:1])]
    beside = f" (measured nearest to it: {' and '.join(nearest)})" if nearest else ""
    prompts = "" if prompt_len is None else f" and prompts of {prompt_len} tokens"
    command = sweep_command(path, batch) + ("" if prompt_len is None else f" --prompt-len {prompt_len}")
    return (
        f"throughput factor of {path.name} with {batch} sequences{prompts}: not measured here{beside}; run `{command}`"
    )
