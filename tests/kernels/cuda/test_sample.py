"""Sampling on the device against its NumPy twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.kernels import reference_sampling as reference
from shoal.kernels.base import SampleRows
from shoal.kernels.cuda import sample, sample_space, samplers
from shoal.kernels.cuda.sample import Sampler
from shoal.kernels.cuda.sample_draw import GATHERED

F32 = NDArray[np.float32]
MAX_ROWS = 8


def how(count: int, **fields: Any) -> SampleRows:
    """How to sample some rows: the same for each, or one value for each."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **fields}
    return SampleRows(
        temperature=np.full(count, plain["temperature"], np.float32),
        top_k=np.full(count, plain["top_k"], np.int32),
        top_p=np.full(count, plain["top_p"], np.float32),
        min_p=np.full(count, plain["min_p"], np.float32),
        seed=np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        sample=np.arange(count, dtype=np.uint32) % 2,
        position=np.arange(count, dtype=np.uint32) + 5,
        banned=[None] * count,
    )


def some_logits(count: int, vocab: int, spread: float = 3.0, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * spread).astype(np.float32)


def rows_of(asked: SampleRows, rows: list[int]) -> SampleRows:
    """Some of the rows, without masks and samplers."""
    arrays: dict[str, Any] = {name: getattr(asked, name)[rows] for name in SampleRows.__slots__[:7]}
    return SampleRows(**arrays, banned=[asked.banned[row] for row in rows])


def on_device(logits: F32) -> torch.Tensor:
    """With more behind each row and after the last: none of it is to be read."""
    rows, vocab = logits.shape
    space = torch.full((MAX_ROWS, vocab + 27), float("nan"))
    space[:rows, :vocab] = torch.from_numpy(logits)
    return space[:, :vocab]


def sampled(logits: F32, asked: SampleRows) -> list[int]:
    data = on_device(logits)
    before = data.clone()
    tokens: list[int] = Sampler(logits.shape[1], MAX_ROWS).sample(data, asked).tolist()
    assert torch.equal(data.nan_to_num(7.0), before.nan_to_num(7.0))  # what ``last_logits`` shows
    return tokens


def by_twin(logits: F32, asked: SampleRows) -> list[int]:
    return [reference.sample_row(logits[i], asked, i) for i in range(len(logits))]


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1e-4},
    {"temperature": 2.0, "min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 2**31 - 1},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.0, "top_k": 7, "min_p": 0.1, "temperature": 1.5},
    {"top_p": 0.999, "temperature": 1.5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocab", [5, 257, 5000])
def test_equals_the_twin(parameters: dict[str, Any], vocab: int) -> None:
    logits, asked = some_logits(2, vocab), how(2, **parameters)
    assert sampled(logits, asked) == by_twin(logits, asked)


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.95}], ids=str)
def test_equals_the_twin_where_there_are_many_tokens(parameters: dict[str, Any]) -> None:
    logits, asked = some_logits(2, 50_000), how(2, **parameters)
    assert sampled(logits, asked) == by_twin(logits, asked)


@pytest.mark.parametrize("parameters", [{"top_k": 6000}, {"top_p": 0.9, "temperature": 9.0}], ids=str)
def test_equals_the_twin_where_more_rank_than_are_gathered(parameters: dict[str, Any]) -> None:
    logits, asked = some_logits(2, 9000), how(2, **parameters)
    assert len(logits[0]) * 0.6 > GATHERED.value
    assert sampled(logits, asked) == by_twin(logits, asked)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_twin_with_many_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(2, 700))
    logits = (rng.integers(0, rng.integers(1, 40) + 1, (MAX_ROWS, vocab)) * 0.37).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    asked = how(
        MAX_ROWS,
        temperature=rng.choice([0.0, 0.5, 1.0, 3.0], MAX_ROWS),
        top_k=rng.choice([0, 1, 2, 7, 100], MAX_ROWS),
        top_p=rng.choice([1.0, 0.97, 0.6, 0.01], MAX_ROWS),
        min_p=rng.choice([0.0, 0.03], MAX_ROWS),
    )
    asked.banned[0:2] = [np.array([0, vocab - 1, 0], np.int32), rng.integers(0, vocab, 9).astype(np.int32)]  # type: ignore[index]
    assert sampled(logits, asked) == by_twin(logits, asked)


@pytest.mark.parametrize("parameters", [*PARAMETERS, {"top_p": 0.5}, {"top_k": 3}], ids=str)
def test_all_logits_equal(parameters: dict[str, Any]) -> None:
    """Every weight is 1: ids decide the rank."""
    logits, asked = np.full((2, 300), -2.5, np.float32), how(2, **parameters)
    assert sampled(logits, asked) == by_twin(logits, asked)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of NumPy, which the interpreter computes with
