"""The command line in a container: under a tree of cgroup files that looks like one, in a mount namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.support.tiny_model import write_tiny_model

MIB = 1 << 20

# What a container of 512 MiB and one CPU sees, in place of the real /sys/fs/cgroup; then the command.
ENTER = """
set -e
mount --make-rprivate /
umount -R /sys/fs/cgroup 2>/dev/null || true
mount --bind "$0/tree" /sys/fs/cgroup
mount --bind "$0/self" /proc/$$/cgroup
exec "$@"
"""


def can_unshare() -> bool:
    """Whether this process may have mounts of its own."""
    try:
        command = ["unshare", "-m", "mount", "--make-rprivate", "/"]
        return os.geteuid() == 0 and not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """The folder with what takes the place of the real files."""
    if not can_unshare():
        pytest.skip("needs root and unshare for a mount namespace")
    folder = tmp_path / "container"
    files = {
        "memory.max": f"{512 * MIB}\n",
        "memory.current": f"{50 * MIB}\n",
        "memory.stat": f"anon {40 * MIB}\ninactive_file {10 * MIB}\n",
        "cpu.max": "100000 100000\n",
        "cgroup.controllers": "cpu memory\n",
    }
    (folder / "tree").mkdir(parents=True)
    for name, text in files.items():
        (folder / "tree" / name).write_text(text)
    (folder / "self").write_text("0::/\n")
    return folder


def run(container: Path, *arguments: str | Path) -> dict[str, str]:
    """A verb inside; its lines, each by its first word or two."""
    shell = shutil.which("sh") or "/bin/sh"
    command = [sys.executable, "-m", "shoal.cli.main", *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "-m", shell, "-c", ENTER, str(container), *command],
        capture_output=True,
        text=True,
        env=environment(container),
        timeout=120,
        check=True,
    )
    lines = (line.strip().partition("  ") for line in done.stdout.splitlines())
    return {name: value.strip() for name, _, value in lines}


def test_collect_env_tells_the_limits_and_where_they_are_from(container: Path) -> None:
    facts = run(container, "collect-env")
    assert facts["threads"] == "1"
    assert facts["cpu_quota"] == "1 (/sys/fs/cgroup/cpu.max)"
    assert (facts["memory_limit"], facts["memory_limit_set_by"]) == ("0.5 GiB", "/sys/fs/cgroup/memory.max")


def test_inspect_tells_them_and_plans_with_them(container: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", context=1 << 20)
    facts = run(container, "inspect", model, "--max-num-seqs", "65536")
    assert "1 threads" in facts["backend"]
    assert facts["CPU quota"] == "1 (/sys/fs/cgroup/cpu.max)"
    assert facts["memory limit"] == "512.0 MiB (/sys/fs/cgroup/memory.max)"
    budget = int(facts["kv_cache_memory"])
    assert 0.39 * 472 * MIB < budget <= 0.4 * 472 * MIB
