"""Attention and sampling on their own: what a measured step computes, and the tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.bench import timing
from shoal.bench.kernels import step_ops
from shoal.bench.kernels.step_ops import AttentionTime, SampleTime, StepOpsPlan, StepOpsReport, measure_step_ops
from shoal.errors import UnsupportedError
from shoal.kernels import reference
from shoal.kernels.base import AttentionShape
from shoal.kernels.reference_sampling import sample_row

SHAPE = AttentionShape(4, 2, 16, 0.25)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(step_ops, "_LEAST_KV", 3 * 2 * 2 * 20 * 2 * 16 * 2)  # three layers of two sequences of 20


def plan(**settings: Any) -> StepOpsPlan:
    small: dict[str, Any] = {
        "sequences": (2,),
        "contexts": (20,),
        "vocab": 300,
        "shape": SHAPE,
        "rounds": 2,
        "threads": 1,
        "device": "reference",
    }
    return StepOpsPlan(**(small | settings))


def test_every_query_attends_to_pages_that_were_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    attend = reference.attend

    def note(q: Any, k: Any, v: Any, positions: Any, shape: Any, first: int) -> Any:
        assert np.abs(k).max(axis=(1, 2)).min() > 0
        assert np.abs(v).max(axis=(1, 2)).min() > 0
        seen.append((len(q), len(k)))
        return attend(q, k, v, positions, shape, first)

    monkeypatch.setattr(reference, "attend", note)
    (found,) = measure_step_ops(plan(vocab=0)).attention
    assert (found.sequences, found.context, found.num_bytes) == (2, 20, 2 * 2 * 20 * 2 * 16 * 2)
    assert found.seconds > 0
    assert set(seen) == {(1, 20)}
    assert len(seen) % (3 * 2) == 0  # layers and sequences of a step


def test_a_long_context_is_filled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_ops, "_FILL_ROWS", 16)
    assert len(measure_step_ops(plan(contexts=(16, 40), vocab=0)).attention) == 2


def test_logits_are_as_spread_as_those_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    spread: list[float] = []
    sample = sample_row

    def note(logits: Any, how: Any, row: int) -> int:
        spread.append(float(logits.std()))
        return sample(logits, how, row)

    monkeypatch.setattr(reference, "sample_row", note)
    samples = measure_step_ops(plan(contexts=(), sequences=(3, 65), vocab=2000)).samples
    assert [(found.how, found.rows, found.vocab) for found in samples] == [(how, 3, 2000) for how in step_ops.HOW]
    assert np.mean(spread) == pytest.approx(3.0, rel=0.25)


@pytest.mark.parametrize("name", ["contexts", "vocab"])
def test_what_is_not_wanted_is_not_measured(name: str) -> None:
    report = measure_step_ops(plan(**{name: () if name == "contexts" else 0}))
    assert bool(report.attention) == (name == "vocab")
    assert bool(report.samples) == (name == "contexts")


def test_both_run_on_the_cpu() -> None:
    report = measure_step_ops(plan(device="cpu", sequences=(1, 3), contexts=(5, 33)))
    assert len(report.attention) == 4
    assert len(report.samples) == 2 * len(step_ops.HOW)


def test_a_head_that_is_too_large_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="head size 1024"):
        measure_step_ops(plan(device="cpu", shape=AttentionShape(1, 1, 1024, 1.0)))


def test_markdown_has_a_table_each() -> None:
    attention = [AttentionTime(n, 128, 1_000_000 * n, 0.0001) for n in (1, 8)]
    samples = [SampleTime(how, 8, 5000, 0.0002) for how in ("greedy", "top-k 40")]
    text = StepOpsReport(SHAPE, attention, samples).as_markdown()
    assert "**Attention of one layer, us (GB/s of KV), context by sequences: 4 heads of 16, 2 KV heads, f16**" in text
    assert "| context | 1 | 8 |" in text
    assert "| 128 | 100 (10.0) | 100 (80.0) |" in text
    assert "| greedy | 200 |\n| top-k 40 | 200 |" in text
    assert "Attention" not in StepOpsReport(SHAPE, [], samples).as_markdown()
