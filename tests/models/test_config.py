from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import GGUFError, UnsupportedError
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig
from tests.support.tiny_archs import TINY_ARCHS


def config_of(tmp_path: Path, name: str, keys: Mapping[str, Any], layers: int | None = None) -> ModelConfig:
    """That of a tiny model with other keys."""
    tiny = TINY_ARCHS[name]
    changed = replace(tiny, keys={**tiny.keys, **keys}, layers=layers or tiny.layers)
    with GGUFFile.open(changed.write(tmp_path / "tiny.gguf")) as file:
        return ModelConfig.from_gguf(file)


def test_a_number_for_each_layer_is_one_number_where_they_are_alike(tmp_path: Path) -> None:
    assert config_of(tmp_path, "llama_fused", {"attention.head_count_kv": [2, 2]}).n_kv_heads == 2
    with pytest.raises(GGUFError, match="head_count_kv"):
        config_of(tmp_path, "llama_fused", {"attention.head_count_kv": [2, 1]})


def test_windows_follow_the_period_or_a_flag_for_each_layer(tmp_path: Path) -> None:
    flags = {"attention.sliding_window_pattern": [False, True, False, True, True]}
    assert config_of(tmp_path, "olmo3", flags).windows == (0, 7, 0, 7, 7)
    assert config_of(tmp_path, "olmo3", {"attention.sliding_window_pattern": 3}).windows == (7, 7, 0, 7, 7)
    assert config_of(tmp_path, "olmo3", {"attention.sliding_window": 0}).windows == (0,) * 5
    with pytest.raises(GGUFError, match=r"4 items for 5 layers"):
        config_of(tmp_path, "olmo3", {"attention.sliding_window_pattern": [True] * 4})


def test_layers_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    assert config_of(tmp_path, "glm4moe_guessing", {}).n_layers == 2
    with pytest.raises(GGUFError, match=r"nextn_predict_layers.*3 is not below block_count 3"):
        config_of(tmp_path, "glm4moe_guessing", {"nextn_predict_layers": 3})


def test_the_number_of_layers_chooses_between_models_of_one_name(tmp_path: Path) -> None:
    assert config_of(tmp_path, "baichuan_13b", {}).alibi == 8.0
    assert config_of(tmp_path, "baichuan_13b", {}, layers=32).alibi == 0.0


def test_a_context_ends_where_scores_would_be_sharpened(tmp_path: Path) -> None:
    assert config_of(tmp_path, "mistral3", {}).context_length == 32
    assert config_of(tmp_path, "mistral3", {"attention.temperature_scale": 0.0}).context_length == 64


def test_layers_with_and_without_experts_in_turn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="interleave_moe_layer_step"):
        config_of(tmp_path, "ernie4_5-moe", {"interleave_moe_layer_step": 2})


def test_the_rope_scaling_of_a_model_without_rope_is_not_looked_at(tmp_path: Path) -> None:
    odd = {"rope.scaling.type": "su", "rope.scaling.factor": "2"}
    assert config_of(tmp_path, "starcoder", odd).rope_scaling.kind == "none"
    with pytest.raises(UnsupportedError, match="'su' is not supported"):
        config_of(tmp_path, "llama_fused", {"rope.scaling.type": "su"})
