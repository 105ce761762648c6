"""The sampling kernel against its NumPy twin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import LOGIT_ROWS, SampleRows
from shoal.kernels.cpu.backend import CPUBackend, _Sampler

F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


def _how(rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> SampleRows:
    return SampleRows(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
        seed=np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        sample=np.zeros(rows, np.uint32),
        position=np.arange(rows, dtype=np.uint32) + 5,
        banned=[None] * rows,
    )


def _sample(backend: CPUBackend, logits: F32, how: SampleRows) -> list[int]:
    rows = len(logits)
    padded = np.zeros((LOGIT_ROWS, -(-logits.shape[1] // 16) * 16), np.float32)
    view = padded[:, : logits.shape[1]]
    view[:rows] = logits
    space = np.array([rows, 1, rows], np.int64)
    sampler = _Sampler(backend, view, space.ctypes.data)
    sampler.set(how)
    backend.pool.run(sampler.program())
    return [int(token) for token in sampler.tokens[:rows]]


def _twin(logits: F32, how: SampleRows) -> list[int]:
    return [reference.sample_row(logits[i], how, i) for i in range(len(logits))]


def _logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


PARAMETERS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 1.5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 17, 96, 5000])
def test_equals_the_twin(backend: CPUBackend, parameters: dict[str, float], vocab: int) -> None:
    logits, how = _logits(64, vocab), _how(64, **parameters)  # type: ignore[arg-type]
    assert _sample(backend, logits, how) == _twin(logits, how)


def test_ties_go_to_the_lowest_id(backend: CPUBackend) -> None:
    logits = np.zeros((2, 300), np.float32)
    logits[1, [40, 41, 299]] = 2.5
    assert _sample(backend, logits, _how(2, temperature=0)) == [0, 40]
    drawn = _sample(backend, np.zeros((64, 300), np.float32), _how(64, top_k=3))
    assert set(drawn) == {0, 1, 2}


def test_banned_ids_are_never_chosen(backend: CPUBackend) -> None:
    logits = _logits(3, 50)
    how = _how(3, temperature=0)
    best = logits.argmax(1)
    how.banned[0:3] = [np.array([best[0]], np.int32), None, np.arange(50, dtype=np.int32)]  # type: ignore[index]
    got = _sample(backend, logits, how)
    assert got == _twin(logits, how)
    assert got[0] != best[0]
    assert got[1:] == [best[1], -1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_reported_and_harms_no_other(backend: CPUBackend, bad: float) -> None:
    logits = _logits(5, 100)
    how = _how(5)
    clean = _sample(backend, logits, how)
    logits[2, 99] = bad
    assert _sample(backend, logits, how) == [*clean[:2], -1, *clean[3:]]


def test_a_row_draws_the_same_in_any_batch(backend: CPUBackend) -> None:
    logits, how = _logits(64, 1000), _how(64, temperature=1.2, top_p=0.95)
    together = _sample(backend, logits, how)
    for i in (0, 5, 63):
        one = SampleRows(*(getattr(how, f)[i : i + 1] for f in SampleRows.__slots__))
        assert _sample(backend, logits[i : i + 1], one) == [together[i]]


def test_draws_follow_the_distribution(backend: CPUBackend) -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logits = np.tile(np.log(probabilities).astype(np.float32), (64, 1))
    counts = np.zeros(4)
    for batch in range(100):
        how = _how(64)
        how.position[:] = np.arange(64) + 64 * batch
        counts += np.bincount(_sample(backend, logits, how), minlength=4)
    expected = probabilities * counts.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 21.1  # chi-square, 3 degrees of freedom, p = 1e-4


def test_philox_is_the_published_one() -> None:
    # Known answer of Random123's kat_vectors: philox4x32-10 of counter 0 and key 0 begins 6627e8d5 e169c58d.
    assert reference.philox(0, 0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53
