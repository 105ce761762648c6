"""Constrained sequences on the toy: masks, end tokens, preemption, faults of a constraint, thinking before it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.engine import masks
from shoal.engine.constraint import Constraint, Mask
from shoal.engine.engine import Request
from shoal.engine.sequence import Metrics, Sequence
from shoal.errors import ConstraintError
from shoal.params import SamplingParams
from tests.engine.steps import END, Steps
from tests.engine.toy import VOCAB, mixed_requests, run, solo, tokens, toy_engine


def bits_of(row: Mask) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.astype("<u4").view(np.uint8), bitorder="little")).tolist())


def constrained(name: str, constraint: Constraint, **fields: Any) -> Request:
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 12, **fields})
    return Request(
        name,
        (5, 6, 7),
        params,
        eos_ids=frozenset((END,)),
        seed=sum(name.encode()),
        constraint=constraint,
    )


def sequence(constraint: Constraint, **fields: Any) -> Sequence:
    return Sequence(constrained("r", constraint, **fields), 100, Metrics(0.0))


def filled(seqs: list[Sequence]) -> list[Mask | None]:
    filler = masks.MaskFiller(VOCAB, 8)
    filler.start(seqs)
    rows = filler.wait(seqs)
    filler.close()
    assert rows is not None
    return [None if row is None else row.copy() for row in rows]


def random_steps(rng: np.random.Generator) -> Steps:
    sets = [tuple(rng.choice(np.arange(3, 50), size=int(rng.integers(1, 6)), replace=False).tolist()) for _ in range(9)]
    return Steps(tuple(sets), frozenset(rng.choice(9, 2).tolist()) - {0})


def test_only_allowed_tokens_come_and_completion_is_a_stop() -> None:
    steps = Steps(((10, 11), (12,), (13, 14, 15)))
    result = run(toy_engine(), [constrained("r", steps)])["r"]
    assert result.end == ("stop", None)
    assert len(result.token_ids) == 3
    assert all(token in allowed for token, allowed in zip(result.token_ids, steps.sets, strict=True))
    assert steps.place == 0  # the request's own is left as it was


def test_max_tokens_cuts_are_length_but_a_complete_output_is_not_cut() -> None:
    steps = Steps(((10,), (11,), (12,)))
    results = run(toy_engine(), [constrained("cut", steps, max_tokens=2), constrained("whole", steps, max_tokens=3)])
    assert results["cut"].end == ("length", None)
    assert results["whole"].end == ("stop", None)


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("pages", [8, 1000])
def test_batch_equals_solo_with_constrained_rows_among_others(pages: int) -> None:
    rng = np.random.default_rng(3)
    requests = mixed_requests(40, rng)
    for index in range(0, 40, 2):
        requests[index] = replace(requests[index], constraint=random_steps(rng), eos_ids=frozenset((END,)))
    plain = [request for request in requests if request.constraint is None]
    engine = toy_engine(pages=pages, budget=64)
    together = tokens(run(engine, requests))
    assert together == solo(requests)
    assert {request.request_id: together[request.request_id] for request in plain} == tokens(run(toy_engine(), plain))
    assert (engine.stats().preemptions > 0) == (pages == 8)


def test_a_step_without_constrained_rows_has_no_masks_and_no_threads() -> None:
    filler = masks.MaskFiller(VOCAB, 8)
    seq = Sequence(Request("r", (1,), SamplingParams()), 10, Metrics(0.0))
    filler.start([seq])
    assert filler.wait([seq]) is None
    assert filler._crew is None


def test_rows_get_their_own_masks() -> None:
    plain = Sequence(Request("r", (1,), SamplingParams()), 10, Metrics(0.0))
    rows = filled([sequence(Steps(((3, 40),))), plain, sequence(Steps(((60,),)))])
    assert [row if row is None else bits_of(row) for row in rows] == [{3, 40}, None, {60}]


def test_end_tokens_are_the_constraints_business() -> None:
    may_end = Steps(((3, 9),), frozenset((0,)))
    must_go_on = Steps(((3, 9),))

    def bits(constraint: Steps, **fields: Any) -> set[int]:
        (row,) = filled([sequence(constraint, **fields)])
        assert row is not None
        return bits_of(row)

    assert bits(may_end) == {3, 9, END}
    assert bits(may_end, min_tokens=1) == {3, 9}
    assert bits(may_end, ignore_eos=True) == {3, 9}
    complete = Steps(())
    assert bits(complete, ignore_eos=True) == bits(complete, min_tokens=5) == {END}
    # A stop token of the request's own: a way to end where the output may end, and nothing else.
    assert bits(may_end, stop_token_ids=[9, 50]) == {3, 9, 50, END}
    assert bits(must_go_on, stop_token_ids=[9, 50]) == {3}
    assert bits(may_end, stop_token_ids=[9, 50], min_tokens=1) == {3}
    assert bits(may_end, stop_token_ids=[2**31 - 1]) == {3, 9, END}  # one that the model does not have


def test_stop_tokens_that_the_constraint_needs_are_an_error_that_says_so() -> None:
    result = run(toy_engine(), [constrained("r", Steps(((9,),)), stop_token_ids=[9])])["r"]
    assert result.end == ("error", None)
    assert "stop_token_ids" in result.error


def test_with_ignore_eos_it_ends_when_it_is_complete() -> None:
    steps = Steps(((10,), (11,)), frozenset((1,)))
    result = run(toy_engine(), [constrained("r", steps, ignore_eos=True)])["r"]
    assert (result.token_ids, result.end) == ([10, 11], ("stop", None))


class LateEnd(Steps):
    """Knows only from its mask that nothing may follow."""

    @property
    def is_complete(self) -> bool:
        return False

    @property
    def is_accepting(self) -> bool:
        return self.place == len(self.sets)


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 8}])
def test_an_end_that_is_found_late_is_an_end(fields: dict[str, Any]) -> None:
    result = run(toy_engine(), [constrained("r", LateEnd(((10,), (11,))), **fields)])["r"]
    assert (result.token_ids, result.end) == ([10, 11], ("stop", None))


def test_it_moves_on_only_with_accepted_tokens() -> None:
    """A step that fails is computed again: the mask is filled again at the same place."""
    steps = Steps(((10, 11), (12, 13), (14, 15)))
    engine = toy_engine()
    engine.add(constrained("r", steps))
    ((seq,),) = engine._sequences.values()
    assert engine._compute is not None
    sampler = engine._compute[1]
    original, failures = sampler.sample, iter((True, False, True, False, False))

    def failing(*args: object) -> object:
        result = original(*args)  # type: ignore[arg-type]
        if next(failures):
            raise RuntimeError("once")
        return result

    sampler.sample = failing  # type: ignore[assignment]
    results = run(engine)
    assert isinstance(seq.constraint, Steps)
    assert seq.constraint.filled == [0, 0, 1, 1, 2]
    assert results["r"].end == ("stop", None)


# --- faults


class Faulty(Steps):
    """Fails in its second mask, or at its second token."""

    error: Exception = ConstraintError("too many items")
    where: str = "fill_mask"

    def fill_mask(self, row: Mask) -> None:
        super().fill_mask(row)
        if self.where == "fill_mask" and self.place == 1:
            raise self.error

    def advance(self, token: int) -> None:
        if self.where == "advance" and self.place == 1:
            raise self.error
        super().advance(token)


@pytest.mark.parametrize("where", ["fill_mask", "advance"])
def test_a_broken_limit_is_the_error_of_that_request_alone(where: str) -> None:
    others = mixed_requests(10, np.random.default_rng(5))
    faulty = Faulty(((10,), (11,), (12,)))
    faulty.where = where
    faulty.copy = lambda: faulty  # type: ignore[method-assign]
    results = run(toy_engine(), [*others, constrained("bad", faulty)])
    assert (results["bad"].end, results["bad"].error) == (("error", None), "too many items")
    del results["bad"]
    assert tokens(results) == solo(others)


def test_what_else_a_mask_raises_is_an_error_of_that_request_too() -> None:
    faulty = Faulty(((10,), (11,)))
    faulty.error = RuntimeError("poisoned")
    faulty.copy = lambda: faulty  # type: ignore[method-assign]
    result = run(toy_engine(), [constrained("bad", faulty)])["bad"]
    assert result.error == "the constraint failed: RuntimeError: poisoned"


class Stuck(Steps):
    """Its second mask is never ready."""

    release = threading.Event()

    def fill_mask(self, row: Mask) -> None:
        if self.place == 1:
            self.release.wait()
        super().fill_mask(row)


def test_a_mask_that_takes_too_long_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MASK_SECONDS", 0.2)
    rng = np.random.default_rng(8)
    good = [constrained(f"good{i}", random_steps(rng)) for i in range(6)]
    bad = [constrained(f"stuck{i}", Stuck(((10,), (11,)))) for i in range(2)]
    engine = toy_engine()
    results = run(engine, [*good[:3], *bad, *good[3:]])
    try:
        for request in bad:
            assert "took more than 0.2 s" in results.pop(request.request_id).error
        assert tokens(results) == solo(good)
    finally:
        Stuck.release.set()
        engine.close()


@pytest.mark.parametrize("seqs", [2, 8])
def test_each_sample_has_a_constraint_of_its_own(seqs: int) -> None:
    request = constrained("r", random_steps(np.random.default_rng(1)), n=6)
    results = run(toy_engine(seqs=seqs), [request])
    assert {name: result.token_ids for name, result in results.items()} == solo([request])
    assert len({tuple(result.token_ids) for result in results.values()}) > 1


# --- threads


def mask_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shoal-mask"]


@pytest.mark.parametrize("closed", [True, False])
def test_an_engine_that_is_closed_or_dropped_leaves_no_threads(closed: bool) -> None:
    before = set(mask_threads())
    engine = toy_engine()
    run(engine, [constrained("r", Steps(((10,), (11,))))])
    own = [thread for thread in mask_threads() if thread not in before]
    assert own
    if closed:
        engine.close()
    del engine
    gc.collect()
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


def test_what_the_request_allows_and_what_the_constraint_allows_are_both_kept() -> None:
    steps = Steps(((10, 11), (12, 13)))
    result = run(toy_engine(), [constrained("r", steps, allowed_token_ids=[11, 13, 20])])["r"]
    assert (result.token_ids, result.end) == ([11, 13], ("stop", None))
    none_left = run(toy_engine(), [constrained("r", steps, allowed_token_ids=[20])])["r"]
    assert "leave no token" in none_left.error
    biased = run(toy_engine(), [constrained("r", steps, logit_bias={10: -100.0})])["r"]
    assert biased.token_ids[0] == 11
