"""A second model that drafts: what it computes, what it holds, and that no token depends on it."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine import masks
from shoal.engine.constraint import Mask
from shoal.engine.draft import Wanted
from shoal.engine.draft_model import ModelDrafter
from shoal.engine.draft_model_pace import ModelPace
from shoal.engine.engine import Engine, Request
from shoal.engine.memory_plan import MemoryPlan
from shoal.engine.sequence import Sequence as Running
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import (
    PAGE_SIZE,
    AttentionShape,
    Head,
    IntArray,
    KVGroup,
    Layers,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.load import load_backend
from shoal.models.weights import Model, load_model
from shoal.params import EngineConfig, SamplingParams
from tests.engine.random_network import VOCAB as NETWORK_VOCAB
from tests.engine.random_network import write_network
from tests.engine.steps import END, Steps
from tests.engine.toy import (
    PAGE_BYTES,
    Result,
    ToyBackend,
    ToyCache,
    ToyNetwork,
    collect,
    drain,
    greedy,
    mixed_requests,
    run,
    solo,
    tokens,
    toy_model,
)


@dataclass(eq=False)
class TwoModels(ToyBackend):
    """The toy twice: the networks that are bound second are the draft model's. ``wrong``: of how many states one gives other logits
    there (0: none). ``before_guess`` may raise."""

    wrong: int = 0
    before_guess: Callable[[StepInput], None] = lambda step: None
    bound: int = 0
    guessing_steps: int = 0

    def bind(
        self, layers: Layers, head: Head, cache: list[ToyCache], limits: StepLimits, states: Head | None = None
    ) -> ToyNetwork:
        self.bound += 1
        return super().bind(layers, head, cache, limits, states) if self.bound % 2 else Guessing(self, cache, limits)


class Guessing(ToyNetwork):
    """Right but for one state of so many."""

    def __init__(self, backend: TwoModels, caches: list[ToyCache], limits: StepLimits) -> None:
        super().__init__(replace(backend, before_step=backend.before_guess), caches, limits)
        self._owner = backend

    def layers(self, step: StepInput) -> None:
        self._owner.guessing_steps += 1
        super().layers(step)
        if self._owner.wrong:
            self._states = np.where(
                self._states % np.uint64(self._owner.wrong), self._states, self._states + np.uint64(1)
            )


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many guesses as there can be, and every text is read."""
    monkeypatch.setattr(ModelPace, "counts", every_count)
    monkeypatch.setattr(ModelPace, "may_begin", True)


def every_count(pace: ModelPace, chances: list[float], most: list[int], room: int) -> list[int]:
    counts = []
    for count in most:
        counts.append(max(0, min(count, room)))
        room -= counts[-1]
    return counts


def drafting_engine(
    *,
    backend: ToyBackend | None = None,
    guesses: int = 4,
    draft: Model | None = None,
    pages: int = 1000,
    seqs: int = 64,
    budget: int = 512,
    longest: int = 512,
    windows: tuple[int, ...] = (0,),
    prefix_caching: bool = True,
) -> Engine:
    """As ``toy_engine``, with memory for ``pages`` pages of both models, which hold a sequence at least."""
    config = EngineConfig(
        max_model_len=min(longest, pages * PAGE_SIZE),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        kv_cache_memory=2 * pages * PAGE_BYTES * len(windows),
        enable_prefix_caching=prefix_caching,
        speculative_config={"method": "draft_model", "model": "toy", "num_speculative_tokens": guesses},
    )
    backend = backend or TwoModels(windows=windows)
    model = toy_model(windows=windows)
    return Engine(model, backend, config, clock=lambda: 0.0, check_every_step=True, draft=draft or model)


def drafter(engine: Engine) -> ModelDrafter:
    assert engine._draft is not None
    return engine._draft


def assert_all_free(engine: Engine) -> None:
    """No page of the draft model's is lost."""
    assert not drafter(engine)._texts
    assert all(group.pool.num_free == group.pool.num_pages for group in drafter(engine)._groups)


# --- what it computes


