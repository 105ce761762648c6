"""States as they are gathered: in whatever pieces they come, and what becomes of inputs that do not end well."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.engine.engine import Metrics, Output
from shoal.params import Pooling, PoolingParams
from shoal.requests.pooled import EmbeddingRequestOutput, Pooled, ScoringRequestOutput, normalised

STATES = np.random.default_rng(4).standard_normal((37, 5)).astype(np.float32) * np.float32(1e3)


def gathered(pooling: Pooling, pieces: list[NDArray[np.float32]], **params: Any) -> Pooled:
    """A finished item that got its states in these pieces."""
    item = Pooled("a", [0] * len(STATES), pooling, PoolingParams(**params), [])
    for number, piece in enumerate(pieces, start=1):
        done = number == len(pieces)
        output = Output("a", Metrics(0.0), finished=done, finish_reason="stop" if done else None, states=piece)
        assert not item.take(output)
    return item


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("size", [1, 2, 7, 36])
def test_pieces_change_no_bit(pooling: Pooling, size: int) -> None:
    pieces = [STATES[start : start + size] for start in range(0, len(STATES), size)]
    assert np.array_equal(gathered(pooling, pieces).vector(), gathered(pooling, [STATES]).vector())


def test_a_mean_is_the_mean() -> None:
    mean = gathered("mean", [STATES], normalize=False).vector()
    assert np.allclose(mean, STATES.astype(np.float64).mean(axis=0), rtol=1e-6)
    assert mean.dtype == np.float32


def test_a_state_of_a_single_number_is_added_in_order_too() -> None:
    """Of one column NumPy would add pairs."""
    column, total = STATES[:, :1], 0.0
    for state in column[:, 0].tolist():
        total += state
    (found,) = gathered("mean", [column], normalize=False).vector()
    assert found == np.float32(total / len(column))


def test_zeros_have_no_direction() -> None:
    assert normalised(np.zeros(4)).tolist() == [0.0] * 4
    assert normalised(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist() == pytest.approx(np.array([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize(("logit", "score"), [(-1e30, 0.0), (-700.0, math.exp(-700.0)), (0.0, 0.5), (1e30, 1.0)])
def test_scores_of_any_size(logit: float, score: float) -> None:
    row = np.array([[logit, 5.0]], np.float32)
    assert gathered("rank", [row]).score() == pytest.approx(score, rel=1e-6)
    assert gathered("rank", [row], use_activation=False).score() == np.float32(logit)


@pytest.mark.parametrize(("reason", "says"), [("timeout", "time was up"), ("abort", "aborted"), ("error", "boom")])
def test_what_did_not_end_well_says_why(reason: Any, says: str) -> None:
    item = gathered("mean", [STATES[:3]])
    item.finish_reason = None
    error = "boom" if reason == "error" else None
    item.take(Output("a", Metrics(0.0), finished=True, finish_reason=reason, error=error))
    output, scored = item.snapshot(), item.scored()
    assert output.finished
    assert output.outputs.embedding == []
    assert output.outputs.hidden_size == 0
    assert says in (output.error or "")
    assert scored.error == output.error
    assert math.isnan(scored.outputs.score)


def test_an_abort_changes_nothing_that_has_ended() -> None:
    item = gathered("mean", [STATES])
    item.abort()
    assert item.finish_reason == "stop"
    assert item.snapshot().error is None


def test_a_pair_of_which_one_failed_has_no_score() -> None:
    fine, bad = gathered("mean", [STATES]).snapshot(), EmbeddingRequestOutput.failed("b", "too long")
    assert ScoringRequestOutput.of_similarity(fine, fine).outputs.score == pytest.approx(1.0)
    pair = ScoringRequestOutput.of_similarity(fine, bad)
    assert (pair.error, math.isnan(pair.outputs.score)) == ("too long", True)
