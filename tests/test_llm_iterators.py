"""LLM.generate and chat over iterators: the answers of the list form, one by one, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import EngineError, ParameterError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.prompts import Prompt
from tests.support.tiny_model import write_tiny_model

SEQS = 4
WINDOW = 8 * SEQS
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


def open_llm(path: Path) -> LLM:
    return LLM(path, device="reference", max_num_seqs=SEQS, max_num_batched_tokens=64)


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with open_llm(path) as llm:
        yield llm
        assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    """Nothing is left but the word that something was aborted."""
    llm.step()
    assert not llm.has_work
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, stats.num_pages)


class Counted:
    """Prompts of an iterable, and how many were taken."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self.taken = 0
        self._prompts = iter(prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        prompt = next(self._prompts)
        self.taken += 1
        return prompt


def limited(*lengths: int) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]


def essence(outputs: Iterable[RequestOutput]) -> list[tuple[Any, ...]]:
    """Everything but the times."""
    return [(o.request_id, o.prompt, o.prompt_token_ids, o.outputs, o.error) for o in outputs]


def test_the_outputs_are_those_of_the_list(path: Path) -> None:
    prompts: list[Any] = [f"prompt {i} " * (1 + i % 5) for i in range(50)]
    prompts[7], prompts[30], prompts[49] = "", {"prompt_token_ids": [10**6]}, 7
    params = [SamplingParams(max_tokens=1 + i * 7 % 20, ignore_eos=True) for i in range(50)]  # seeds by number
    with open_llm(path) as llm:
        expected = essence(llm.generate(prompts, params))
    assert [item[-1] is not None for item in expected] == [i in (7, 30, 49) for i in range(50)]
    for given in (params, iter(params)):
        with open_llm(path) as llm:
            assert essence(llm.generate(iter(prompts), given)) == expected
    with open_llm(path) as llm:
        assert essence(llm.generate((prompt for prompt in prompts), GREEDY)) != expected


def test_nothing_is_taken_before_it_is_needed(llm: LLM) -> None:
    prompts = Counted(itertools.repeat("hello"))
    outputs = llm.generate(prompts, GREEDY)
    assert prompts.taken == 0
    for number, output in enumerate(itertools.islice(outputs, 20), start=1):
        assert output.error is None
        assert prompts.taken <= number + 2 * SEQS
    outputs.close()


@pytest.mark.parametrize("rest", ["hello", ""])
def test_a_long_one_holds_up_no_more_than_a_window(llm: LLM, rest: str) -> None:
    """Behind the first, which takes 200 steps, come prompts of one step, or bad ones."""
    prompts = Counted(["long", *[rest] * 300])
    params = itertools.chain(limited(200), itertools.repeat(limited(1)[0]))
    most = yielded = 0
    for output in llm.generate(prompts, params):
        most = max(most, prompts.taken - yielded)
        yielded += 1
        if yielded == 1:
            assert len(output.outputs[0].token_ids) == 200
    assert (most, yielded) == (WINDOW, 301)


def test_the_engine_stays_full(llm: LLM) -> None:
    params = limited(*(5 + i * 5 % 7 for i in range(60)))
    prompts = [f"{i}" for i in range(60)]

    def steps(given: Any) -> int:
        before = llm.engine.stats().steps
        assert len(list(llm.generate(given, params))) == 60
        return llm.engine.stats().steps - before

    assert steps(iter(prompts)) <= steps(prompts)


def test_closing_early_aborts_what_runs(llm: LLM) -> None:
    prompts = Counted(itertools.repeat("hello"))
    outputs = llm.generate(prompts, itertools.cycle(limited(3, 12)))
    next(outputs)
    assert llm.engine.stats().running > 0
    outputs.close()
    assert_idle(llm)
    taken = prompts.taken
    assert next(outputs, None) is None
    assert prompts.taken == taken


def test_an_error_of_the_iterator_reaches_the_caller(llm: LLM) -> None:
    def prompts() -> Iterator[Prompt]:
        yield from ["hello"] * 10
        raise OSError("the input is gone")

    outputs = llm.generate(prompts(), GREEDY)
    with pytest.raises(OSError, match="the input is gone"):
        list(outputs)
    assert_idle(llm)


def test_parameters_in_parallel(llm: LLM) -> None:
    found = [len(o.outputs[0].token_ids) for o in llm.generate(iter("abc"), itertools.cycle(limited(3, 1)))]
    assert found == [3, 1, 3]
    with pytest.raises(ParameterError, match="sampling_params: got '2 items', must be one, or as many"):
        list(llm.generate(iter("abc"), limited(3, 1)))
    assert_idle(llm)
    with pytest.raises(ParameterError, match="sampling_params"):
        list(llm.generate(iter("a"), [{"temperature": 0}]))  # type: ignore[list-item]


def test_what_is_wrong_with_the_call_is_said_at_the_call(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="timeout: got 0"):
        llm.generate(iter("a"), GREEDY, timeout=0)
    with pytest.raises(TypeError, match="not iterable"):
        llm.generate(7)  # type: ignore[call-overload]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert list(llm.generate(iter(()))) == []
    assert list(llm.chat(iter(()))) == []


def test_time_limits(llm: LLM) -> None:
    outputs = list(llm.generate(iter(["a", "b"]), GREEDY, timeout=1e-9))
    outputs += llm.generate(iter(["c"]), GREEDY, queue_timeout=1e-9)
    assert [output.outputs[0].finish_reason for output in outputs] == ["timeout"] * 3


def test_conversations(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": f"say {i}"}] for i in range(10)]
    expected = llm.chat(conversations, GREEDY)
    found = list(llm.chat(iter(conversations), GREEDY))
    assert [o.outputs for o in found] == [o.outputs for o in expected]
    assert [o.prompt_token_ids for o in found] == [o.prompt_token_ids for o in expected]


def test_other_work_between_the_outputs_changes_nothing(llm: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    expected = [output.outputs for output in llm.generate(prompts, GREEDY)]
    found = []
    for output in llm.generate(iter(prompts), GREEDY):
        assert llm.generate(["prompt 3"], GREEDY)[0].outputs == expected[3]  # and the others go on meanwhile
        found.append(output.outputs)
    assert found == expected


def test_an_abort_by_id_ends_one_and_no_others(llm: LLM) -> None:
    expected = [output.outputs for output in llm.generate(["a", "b", "c"], GREEDY)]
    for outputs in (
        llm.generate(iter(["x", "a", "b", "c"]), limited(1, 12, 12, 12)),
        llm.stream(["x", "a", "b", "c"], GREEDY),
    ):
        first = next(outputs)
        aborted = str(int(first.request_id) + 2)
        assert llm.abort(aborted)
        last = {output.request_id: output for output in outputs}
        assert last[aborted].outputs[0].finish_reason == "abort"
        kept = [last[key].outputs for key in sorted(last, key=int)[-3:] if key != aborted]
        assert kept == [expected[0], expected[2]]


def test_closing_the_model_ends_the_outputs(path: Path) -> None:
    llm = open_llm(path)
    outputs = llm.generate(itertools.repeat("hello"), itertools.cycle(limited(1, 12)))
    streamed = llm.stream("hello", GREEDY)
    next(outputs)
    next(streamed)
    llm.close()
    assert [output.outputs[0].finish_reason for output in streamed] == ["abort"]
    ended: list[RequestOutput] = []
    with pytest.raises(EngineError, match="closed"):
        ended.extend(outputs)
    assert {output.outputs[0].finish_reason for output in ended} == {"length", "abort"}
