"""The sampling kernel against its NumPy twin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.kernels import reference_sampling as reference
from shoal.kernels.base import LOGIT_ROWS, SampleRows
from shoal.kernels.cpu.backend import CPUBackend, _Sampler
from tests.kernels.runner import said_by_each_isa

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


class _Program:
    """The sampling operation over some rows of logits."""

    def __init__(self, backend: CPUBackend, logits: F32) -> None:
        rows, vocab = logits.shape
        self.logits = np.full((LOGIT_ROWS, -(-vocab // 16) * 16), 9e9, np.float32)[
            :, :vocab
        ]  # what follows a row is not read
        self.logits[:rows] = logits
        self._space = np.array([rows, 1, rows], np.int64)
        self._pool, self._sampler = backend.pool, _Sampler(backend, self.logits, self._space.ctypes.data)
        self._program = self._sampler.program()

    def run(self, how: SampleRows) -> list[int]:
        self._sampler.set(how)
        self._pool.run(self._program)
        return [int(token) for token in self._sampler.tokens[: self._space[0]]]


def _sample(backend: CPUBackend, logits: F32, how: SampleRows) -> list[int]:
    return _Program(backend, logits).run(how)


def _twin(logits: F32, how: SampleRows) -> list[int]:
    return [reference.sample_row(logits[i], how, i) for i in range(len(logits))]


def _logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


PARAMETERS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1e-4},
    {"temperature": 2.0, "min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.0},
    {"top_p": 0.0, "top_k": 7, "min_p": 0.1, "temperature": 1.5},
    {"top_p": 0.999, "temperature": 1.5},
    {"top_p": 0.7, "min_p": 0.02},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 96, 255, 256, 257, 5000])
def test_equals_the_twin(backend: CPUBackend, parameters: dict[str, float], vocab: int) -> None:
    logits, how = _logits(64, vocab), _how(64, **parameters)  # type: ignore[arg-type]
    assert _sample(backend, logits, how) == _twin(logits, how)


@pytest.mark.parametrize("more", [{}, {"temperature": 3.0}, {"top_k": 5}, {"min_p": 0.5}], ids=str)
def test_top_p_of_0_keeps_the_likeliest_token(backend: CPUBackend, more: dict[str, float]) -> None:
    logits, how = np.round(_logits(64, 300)), _how(64, top_p=0.0, **more)  # type: ignore[arg-type]
    likeliest = logits.argmax(axis=1).tolist()  # of equals the lowest id
    assert _sample(backend, logits, how) == _twin(logits, how) == likeliest


def _distance(token: int, logits: F32, how: SampleRows, row: int) -> float:
    """How far the draw lies from where the token's share of the mass begins and ends, as a part of the mass; 0 between them.

    Infinite if the token is not among the survivors. In float64 from exact weights, so rank and cut are off by rounding alone.
    """
    t = float(how.temperature[row])
    weights = np.exp((logits.astype(np.float64) - logits.max()) / t)
    kept = np.flatnonzero(weights >= how.min_p[row] * (1 - 1e-6))
    if how.top_k[row] > 0 or how.top_p[row] < 1:
        kept = kept[np.argsort(-weights[kept], kind="stable")]
    kept = kept[: how.top_k[row] or None]
    mass = np.cumsum(weights[kept])
    if how.top_p[row] < 1:
        kept = kept[: int(np.searchsorted(mass, float(how.top_p[row]) * mass[-1])) + 1]
    place = np.flatnonzero(kept == token)
    if len(place) == 0:
        return float("inf")
    end, total = mass[place[0]], mass[len(kept) - 1]
    draw = reference.philox(int(how.seed[row]), int(how.sample[row]), int(how.position[row])) * total
    return float(max(end - weights[token] - draw, draw - end, 0.0) / total)


LARGE = [
    {"temperature": 1.0},
    {"top_k": 40},
    {"top_k": 3000, "temperature": 2.0},
    {"top_p": 0.95},
    {"top_p": 0.95, "temperature": 2.0},
    {"top_k": 40, "top_p": 0.95},
    {"min_p": 0.05},
]


@pytest.mark.parametrize("parameters", LARGE, ids=str)
@pytest.mark.parametrize(("vocab", "peaks"), [(49_152, 0), (262_144, 0), (262_144, 12), (262_145, 3)])
def test_large_vocabularies(backend: CPUBackend, parameters: dict[str, float], vocab: int, peaks: int) -> None:
    """A token's share is so small here that rounding may move a draw to a neighbour: no further than 1e-5 of the mass."""
    logits, how = _logits(4, vocab), _how(4, **parameters)  # type: ignore[arg-type]
    logits[:, vocab - 7 * peaks : vocab : 7] = 18 - 0.5 * np.arange(peaks, dtype=np.float32)
    distances = [_distance(token, logits[i], how, i) for i, token in enumerate(_sample(backend, logits, how))]
    assert max(distances) < 1e-5


