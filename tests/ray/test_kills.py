"""A few of the kills of ``python -m tests.ray.kills``, and the loss of what a driver cannot do without."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from tests.jobs import kills as on_one
from tests.ray.driver import Orders
from tests.ray.kills import Driver, run_kills
from tests.ray.machines import machines
from tests.support.tiny_model import write_tiny_model


def test_whatever_dies_each_row_has_one_record_that_is_the_right_one(tmp_path: Path) -> None:
    wanted = Counter(worker=6, driver=1, node=1, raylet=1, zombie=1)
    tally = run_kills(tmp_path, wanted, random.Random(1))
    assert not tally.faults
    assert tally.done >= wanted
    assert tally.late, "a zombie has answered"


def test_a_driver_that_has_lost_its_node_ends_and_says_that_nothing_is_lost(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    on_one.write_rows(tmp_path / "in.jsonl", random.Random(0))
    with machines(1) as found:
        driver = Driver(tmp_path, Orders(str(model), found.address, workers=2, seconds_a_step=1.0))
        assert driver.wait(driver.at_work)
        found.kill_head()
        assert driver.end() == 1
    said = (tmp_path / "stderr").read_text()
    assert "the Ray node of this machine" in said
    assert "cannot be reached; finished rows are safe, resume with the same command" in said
    shutil.rmtree(tmp_path / "out.jsonl.shoal")
