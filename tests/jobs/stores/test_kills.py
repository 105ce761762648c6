"""Drivers that end, sleep or race at requests to an S3 store; ``python -m tests.jobs.stores.kills`` does so at every request."""

from __future__ import annotations

import random

import pytest

from tests.jobs.stores.kills import MOMENTS, Harness, Tally
from tests.jobs.stores.s3 import S3, Moment


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Harness:
    found = Harness(tmp_path_factory.mktemp("kills"), s3)
    assert found.undisturbed() == Tally(jobs=1)
    return found


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_driver_is_killed_and_the_job_goes_on(harness: Harness, share: float, moment: Moment) -> None:
    tally = harness.kill(int(harness.num_requests * share), moment)
    assert (tally.faults, tally.kills > 0) == (0, True), tally.line()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_driver_wakes_when_another_has_done_its_work(harness: Harness, share: float, moment: Moment) -> None:
    tally = harness.sleep(int(harness.num_requests * share), moment)
    assert (tally.faults, tally.sleeps) == (0, 1), tally.line()


def test_two_drivers_at_once(harness: Harness) -> None:
    tally = harness.race(random.Random(0))
    assert tally.faults == 0, tally.line()
