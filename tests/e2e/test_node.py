"""The openai client for Node against a real server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import EngineConfig
from tests.server.running import running

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parent / "node"
CONFIG = EngineConfig(max_num_seqs=8, max_model_len=1024)
MODEL = "smollm2:135m"


def test_the_client_for_node_works_unmodified(smollm2_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on PATH")
    if not (FOLDER / "node_modules" / "openai").is_dir():
        pytest.skip(f"the openai package is not installed: npm install --prefix {FOLDER}")
    with running(lambda: LLM(smollm2_path, config=CONFIG), CONFIG, served=(MODEL,)) as server:
        command = [node, "chat.js", f"{server.url}/v1", MODEL]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok: ") == 8
