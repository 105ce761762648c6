"""Speculation through the public API: whatever a request asks for, its answer is the one without guesses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.draft_model_pace import ModelPace
from shoal.engine.draft_pace import DraftPace
from shoal.gguf.reader import GGUFFile
from shoal.llm import LLM, CompletionOutput
from shoal.params import SamplingParams, SpeculativeConfig, StructuredOutputsParams
from tests.support.tiny_model import VOCAB_SIZE, write_tiny_model

METHODS: list[dict[str, Any]] = [
    {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1},
    {"method": "suffix", "suffix_decoding_max_spec_factor": 4},
    {"method": "draft_model", "model": "tiny.gguf"},  # itself: what it guesses is right
    {"method": "draft_model", "model": "other.gguf"},
]
EVERYTHING = {"prompt_token_ids": list(range(3, VOCAB_SIZE - 3))}  # whatever comes has come before
PROMPTS: list[Any] = [EVERYTHING, "one two one two one", "a b c a b"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "other.gguf", context=64, layers=1, seed=1)
    return write_tiny_model(folder / "tiny.gguf", context=1024)


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[LLM]:
    with LLM(path, device="reference") as llm:
        yield llm


def speculative_config(method: dict[str, Any], path: Path) -> dict[str, Any]:
    return {**method, "model": path.with_name(method["model"])} if "model" in method else method


@pytest.fixture(params=METHODS, ids=lambda config: config.get("model", config["method"]))
def guessing(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """As many guesses as there can be."""
    monkeypatch.setattr(ModelPace, "may_begin", True)
    monkeypatch.setattr(DraftPace, "counts", lambda self, chances, most, room: [max(0, count) for count in most])
    with LLM(path, device="reference", speculative_config=speculative_config(request.param, path)) as llm:
        yield llm


def answers(llm: LLM, params: SamplingParams) -> list[CompletionOutput]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert not any(output.error for output in outputs)
    return [answer for output in outputs for answer in output.outputs]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "logprobs": 3},
        {"n": 4, "logprobs": 1},
        {"temperature": 2.0, "stop": ["e", "7", "@@"], "min_tokens": 4},
        {"temperature": 2.0, "stop": ["e", "7"], "include_stop_str_in_output": True},
        {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 1.0},
        {"structured_outputs": StructuredOutputsParams(regex="(ab|cd|x[0-9]){5,30}"), "logprobs": 2},
        {"structured_outputs": StructuredOutputsParams(choice=["one two one", "one two two", "three"])},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_answers_are_those_without_guesses(plain: LLM, guessing: LLM, fields: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": 40, "seed": 5, **fields})
    expected = answers(plain, params)
    for _ in range(2):  # the second time earlier answers are known
        assert answers(guessing, params) == expected
    stats = guessing.engine.stats()
    assert stats.spec_decode_num_draft_tokens > 0
    if guessing.config.speculative_config in (
        SpeculativeConfig(**METHODS[1]),
        SpeculativeConfig(**speculative_config(METHODS[2], guessing.path)),
    ):
        assert stats.spec_decode_num_accepted_tokens > 5


def test_a_stream_grows_to_the_same_text(plain: LLM, guessing: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    (expected,) = plain.generate(PROMPTS[1], params, use_tqdm=False)
    seen = [output.outputs[0] for output in guessing.stream(PROMPTS[1], params)]
    lengths = [len(answer.token_ids) for answer in seen]
    assert lengths == sorted(lengths)
    assert all(expected.outputs[0].text.startswith(answer.text) for answer in seen)
    assert seen[-1] == expected.outputs[0]
    assert len(seen) < 40


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1.0, "n": 3}, {"temperature": 0.7, "top_p": 0.9}]
)
def test_a_real_model_guesses_right_for_itself(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    """Greedy or sampled, each token is computed once: its guesses are drawn with the same random numbers."""
    monkeypatch.setattr(ModelPace, "may_begin", True)
    monkeypatch.setattr(DraftPace, "counts", lambda self, chances, most, room: [max(0, count) for count in most])
    prompts, asked = ["The capital of France is", "Once upon a time"], SamplingParams(max_tokens=20, seed=3, **params)
    sizes: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 8}
    with LLM(smollm2_path, **sizes) as plain:
        expected = plain.generate(prompts, asked, use_tqdm=False)
    itself = {"method": "draft_model", "model": smollm2_path, "num_speculative_tokens": 4}
    with LLM(smollm2_path, **sizes, speculative_config=itself) as llm:
        found = llm.generate(prompts, asked, use_tqdm=False)
        stats = llm.engine.stats()
    assert [output.outputs for output in found] == [output.outputs for output in expected]
    assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens
    assert stats.spec_decode_num_accepted_tokens > 0.7 * stats.generation_tokens


def coarser(path: Path, copy: Path) -> Path:
    """A copy with matrices in 8 levels instead of 16 (Q4_1: float16 scale and minimum, then two codes a byte)."""
    data = np.fromfile(path, np.uint8)
    with GGUFFile.open(path) as file:
        for name, info in file.tensors.items():
            if info.format.name == "Q4_1" and "ffn_down" in name:
                blocks = data[info.offset : info.offset + info.nbytes].reshape(-1, info.format.block_bytes)
                scales = blocks[:, :4].copy().view(np.float16)
                scales[:, 1] += scales[:, 0] / 2  # what lies between two levels
                blocks[:, :4], blocks[:, 4:] = scales.view(np.uint8), blocks[:, 4:] & 0xEE
    data.tofile(copy)
    return copy


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_coarser_copy_of_a_real_model_is_often_right(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(ModelPace, "may_begin", True)
    monkeypatch.setattr(DraftPace, "counts", lambda self, chances, most, room: [max(0, count) for count in most])
    prompts = ["The capital of France is", "1, 2, 3, 4, 5, 6,"]
    params = SamplingParams(temperature=temperature, max_tokens=30, seed=3, n=2, top_p=0.9)
    sizes: dict[str, Any] = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 8}
    with LLM(smollm2_path, **sizes) as plain:
        expected = plain.generate(prompts, params, use_tqdm=False)
    copy = coarser(smollm2_path, tmp_path / "coarser.gguf")
    guesses = {"method": "draft_model", "model": copy, "num_speculative_tokens": 4}
    with LLM(smollm2_path, **sizes, speculative_config=guesses) as llm:
        found = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.engine.stats()
    copy.unlink()
    assert [output.outputs for output in found] == [output.outputs for output in expected]
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens


def test_a_new_size_holds_for_the_draft_model_too(path: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelPace, "may_begin", True)
    config = speculative_config(METHODS[2], path)
    with LLM(path, device="reference", max_model_len=256, max_num_seqs=4, speculative_config=config) as llm:
        before = llm.engine.memory_plan
        llm.resize(max_num_seqs=2)
        after = llm.engine.memory_plan
        assert before.draft is not None
        assert after.draft is not None
        assert (before.draft.num_pages, after.draft.num_pages) == ((64,), (32,))
        params = SamplingParams(temperature=0, max_tokens=30)
        assert [o.outputs for o in llm.generate(PROMPTS[1:], params, use_tqdm=False)] == [
            o.outputs for o in plain.generate(PROMPTS[1:], params, use_tqdm=False)
        ]