@pytest.mark.parametrize("parameters", [*PARAMETERS, {"top_p": 0.5}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("vocab", [17, 300, 262_144])
def test_all_logits_equal(backend: CPUBackend, parameters: dict[str, float], vocab: int) -> None:
    """Every weight is 1, so sums are exact; ids decide the rank."""
    logits, how = np.full((3, vocab), -2.5, np.float32), _how(3, **parameters)  # type: ignore[arg-type]
    assert _sample(backend, logits, how) == _twin(logits, how)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 700), levels=st.integers(1, 40))
def test_equals_the_twin_with_many_ties(backend: CPUBackend, data: st.DataObject, vocab: int, levels: int) -> None:
    parameters = data.draw(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
                "top_k": st.sampled_from([0, 1, 2, 7, 100, 2**31 - 1]),
                "top_p": st.sampled_from([1.0, 0.97, 0.6, 0.01]),
                "min_p": st.sampled_from([0.0, 0.03]),
            }
        )
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (rng.integers(0, levels, (8, vocab)) * 0.37).astype(np.float32)
    logits[rng.random((8, vocab)) < 0.1] = -np.inf
    how = _how(8, **parameters)  # type: ignore[arg-type]
    how.banned[0:2] = [np.array([0, vocab - 1, 0], np.int32), rng.integers(0, vocab, 9).astype(np.int32)]  # type: ignore[index]
    assert _sample(backend, logits, how) == _twin(logits, how)


def test_ties_go_to_the_lowest_id(backend: CPUBackend) -> None:
    logits = np.zeros((3, 300), np.float32)
    logits[1, [40, 41, 299]] = 2.5
    logits[2, ::2] = -0.0
    assert _sample(backend, logits, _how(3, temperature=0)) == [0, 40, 0]
    drawn = _sample(backend, np.zeros((64, 300), np.float32), _how(64, top_k=3))
    assert set(drawn) == {0, 1, 2}


def test_logits_too_far_apart_for_float32(backend: CPUBackend) -> None:
    logits = np.full((2, 500), -3e38, np.float32)
    logits[:, 321] = 3e38
    assert _sample(backend, logits, _how(2, top_p=0.9)) == [321, 321]
    assert _sample(backend, logits, _how(2, temperature=1e-4)) == [321, 321]


def test_banned_ids_are_never_chosen(backend: CPUBackend) -> None:
    logits = _logits(3, 50)
    how = _how(3, temperature=0)
    best = logits.argmax(1)
    how.banned[0:3] = [np.array([best[0]], np.int32), None, np.arange(50, dtype=np.int32)]  # type: ignore[index]
    got = _sample(backend, logits, how)
    assert got == _twin(logits, how)
    assert got[0] != best[0]
    assert got[1:] == [best[1], -1]


def test_banned_rows_leave_their_logits_as_they_were(backend: CPUBackend) -> None:
    logits = _logits(2, 300)
    logits[0, 5] = np.nan  # a banned id may be anything
    how = _how(2, top_k=5)
    how.banned[0:2] = [np.array([5], np.int32), None]  # type: ignore[index]
    program = _Program(backend, logits)
    assert program.run(how) == _twin(logits, how)
    np.testing.assert_array_equal(program.logits[:2], logits)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("place", [0, 98, 99])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_bad_row_is_reported_and_harms_no_other(backend: CPUBackend, bad: float, place: int, greedy: bool) -> None:
    logits = _logits(5, 100)
    how = _how(5, temperature=0.0 if greedy else 1.0)
    clean = _sample(backend, logits, how)
    logits[2, place] = bad
    assert _sample(backend, logits, how) == [*clean[:2], -1, *clean[3:]]


@pytest.mark.parametrize("vocab", [1, 16, 1000])
def test_a_row_without_any_token_is_reported(backend: CPUBackend, vocab: int) -> None:
    logits = np.full((2, vocab), -np.inf, np.float32)
    for parameters in ({"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {}):
        assert _sample(backend, logits, _how(2, **parameters)) == [-1, -1]


@pytest.mark.parametrize("parameters", [{"temperature": 1.2, "top_p": 0.95}, {"top_k": 30}, {}], ids=str)
def test_a_row_draws_the_same_in_any_batch(backend: CPUBackend, parameters: dict[str, float]) -> None:
    logits, how = _logits(64, 5000), _how(64, **parameters)  # type: ignore[arg-type]
    together = _sample(backend, logits, how)
    for i in (0, 5, 63):
        one = SampleRows(*(getattr(how, f)[i : i + 1] for f in SampleRows.__slots__[:8]))
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


TOKENS = """
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels import test_sample as t

backend = CPUBackend(2)
for vocab in (1000, 49_152):
    for parameters in t.PARAMETERS:
        print(t._sample(backend, t._logits(16, vocab), t._how(16, **parameters)))
"""


def test_every_instruction_set_draws_the_same() -> None:
    assert len(set(said_by_each_isa(TOKENS))) == 1
