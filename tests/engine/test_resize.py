"""Other sizes while requests are under way: their results stay, the weights stay, and the old memory goes before the new comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine import memory_plan
from shoal.engine.engine import Engine, Request
from shoal.errors import EngineError, MemoryLimitError
from shoal.kernels.base import AttentionShape, KVGroup
from shoal.params import SamplingParams
from shoal.system.machine_limits import MemoryRoom
from tests.engine.toy import (
    PAGE_BYTES,
    Result,
    ToyBackend,
    ToyCache,
    collect,
    drain,
    greedy,
    mixed_requests,
    solo,
    tokens,
    toy_engine,
)


def resize(engine: Engine, **sizes: int) -> None:
    if "pages" in sizes:
        sizes["kv_cache_memory"] = sizes.pop("pages") * PAGE_BYTES
    engine.resize(replace(engine.config, **sizes))  # type: ignore[arg-type]


def begun(engine: Engine, requests: Sequence[Request], steps: int) -> dict[str, Result]:
    """The results so far of requests that have run for some steps."""
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
    for _ in range(steps):
        collect(engine.step(), results)
    return results


SIZES = st.fixed_dictionaries(
    {
        "pages": st.integers(9, 60),
        "max_num_seqs": st.integers(1, 10),
        "max_num_batched_tokens": st.integers(1, 40),
    }
)


@pytest.mark.usefixtures("drafting")
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 5),
    sizes=st.lists(st.tuples(st.integers(0, 12), SIZES), min_size=1, max_size=5),
    windows=st.sampled_from([(0,), (30, 0)]),
    prefix_caching=st.booleans(),
)
def test_results_are_the_same_whatever_the_size_and_whenever_it_changes(
    seed: int, sizes: list[tuple[int, dict[str, int]]], windows: tuple[int, ...], prefix_caching: bool
) -> None:
    requests = [
        replace(request, priority=index % 2, params=replace(request.params, n=1 + index % 3))
        for index, request in enumerate(mixed_requests(12, np.random.default_rng(seed)))
    ]
    engine = toy_engine(pages=20 * len(windows), windows=windows, prefix_caching=prefix_caching)
    results = begun(engine, requests, 0)
    for steps, size in sizes:
        for _ in range(steps):
            collect(engine.step(), results)
        resize(engine, **{**size, "pages": size["pages"] * len(windows)})
        assert engine.config.max_num_seqs == size["max_num_seqs"]
    drain(engine, results)
    assert tokens(results) == solo(requests, windows)
    assert engine.stats().free_pages == engine.num_pages


@pytest.mark.parametrize("steps", range(4))
def test_copies_that_were_not_made_yet_are_not_missed(steps: int) -> None:
    """The pages that a fork was to copy are gone."""
    request = Request("r", tuple(range(20)), SamplingParams(n=4, max_tokens=6), seed=3)
    engine = toy_engine(budget=12)
    results = begun(engine, [request], steps)
    resize(engine, pages=30)
    drain(engine, results)
    assert tokens(results) == solo([request])


def test_fewer_than_are_running() -> None:
    requests = [greedy(f"r{i}", range(i, i + 10), 12) for i in range(8)]
    engine = toy_engine(seqs=8)
    results = begun(engine, requests, 3)
    running = engine.stats().running
    assert running > 5
    resize(engine, max_num_seqs=2)
    assert (engine.stats().running, engine.stats().waiting) == (0, running)
    collect(engine.step(), results)
    assert engine.stats().running == 2
    drain(engine, results)
    assert tokens(results) == solo(requests)


def test_the_same_size_is_no_change() -> None:
    engine = toy_engine()
    begun(engine, [greedy("r", [1, 2, 3])], 2)
    resize(engine, max_num_seqs=64)
    assert (engine.stats().running, engine.stats().preemptions) == (1, 0)


def test_what_no_longer_fits_ends_with_both_numbers_and_the_others_go_on() -> None:
    large = [greedy("large", range(50), 60), greedy("larger", range(40), 80)]  # one runs, one waits
    small = greedy("small", range(20), 10)
    engine = toy_engine(seqs=2)
    results = begun(engine, [large[0], small, large[1]], 3)
    resize(engine, pages=6)
    drain(engine, results)
    assert {name: result.end[0] for name, result in results.items()} == {
        "large": "error",
        "larger": "error",
        "small": "length",
    }
    assert "KV memory for 109 tokens; the whole pool holds 96" in results["large"].error
    assert results["small"].token_ids == solo([small])["small"]


@pytest.mark.parametrize(("pages", "length"), [(1, 5), (2, 17)])
def test_an_answer_that_may_fill_the_pool_ends_where_the_new_one_is_full(pages: int, length: int) -> None:
    """A prompt of 16 and 5 tokens of an answer: 20 in the cache."""
    request = Request("r", (31,) * 16, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    engine = toy_engine(pages=1000)
    results = begun(engine, [request], 5)
    resize(engine, pages=pages)
    drain(engine, results)
    assert (results["r"].end[0], len(results["r"].token_ids)) == ("length", length)


def test_no_answer_becomes_longer_than_it_was_to_be() -> None:
    request = Request("r", (31,) * 16, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    engine = toy_engine(pages=2)
    results = begun(engine, [request], 5)
    resize(engine, pages=1000)
    drain(engine, results)
    assert (results["r"].end[0], len(results["r"].token_ids)) == ("length", 17)


def test_more_than_there_is_is_refused_with_both_numbers_and_nothing_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = toy_engine(pages=100, longest=512)
    results = begun(engine, [greedy("r", range(20), 12)], 3)
    before = engine.stats(), engine.config, engine.memory_plan
    monkeypatch.setattr(memory_plan, "memory_room", lambda: MemoryRoom(PAGE_BYTES * 200, PAGE_BYTES * 400))
    with pytest.raises(MemoryLimitError, match=f"{PAGE_BYTES * 1000} bytes are needed, {PAGE_BYTES * 202} bytes of"):
        resize(engine, pages=1000)
    assert (engine.stats(), engine.config, engine.memory_plan) == before
    resize(engine, pages=202)  # two of the old ones hold something, and will be free
    monkeypatch.setattr(memory_plan, "memory_room", lambda: MemoryRoom(0, PAGE_BYTES * 400))
    resize(engine, pages=150)  # less than there was can always be had
    monkeypatch.undo()
    drain(engine, results)
    assert tokens(results) == solo([greedy("r", range(20), 12)])


@dataclass(eq=False)
class Exhausted(ToyBackend):
    """Has no memory for pages the next ``failures`` times, though it seemed so."""

    failures: int = 0
    asked: list[int] = field(default_factory=list)

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> list[ToyCache]:
        self.asked.append(groups[0].pages)
        if self.failures:
            self.failures -= 1
            raise MemoryError("no room")
        return super().kv_cache(groups, shape, dtype)


def test_where_the_memory_cannot_be_had_after_all_the_old_size_comes_back() -> None:
    backend = Exhausted()
    requests = mixed_requests(10, np.random.default_rng(1))
    engine = toy_engine(backend=backend, pages=40)
    results = begun(engine, requests, 3)
    config, backend.failures = engine.config, 1
    with pytest.raises(MemoryError):
        resize(engine, pages=1000)
    assert (engine.config, engine.num_pages, backend.asked[0], backend.asked[-1]) == (config, (40,), 40, 40)
    drain(engine, results)
    assert tokens(results) == solo(requests)


def test_where_that_cannot_be_had_either_everybody_hears_of_it() -> None:
    backend = Exhausted()
    engine = toy_engine(backend=backend, seqs=1)
    results = begun(engine, [greedy("a", [1, 2, 3]), greedy("b", [1, 2, 3])], 3)
    backend.failures = 2
    with pytest.raises(EngineError, match="no room"):
        resize(engine, pages=40)
    drain(engine, results)
    assert {name: (result.end[0], "no room" in result.error) for name, result in results.items()} == {
        "a": ("error", True),
        "b": ("error", True),
    }
    with pytest.raises(EngineError):
        engine.add(greedy("c", [1]))


def test_a_closed_engine_has_no_size() -> None:
    engine = toy_engine()
    engine.close()
    with pytest.raises(EngineError):
        resize(engine, pages=40)
