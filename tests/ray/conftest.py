"""These tests need Ray, which the README's command does not install."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ray.machines import Machines

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # read when ray is imported
with warnings.catch_warnings():  # of pydantic, about Ray's own models
    warnings.simplefilter("ignore", DeprecationWarning)
    if not collect_ignore_glob:
        importlib.import_module("ray.serve")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Machines]:
    """Two nodes with two CPUs each; this process is no driver of them."""
    from tests.ray.machines import machines

    with machines(2) as found:
        yield found
