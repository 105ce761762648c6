from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.engine import memory_plan
from shoal.engine.memory_plan import DraftSize, MemoryPlan, OwnedPages, plan_memory
from shoal.errors import MemoryLimitError, ParameterError
from shoal.models.config import ModelConfig
from shoal.params import EngineConfig
from shoal.system.machine_limits import MemoryRoom
from tests.engine.toy import PAGE_BYTES, ToyBackend, toy_model

MODEL = toy_model(context=4096).config


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The memory that may be used: ``available`` of ``limit``."""
    memory = SimpleNamespace(available=1 << 34, limit=1 << 35, source="")
    monkeypatch.setattr(memory_plan, "memory_room", lambda: MemoryRoom(**vars(memory)))
    return memory


def plan(config: EngineConfig, model: ModelConfig = MODEL) -> MemoryPlan:
    return plan_memory(model, 1000, config, ToyBackend())


def test_by_default_there_is_room_for_all_sequences_at_full_length() -> None:
    made = plan(EngineConfig(max_num_seqs=3))
    assert (made.max_model_len, made.num_pages, made.num_seqs(4096)) == (4096, (3 * 256,), 3)
    assert (made.weights_bytes, made.kv_bytes_per_token, made.num_tokens) == (1000, 16, 3 * 4096)
    assert made.kv_bytes == 3 * 256 * PAGE_BYTES


def test_float32_pages_are_twice_as_large() -> None:
    assert plan(EngineConfig(kv_cache_dtype="f32")).kv_bytes_per_token == 32


def test_the_default_context_is_the_models_own_up_to_8192() -> None:
    assert plan(EngineConfig(), toy_model(context=10**6).config).max_model_len == 8192
    with pytest.raises(ParameterError, match="max_model_len: got 5000, must be at most the model's context 4096"):
        plan(EngineConfig(max_model_len=5000))


def test_by_default_pages_take_at_most_a_gibibyte_and_two_fifths_of_what_is_available(
    room: SimpleNamespace,
) -> None:
    config = EngineConfig(max_num_seqs=65536)
    assert plan(config).kv_bytes == 1 << 30
    room.available = 100 * PAGE_BYTES * 256
    assert plan(config).num_seqs(4096) == 40


def test_too_little_memory_for_one_sequence_is_refused_with_both_numbers(room: SimpleNamespace) -> None:
    room.available = 2 * 4096 * 16
    with pytest.raises(
        MemoryLimitError, match="need 65536 bytes, 131072 bytes of memory are available, of which 52428"
    ):
        plan(EngineConfig())


def test_a_containers_limit_is_named(room: SimpleNamespace) -> None:
    room.available, room.limit, room.source = 2 * 4096 * 16, 1 << 20, "/sys/fs/cgroup/memory.max"
    says = r"131072 bytes of memory are available \(the limit is 1048576, in /sys/fs/cgroup/memory.max\)"
    with pytest.raises(MemoryLimitError, match=says):
        plan(EngineConfig())
    with pytest.raises(MemoryLimitError, match=says):
        plan(EngineConfig(max_num_seqs=9, kv_cache_memory="1MiB"))


def test_what_the_user_gives_may_be_less_than_one_sequence_but_not_less_than_a_page() -> None:
    made = plan(EngineConfig(kv_cache_memory=5 * PAGE_BYTES + 1))
    assert (made.num_pages, made.num_seqs(80), made.num_seqs(81), made.num_seqs(4096)) == ((5,), 1, 0, 0)
    with pytest.raises(MemoryLimitError, match="one page needs 256 bytes, 255 bytes are given"):
        plan(EngineConfig(kv_cache_memory=PAGE_BYTES - 1))


def test_more_than_there_is_is_refused_and_more_than_is_of_use_not_taken(room: SimpleNamespace) -> None:
    config = EngineConfig(max_num_seqs=2, kv_cache_memory="4GiB")
    assert plan(config).num_seqs(4096) == 2
    room.available = 4096
    with pytest.raises(MemoryLimitError, match="131072 bytes are needed, 4096 bytes of memory are available"):
        plan(config)


def test_what_is_owned_already_counts_as_far_as_it_is_filled_and_can_always_be_had_again(
    room: SimpleNamespace,
) -> None:
    room.available = 100 * PAGE_BYTES
    owned = OwnedPages(total=(200,), filled=(20,))

    def pages(count: int) -> int:
        config = EngineConfig(max_num_seqs=2, kv_cache_memory=count * PAGE_BYTES)
        return plan_memory(MODEL, 1000, config, ToyBackend(), owned).num_pages[0]

    assert [pages(count) for count in (50, 120, 200)] == [50, 120, 200]
    with pytest.raises(MemoryLimitError, match=f"{201 * PAGE_BYTES} bytes are needed, {120 * PAGE_BYTES} bytes of"):
        pages(201)


# --- windows: a page of the layers below takes PAGE_BYTES each


def windowed(*windows: int) -> ModelConfig:
    return toy_model(context=4096, windows=windows).config


def test_layers_with_the_same_window_are_a_group() -> None:
    made = plan(EngineConfig(max_num_seqs=2, max_num_batched_tokens=512), windowed(256, 256, 0, 512, 256))
    assert [(g.use.window, g.layers, g.page_bytes) for g in made.groups] == [
        (256, (0, 1, 4), 3 * PAGE_BYTES),
        (0, (2,), PAGE_BYTES),
        (512, (3,), PAGE_BYTES),
    ]
    assert made.kv_bytes_per_token == 5 * 16
    # Of 256 + 512 tokens the one that computes a chunk and of 256 the other, and a page where they begin inside one.
    assert made.num_pages == (49 + 17, 2 * 256, 65 + 33)
    assert made.num_seqs(4096) == 2


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    made = plan(EngineConfig(max_model_len=256), windowed(256, 0, 255))
    assert [(g.use.window, g.layers) for g in made.groups] == [(0, (0, 1)), (255, (2,))]


def test_a_window_makes_room_for_more_sequences() -> None:
    budget = EngineConfig(kv_cache_memory=2000 * PAGE_BYTES)
    without, with_windows = (plan(budget, windowed(*windows)) for windows in ((0, 0, 0), (128, 128, 0)))
    assert [without.num_seqs(length) for length in (4096, 724, 128)] == [2, 14, 83]
    assert [with_windows.num_seqs(length) for length in (4096, 724, 128)] == [5, 26, 33]


def test_one_sequence_of_full_length_fits_first() -> None:
    first = 256 + 2 * 41  # of 128 + 512 tokens
    made = plan(EngineConfig(kv_cache_memory=first * PAGE_BYTES), windowed(0, 128, 128))
    assert (made.num_pages, made.num_seqs(4096)) == ((256, 41), 1)
    made = plan(EngineConfig(kv_cache_memory=first * PAGE_BYTES - 1), windowed(0, 128, 128))
    assert (made.num_pages, made.num_seqs(4096), made.num_seqs(4080)) == ((255, 41), 0, 1)
    made = plan(EngineConfig(kv_cache_memory=30 * PAGE_BYTES), windowed(0, 128, 128))
    assert (made.num_pages, made.num_seqs(160)) == ((10, 10), 1)


def test_windows_in_every_layer() -> None:
    made = plan(EngineConfig(max_num_seqs=3), windowed(128, 128))
    assert made.num_pages == (41 + 9 + 9,)
    assert made.num_seqs(4096) == 3
    made = plan(EngineConfig(kv_cache_memory=20 * PAGE_BYTES), windowed(128, 128))
    assert (made.num_pages, made.num_seqs(160), made.num_seqs(4096)) == ((10,), 1, 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    windows=st.lists(st.sampled_from([0, 16, 100, 512, 5000]), min_size=1, max_size=4),
    pages=st.integers(4, 5000),
    seqs=st.integers(1, 100),
    length=st.integers(1, 4096),
)
def test_what_the_user_gives_is_used_up_or_enough(windows: list[int], pages: int, seqs: int, length: int) -> None:
    config = EngineConfig(max_num_seqs=seqs, kv_cache_memory=pages * PAGE_BYTES)
    made = plan(config, windowed(*windows))
    assert made.kv_bytes <= pages * PAGE_BYTES
    if made.num_seqs(4096) < seqs:
        assert made.kv_bytes > (pages - 2 * len(windows)) * PAGE_BYTES
    assert min(made.num_pages) >= 1
    fit = made.num_seqs(length)
    assert fit == 0 or all(
        group.use.most_pages(length) + (fit - 1) * group.use.settled_pages(length) <= group.num_pages
        for group in made.groups
    )


# --- with a draft model


def with_draft(config: EngineConfig, draft: ModelConfig, owned: OwnedPages | None = None) -> MemoryPlan:
    return plan_memory(MODEL, 1000, config, ToyBackend(), owned or OwnedPages(), draft=DraftSize(draft, 10))


def test_a_draft_model_has_pages_for_as_many_tokens_out_of_the_same_memory() -> None:
    """Of one that takes two thirds of a token's bytes, that share."""
    made = with_draft(EngineConfig(max_model_len=256, kv_cache_memory=90 * PAGE_BYTES), windowed(0, 0))
    assert made.draft is not None
    assert (made.num_pages, made.draft.num_pages) == ((30,), (30,))
    assert (made.kv_bytes, made.draft.kv_bytes) == (30 * PAGE_BYTES, 60 * PAGE_BYTES)
    assert (made.weights_bytes, made.draft.weights_bytes) == (1000, 10)
    assert (made.kv_bytes_per_token, made.draft.kv_bytes_per_token) == (16, 32)


