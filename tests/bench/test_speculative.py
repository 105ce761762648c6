"""Speculation beside none: which prompts count, what is replayed, and that different answers are no measurement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.bench import copying
from shoal.bench.copying import loops
from shoal.bench.drafts import Drafts
from shoal.bench.speculative import Replay, SpeculativeResult, measure_speculative, remember, without_loops
from shoal.bench.workload import random_prompts
from shoal.engine.draft_pace import DraftPace
from shoal.errors import EngineError
from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model

PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture
def all_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftPace, "counts", lambda self, chances, most, room: [max(0, count) for count in most])


@pytest.fixture
def plain(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, device="reference", enable_prefix_caching=False) as llm:
        yield llm


def replaying(tiny: Path, replay: Replay) -> LLM:
    return LLM(tiny, device="reference", enable_prefix_caching=False, drafter=replay)


def test_an_answer_that_says_the_same_three_times_loops() -> None:
    assert loops([*range(8)] * 3)
    assert not loops([*range(8)] * 2)
    assert not loops([*range(7), 50, *range(7), 51, *range(7), 52])
    assert loops([5] * 10)
    assert not loops([5] * 9)


def test_there_are_prompts_enough_and_no_two_alike() -> None:
    for prompts in (copying.copying(), copying.questions()):
        assert len(prompts) >= 40
        assert len(set(prompts)) == len(prompts)
    assert copying.copying() == copying.copying()
    assert max(map(len, copying.copying())) < 3000


@pytest.mark.parametrize(("right", "accepted"), [(1.0, 1.0), (0.0, 0.0)])
def test_guesses_are_as_right_as_was_asked(
    tiny: Path, plain: LLM, all_guesses: None, right: float, accepted: float
) -> None:
    prompts: list[Any] = random_prompts(plain, 3, 10)
    replay = Replay(4, right, plain.vocab_size)
    remember(plain, replay, prompts, PARAMS)
    with replaying(tiny, replay) as guessing:
        result = measure_speculative(plain, guessing, prompts, PARAMS, batch_size=2, rounds=2)
    assert (result.requests, result.batch_size, result.tokens) == (3, 2, 3 * 29)
    assert len(result.seconds) == len(result.plain_seconds) == 2
    assert result.drafts is not None
    assert result.drafts.drafted > 0
    assert result.drafts.accepted == accepted * result.drafts.drafted


def test_some_of_them_right() -> None:
    replay = Replay(4, 0.7, 1000)
    drafted = [replay._said([7] * 8, place)[0] == 7 for place in range(1000)]
    assert 650 < sum(drafted) < 750
    assert replay._said([7] * 8, 3) == replay._said([7] * 8, 3)


def test_other_answers_are_no_measurement(tmp_path: Path, plain: LLM) -> None:
    prompts: list[Any] = random_prompts(plain, 2, 10)
    another = write_tiny_model(tmp_path / "another.gguf", seed=1)
    with LLM(another, device="reference") as other, pytest.raises(EngineError, match="not those without"):
        measure_speculative(plain, other, prompts, PARAMS, batch_size=2, rounds=1)


def test_prompts_whose_answers_loop_are_left_out(plain: LLM) -> None:
    prompts: list[Any] = random_prompts(plain, 12, 10)
    answers = [plain.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
    good = [prompt for prompt, answer in zip(prompts, answers, strict=True) if not loops(answer)]
    assert without_loops(plain, prompts, PARAMS, len(good)) == good
    with pytest.raises(EngineError, match=f"only {len(good)} of 12 prompts"):
        without_loops(plain, prompts, PARAMS, len(good) + 1)


def test_the_words_and_the_numbers() -> None:
    result = SpeculativeResult(40, 1, 1000, (2.0, 4.0, 3.0), (1.0, 2.0, 2.0), Drafts(500, 300))
    assert str(result) == (
        "40 answers, 1 at once, 1000 tokens: 1.50 (1.50-2.00) times the tokens/s; 300 of 500 guesses right"
    )
    found = result.as_json()
    assert found["gain"] == {"of_medians": 1.5, "low": 1.5, "high": 2.0}
    assert found["spec_decode_num_accepted_tokens"] == 300
    assert "drafts" not in found
