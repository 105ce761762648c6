"""Fixtures for all tests: the golden data, and the two real models where they are already in the cache."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines that run tests are busy at times: what hypothesis may find is not how long an example takes.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")

# Before NumPy is imported, here and in the processes that tests start: threads of a BLAS spin until all have come, which on a busy
# machine takes a hundred times as long as the small products of tests. tests/kernels/test_reference.py has more of them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell that runs the tests in the background has SIGINT ignored, and every process started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_NO_GOLDEN = "golden data is absent"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference answers: SHOAL_GOLDEN, or shared/golden beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("SHOAL_GOLDEN", beside))
    if not folder.is_dir():
        pytest.skip(f"{_NO_GOLDEN}: no folder {folder} (set SHOAL_GOLDEN)")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M Instruct (Q4_1)."""
    return _cached_model("smollm2:135m")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M (Q4_K_M)."""
    return _cached_model("gemma3:270m")


def _cached_model(name: str) -> Path:
    from shoal import hub

    path = hub.cached(name)
    if path is None:
        pytest.skip(f"model {name} is not in the cache: run `shoal pull {name}`")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was not checked because the golden data is not here."""
    skipped = terminalreporter.stats.get("skipped", [])
    absent = sum(_NO_GOLDEN in str(report.longrepr) for report in skipped)
    if absent:
        terminalreporter.write_line(f"{absent} tests were skipped: {_NO_GOLDEN}")
