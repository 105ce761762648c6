"""Running a program as a user who has no account, no home and no right to write anywhere but in /tmp."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

UID = 1000770000


def as_nobody_known() -> list[str]:
    """What stands before the command: it may read everything, as Python may lie in root's home. Skips where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    read_all = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    command = ["setpriv", f"--reuid={UID}", "--regid=0", "--clear-groups", *read_all]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("setpriv cannot change the user here")
    return command


@contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that everybody can write to, as /tmp; those that pytest makes are closed to others."""
    with TemporaryDirectory(prefix="shoal-test-") as name:
        os.chmod(name, 0o1777)
        yield Path(name)
