"""A tiny model for the benchmarks, and no time for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.llm import LLM
from tests.support.haste import hurry
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", fmt="Q4_1")


@pytest.fixture
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(
        tiny, device="reference", max_num_seqs=4, max_num_batched_tokens=16, enable_prefix_caching=False
    ) as opened:
        yield opened
