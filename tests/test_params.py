from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.errors import ParameterError
from shoal.params import EngineConfig, SamplingParams

INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [4.0, np.int64(4), np.float64(4), np.uint8(4)], ids=repr)
def test_a_whole_number_of_any_type_is_an_integer(field: str, value: Any) -> None:
    given = getattr(SamplingParams(**{field: value}), field)
    assert (given, type(given)) == (4, int)


def test_whole_numbers_in_lists_and_of_the_engine() -> None:
    assert repr(SamplingParams(stop_token_ids=[4.0, np.int32(5)])) == repr(SamplingParams(stop_token_ids=[4, 5]))  # type: ignore[list-item]
    assert repr(EngineConfig(max_num_seqs=4.0, threads=np.int64(2))) == repr(EngineConfig(max_num_seqs=4, threads=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [4.5, 1e30, float("inf"), float("nan"), True, "4", b"4", [4]], ids=repr)
def test_anything_else_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{field}: got .*, must be an integer from") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["min_tokens", "top_k"])
def test_a_number_that_must_be_there_is_not_none(field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        SamplingParams(**{field: None})  # type: ignore[arg-type]


def test_the_range_of_top_p() -> None:
    assert SamplingParams(top_p=0).top_p == 0
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ParameterError, match="top_p"):
            SamplingParams(top_p=value)
