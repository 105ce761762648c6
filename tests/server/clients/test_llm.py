"""The program llm, with this server as one of its models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.clients.conftest import Served

pytest.importorskip("llm", reason="llm is not installed: pip install '.[clients]'")

MODELS = """
- model_id: fish
  model_name: {model}
  api_base: {url}/v1
  api_key_name: fish
"""


def test_it_answers_whole_and_streamed(smollm2: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(model=smollm2.model, url=smollm2.url))
    (tmp_path / "keys.json").write_text(json.dumps({"fish": smollm2.key}))
    command = [
        sys.executable,
        "-m",
        "llm",
        "-m",
        "fish",
        "-o",
        "temperature",
        "0",
        "-o",
        "max_tokens",
        "30",
        "--no-log",
    ]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    texts = [
        subprocess.run(
            [*command, *flags, "Name three fish."], env=environment, capture_output=True, text=True, check=True
        )
        for flags in ([], ["--no-stream"])
    ]
    assert texts[0].stdout.strip()
    assert texts[0].stdout == texts[1].stdout
