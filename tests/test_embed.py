"""LLM.embed and LLM.score, on tiny encoders and on a tiny decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM
from shoal.params import BeamSearchParams, PoolingParams, SamplingParams
from tests.support.tiny_encoders import RANK, TINY_ENCODERS, TinyEncoder
from tests.support.tiny_model import write_tiny_model

TEXTS = ["abc def", "a", "uvu ab " * 5, "dad cab", "b b b"]
CLS_ID, SEP_ID = 2, 3
RAW = PoolingParams(normalize=False)


def encoder(path: Path, name: str = "bert", **changes: Any) -> Path:
    changed: TinyEncoder = dataclasses.replace(TINY_ENCODERS[name], words=True, **changes)
    return changed.write(path)


def load(path: Path, device: str = "cpu", **flags: Any) -> LLM:
    return LLM(path, device=device, **{"max_num_seqs": 3, "max_num_batched_tokens": 64, **flags})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with load(encoder(tmp_path_factory.mktemp("bert") / "bert.gguf")) as llm:
        yield llm


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with load(encoder(tmp_path_factory.mktemp("rank") / "rank.gguf", "bert_rank")) as llm:
        yield llm


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama") / "tiny.gguf")


def vectors(llm: LLM, inputs: Any, params: PoolingParams | None = None) -> list[NDArray[np.float64]]:
    outputs = llm.embed(inputs, pooling_params=params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [np.array(output.outputs.embedding) for output in outputs]


# --- what comes out ------------------------------------------------------------------------------------------------------


def test_outputs_are_vllms(bert: LLM) -> None:
    (output,) = bert.embed("abc v")
    assert output.prompt_token_ids == [CLS_ID, 5, 27, 28, 47, SEP_ID]
    assert output.finished
    assert output.outputs.hidden_size == len(output.outputs.embedding) == 40
    assert math.isclose(np.linalg.norm(output.outputs.embedding), 1.0, rel_tol=1e-6)
    assert [bert.embed(TEXTS)[i].outputs.embedding for i in (1, 2)] == [
        bert.embed(TEXTS[i])[0].outputs.embedding for i in (1, 2)
    ]


@pytest.mark.parametrize("name", ["bert", "nomic-bert", "jina-bert-v2"])
def test_the_same_bits_alone_and_together(tmp_path: Path, name: str) -> None:
    with load(encoder(tmp_path / "tiny.gguf", name), max_num_seqs=8) as llm:
        together = vectors(llm, TEXTS * 3)
        alone = [vectors(llm, text)[0] for text in TEXTS]
    for i, vector in enumerate(together):
        assert np.array_equal(vector, alone[i % len(TEXTS)])


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("name", ["bert", "nomic-bert"])
def test_quantised_encoders(tmp_path: Path, name: str, fmt: str) -> None:
    """Activations are int8 then: near the twin's floats, and the same bits in any company."""
    wide: dict[str, Any] = {"n_embd": 64, "n_ff": 96, "head_dim": 16, "shapes": {"token_types": (2, 64)}, "fmt": fmt}
    path = encoder(tmp_path / "tiny.gguf", name, **wide)
    with load(path, max_num_seqs=8, pooling_type="mean") as llm:
        found = vectors(llm, TEXTS)
        assert all(np.array_equal(vectors(llm, text)[0], vector) for text, vector in zip(TEXTS, found, strict=True))
    with load(path, "reference", pooling_type="mean") as llm:
        expected = vectors(llm, TEXTS)
    assert max(1 - a @ b for a, b in zip(found, expected, strict=True)) < (1e-6 if fmt == "F16" else 1e-3)


def test_pooling_is_of_the_states(tmp_path: Path) -> None:
    path = encoder(tmp_path / "tiny.gguf")
    found = {}
    for pooling in ("none", "MEAN", "cls", "last"):
        with load(path, pooling_type=pooling) as llm:
            found[pooling] = vectors(llm, TEXTS[0], RAW)[0]
    states = found["none"]
    assert states.shape == (8, 40)
    assert np.array_equal(found["cls"], states[0])
    assert np.array_equal(found["last"], states[-1])
    total = np.zeros(40)
    for state in states:
        total += state
    assert np.array_equal(found["MEAN"], (total / 8).astype(np.float32))


def test_without_a_word_in_the_file_the_first_or_last_state_is_taken(tmp_path: Path, decoder: Path) -> None:
    path = encoder(tmp_path / "tiny.gguf", pooling=None)
    with load(path) as llm, load(path, pooling_type="cls") as first:
        assert np.array_equal(vectors(llm, TEXTS[0])[0], vectors(first, TEXTS[0])[0])
    with load(decoder) as llm, load(decoder, pooling_type="last") as last:
        assert np.array_equal(vectors(llm, TEXTS[0])[0], vectors(last, TEXTS[0])[0])