def test_right_guesses_are_kept_and_each_token_is_computed_once() -> None:
    request = greedy("r", range(3, 40), 21)
    engine = drafting_engine()
    assert tokens(run(engine, [request])) == solo([request])
    stats = engine.stats()
    assert (stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens) == (16, 16)
    # A token, then four times 4 guesses and one behind them. Of all 58 the last one is never computed, nor is the last guess.
    assert (stats.steps, drafter(engine).rows) == (5, 37 + 21 - 2)
    assert_all_free(engine)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_what_was_guessed_wrong_is_all_that_is_computed_in_vain(wrong: int) -> None:
    request = greedy("r", range(3, 40), 40)
    engine = drafting_engine(backend=TwoModels(wrong=wrong))
    assert tokens(run(engine, [request])) == solo([request])
    stats = engine.stats()
    failed = stats.spec_decode_num_draft_tokens - stats.spec_decode_num_accepted_tokens
    assert failed > 10
    assert drafter(engine).rows <= 37 + 40 + failed


def test_all_texts_are_guessed_in_the_same_steps() -> None:
    requests = [greedy(f"r{i}", range(i, i + 10), 11) for i in (1, 3, 4, 5, 6, 7)]
    backend = TwoModels()
    engine = drafting_engine(backend=backend)
    assert tokens(run(engine, requests)) == solo(requests)
    assert backend.guessing_steps == 1 + 2 * 4  # what they lack at first, then a step for each place of two drafts


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_samples_of_a_prompt_share_what_was_read(prefix_caching: bool) -> None:
    request = Request("r", tuple(range(50)), SamplingParams(n=6, max_tokens=30, seed=1), seed=1)
    engine = drafting_engine(prefix_caching=prefix_caching)
    assert tokens(run(engine, [request])) == solo([request])
    assert engine.stats().spec_decode_num_accepted_tokens == engine.stats().spec_decode_num_draft_tokens >= 100
    assert (drafter(engine).rows < 50 + 6 * (30 + 3)) == prefix_caching


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    engine = drafting_engine()
    for name, rows in (("one", 100 + 10), ("two", 4 + 10)):
        before = drafter(engine).rows
        run(engine, [greedy(name, range(2, 52), 11)])
        assert drafter(engine).rows - before <= rows
    assert_all_free(engine)


def test_a_long_prompt_is_read_in_parts_beside_steps() -> None:
    request = greedy("r", [i % 50 for i in range(300)], 40)
    backend = TwoModels()
    engine = drafting_engine(backend=backend, budget=64)
    engine.add(request)
    results: dict[str, Result] = {}
    while "r" not in results:
        collect(engine.step(), results)
    for read in (64, 128, 192, 256):
        collect(engine.step(), results)
        assert (drafter(engine).rows, engine.stats().spec_decode_num_draft_tokens) == (read, 0)
    collect(engine.step(), results)
    assert engine.stats().spec_decode_num_draft_tokens == 4
    drain(engine, results)
    assert tokens(results) == solo([request])


def test_nothing_is_guessed_behind_a_token_that_ends_the_answer() -> None:
    text = solo([greedy("r", [1, 2, 3], 20)])["r"]
    request = replace(greedy("r", [1, 2, 3], 20), eos_ids=frozenset({text[3]}))
    engine = drafting_engine(guesses=10)
    result = run(engine, [request])["r"]
    assert (result.token_ids, result.end) == (text[:3], ("stop", None))
    assert drafter(engine).rows == 3 + 3  # the prompt, and what comes before the end


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.5, "repetition_penalty": 1.5, "frequency_penalty": 1.0},
        {"temperature": 1.5, "repetition_penalty": 1.5, "repeat_last_n": 3},
        {"temperature": 0.0, "dry_multiplier": 2.0, "dry_allowed_length": 1},
        {"temperature": 1.0, "xtc_probability": 0.5, "top_k": 30},
        {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": list(range(0, 60, 2))},
        {"temperature": 1.0, "logit_bias": {5: 3.0}, "top_p": 0.8, "logprobs": 2},
    ],
)
def test_guesses_are_drawn_as_the_request_is(fields: dict[str, Any]) -> None:
    """With its samplers, seed, sample and positions: the same model guesses all of it right."""
    few = fields if "min_tokens" in fields else {**fields, "allowed_token_ids": [1, 2, 3, 4, 5, 6, 7]}
    params = SamplingParams(max_tokens=40, n=2, **few)
    requests = [Request(f"r{i}", (1, 2, 3), params, seed=i) for i in range(3)]
    engine = drafting_engine()
    assert tokens(run(engine, requests)) == solo(requests)
    stats = engine.stats()
    assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens > 50


