"""One server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import EngineConfig
from tests.server.running import Running, running
from tests.support.tiny_model import write_tiny_model

CONFIG = EngineConfig(
    device="reference", max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, preempt_for_priority=True
)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def server(tiny_path: Path) -> Iterator[Running]:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, served=("tiny", "alias")) as server:
        yield server
