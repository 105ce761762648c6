"""Structured outputs through LLM: valid text from a model of noise, alone or in company; errors of one request alone."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import LLM, SamplingParams, StructuredOutputsParams
from shoal.errors import ParameterError, RequestError
from tests.constrain.made_schemas import schemas
from tests.constrain.walks import validate
from tests.support.tiny_model import END_ID, write_tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = StructuredOutputsParams(choice=["positive", "negative", "neutral"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("structured") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM(path, max_num_seqs=16, max_model_len=512) as llm:
        yield llm


def params(constraint: StructuredOutputsParams | None, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "seed": 1, **fields}, structured_outputs=constraint)


def texts(llm: LLM, constraint: StructuredOutputsParams, count: int = 4, **fields: Any) -> list[str]:
    outputs = llm.generate(["hi"] * count, [params(constraint, **{**fields, "seed": seed}) for seed in range(count)])
    assert [output.error for output in outputs] == [None] * count
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


@given(schema=schemas())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_json_under_made_schemas_is_valid(llm: LLM, schema: dict[str, Any]) -> None:
    constraint = StructuredOutputsParams(json=schema)
    outputs = llm.generate(["one", "two"], [params(constraint, seed=seed, max_tokens=200) for seed in (1, 2)])
    for output in outputs:
        assert output.error is None
        if output.outputs[0].finish_reason == "stop":
            validate(output.outputs[0].text, schema)


def test_every_kind_of_constraint(llm: LLM) -> None:
    for text in texts(llm, StructuredOutputsParams(json=PERSON)):
        validate(text, PERSON)
    assert set(texts(llm, CHOICES)) <= set(CHOICES.choice or ())
    assert all(re.fullmatch(r"\d{2}:\d{2}", text) for text in texts(llm, StructuredOutputsParams(regex=r"\d{2}:\d{2}")))
    gbnf = 'root ::= "<" [ab]{2,3} ">"'
    assert all(re.fullmatch("<[ab]{2,3}>", text) for text in texts(llm, StructuredOutputsParams(grammar=gbnf)))


def test_greedy_and_sampled_rows_alike(llm: LLM) -> None:
    assert texts(llm, CHOICES, 1, temperature=0) == texts(llm, CHOICES, 1, temperature=0, min_tokens=20)
    for fields in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}, {"ignore_eos": True}, {"stop_token_ids": [END_ID]}):
        assert set(texts(llm, CHOICES, 2, **fields)) <= set(CHOICES.choice or ())


def test_max_tokens_cuts_are_length(llm: LLM) -> None:
    (output,) = llm.generate(["x"], params(CHOICES, max_tokens=3))
    answer = output.outputs[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 3)
    assert any(choice.startswith(answer.text) for choice in CHOICES.choice or ())


def test_a_whole_answer_at_the_limit_is_a_stop(llm: LLM) -> None:
    (output,) = llm.generate(["x"], params(StructuredOutputsParams(choice=["abc"]), max_tokens=3))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abc", "stop")


@pytest.mark.parametrize(
    "flags", [{}, {"kv_cache_memory": "64KiB", "max_num_batched_tokens": 40}], ids=["", "preempted"]
)
def test_batch_equals_solo_with_constrained_rows_among_others(path: Path, flags: dict[str, Any]) -> None:
    constraints = [
        None,
        CHOICES,
        StructuredOutputsParams(json=PERSON),
        None,
        StructuredOutputsParams(regex="[a-z]{5,40}"),
    ]
    many = [params(constraints[i % 5], seed=i, max_tokens=30, temperature=(0.0, 1.0)[i % 2]) for i in range(20)]
    prompts = [f"prompt {i} " * (1 + i % 4) for i in range(20)]
    with LLM(path, max_num_seqs=12, max_model_len=128, **flags) as llm:
        together = llm.generate(prompts, many)
        preemptions = llm.engine.stats().preemptions
    with LLM(path, max_num_seqs=1, max_model_len=128) as llm:
        alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, many, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].finish_reason == other.outputs[0].finish_reason
    assert (preemptions > 0) == bool(flags)


_constraints = st.sampled_from(
    [
        None,
        CHOICES,
        StructuredOutputsParams(json=PERSON),
        StructuredOutputsParams(regex="[a-z]{3,12}( [0-9]+)?"),
        StructuredOutputsParams(grammar='root ::= "(" root ")" | [ab]+'),
        StructuredOutputsParams(json_object=True),
    ]
)
_params = st.builds(
    lambda constraint, few, **fields: params(constraint, max_tokens=few + 4, min_tokens=few, **fields),
    _constraints,
    st.integers(0, 20),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 40]),
    top_p=st.sampled_from([0.3, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(ord("a"), ord("z")), max_size=2),
    logprobs=st.sampled_from([None, 2]),
    seed=st.integers(0, 99),
)


@given(many=st.lists(_params, min_size=2, max_size=8))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_batch_equals_solo_with_any_parameters(llm: LLM, many: list[SamplingParams]) -> None:
    prompts = [f"{'abc'[i % 3]} prompt that goes on for more than a page, number {i}" for i in range(len(many))]
    together = llm.generate(prompts, many)
    for prompt, one, output in zip(prompts, many, together, strict=True):
        (alone,) = llm.generate([prompt], one)
        assert alone.outputs == output.outputs
        assert alone.error == output.error


def test_logprobs_are_of_the_raw_logits(llm: LLM) -> None:
    (free,) = llm.generate(["x"], params(None, logprobs=3, max_tokens=1, temperature=0))
    (bound,) = llm.generate(["x"], params(CHOICES, logprobs=3, max_tokens=1, temperature=0))
    assert free.outputs[0].logprobs is not None
    assert bound.outputs[0].logprobs is not None
    best = [
        {token: place for token, place in output[0].items() if place.rank <= 3}
        for output in (free.outputs[0].logprobs, bound.outputs[0].logprobs)
    ]
    assert best[0] == best[1]


def test_errors_are_of_one_request_alone(llm: LLM) -> None:
    bad = StructuredOutputsParams(json={"type": "array", "uniqueItems": True})
    ambiguous = StructuredOutputsParams(grammar="start: e\ne: e e | /[a-z]/ | e e e")
    outputs = llm.generate(
        ["x"] * 4, [params(CHOICES), params(bad), params(ambiguous, max_tokens=400, ignore_eos=True), params(None)]
    )
    assert [output.outputs[0].finish_reason for output in outputs][:3] == ["stop", "error", "error"]
    assert "'uniqueItems at #'" in (outputs[1].error or "")
    assert "items" in (outputs[2].error or "")
    assert outputs[3].error is None
    with pytest.raises(ParameterError, match="uniqueItems"):
        llm.submit("x", params(bad))


def test_a_slow_schema_holds_nobody_up(llm: LLM) -> None:
    """It is compiled by the thread that submits it, outside of everybody's turn."""
    slow = StructuredOutputsParams(grammar="start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(1, 61)))
    texts(llm, CHOICES)  # the vocabulary is ready
    refused = threading.Event()

    def submit() -> None:
        with pytest.raises(ParameterError, match="did not end"):
            llm.submit("x", params(slow))
        refused.set()

    thread = threading.Thread(target=submit)
    thread.start()
    answers = 0
    while not refused.is_set():
        answers += len(llm.generate(["x"], params(None, max_tokens=2)))
    thread.join()
    assert answers > 1


def test_without_a_tokenizer_it_is_refused(path: Path) -> None:
    with LLM(path, skip_tokenizer_init=True) as llm:
        (output,) = llm.generate([{"prompt_token_ids": [5]}], params(CHOICES))
        assert "needs a tokenizer" in (output.error or "")
        with pytest.raises(RequestError):
            llm.submit({"prompt_token_ids": [5]}, params(CHOICES))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_the_child_goes_on_with_processes_and_threads_of_its_own(path: Path) -> None:
    with LLM(path, max_model_len=128, threads=1) as llm:
        expected = texts(llm, CHOICES)
        child = os.fork()
        if child == 0:
            good = (
                texts(llm, CHOICES) == expected and texts(llm, StructuredOutputsParams(choice=["new"])) == ["new"] * 4
            )
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert texts(llm, CHOICES) == expected


def test_smollm2_answers_under_a_schema(smollm2_path: Path) -> None:
    city = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
        "required": ["city", "country"],
        "additionalProperties": False,
    }
    question = [{"role": "user", "content": "Which city is the capital of France? Answer in JSON."}]
    with LLM(smollm2_path, max_num_seqs=4) as llm:
        greedy = params(StructuredOutputsParams(json=city), temperature=0, max_tokens=60)
        (output,) = llm.chat(question, greedy)
    answer = json.loads(output.outputs[0].text)
    assert answer["city"] == "Paris"
    assert answer["country"].lower() == "france"
