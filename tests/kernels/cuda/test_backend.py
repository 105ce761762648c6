"""The backend under the engine: a request's tokens are its own, whatever runs beside it and however its step is padded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.kernels.cuda import ops
from shoal.kernels.cuda.graphs import LARGEST_BUCKET, Graphs, buckets_up_to
from shoal.kernels.reference import PIECE
from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module", params=["F32", "Q4_0", "Q8_0"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", fmt=request.param)
    with LLM(path, device="cuda", max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32) as llm:
        yield llm


def several() -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(seed=2, top_p=0.8, top_k=20, max_tokens=5, ignore_eos=True),
        SamplingParams(seed=3, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.3, max_tokens=7, ignore_eos=True),
        SamplingParams(seed=4, logprobs=3, max_tokens=4, ignore_eos=True),
    ]


def test_tokens_are_the_same_alone_and_together(llm: LLM) -> None:
    prompts = [f"{'many words ' * n}prompt {n}" for n in range(5)]
    together = llm.generate(prompts, several(), use_tqdm=False)
    for prompt, params, output in zip(prompts, several(), together, strict=True):
        alone = llm.generate(prompt, params, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.outputs[0].logprobs == output.outputs[0].logprobs


def test_logits_of_a_prompt_are_the_same_however_it_is_cut(llm: LLM) -> None:
    tokens = list(range(1, 60))
    whole = llm.logits(tokens)
    assert np.isfinite(whole).all()
    assert np.array_equal(llm.logits(tokens[:41]), whole[:41])
    assert np.array_equal(llm.logits([tokens[5:], tokens, [3]])[1], whole)


def test_near_the_reference(llm: LLM) -> None:
    tokens = list(range(1, 40))
    path = llm.path
    with LLM(path, device="reference", max_model_len=128) as reference:
        expected = reference.logits(tokens)
    error = ((llm.logits(tokens) - expected) ** 2).mean() / (expected**2).mean()
    assert error < 2e-5


def test_rows_without_room_for_their_records_are_no_matter_of_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is made for rows that leave records of the pieces of their KV: here the second piece begins, and there is no room."""
    path = write_tiny_model(tmp_path / "tiny.gguf", context=PIECE + 32, layers=1)
    replayed: list[int] = []

    def run(graphs: Graphs, bucket: int) -> None:
        replayed.append(bucket)
        graphs._program(bucket)

    monkeypatch.setattr(Graphs, "run", run)
    params, tokens = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), []
    # Six heads, and of five steps that decode those before the second piece.
    for room, graphs in ((1000, 6 + 5), (0, 6 + 2)):
        monkeypatch.setattr(ops, "record_count", lambda *sizes, room=room: room)
        with LLM(path, device="cuda", max_num_seqs=2, max_num_batched_tokens=PIECE) as llm:
            replayed.clear()
            prompt = {"prompt_token_ids": [n % 200 for n in range(PIECE - 2)]}
            tokens.append(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)
            assert len(replayed) == graphs
    assert tokens[0] == tokens[1]


def test_pages_and_workspace_go_with_the_engine(tmp_path: Path) -> None:
    """At once: the memory of a GPU, which knows nothing of cycles of objects, may be wanted for the next pages."""
    with LLM(write_tiny_model(tmp_path / "tiny.gguf"), device="cuda", max_model_len=64) as llm:
        assert llm.engine._compute is not None
        bound = weakref.ref(llm.engine._compute[0].network)
        gc.disable()
        try:
            llm.engine.close()
            assert bound() is None
        finally:
            gc.enable()


def test_buckets() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(5) == (1, 2, 4, 8)
    assert buckets_up_to(10_000)[-1] == LARGEST_BUCKET
    graphs = Graphs(lambda rows: None, buckets_up_to(5), lambda bucket: None)
    assert [graphs.bucket(rows) for rows in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, None]


def test_a_file_that_is_unpacked_exactly_gives_the_same_tokens_again(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", fmt="Q4_1")
    params = SamplingParams(seed=5, max_tokens=8, ignore_eos=True)
    texts = []
    for _ in range(2):
        with LLM(path, device="cuda", max_model_len=64) as llm:
            texts.append(llm.generate("again", params, use_tqdm=False)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]