# --- what stays as it is


class AnyCount:
    """As many guesses as chance will have it, and reading when it will."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def counts(self, chances: list[float], most: list[int], room: int) -> list[int]:
        counts = []
        for count in most:
            counts.append(self.rng.randint(0, max(0, min(count, room))))
            room -= counts[-1]
        return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sizes", "preempted"),
    [
        ({"budget": 64}, False),
        ({"budget": 16, "seqs": 5, "pages": 12}, True),
        ({"windows": (30, 0), "pages": 14}, True),
        ({"prefix_caching": False, "pages": 14}, True),
        ({"budget": 7, "seqs": 2}, False),
    ],
)
def test_tokens_are_those_of_each_request_alone(
    seed: int, sizes: dict[str, Any], preempted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, with further samples, preempted, from the cache, with right guesses and wrong ones."""
    any_count = AnyCount(seed)
    monkeypatch.setattr(ModelPace, "counts", lambda pace, *args: any_count.counts(*args))
    monkeypatch.setattr(ModelPace, "may_begin", property(lambda pace: any_count.rng.random() < 0.7))
    requests = [
        replace(
            request, params=replace(request.params, n=1 + index % 2), prompt_token_ids=shared + request.prompt_token_ids
        )
        for index, request in enumerate(mixed_requests(20, np.random.default_rng(seed), longest_prompt=60))
        for shared in [tuple(range(20)) if index % 3 == 0 else ()]
    ]
    windows = sizes.get("windows", (0,))
    engine = drafting_engine(backend=TwoModels(windows=windows, wrong=4), **sizes)
    assert tokens(run(engine, requests)) == solo(requests, windows)
    assert_all_free(engine)
    stats = engine.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert (stats.preemptions > 0) == preempted


def test_log_probabilities_are_the_same() -> None:
    requests = [
        replace(r, params=replace(r.params, logprobs=2, prompt_logprobs=1))
        for r in mixed_requests(10, np.random.default_rng(3))
    ]
    engine = drafting_engine(backend=TwoModels(wrong=3))
    plain = run(Engine(toy_model(), ToyBackend(), replace(engine.config, speculative_config=None)), requests)
    drafted = run(engine, requests)

    def places(result: Result) -> list[Any]:
        return [place for output in result.outputs for place in output.logprobs or ()]

    assert {name: places(result) for name, result in drafted.items()} == {
        name: places(result) for name, result in plain.items()
    }


# --- constraints


def constrained(name: str, constraint: Steps, **fields: Any) -> Request:
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 12, **fields})
    return Request(name, (5, 6, 7), params, frozenset((END,)), seed=len(name), constraint=constraint)


def ten_steps(**fields: Any) -> Steps:
    return Steps(tuple((10 + i, 20 + i, 30 + i) for i in range(10)), **fields)


@pytest.mark.parametrize("fields", [{}, {"min_tokens": 4}, {"temperature": 0.0, "stop_token_ids": [13, 24]}])
def test_guesses_are_what_the_constraint_allows(fields: dict[str, Any]) -> None:
    free = frozenset(range(4, 10)) if fields else frozenset[int]()
    requests = [constrained("r" * i, ten_steps(accepting=free), **fields) for i in range(1, 6)]
    engine = drafting_engine()
    plain = run(Engine(toy_model(), ToyBackend(), EngineConfig(max_model_len=64)), requests)
    results = run(engine, requests)
    assert {name: (result.token_ids, result.end) for name, result in results.items()} == {
        name: (result.token_ids, result.end) for name, result in plain.items()
    }
    stats = engine.stats()
    assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens > 10


