"""Kernels compiled by several processes: in processes of their own, with an empty store each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from shoal.kernels.cpu import attention, elementwise, together
from shoal.kernels.cpu.jit import STORE, Lazy

heard = []
Lazy.on_compile = heard.append
kernels = [elementwise.quantise, elementwise.add_rows, elementwise.multiply, elementwise.add_bias, attention.merge]
{change}
together.compile_together(kernels, 2)
assert all(kernel.get() for kernel in kernels)
print(len(heard), len(set(heard)), sum(STORE.has(kernel.cache_name) for kernel in kernels))
"""


def _said(folder: Path, change: str = "") -> list[int]:
    environment = {**os.environ, "SHOAL_KERNEL_CACHE": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM.format(change=change)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_each_is_compiled_by_one_and_loaded_by_the_next_start(tmp_path: Path) -> None:
    assert _said(tmp_path) == [5, 5, 5]
    assert _said(tmp_path) == [0, 0, 5]


@pytest.mark.parametrize(
    "change",
    [
        "sys.executable = '/nonexistent'",
        "sys.executable = '/bin/false'",
        "sys.executable = '/bin/cat'",
        "sys.executable = ''",
        "sys.frozen = True; sys.executable = '/bin/false'",
        "sys.executable = {silent!r}",
    ],
)
def test_without_a_helper_all_is_compiled_here(tmp_path: Path, change: str) -> None:
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o700)
    assert _said(tmp_path / "kernels", change.format(silent=str(silent))) == [5, 5, 5]


def test_a_process_forked_meanwhile_holds_up_nothing(tmp_path: Path) -> None:
    """It inherits the pipes to the helpers."""
    change = """
import os, signal, threading, time
def fork():
    time.sleep(0.3)
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    children.append(child)
children = []
forking = threading.Thread(target=fork)
forking.start()
import atexit
atexit.register(lambda: [os.kill(child, signal.SIGKILL) for child in children])
"""
    assert _said(tmp_path, change) == [5, 5, 5]


def test_a_start_that_finds_all_tries_to_write_nothing(tmp_path: Path) -> None:
    _said(tmp_path)
    spoilt = "STORE.__dict__['_unwritable'] = property(lambda self: 1 / 0); type(STORE)._spare = property(lambda self: 1 / 0)"
    assert _said(tmp_path, spoilt) == [0, 0, 5]


def test_without_a_place_for_kernels_all_is_compiled_here(tmp_path: Path) -> None:
    assert _said(tmp_path, "STORE.folder = None; STORE.__dict__['_spare'] = None") == [5, 5, 0]
