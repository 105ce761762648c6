"""Jobs and the server on many machines, on a Ray cluster (``pip install 'shoal[ray]'``). Nothing below knows of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.ray.application import serve_app
    from shoal.ray.predictor import BatchPredictor

__all__ = ["BatchPredictor", "serve_app"]

_HOME = {
    "BatchPredictor": "shoal.ray.predictor",
    "serve_app": "shoal.ray.application",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: each needs another part of Ray."""
    if name not in _HOME:
        raise AttributeError(f"module 'shoal.ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
