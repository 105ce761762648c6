"""What constraints cost: how steps are compared, and that each kind is measured."""

from __future__ import annotations

import json

import pytest

from shoal.bench.constraints import ConstraintResult, measure_constraints, schema
from shoal.errors import RequestError
from shoal.llm import LLM


def test_shares_compare_steps_of_the_same_round() -> None:
    result = ConstraintResult(4, free=[1.0, 2.0, 4.0], one_schema=[1.5, 2.2, 4.0], own_schemas=[2.0, 4.0, 8.0])
    assert result.slower(result.one_schema) == pytest.approx(0.1)
    assert result.as_json()["own_schemas_slower"] == pytest.approx(1.0)
    assert "4 rows under one schema: 2200.00 ms a step, +10.0%" in str(result)


def test_schemas_differ() -> None:
    assert len({json.dumps(schema(number).json) for number in range(32)}) == 32


def test_each_kind_is_measured(llm: LLM) -> None:
    result = measure_constraints(llm, rows=3, steps=4, rounds=2)
    assert not llm.has_work
    assert result.rows == 3
    assert [len(times) for times in (result.free, result.one_schema, result.own_schemas)] == [2, 2, 2]
    assert min(result.free + result.one_schema + result.own_schemas) > 0


def test_rows_that_do_not_fit_are_no_measurement(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"only \d of 6 rows"):
        measure_constraints(llm, rows=6, steps=4, rounds=1)
