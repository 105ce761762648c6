from __future__ import annotations

from types import SimpleNamespace

import pytest

from shoal.engine.engine import MemoryPlan, plan_memory
from shoal.errors import MemoryLimitError, ParameterError
from shoal.models.config import ModelConfig
from shoal.params import EngineConfig
from tests.engine.toy import PAGE_BYTES, ToyBackend, toy_model

MODEL = toy_model(context=4096).config


@pytest.fixture(autouse=True)
def available(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The memory that the machine says it has."""
    memory = SimpleNamespace(available=1 << 34)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    return memory


def plan(config: EngineConfig, model: ModelConfig = MODEL) -> MemoryPlan:
    return plan_memory(model, 1000, config, ToyBackend())


def test_by_default_there_is_room_for_all_sequences_at_full_length() -> None:
    made = plan(EngineConfig(max_num_seqs=3))
    assert (made.max_model_len, made.num_pages, made.num_full_length_seqs) == (4096, 3 * 256, 3)
    assert (made.weights_bytes, made.kv_bytes_per_token, made.num_tokens) == (1000, 16, 3 * 4096)
    assert made.kv_bytes == 3 * 256 * PAGE_BYTES


def test_float32_pages_are_twice_as_large() -> None:
    assert plan(EngineConfig(kv_cache_dtype="f32")).kv_bytes_per_token == 32


def test_the_default_context_is_the_models_own_up_to_8192() -> None:
    assert plan(EngineConfig(), toy_model(context=10**6).config).max_model_len == 8192
    with pytest.raises(ParameterError, match="max_model_len: got 5000, must be at most the model's context 4096"):
        plan(EngineConfig(max_model_len=5000))


def test_by_default_pages_take_at_most_a_gibibyte_and_two_fifths_of_what_is_available(
    available: SimpleNamespace,
) -> None:
    config = EngineConfig(max_num_seqs=65536)
    assert plan(config).kv_bytes == 1 << 30
    available.available = 100 * PAGE_BYTES * 256
    assert plan(config).num_full_length_seqs == 40


def test_too_little_memory_for_one_sequence_is_refused_with_both_numbers(available: SimpleNamespace) -> None:
    available.available = 2 * 4096 * 16
    with pytest.raises(
        MemoryLimitError, match="need 65536 bytes, 131072 bytes of memory are available, of which 52428"
    ):
        plan(EngineConfig())


def test_what_the_user_gives_may_be_less_than_one_sequence_but_not_less_than_a_page() -> None:
    made = plan(EngineConfig(kv_cache_memory=5 * PAGE_BYTES + 1))
    assert (made.num_pages, made.num_full_length_seqs) == (5, 0)
    with pytest.raises(MemoryLimitError, match="one page needs 256 bytes, 255 bytes are given"):
        plan(EngineConfig(kv_cache_memory=PAGE_BYTES - 1))


def test_more_than_there_is_is_refused_and_more_than_is_of_use_not_taken(available: SimpleNamespace) -> None:
    config = EngineConfig(max_num_seqs=2, kv_cache_memory="4GiB")
    assert plan(config).num_full_length_seqs == 2
    available.available = 4096
    with pytest.raises(MemoryLimitError, match="131072 bytes are needed, 4096 bytes are available"):
        plan(config)
