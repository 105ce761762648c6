from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.sampler import token_logprobs

LOGIT = st.sampled_from([-math.inf, -3.0, -1.5, 0.0, 0.25, 2.0, 30.0])  # few values, so that there are ties


@given(st.lists(LOGIT, min_size=1, max_size=40).filter(lambda row: max(row) > -math.inf), st.integers(0, 20), st.data())
def test_token_logprobs_against_plain_python(row: list[float], count: int, data: st.DataObject) -> None:
    token = data.draw(st.sampled_from([i for i, x in enumerate(row) if x > -math.inf]))
    total = math.log(math.fsum(math.exp(x) for x in row))
    got = token_logprobs(np.array(row, np.float32), token, count)
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
    assert (got.token_id, [i for i, _ in got.top]) == (token, best)
    assert got.rank == sum(x >= row[token] for x in row)
    assert got.logprob == pytest.approx(row[token] - total, abs=1e-9)
    assert [x for _, x in got.top] == pytest.approx([row[i] - total for i in best], abs=1e-9)


def test_infinite_logits_raise_nothing() -> None:
    got = token_logprobs(np.array([1.0, np.inf, 2.0], np.float32), 1, 2)
    assert (got.token_id, got.rank, [i for i, _ in got.top]) == (1, 1, [1, 2])
    assert math.isnan(got.logprob)
