"""Jobs and the server on many machines, on a Ray cluster (``pip install 'shoal[ray]'``). Nothing below knows of it.

import shoal.ray
summary = shoal.ray.run("smollm2:135m", "requests.jsonl", "results.jsonl", address="auto", workers=8)

    jobs      launch -> fleet (row_line: which worker gets which rows; connection, metrics) -> worker
    server    application -> ingress (routing, replicas, upstream, exposition) -> replica; scaling: how many there are to be
    Ray Data  predictor
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal.errors import JobError

if TYPE_CHECKING:
    from shoal.ray.application import serve_app
    from shoal.ray.launch import Cluster, run, run_job
    from shoal.ray.predictor import BatchPredictor

__all__ = ["BatchPredictor", "Cluster", "run", "run_job", "serve_app"]

_HOME = {
    "BatchPredictor": "shoal.ray.predictor",
    "Cluster": "shoal.ray.launch",
    "run": "shoal.ray.launch",
    "run_job": "shoal.ray.launch",
    "serve_app": "shoal.ray.application",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: each needs another part of Ray. Raises JobError where that is not installed."""
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.ray' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise JobError("Ray is not installed: pip install 'shoal[ray]'") from error