def test_logits_too_far_apart_for_float32() -> None:
    logits = np.full((2, 500), -3e38, np.float32)
    logits[:, 321] = 3e38
    assert sampled(logits, how(2, top_p=0.9)) == [321, 321]
    assert sampled(logits, how(2, temperature=1e-4)) == [321, 321]


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros((3, 300), np.float32)
    logits[1, [40, 41, 299]] = 2.5
    logits[2, ::2] = -0.0
    assert sampled(logits, how(3, temperature=0)) == [0, 40, 0]


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_bad_row_is_reported_and_harms_no_other(bad: float, parameters: dict[str, Any]) -> None:
    logits, asked = some_logits(3, 100), how(3, **parameters)
    clean = sampled(logits, asked)
    logits[1, 98] = bad
    assert sampled(logits, asked) == [clean[0], -1, clean[2]]


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_row_without_any_token_is_reported(parameters: dict[str, Any]) -> None:
    assert sampled(np.full((2, 300), -np.inf, np.float32), how(2, **parameters)) == [-1, -1]
    asked = how(2, **parameters)
    asked.banned[0:1] = [np.arange(300, dtype=np.int32)]  # type: ignore[index]
    asked = replace(asked, mask=[None, np.zeros(10, np.uint32)])
    assert sampled(some_logits(2, 300), asked) == [-1, -1]


def test_masks_and_banned_ids() -> None:
    rng = np.random.default_rng(3)
    logits, asked = some_logits(5, 77), how(5, top_k=20)
    masks = rng.integers(0, 2**32, (5, 3), dtype=np.uint32)
    logits[1, 5] = np.nan  # a banned id may be anything
    asked.banned[1:3] = [np.array([5], np.int32), np.array([7, 8, 76], np.int32)]  # type: ignore[index]
    asked = replace(asked, mask=[masks[0], None, masks[2], None, masks[4]])
    assert sampled(logits, asked) == by_twin(logits, asked)


def test_a_row_draws_the_same_in_any_batch() -> None:
    """Whatever the others need, and in whatever order they are."""
    logits = some_logits(6, 5000)
    fields = {"temperature": np.array([1, 0, 1.2, 1, 0.7, 1]), "top_k": np.array([0, 0, 0, 30, 5, 0])}
    asked = how(6, **fields, top_p=np.array([1, 1, 0.95, 1, 0.9, 1]))
    asked.banned[5:6] = [np.array([3], np.int32)]  # type: ignore[index]
    together = sampled(logits, asked)
    for rows in ([2], [3], [4, 0, 5, 1]):
        some = rows_of(asked, rows)
        assert sampled(logits[rows], some) == [together[row] for row in rows]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = some_logits(2, 3000)
    asked = [how(2, **parameters) for parameters in ({}, {"top_k": 40, "top_p": 0.9}, {"temperature": 0.0})]
    before = [sampled(logits, each) for each in asked]
    for module in (sample_space, sample, samplers):
        monkeypatch.setattr(module, "CHUNK", 512)
    for module in (sample, samplers):
        monkeypatch.setattr(module, "BLOCK", 1024)
    assert [sampled(logits, each) for each in asked] == before


def test_only_the_rows_of_a_step_get_tokens() -> None:
    chooser, logits = Sampler(50, MAX_ROWS), on_device(some_logits(MAX_ROWS, 50))
    chooser._answer.fill_(77)
    chooser.set(how(3))
    chooser.run(logits)
    assert len(chooser.tokens()) == 3
    assert chooser._answer[0, 3:].tolist() == [77] * 5


def test_one_sampler_serves_many_steps() -> None:
    """What one step needs does not stay for the next; more than its memory was made for is no fault."""
    chooser, logits = Sampler(300, MAX_ROWS), some_logits(MAX_ROWS, 300)
    large = how(MAX_ROWS, temperature=0.0)
    large.banned[:] = [np.tile(np.arange(299, dtype=np.int32), 40)] * MAX_ROWS  # type: ignore[index]
    for asked in (how(2, top_k=3), large, how(5), how(0), how(4, temperature=0.0), how(2, top_k=3)):
        count = len(asked.temperature)
        assert chooser.sample(on_device(logits), asked).tolist() == by_twin(logits[:count], asked)


def test_logits_come_to_the_host() -> None:
    logits = some_logits(3, 77)
    chooser = Sampler(77, MAX_ROWS)
    for count in (3, 1, 0):
        np.testing.assert_array_equal(chooser.to_host(on_device(logits), count), logits[:count])


def test_a_vocabulary_whose_sums_could_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="no more than 1048576"):
        Sampler((1 << 20) + 1, 1)
