"""The engine on small random networks: the reference backend's attention, positions and pages instead of the toy's."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.engine import Engine, Request
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import AttentionShape, Backend, KVGroup, StepInput
from shoal.kernels.load import load_backend
from shoal.kernels.reference import ReferenceBackend
from shoal.models.weights import Encoder, Model, load_model
from shoal.params import EngineConfig, SamplingParams
from tests.engine.faulty import faulty
from tests.engine.random_network import HEADS, KV_HEADS, LAYERS, NAN_TOKEN, VOCAB, WIDTH, write_network
from tests.engine.toy import Result, collect, drain, run, samples, tokens

PAGE_BYTES = LAYERS * 2 * KV_HEADS * (WIDTH // HEADS) * 2 * 16


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model | Encoder]:
    path = write_network(tmp_path_factory.mktemp("models") / "random.gguf", request.param)
    with GGUFFile.open(path) as file:
        yield load_model(file, ReferenceBackend())


def engine(
    model: Model | Encoder, backend: Backend | None = None, *, pages: int = 100, budget: int = 512, dtype: str = "f16"
) -> Engine:
    """``pages``: as many as take so much memory with f16."""
    config = EngineConfig(max_num_batched_tokens=budget, kv_cache_memory=pages * PAGE_BYTES, kv_cache_dtype=dtype)
    return Engine(model, backend or ReferenceBackend(), config, check_every_step=True)


def requests() -> list[Request]:
    rng = np.random.default_rng(1)
    made = []
    for i, length in enumerate([1, 7, 17, 33, 60, 2, 16, 48]):
        temperature = 0.9 if i % 2 else 0.0
        params = SamplingParams(temperature=temperature, max_tokens=12)
        made.append(Request(f"r{i}", tuple(rng.integers(0, VOCAB, length).tolist()), params, seed=i))
    return made


@pytest.fixture(scope="module")
def alone(model: Model | Encoder) -> dict[str, list[int]]:
    one = engine(model)
    return {request.request_id: tokens(run(one, [request]))[request.request_id] for request in requests()}


@pytest.mark.parametrize(("pages", "budget"), [(100, 512), (100, 16), (100, 5), (5, 64)])
def test_batch_equals_solo(model: Model | Encoder, alone: dict[str, list[int]], pages: int, budget: int) -> None:
    many = engine(model, pages=pages, budget=budget)
    assert tokens(run(many, requests()[::-1])) == alone
    assert (many.stats().preemptions > 0) == (pages == 5)


def test_decoding_agrees_with_scoring_the_whole_text_at_once(
    model: Model | Encoder, alone: dict[str, list[int]]
) -> None:
    greedy = [request for request in requests() if request.params.greedy]
    whole = [
        replace(request, prompt_token_ids=request.prompt_token_ids + tuple(alone[request.request_id]), want_logits=True)
        for request in greedy
    ]
    results = run(engine(model, budget=40), whole)
    for request in greedy:
        logits = logits_of(results[request.request_id])
        expected = alone[request.request_id]
        assert logits[len(request.prompt_token_ids) - 1 : -1].argmax(axis=1).tolist() == expected


def test_logits_do_not_depend_on_chunks(model: Model | Encoder) -> None:
    request = replace(requests()[4], want_logits=True)
    whole = logits_of(run(engine(model), [request])["r4"])
    chunked = logits_of(run(engine(model, budget=7), [request])["r4"])
    assert np.array_equal(chunked, whole)


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_text_of_many_windows_does_not_depend_on_pages_or_chunks(tmp_path: Path, device: str) -> None:
    """Several hundred tokens: the windowed layer has pages for a window and a chunk alone, and they change hands all the time."""
    rng = np.random.default_rng(2)
    params = SamplingParams(temperature=0, max_tokens=80)
    long = [Request(f"r{i}", tuple(rng.integers(0, VOCAB, 300 + i).tolist()), params) for i in range(3)]
    scored = replace(long[2], want_logits=True)
    backend = load_backend(device, 2)
    try:
        with GGUFFile.open(write_network(tmp_path / "random.gguf", "gemma2")) as file:
            windowed = load_model(file, backend)
        one = engine(windowed, backend, pages=200)
        expected = {request.request_id: tokens(run(one, [request]))[request.request_id] for request in long}
        logits = logits_of(run(one, [scored])["r2"])
        for pages, budget in ((60, 512), (60, 33), (24, 16)):
            many = engine(windowed, backend, pages=pages, budget=budget)
            assert tokens(run(many, long)) == expected
            assert (many.stats().preemptions > 0) == (pages == 24)
            assert np.array_equal(logits_of(run(many, [scored])["r2"]), logits)
    finally:
        backend.close()


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = load_backend(request.param, 2)
    yield backend
    backend.close()


def ends(results: dict[str, Result]) -> dict[str, tuple[str | None, list[int]]]:
    """Why each request ended, and its tokens."""
    return {name: (result.end[0], result.token_ids) for name, result in results.items()}


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["f16", "f32", "q8_0"])
def test_nan_harms_neither_neighbours_nor_those_who_get_its_pages(
    tmp_path: Path, backend: Backend, architecture: str, dtype: str
) -> None:
    good = [replace(r, prompt_token_ids=tuple(t % NAN_TOKEN for t in r.prompt_token_ids)) for r in requests()]
    prompt = (*range(20), NAN_TOKEN, *range(20))
    bad = [
        Request("plain", prompt, SamplingParams(max_tokens=5)),
        Request("scored", prompt, SamplingParams(max_tokens=5, prompt_logprobs=2)),
        Request("logits", prompt, SamplingParams(), want_logits=True),
    ]
    with GGUFFile.open(write_network(tmp_path / "nan.gguf", architecture, with_nan=True)) as file:
        model = load_model(file, backend)
    clean = engine(model, backend, dtype=dtype)
    expected = {name: end for request in good for name, end in ends(run(clean, [request])).items()}
    assert "length" in {reason for reason, _ in expected.values()}
    for budget in (16, 512):
        many = engine(model, backend, pages=24, budget=budget, dtype=dtype)
        for first in range(3):  # another one of the bad comes first, and all pages have held NaN
            results = run(many, [*bad[first:], *good[:4], *bad[:first], *good[4:]])
            for request in bad:
                assert "NaN" in results.pop(request.request_id).error
            assert ends(results) == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["f16", "f32", "q8_0"])
def test_samples_go_on_from_copies_of_the_last_page(
    tmp_path: Path, backend: Backend, architecture: str, dtype: str
) -> None:
    with GGUFFile.open(write_network(tmp_path / "net.gguf", architecture)) as file:
        model = load_model(file, backend)
    many = [
        replace(r, params=replace(r.params, n=3, temperature=0.9)) for r in requests() if len(r.prompt_token_ids) > 2
    ]
    clean = engine(model, backend, dtype=dtype)
    alone = {one.request_id: tokens(run(clean, [one]))[one.request_id] for r in many for one in samples(r)}
    assert tokens(run(engine(model, backend, dtype=dtype, budget=40), many)) == alone


def test_other_sizes_change_no_token_and_take_their_memory_after_the_old_went(
    tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with GGUFFile.open(write_network(tmp_path / "net.gguf", "gemma2")) as file:
        model = load_model(file, backend)
    clean = engine(model, backend)
    alone = {request.request_id: tokens(run(clean, [request]))[request.request_id] for request in requests()}
    arrays: list[weakref.ref[np.ndarray]] = []
    kv_cache = backend.kv_cache

    def watched(groups: Row[KVGroup], shape: AttentionShape, dtype: str) -> Any:
        assert all(array() is None for array in arrays), "the old memory is still there"
        cache = kv_cache(groups, shape, dtype)
        kept = [cache.k] if isinstance(cache.k, np.ndarray) else cache.k.values()
        arrays.extend(weakref.ref(array) for array in kept)
        return cache

    monkeypatch.setattr(backend, "kv_cache", watched)
    one = engine(model, backend, pages=30)
    results: dict[str, Result] = {}
    for request in requests():
        one.add(request)
    for pages, seqs, budget in ((60, 8, 64), (12, 2, 20), (30, 5, 7)):
        for _ in range(4):
            collect(one.step(), results)
        one.resize(
            replace(one.config, kv_cache_memory=pages * PAGE_BYTES, max_num_seqs=seqs, max_num_batched_tokens=budget)
        )
    drain(one, results)
    assert tokens(results) == alone
    assert one.stats().preemptions > 0


def test_a_fault_harms_no_neighbour(tmp_path: Path, backend: Backend) -> None:
    poison = Request("poison", (NAN_TOKEN, 1, 2), SamplingParams(temperature=0))
    calls = itertools.count()

    def always(name: str, step: StepInput) -> None:
        if (step.positions[step.token_ids == NAN_TOKEN] == 0).any():
            raise FloatingPointError("unlucky")

    def at_times(name: str, step: StepInput) -> None:
        if next(calls) % 5 == 4:
            raise MemoryError

    good = [replace(r, prompt_token_ids=(0, *r.prompt_token_ids)) for r in requests()]
    with GGUFFile.open(write_network(tmp_path / "random.gguf", "llama")) as file:
        model = load_model(file, backend)
    one = engine(model, backend)
    expected = {name: end for request in good for name, end in ends(run(one, [request])).items()}
    for budget in (20, 512):
        results = run(engine(model, faulty(backend, always), budget=budget), [*good[:4], poison, *good[4:]])
        assert results.pop("poison").error == "FloatingPointError: unlucky"
        assert ends(results) == expected
        assert ends(run(engine(model, faulty(backend, at_times), budget=budget), good)) == expected
    assert next(calls) > 40


def logits_of(result: Result) -> np.ndarray:
    return np.concatenate([output.logits for output in result.outputs])
