from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.errors import ParameterError
from shoal.params import EngineConfig, SamplingParams, SpeculativeConfig

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


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 3}, (3, 3)),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 2}, (2, 4)),
    ],
)
def test_sizes_of_ngrams_are_vllms(given: dict[str, int], sizes: tuple[int, int]) -> None:
    config = EngineConfig(speculative_config={"method": "ngram", **given}).speculative_config
    assert isinstance(config, SpeculativeConfig)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == sizes
    assert EngineConfig(speculative_config=config) == EngineConfig(speculative_config={"method": "ngram", **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"speculative_config: got \[\], must be an object"),
        ({}, "speculative_config: got {}, must be given with a method"),
        ({"method": "eagle"}, "speculative_config.method: got 'eagle', must be one of ngram, suffix, draft_model"),
        ({"method": "suffix", "prompt_lookup_max": 3}, "prompt_lookup_max: got 3, must be left out for method suffix"),
        ({"method": "ngram", "suffix_decoding_min_token_prob": 0.5}, "must be left out for method ngram"),
        ({"method": "suffix", "model": "a.gguf"}, "config.model: got 'a.gguf', must be left out for method suffix"),
        ({"method": "draft_model"}, "speculative_config.model: got None, must be a path or a name of a model"),
        ({"method": "draft_model", "model": 3}, "config.model: got 3, must be a path or a name"),
        (
            {"method": "draft_model", "model": "a.gguf", "prompt_lookup_max": 3},
            "prompt_lookup_max: got 3, must be left out for method draft_model",
        ),
        (
            {"method": "suffix", "suffix_decoding_min_token_prob": 1.5},
            "min_token_prob: got 1.5, must be .* from 0 to 1",
        ),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 2}, "max_tree_depth: got 2, must be an integer from 3"),
        (
            {"method": "ngram", "k": 1},
            "speculative_config: got 'k', must be names among method, num_speculative_tokens",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            "num_speculative_tokens: got 0, must be an integer from 1 to",
        ),
        ({"method": "ngram", "prompt_lookup_min": "a"}, "prompt_lookup_min: got 'a', must be an integer from 1 to 16"),
        ({"method": "ngram", "prompt_lookup_min": 65}, "prompt_lookup_min: got 65, must be an integer from 1 to 16"),
        (
            {"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "min: got 4, must be an integer from 1 to 3",
        ),
        ({"method": "ngram", "num_speculative_tokens": "6"}, "num_speculative_tokens: got '6', must be an integer"),
        ({"method": "ngram", "prompt_lookup_max": 0}, "prompt_lookup_max: got 0, must be an integer from 1 to 16"),
        ({"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 4}, "lookup_min: got 4, must be .* 1 to 3"),
    ],
)
def test_what_is_wrong_with_a_speculative_config_is_named(given: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        EngineConfig(speculative_config=given)