def test_by_default_both_share_what_one_would_have(room: SimpleNamespace) -> None:
    config = EngineConfig(max_num_seqs=3)
    made = with_draft(config, windowed(0))
    assert made.draft is not None
    assert made.num_pages == made.draft.num_pages == plan(config).num_pages
    many = with_draft(EngineConfig(max_num_seqs=65536), windowed(0))
    assert many.draft is not None
    assert many.kv_bytes + many.draft.kv_bytes == 1 << 30
    room.available = 2 * 4096 * 16
    with pytest.raises(
        MemoryLimitError, match=r"need 131072 bytes, 131072 bytes of memory are available, of which 52428"
    ):
        with_draft(EngineConfig(), windowed(0))
    with pytest.raises(MemoryLimitError, match="one page needs 512 bytes, 511 bytes are given"):
        with_draft(EngineConfig(kv_cache_memory=2 * PAGE_BYTES - 1), windowed(0))


def test_a_draft_model_has_its_own_context_and_windows() -> None:
    made = with_draft(EngineConfig(max_num_seqs=2), toy_model(context=1024, windows=(128, 0, 2000)).config)
    assert made.draft is not None
    assert (made.max_model_len, made.draft.max_model_len) == (4096, 1024)
    assert [(g.use.window, g.layers) for g in made.draft.groups] == [(128, (0,)), (0, (1, 2))]
    assert made.num_pages == (2 * 256,)
    assert made.draft.num_pages[0] < made.draft.num_pages[1] == 2 * 256