@pytest.mark.parametrize("place", range(10))
def test_a_limit_breaks_at_its_token_and_no_guess_before(place: int) -> None:
    text = solo([constrained("r", ten_steps())])["r"]
    result = run(drafting_engine(), [constrained("r", ten_steps(broken_at=place))])["r"]
    assert (result.token_ids, result.end, result.error) == (text[:place], ("error", None), "too many items")


class SlowAhead(Steps):
    """The masks of copies are never ready, but for the request's own."""

    release = threading.Event()
    is_copy = False

    def fill_mask(self, row: Mask) -> None:
        if self.is_copy and self.place >= 3:
            self.release.wait(20)
        super().fill_mask(row)

    def copy(self) -> SlowAhead:
        twin = replace(self, filled=[])
        twin.is_copy = self.place > 0  # the request's own is copied once, before it begins
        return twin


def test_a_guess_whose_mask_is_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MASK_SECONDS", 0.05)
    others = [constrained(f"other{i}", ten_steps()) for i in range(3)]
    text = solo([constrained("r", ten_steps()), *others])
    engine = drafting_engine()
    try:
        results = run(engine, [constrained("r", SlowAhead(ten_steps().sets)), *others])
        assert tokens(results) == text
        assert {result.end for result in results.values()} == {("stop", None)}
    finally:
        SlowAhead.release.set()
        engine.close()


# --- what it holds


def test_who_leaves_frees_its_pages() -> None:
    now = 0.0
    engine = drafting_engine()
    engine._clock = lambda: now
    requests = [greedy(f"r{i}", range(i, i + 30), 100) for i in range(4)]
    requests[1] = replace(requests[1], timeout=5.0)
    for request in requests:
        engine.add(request)
    results: dict[str, Result] = {}
    for _ in range(4):
        collect(engine.step(), results)
    assert len(drafter(engine)._texts) == 4
    engine.abort("r0")
    now = 6.0
    collect(engine.step(), results)
    assert len(drafter(engine)._texts) == 2
    engine.abort("r2")
    engine.abort("r3")
    drain(engine, results)
    assert {name: result.end[0] for name, result in results.items()} == {
        "r0": "abort",
        "r1": "timeout",
        "r2": "abort",
        "r3": "abort",
    }
    assert_all_free(engine)


def with_pages(plan: MemoryPlan, pages: int) -> MemoryPlan:
    return replace(plan, groups=tuple(replace(group, num_pages=pages) for group in plan.groups))


@pytest.mark.parametrize("pages", [1, 3, 6, 12])
def test_where_its_pages_run_out_there_are_fewer_guesses(pages: int) -> None:
    requests = mixed_requests(12, np.random.default_rng(5), longest_prompt=60)
    engine = drafting_engine()
    plan = engine.memory_plan.draft
    assert plan is not None
    drafter(engine).unbind()
    drafter(engine).bind(with_pages(plan, pages), engine.config)
    assert tokens(run(engine, requests)) == solo(requests)
    assert_all_free(engine)