def test_dimensions_are_the_first_normalised_anew(bert: LLM) -> None:
    whole = vectors(bert, TEXTS[0], RAW)[0]
    cut = vectors(bert, TEXTS[0], PoolingParams(dimensions=7))[0]
    assert np.allclose(cut, whole[:7] / np.linalg.norm(whole[:7]), rtol=1e-6)
    assert np.array_equal(vectors(bert, TEXTS[0], PoolingParams(dimensions=7, normalize=False))[0], whole[:7])
    with pytest.raises(ParameterError, match="dimensions: got 41, must be at most the model's 40"):
        bert.embed(TEXTS, pooling_params=PoolingParams(dimensions=41))


# --- what does not fit ------------------------------------------------------------------------------------------------------


def test_an_input_longer_than_a_step_is_refused_with_both_numbers(bert: LLM) -> None:
    long, short = bert.embed(["ab " * 32, "ab"])
    assert long.error is not None
    assert "66 tokens" in long.error
    assert "64" in long.error
    assert "one step" in long.error
    assert long.outputs.embedding == []
    assert short.error is None


def test_context_and_step_bound_max_model_len(tmp_path: Path) -> None:
    path = encoder(tmp_path / "tiny.gguf")
    with load(path, max_num_batched_tokens=24) as llm:
        assert llm.engine.max_model_len == 24
    with pytest.raises(ParameterError, match=r"max_model_len: got 30, must be .*context 64.*max_num_batched_tokens 24"):
        load(path, max_num_batched_tokens=24, max_model_len=30)


def test_the_size_of_a_step_may_change(tmp_path: Path) -> None:
    """And with it how long an input may be; a target for the time of a step cuts no input."""
    texts = ["ab " * 5, "ab " * 20]
    with load(encoder(tmp_path / "tiny.gguf"), max_num_batched_tokens=24, target_step_ms=0.001) as llm:
        before = llm.embed(texts)
        llm.resize(max_num_batched_tokens=64, max_num_seqs=8)
        after = llm.embed(texts * 4)
        assert len(llm.embed(texts[1] * 9, truncate_prompt_tokens=-1)[0].prompt_token_ids) == 64
    assert [output.error is None for output in before] == [True, False]
    assert all(output.error is None for output in after)
    assert after[0].outputs == after[6].outputs == before[0].outputs


def test_what_is_too_long_is_cut_when_asked(bert: LLM) -> None:
    text = "abc def " * 40
    (cut,) = bert.embed(text, truncate_prompt_tokens=9)
    body = bert.encode("abc def")[1:-1]
    assert cut.prompt_token_ids == [CLS_ID, *(body * 2)[:7], SEP_ID]
    assert len(bert.embed(text, truncate_prompt_tokens=-1)[0].prompt_token_ids) == 64
    assert bert.embed({"prompt": text}, truncate_prompt_tokens=9)[0].prompt_token_ids == cut.prompt_token_ids
    bare: dict[str, Any] = {"prompt": text, "add_special_tokens": False}
    assert bert.embed(bare, truncate_prompt_tokens=7)[0].prompt_token_ids == cut.prompt_token_ids[1:-1]
    assert bert.embed({"prompt_token_ids": [9] * 70}, truncate_prompt_tokens=5)[0].prompt_token_ids == [9] * 5
    assert bert.embed("a", truncate_prompt_tokens=9)[0].outputs == bert.embed("a")[0].outputs
    with pytest.raises(ParameterError, match="truncate_prompt_tokens: got 65, must be at most max_model_len 64"):
        bert.embed(text, truncate_prompt_tokens=65)
    assert "no room" in (bert.embed(text, truncate_prompt_tokens=2)[0].error or "")


def test_bad_inputs_are_errors_of_their_own(bert: LLM) -> None:
    inputs: list[Any] = ["", "ab", 5, {"prompt_token_ids": [1 << 20]}, "\ud800"]
    outputs = bert.embed(inputs)
    assert [output.error is None for output in outputs] == [False, True, False, False, False]
    with pytest.raises(RequestError, match="empty"):
        bert.embed([])


def test_an_encoder_continues_nothing(bert: LLM) -> None:
    for call in (
        lambda: bert.generate("ab"),
        lambda: bert.chat([{"role": "user", "content": "ab"}]),
        lambda: list(bert.stream("ab")),
        lambda: bert.submit("ab", SamplingParams()),
        lambda: bert.beam_search(["ab"], BeamSearchParams(beam_width=2, max_tokens=3)),
        lambda: bert.logits([5, 6]),
    ):
        with pytest.raises(RequestError, match="bert is an encoder"):
            call()
    assert bert.engine.stats().running == bert.engine.stats().waiting == 0


def test_params_are_checked() -> None:
    wrong: list[dict[str, Any]] = [{"dimensions": 0}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2}]
    for fields in [*wrong, {"normalize": 1}]:
        with pytest.raises(ParameterError, match=next(iter(fields))):
            PoolingParams(**fields)


def test_pooling_types_are_checked(tmp_path: Path) -> None:
    path = encoder(tmp_path / "tiny.gguf")
    for wrong in ("sum", "rank"):
        with pytest.raises(ParameterError, match="pooling_type"):
            load(path, pooling_type=wrong)