def test_pages_of_a_draft_model_that_give_way_count_too(room: SimpleNamespace) -> None:
    room.available = 0
    config = EngineConfig(max_model_len=256, kv_cache_memory=90 * PAGE_BYTES)
    owned = OwnedPages((30, 30), (30, 29))
    with pytest.raises(
        MemoryLimitError, match=f"{93 * PAGE_BYTES} bytes are needed, {90 * PAGE_BYTES - 2 * PAGE_BYTES} bytes"
    ):
        with_draft(replace(config, kv_cache_memory=93 * PAGE_BYTES), windowed(0, 0), owned)
    assert with_draft(config, windowed(0, 0), owned).num_pages == (30,)


def test_what_the_user_gives_must_hold_a_sequence_of_both() -> None:
    """No answer may end for want of pages that there would be without the draft model."""
    both = EngineConfig(max_model_len=256, kv_cache_memory=32 * PAGE_BYTES)
    made = with_draft(both, windowed(0))
    assert (made.num_pages, made.num_seqs(256)) == ((16,), 1)
    says = f"need {32 * PAGE_BYTES} bytes, {32 * PAGE_BYTES - 1} bytes are given: lower max_model_len, or have no draft"
    with pytest.raises(MemoryLimitError, match=says):
        with_draft(replace(both, kv_cache_memory=32 * PAGE_BYTES - 1), windowed(0))
    assert plan(replace(both, kv_cache_memory=4 * PAGE_BYTES)).num_pages == (4,)
