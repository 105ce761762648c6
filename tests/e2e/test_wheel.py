"""The wheel has the page in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shoal.server.routes.page import page_folder
from tests.server.page.test_files import page_files

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_has_every_file_of_the_page(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(REPOSITORY),
    ]
    subprocess.run(build, check=True, timeout=500)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"shoal/server/page/{name}" for name, _ in page_files(page_folder())}
    assert wanted <= packed
    assert len(wanted) > 10
