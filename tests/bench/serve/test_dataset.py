"""Random prompts: lengths, what they have in common, bodies."""

from __future__ import annotations

import pytest

from shoal.bench.serve.dataset import RandomShape, Sample, Sampling, body_of, random_samples, vocabulary_of
from shoal.errors import ParameterError


def test_the_same_seed_gives_the_same_prompts() -> None:
    shape = RandomShape(input_len=20, output_len=5)
    first, again, other = (random_samples(3, shape, 1000, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(sample.numbers) == 20 and sample.output_len == 5 for sample in first)
    assert all(0 <= number < 1000 for sample in first for number in sample.numbers)


def test_lengths_fill_their_range() -> None:
    samples = random_samples(2000, RandomShape(input_len=10, output_len=4, range_ratio=0.5), 50, 0)
    assert {len(sample.numbers) for sample in samples} == set(range(5, 16))
    assert {sample.output_len for sample in samples} == set(range(2, 7))


def test_no_length_is_zero() -> None:
    samples = random_samples(200, RandomShape(input_len=1, output_len=1, range_ratio=0.9), 50, 0)
    assert {len(sample.numbers) for sample in samples} == {1, 2}


def test_a_prefix_is_shared_and_comes_on_top() -> None:
    one, other = random_samples(2, RandomShape(input_len=10, output_len=1, prefix_len=6), 1000, 0)
    assert one.numbers[:6] == other.numbers[:6]
    assert one.numbers[6:] != other.numbers[6:]
    assert len(one.numbers) == 16


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_that_makes_no_range(ratio: float) -> None:
    with pytest.raises(ParameterError, match="random_range_ratio"):
        RandomShape(range_ratio=ratio)


def test_a_completion_is_asked_for_by_ids() -> None:
    body = body_of(Sample([3, 1], 9), "openai", "m", Sampling(ignore_eos=True, temperature=0.0))
    assert body == {
        "model": "m",
        "prompt": [3, 1],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }


def test_a_chat_is_asked_for_by_words() -> None:
    body = body_of(Sample([0, 1, 0], 9), "openai-chat", "m", Sampling(extra={"model": "x", "top_k": 1}), stream=False)
    assert body == {
        "model": "x",
        "messages": [{"role": "user", "content": "the and the"}],
        "max_completion_tokens": 9,
        "top_k": 1,
    }


def test_every_number_of_a_chat_has_a_word() -> None:
    count = vocabulary_of("openai-chat", 10**6)
    words = body_of(Sample(list(range(count)), 1), "openai-chat", "m", Sampling())["messages"][0]["content"].split()
    assert len(set(words)) == count > 100
    assert vocabulary_of("openai", 10**6) == 10**6
