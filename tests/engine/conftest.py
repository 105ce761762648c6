"""Tests that use ``drafting`` run twice: without drafts, and with drafts that are right, wrong and mixed."""

from __future__ import annotations

import pytest

from tests.engine import toy


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "drafted"])
def drafting(request: pytest.FixtureRequest) -> bool:
    drafted: bool = request.param
    return drafted


@pytest.fixture(autouse=True)
def drafts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For such a test, whatever ran before it."""
    wanted = "drafting" in request.fixturenames and request.getfixturevalue("drafting")
    monkeypatch.setattr(toy, "DRAFTING", wanted)
