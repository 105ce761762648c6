"""The engine half of batches: what is left of one is never taken for the next one's."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.server.store.low_priority import LowPriority
from tests.support.tiny_model import write_tiny_model

ONE = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


def test_what_ended_unseen_is_not_the_next_batchs(model: Path) -> None:
    with LLM(model, device="reference") as llm:
        own = llm.generate(["new"], ONE, use_tqdm=False)[0].outputs[0].text
        half = LowPriority(llm, llm)
        half.submit("old", ONE, request_id="1")
        half.submit_embedding("old", request_id="1-0")
        assert half.abort("1") is True
        half.submit("old", ONE, request_id="2")
        llm.generate("other", ONE, use_tqdm=False)  # moves them on, and they are not fetched
        half.close()
        half = LowPriority(llm, llm)
        half.submit("new", ONE, request_id="1")
        half.submit("new", ONE, request_id="2")
        half.submit_embedding("new", request_id="1-0")
        found = [(output.request_id, output.outputs[0].text) for output in half.step() if output.finished]
        assert sorted(found) == [("1", own), ("2", own)]
        assert [output.request_id for output in half.embeddings()] == ["1-0"]
        assert (half.config, half.tokenizer) == (llm.config, llm.tokenizer)


def test_an_id_is_free_again_at_once(model: Path) -> None:
    with LLM(model, device="reference") as llm:
        for _ in range(2):
            half = LowPriority(llm, llm)
            half.submit("text", SamplingParams(max_tokens=9), request_id="1")
            half.step()
            half.abort("1")
            half.close()
        assert llm.stats().running == 0
