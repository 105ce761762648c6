"""Beam search against all texts there are, on a tiny model with random weights."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import jobs
from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM
from shoal.openai.convert import parse_chat, parse_completion
from shoal.openai.schema import APIError
from shoal.params import BeamSearchParams, SamplingParams
from shoal.requests.beam import BeamSearch
from shoal.requests.outputs import Logprob, RequestOutput
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


def submitted(llm: LLM, *prompts: Any, params: BeamSearchParams) -> dict[str, RequestOutput]:
    names = [llm.submit(prompt, params) for prompt in prompts]
    found: dict[str, RequestOutput] = {}
    while llm.has_work:
        found |= {output.request_id: output for output in llm.step()}
    assert list(found) == sorted(names)
    return found


def test_a_search_that_is_submitted_finds_the_same(llm: LLM) -> None:
    params = BeamSearchParams(3, 5)
    found = submitted(llm, "one", PROMPT, params=params)
    for output, expected in zip(found.values(), llm.beam_search(["one", PROMPT], params), strict=True):
        assert output.finished
        prompt = output.prompt_token_ids
        assert [prompt + answer.token_ids for answer in output.outputs] == [s.tokens for s in expected.sequences]
        assert [answer.cumulative_logprob for answer in output.outputs] == [s.cum_logprob for s in expected.sequences]
        assert [answer.index for answer in output.outputs] == [0, 1, 2]
        assert all(answer.text for answer in output.outputs)


def test_what_is_submitted_beside_a_search(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=4)
    expected = llm.generate("hello", plain, use_tqdm=False)[0].outputs[0].token_ids
    search, other = llm.submit(PROMPT, BeamSearchParams(2, 9)), llm.submit("hello", plain)
    outputs = []
    while llm.has_work:
        outputs += llm.step()
    assert [output.request_id for output in outputs if output.finished] == [other, search]
    assert outputs[-2].outputs[0].token_ids == expected


def test_a_search_is_aborted(llm: LLM) -> None:
    name = llm.submit(PROMPT, BeamSearchParams(2, 30), request_id="mine")
    with pytest.raises(RequestError, match="in use"):
        llm.submit(PROMPT, BeamSearchParams(2, 30), request_id="mine")
    llm.step()
    assert llm.abort(name)
    assert not llm.abort(name)
    while llm.has_work:
        assert llm.step() == []
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_closing_ends_a_search(llm: LLM) -> None:
    with LLM(llm.path, device="reference", max_num_seqs=2) as other:
        other.submit(PROMPT, BeamSearchParams(2, 30))
        assert other.has_work
    assert not other.has_work


def test_a_search_whose_time_is_up(llm: LLM) -> None:
    llm.submit(PROMPT, BeamSearchParams(2, 9), timeout=1e-9)
    (output,) = [output for _ in range(9) if llm.has_work for output in llm.step()]
    assert (output.finished, output.outputs[0].finish_reason) == (True, "timeout")
    with pytest.raises(RequestError, match="empty"):
        llm.submit("", BeamSearchParams(2, 9))


def test_bodies() -> None:
    body = {"prompt": "hi", "use_beam_search": True, "max_tokens": 7, "length_penalty": 0.5, "temperature": 0.7}
    assert parse_completion(body).beams == BeamSearchParams(1, 7, length_penalty=0.5)
    assert parse_completion({**body, "use_beam_search": False}).beams is None
    chat = {"messages": [{"role": "user", "content": "hi"}], "use_beam_search": True}
    assert parse_chat({**chat, "max_completion_tokens": 3, "ignore_eos": True}).beams == BeamSearchParams(1, 3, True)
    assert parse_completion({**body, "n": 4}).beams == BeamSearchParams(4, 7, length_penalty=0.5)
    with pytest.raises(APIError, match=r"^n: .*10"):
        parse_completion({**body, "n": 11})
    constrained = {**chat, "max_tokens": 1, "response_format": {"type": "json_object"}}
    for refused, param in (
        (constrained, "use_beam_search"),
        (chat, "max_tokens"),
        ({**chat, "max_tokens": 1, "logprobs": True}, "use_beam_search"),
    ):
        with pytest.raises(APIError) as caught:
            parse_chat(refused)
        assert caught.value.param == param


def test_rows_of_a_job(llm: LLM, tmp_path: Path) -> None:
    body = {"prompt": "one", "use_beam_search": True, "max_tokens": 5, "n": 3}
    rows = [{"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} for name in ("a", "b")]
    rows[1]["body"] = {**body, "prompt": [999999]}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = jobs.run(llm.path, source, target, show_progress=False, device="reference", max_model_len=40)
    assert (summary.rows, summary.failed) == (2, 1)
    choices = json.loads(target.read_text())["response"]["body"]["choices"]
    (found,) = llm.beam_search(["one"], BeamSearchParams(3, 5))
    assert llm.tokenizer is not None
    ids = [sequence.tokens[len(llm.encode("one")) :] for sequence in found.sequences]
    assert [choice["text"] for choice in choices] == [llm.tokenizer.decode(one, skip_special=True) for one in ids]
