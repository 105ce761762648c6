"""Tests that use ``drafting`` run twice: without drafts, and with drafts that are right, wrong and mixed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine import toy


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "drafted"])
def drafting(request: pytest.FixtureRequest) -> Iterator[bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "DRAFTING", request.param)
        yield request.param