@pytest.mark.parametrize("pages", [8, 11, 14])
def test_no_guess_is_made_that_there_are_no_pages_for(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model itself: its guesses would be dropped."""
    made = 0
    draft = ModelDrafter.draft

    def counted(drafter: ModelDrafter, wanted: Sequence[Wanted]) -> list[list[int]]:
        nonlocal made
        drafts = draft(drafter, wanted)
        made += sum(map(len, drafts))
        return drafts

    monkeypatch.setattr(ModelDrafter, "draft", counted)
    params = SamplingParams(temperature=1.0, max_tokens=50, allowed_token_ids=list(range(50)))
    requests = [Request(f"r{i}", tuple(range(i, i + 10)), params, seed=i) for i in range(8)]
    engine = drafting_engine(pages=pages)
    assert tokens(run(engine, requests)) == solo(requests)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.spec_decode_num_draft_tokens == made > 50


def test_who_is_not_asked_for_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that had guesses keeps its pages until they are needed."""
    asked = 0
    monkeypatch.setattr(
        ModelPace, "counts", lambda pace, chances, most, room: [4 * (index == asked) for index in range(len(most))]
    )
    requests = [greedy("first", range(1, 31), 100), greedy("second", range(3, 33), 100)]
    engine = drafting_engine()
    assert engine.memory_plan.draft is not None
    drafter(engine).unbind()
    drafter(engine).bind(with_pages(engine.memory_plan.draft, 4), engine.config)
    for request in requests:
        engine.add(request)
    results: dict[str, Result] = {}
    held = []
    for asked in (0, 0, 1, 1, 0):  # noqa: B007
        collect(engine.step(), results)
        held.append([key.request.request_id for key in drafter(engine)._texts if isinstance(key, Running)])
    assert held == [[], ["first"], ["second"], ["second"], ["first"]]
    assert engine.stats().spec_decode_num_accepted_tokens == 4 * 4
    drain(engine, results)
    assert tokens(results) == solo(requests)
    assert_all_free(engine)


def test_beyond_its_context_there_are_no_guesses() -> None:
    requests = [greedy("long", range(50), 40), greedy("short", range(5), 60)]
    engine = drafting_engine(draft=toy_model(context=64))
    assert tokens(run(engine, requests)) == solo(requests)
    assert engine.memory_plan.draft is not None
    assert engine.memory_plan.draft.max_model_len == 64
    # Positions 0 ... 63 are computed there, so that the last guess is the 65th token.
    assert 20 < engine.stats().spec_decode_num_accepted_tokens < 15 + 60
    assert drafter(engine).rows <= 2 * 64
    assert_all_free(engine)


def test_a_new_size_is_one_for_both() -> None:
    requests = mixed_requests(12, np.random.default_rng(2))
    engine = drafting_engine(pages=40, longest=24 * PAGE_SIZE)
    for request in requests:
        engine.add(request)
    results: dict[str, Result] = {}
    for pages in (60, 24, 200):
        for _ in range(3):
            collect(engine.step(), results)
        engine.resize(replace(engine.config, kv_cache_memory=2 * pages * PAGE_BYTES))
        assert engine.memory_plan.draft is not None
        assert engine.num_pages == engine.memory_plan.draft.num_pages == (pages,)
    drain(engine, results)
    assert tokens(results) == solo(requests)
    assert engine.stats().spec_decode_num_accepted_tokens > 20
    assert_all_free(engine)


@dataclass(eq=False)
class Exhausted(TwoModels):
    """Has no memory for pages at one time."""

    fails_at: int = 0
    asked: int = 0

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> list[ToyCache]:
        self.asked += 1
        if self.asked == self.fails_at:
            raise MemoryError("no room")
        return super().kv_cache(groups, shape, dtype)


@pytest.mark.parametrize("which", ["model", "draft model"])
def test_where_the_memory_cannot_be_had_after_all_the_old_size_comes_back(which: str) -> None:
    requests = mixed_requests(6, np.random.default_rng(1))
    backend = Exhausted()
    engine = drafting_engine(backend=backend, pages=60)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
    for _ in range(3):
        collect(engine.step(), results)
    backend.fails_at = backend.asked + (1 if which == "model" else 2)
    backend.bound += which == "draft model"  # the model's network was bound, and is bound again
    with pytest.raises(MemoryError):
        engine.resize(replace(engine.config, kv_cache_memory=2 * 200 * PAGE_BYTES))
    assert engine.num_pages == (60,)
    drain(engine, results)
    assert tokens(results) == solo(requests)
    assert_all_free(engine)


# --- what goes wrong


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("a fault")])
def test_where_it_fails_nothing_is_guessed_and_nobody_is_harmed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("shoal.engine.draft"), "exception", said.append)
    requests = mixed_requests(10, np.random.default_rng(4))

    def fail(step: StepInput) -> None:
        if backend.guessing_steps > 5:
            raise error

    backend = TwoModels(before_guess=fail)
    engine = drafting_engine(backend=backend)
    assert tokens(run(engine, requests)) == solo(requests)
    assert len(said) == 1
    assert backend.guessing_steps == 6