# --- decoders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_chunks_and_texts_beside_change_no_bit(decoder: Path, pooling: str) -> None:
    """A decoder's input is computed in parts, next to others that generate."""
    inputs = ["the first text, which is long " * 3, "two", "the first text, which is short"]
    found = []
    for rows in (256, 7):
        with load(decoder, pooling_type=pooling, max_num_batched_tokens=rows, max_num_seqs=4) as llm:
            llm.submit("beside them", SamplingParams(max_tokens=12, seed=1), request_id="beside")
            found += [vectors(llm, inputs), [vectors(llm, text)[0] for text in inputs]]
            texts = [out.outputs[0].token_ids for out in llm.step() if out.finished]
            while llm.has_work:
                texts += [out.outputs[0].token_ids for out in llm.step() if out.finished]
            alone = llm.generate("beside them", SamplingParams(max_tokens=12, seed=1))[0].outputs[0].token_ids
            assert texts == [alone]
    for others in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_the_last_state_may_follow_a_cached_prefix(decoder: Path) -> None:
    text = "a beginning that several texts have in common, "
    with load(decoder, max_num_batched_tokens=256) as llm:
        fresh = llm.embed(text + "and an end")[0]
        llm.generate(text + "or another", SamplingParams(max_tokens=2))
        again = llm.embed(text + "and an end")[0]
    assert (fresh.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    assert fresh.outputs == again.outputs


def test_states_are_those_that_logits_come_of(decoder: Path) -> None:
    """The head of the tiny model is its embedding: logits are the products with what is embedded."""
    from shoal.gguf.reader import GGUFFile

    with GGUFFile.open(decoder) as file:
        raw = file.tensor("token_embd.weight")
        table = raw.view(np.float32).reshape(len(raw), -1).copy()
    with load(decoder, device="reference", pooling_type="none") as llm:
        ids = llm.encode("some text")
        states = vectors(llm, {"prompt_token_ids": ids}, RAW)[0]
        assert np.allclose(states @ table.T.astype(np.float64), llm.logits(ids), atol=1e-4)


# --- scores -------------------------------------------------------------------------------------------------------------------


def test_a_ranker_reads_both_texts(ranker: LLM) -> None:
    outputs = ranker.score("abc", TEXTS)
    logits = ranker.score("abc", TEXTS, pooling_params=PoolingParams(use_activation=False))
    assert outputs[1].prompt_token_ids == [CLS_ID, 5, 27, 28, SEP_ID, 5, SEP_ID]
    for output, logit in zip(outputs, logits, strict=True):
        assert math.isclose(output.outputs.score, 1 / (1 + math.exp(-logit.outputs.score)), rel_tol=1e-12)
    assert len({output.outputs.score for output in outputs}) == len(TEXTS)
    assert ranker.score("abc", TEXTS[3])[0].outputs == outputs[3].outputs
    assert ranker.score(["a", "abc"], TEXTS[2:4])[1].outputs == outputs[3].outputs


def test_a_ranker_embeds_nothing_unless_told_to(ranker: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"pooling rank scores pairs of texts \(LLM.score\)"):
        ranker.embed("abc")
    with load(encoder(tmp_path / "tiny.gguf", "bert_rank"), pooling_type="mean") as llm:
        assert len(vectors(llm, "abc")[0]) == 40


def test_pairs_that_do_not_fit(ranker: LLM) -> None:
    long = "a " * 80
    refused, fine = ranker.score("abc", [long, "a"])
    assert "64" in (refused.error or "")
    assert math.isnan(refused.outputs.score)
    assert fine.error is None
    (cut,) = ranker.score("abc", long, truncate_prompt_tokens=10)
    assert cut.prompt_token_ids == [CLS_ID, 5, 27, 28, SEP_ID, 5, 5, 5, 5, SEP_ID]
    with pytest.raises(ParameterError, match="data_1: got '2 items', must be one, or as many as data_2 has"):
        ranker.score(["a", "b"], ["a", "b", "c"])


def test_without_a_classifier_scores_are_cosines(bert: LLM) -> None:
    a, b, c = vectors(bert, TEXTS[:3])
    scores = [output.outputs.score for output in bert.score(TEXTS[0], TEXTS[:3])]
    assert np.allclose(scores, np.array([1.0, a @ b, a @ c]), atol=1e-6)


def test_what_needs_one_embedding_refuses_many(tmp_path: Path) -> None:
    with load(encoder(tmp_path / "tiny.gguf"), pooling_type="none") as llm:
        for call in (lambda: llm.score("a", "b"), lambda: llm.submit_embedding("a")):
            with pytest.raises(RequestError, match="pooling none gives an embedding for each token"):
                call()


def test_a_classifier_is_needed_to_rank(tmp_path: Path) -> None:
    from shoal.errors import GGUFError

    with pytest.raises(GGUFError, match=r"cls\.weight.*missing"):
        load(encoder(tmp_path / "tiny.gguf", pooling=RANK))
