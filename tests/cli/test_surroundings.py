"""The command where hardly anything of what it likes to have is there: no home, no account, caches that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Shoal
from tests.support.other_user import as_nobody_known, public_folder
from tests.support.tiny_model import write_tiny_model

PROGRAM = """
import contextlib, io, json, sys
from shoal.cli.main import main

done = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(arguments)
    done.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(done))
"""


@dataclass
class Done:
    code: int
    out: str
    error: str


def run_as_nobody(folder: Path, *commands: list[Any]) -> list[Done]:
    """``shoal`` with each of some arguments, in ``folder``, without HOME."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    arguments = json.dumps([[str(part) for part in command] for command in commands])
    command = [*as_nobody_known(), sys.executable, "-c", PROGRAM, arguments]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Done(*parts) for parts in json.loads(done.stdout)]


def test_without_home_and_account_it_works_or_says_what_to_set() -> None:
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
    with public_folder() as folder:
        model = write_tiny_model(folder / "tiny.gguf")
        (folder / "in.jsonl").write_text(json.dumps(row) + "\n")
        job = ["run-batch", "--device", "reference", "-i", "in.jsonl"]
        *needs_a_folder, inspected, environment, done, refused = run_as_nobody(
            folder,
            ["pull", "smollm2:135m"],
            ["rm", "smollm2:135m"],
            ["list"],
            ["inspect", "--device", "reference", model],
            ["collect-env", "--json"],
            [*job, "-o", "out.jsonl", model],
            [*job, "-o", "none.jsonl", "smollm2:135m"],
        )
        for command in (*needs_a_folder, refused):
            assert (command.code, command.out) == (2, "")
            assert command.error.endswith("as this user has no home; set SHOAL_CACHE to a folder of yours\n")
            assert command.error.count("\n") == 1
        assert inspected.code == 0, inspected.error
        assert done.code == 0, done.error
        assert environment.code == 0, environment.error
        facts = json.loads(environment.out)
        assert facts["models_folder"] == facts["kernel_cache_folder"] == "none (this user has no home)"
        made = {path.name for path in folder.iterdir() if not path.name.startswith("shoal-")}
        assert made == {"tiny.gguf", "in.jsonl", "out.jsonl", "out.jsonl.shoal"}


def test_collect_env_says_what_keeps_the_kernels_from_running(
    shoal_process: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_ISA", "mmx")
    done = shoal_process("collect-env", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["isa"].startswith("none (SHOAL_ISA: got 'mmx'")