@pytest.mark.parametrize("step", range(1, 12, 2))
@pytest.mark.parametrize("place", ["before_guess", "sample"])
def test_an_interrupted_guess_is_made_again(step: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = mixed_requests(8, np.random.default_rng(6))
    times = 0

    def interrupt() -> None:
        nonlocal times
        times += 1
        if times == step:
            raise KeyboardInterrupt

    backend = TwoModels(wrong=3)
    if place == "before_guess":
        backend.before_guess = lambda step: interrupt()
    else:
        sample = Guessing.sample

        def interrupted_sample(network: Guessing, rows: IntArray, how: SampleRows) -> IntArray:
            interrupt()
            return sample(network, rows, how)

        monkeypatch.setattr(Guessing, "sample", interrupted_sample)
    engine = drafting_engine(backend=backend)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
    interrupted = 0
    while engine.has_work:
        try:
            collect(engine.step(), results)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert tokens(results) == solo(requests)
    assert engine.stats().spec_decode_num_accepted_tokens > 10
    assert_all_free(engine)


def test_nan_ends_a_guess_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = ToyNetwork.logits

    def some_nan(network: ToyNetwork, rows: IntArray) -> Any:
        found = logits(network, rows)
        if isinstance(network, Guessing):
            found[network._states[rows] % np.uint64(4) == 0, 7] = np.nan
        return found

    monkeypatch.setattr(ToyNetwork, "logits", some_nan)
    requests = mixed_requests(8, np.random.default_rng(8))
    engine = drafting_engine()
    assert tokens(run(engine, requests)) == solo(requests)
    stats = engine.stats()
    assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens > 20


# --- real arithmetic


@pytest.fixture(params=["reference", "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def networks(tmp_path: Path, device: str) -> Iterator[tuple[Any, dict[str, Model]]]:
    backend = load_backend(device, 2)
    models = {}
    for architecture in ("llama", "gemma2"):
        with GGUFFile.open(write_network(tmp_path / f"{architecture}.gguf", architecture)) as file:
            model = load_model(file, backend)
        assert isinstance(model, Model)
        models[architecture] = model
    yield backend, models
    backend.close()


@pytest.mark.parametrize(("target", "draft"), [("llama", "llama"), ("llama", "gemma2"), ("gemma2", "gemma2")])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_tokens_of_a_network(networks: tuple[Any, dict[str, Model]], target: str, draft: str, dtype: str) -> None:
    """Bits are those without guesses, whether the draft model is the same, with and without windows, or another."""
    backend, models = networks
    rng = np.random.default_rng(3)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.integers(0, NETWORK_VOCAB, length).tolist()),
            SamplingParams(temperature=i % 2 * 0.9, max_tokens=40, logprobs=2),
            seed=i,
        )
        for i, length in enumerate([1, 17, 40, 90, 200])
    ]
    config = EngineConfig(max_num_batched_tokens=48, kv_cache_dtype=dtype, max_model_len=512, max_num_seqs=8)
    guesses = {"method": "draft_model", "model": "other", "num_speculative_tokens": 5}
    plain = run(Engine(models[target], backend, config, check_every_step=True), requests)
    engine = Engine(
        models[target],
        backend,
        replace(config, speculative_config=guesses),
        check_every_step=True,
        draft=models[draft],
    )
    drafted = run(engine, requests)
    for name, result in plain.items():
        assert drafted[name].token_ids == result.token_ids
        assert [o.logprobs for o in drafted[name].outputs] == [o.logprobs for o in result.outputs]
    stats = engine.stats()
    assert stats.spec_decode_num_draft_tokens > 50
    if target == draft:  # the same bits, in another company of rows
        assert stats.spec_decode_num_accepted_tokens == stats.spec_decode_num_draft_tokens
    assert_all_free(engine)
