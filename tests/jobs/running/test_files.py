"""Which files a job may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import ParameterError
from shoal.jobs.running.files import JobFiles


def test_an_input_that_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    """It would be used up by the check of its rows, and none would be left to run."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ParameterError, match=r"input file: got '.*pipe', must be a regular file, or - for stdin"):
        JobFiles.named(pipe, tmp_path / "out.jsonl").check()


@pytest.mark.parametrize(("name", "says"), [("", "a file, not a folder"), ("absent.jsonl", "a file that exists")])
def test_an_input_that_is_no_file_is_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ParameterError, match=f"input file: got '.*', must be {says}"):
        JobFiles.named(tmp_path / name, tmp_path / "out.jsonl").check()
