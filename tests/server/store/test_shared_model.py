"""Batches on the model of a server that others use too, whose thread computes the steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import EngineConfig, SamplingParams
from shoal.server.store.runner import BatchRunner, Served
from shoal.server.store.store import Store
from tests.server.running import running
from tests.server.store.served import records, rows, submit, wait
from tests.support.tiny_model import write_tiny_model

CONFIG = EngineConfig(device="reference", max_num_seqs=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


def test_rows_and_requests_are_answered_side_by_side(model: Path, tmp_path: Path) -> None:
    with LLM(model, config=CONFIG) as alone:
        greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        texts = [
            out.outputs[0].text for out in alone.generate([f"text {i}" for i in range(20)], greedy, use_tqdm=False)
        ]
    store = Store(tmp_path)
    runner = BatchRunner(store)
    with running(lambda: LLM(model, config=CONFIG), CONFIG) as server:
        llm = server.llm
        runner.start(Served(llm, server.service.worker.session("batch:"), ("tiny",)))
        batch = submit(store, runner, rows(20, temperature=0))
        body = {"prompt": "text 7", "temperature": 0, "max_tokens": 3, "ignore_eos": True}
        answers = [server.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(3)]
        found = records(store, wait(store, batch))
        runner.stop()
    store.close()
    assert answers == [texts[7]] * 3
    assert found == {f"row-{i}": text for i, text in enumerate(texts)}


def test_stopping_gives_the_engine_back(model: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    runner = BatchRunner(store)
    with running(lambda: LLM(model, config=CONFIG), CONFIG) as server:
        llm = server.llm
        runner.start(Served(llm, server.service.worker.session("batch:"), ("tiny",)))
        batch = submit(store, runner, rows(50, max_tokens=100))
        wait(store, batch, lambda found: llm.stats().running > 0)
        runner.stop()
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)
    assert store.batches.get("me", batch.id).status == "in_progress"
    store.close()
