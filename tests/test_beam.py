"""Beam search against all texts there are, on a tiny model with random weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shoal.beam import BeamSearch
from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM
from shoal.outputs import Logprob
from shoal.params import BeamSearchParams
from tests.support.tiny_model import VOCAB_SIZE, write_tiny_model

PROMPT = {"prompt_token_ids": [65, 66, 67]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with LLM(path, device="reference", max_num_seqs=16, max_num_batched_tokens=64, max_model_len=40) as llm:
        yield llm


def log_softmax(logits: Any) -> Any:
    scores = logits.astype(np.float64) - logits.max()
    return scores - np.log(np.exp(scores).sum())


def test_finds_what_a_search_by_hand_finds(llm: LLM) -> None:
    """The same rules, over all tokens instead of the likeliest of each beam."""
    width, beams = 4, [(0.0, [65, 66, 67])]
    for _ in range(3):
        rows = llm.logits([tokens for _, tokens in beams])
        grown = [
            (score + float(log_softmax(row[-1])[token]), [*tokens, token])
            for (score, tokens), row in zip(beams, rows, strict=True)
            for token in range(VOCAB_SIZE)
        ]
        beams = sorted(grown, key=lambda item: -item[0])[:width]
    (found,) = llm.beam_search([PROMPT], BeamSearchParams(width, 3, ignore_eos=True))
    assert [sequence.tokens for sequence in found.sequences] == [tokens for _, tokens in beams]
    for sequence, (score, _) in zip(found.sequences, beams, strict=True):
        assert sequence.cum_logprob == pytest.approx(score, abs=1e-4)
        assert sequence.finish_reason == "length"
        assert len(sequence.logprobs) == 3
        assert llm.tokenizer is not None
        assert sequence.text == llm.tokenizer.decode(sequence.tokens, skip_special=True)


def test_prompts_do_not_matter_to_each_other(llm: LLM) -> None:
    prompts: list[Any] = ["one", PROMPT, "", {"prompt_token_ids": [VOCAB_SIZE]}, {"prompt_token_ids": [1] * 36}]
    params = BeamSearchParams(3, 6)
    together = llm.beam_search(prompts, params)
    assert [output.error is None for output in together] == [True, True, False, False, True]
    assert together[3].sequences == []
    assert "ends at" in str(together[3].error)
    for prompt, output in zip(prompts, together, strict=True):
        assert llm.beam_search(prompt, params) == [output]
    assert {len(sequence.tokens) for sequence in together[4].sequences} == {40}  # the context ends there


def likely(*tokens: tuple[int, float]) -> dict[int, Logprob]:
    return {token: Logprob(math.log(p), rank, "") for rank, (token, p) in enumerate(tokens, 1)}


@pytest.mark.parametrize("include", [False, True])
def test_ends_of_generation(include: bool) -> None:
    search = BeamSearch([1], BeamSearchParams(2, 9, include_stop_str_in_output=include), {9}, 100)
    search.take([likely((5, 0.5), (9, 0.4), (6, 0.1))])
    assert [beam.tokens for beam in search.beams] == [[1, 5], [1, 6]]
    assert not search.finished
    search.take([likely((9, 0.9), (7, 0.1)), likely((9, 1.0))])
    found = search.best()
    assert [beam.tokens for beam in found] == ([[1, 5, 9], [1, 9]] if include else [[1, 5], [1]])
    assert [beam.cum_logprob for beam in found] == pytest.approx([math.log(0.45), math.log(0.4)])
    assert [(beam.finish_reason, beam.stop_reason) for beam in found] == [("stop", 9)] * 2
    assert all(len(beam.logprobs) == len(beam.tokens) - 1 for beam in found)


def test_the_length_penalty() -> None:
    """Of two ends, the short one is likelier; by length the long one is better."""
    for penalty, first in ((0.0, [1]), (2.0, [1, 5, 6])):
        search = BeamSearch([1], BeamSearchParams(2, 9, length_penalty=penalty), {9}, 100)
        search.take([likely((5, 0.5), (9, 0.4))])
        search.take([likely((6, 0.9))])
        search.take([likely((9, 0.8))])
        assert search.best()[0].tokens == first
        assert search.finished


def test_ignoring_ends() -> None:
    search = BeamSearch([1], BeamSearchParams(2, 2, ignore_eos=True), {9}, 100)
    for _ in range(2):
        search.take([likely((9, 0.9), (5, 0.1))] * len(search.beams))
    assert search.finished
    assert search.best()[0].tokens == [1, 9, 9]


@pytest.mark.parametrize(
    ("field", "value"),
    list(itertools.product(["beam_width", "max_tokens", "length_penalty", "ignore_eos"], [-1000, "x"])),
)
def test_parameters_that_are_wrong(field: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, field: value})
    assert caught.value.field == field
    with pytest.raises(ParameterError, match=r"beam_width.*11.*10"):
        BeamSearchParams(11, 3)


def test_an_empty_list(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.beam_search([], BeamSearchParams(2, 2))
