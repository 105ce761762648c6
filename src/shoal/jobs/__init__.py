"""Jobs: a file of requests worked through into a file of results, whatever happens on the way.

from shoal import jobs
summary = jobs.run("smollm2:135m", "requests.jsonl", "results.jsonl", max_num_seqs=32)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.jobs.running.control import JobStatus, cancel, status
    from shoal.jobs.running.launch import run
    from shoal.jobs.running.summary import Summary

__all__ = ["JobStatus", "Summary", "cancel", "run", "status"]

_HOME = {
    "JobStatus": "shoal.jobs.running.control",
    "Summary": "shoal.jobs.running.summary",
    "cancel": "shoal.jobs.running.control",
    "run": "shoal.jobs.running.launch",
    "status": "shoal.jobs.running.control",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a job needs the engine, its status does not."""
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.jobs' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
