"""The samplers of a row on the device against their NumPy twin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.kernels import reference_sampling as reference
from shoal.kernels.base import SampleRows
from shoal.kernels.cuda import dry, sample, sample_space, samplers
from shoal.kernels.cuda.sample import Sampler as Chooser
from shoal.kernels.samplers import (
    XTC,
    Bias,
    Breakers,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Sampler,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)
from tests.kernels.cuda.test_sample import how, on_device, some_logits
from tests.kernels.test_samplers import breakers, random_bias, random_dry, random_penalties

F32 = NDArray[np.float32]
Chain = tuple[Sampler, ...]
VOCAB = 300


def asked(chains: list[Chain | None], temperature: float = 1.0) -> SampleRows:
    count = len(chains)
    return replace(how(count, temperature=temperature), samplers=chains, surprise=np.full(count, -5, np.float32))


def check(logits: F32, chains: list[Chain | None], temperature: float = 1.0) -> None:
    """Tokens, scores and surprises are the twin's."""
    rows, wanted = asked(chains, temperature), asked(chains, temperature)
    chooser = Chooser(logits.shape[1], 8)
    tokens = chooser.sample(on_device(logits), rows).tolist()
    assert tokens == [reference.sample_row(logits[i], wanted, i) for i in range(len(logits))]
    assert rows.surprise is not None
    assert wanted.surprise is not None
    np.testing.assert_allclose(rows.surprise, wanted.surprise, rtol=1e-5, atol=1e-6)
    for i, chain in enumerate(chains):
        if chain:
            left = chooser._space.scratch[i, : logits.shape[1]].numpy()
            np.testing.assert_allclose(left, reference.adjusted(logits[i], wanted, i), rtol=2e-6)


ALONE: list[Sampler] = [
    random_bias(3),
    random_penalties(4),
    random_dry(5),
    TopNSigma(1.0),
    TopNSigma(0.0),
    Temperature(0.5),
    Temperature(0.0),
    Temperature(1.0, 0.7, 1.5),
    Temperature(1.0, 5.0, 0.0),
    Typical(0.6),
    Typical(0.2, 5),
    Typical(0.999),
    MinP(0.1),
    MinP(0.5, 9),
    MinP(0.0),
    TopK(1),
    TopK(40),
    TopK(1000),
    TopP(0.7),
    TopP(0.01, 7),
    TopP(0.0),
    XTC(1.0, 0.05),
    XTC(0.5, 0.02, 200),
    XTC(1.0, 0.05, VOCAB),
    XTC(1.0, 0.6),
    Mirostat(1, 3.0),
    Mirostat(1, 0.0),
    Mirostat(1, 40.0),
    Mirostat(2, 3.0),
    Mirostat(2, 0.0),
]


@pytest.mark.parametrize("sampler", ALONE, ids=lambda sampler: type(sampler).__name__)
def test_each_alone(sampler: Sampler) -> None:
    logits = some_logits(2, VOCAB, seed=1)
    logits[1] = np.round(logits[1])  # ties
    logits[1, ::3] = -np.inf
    check(logits, [(sampler,)] * 2)


@pytest.mark.parametrize("sampler", [TopK(40), TopP(0.9), Typical(0.5), XTC(1.0, 0.01), Mirostat(1, 5.0)], ids=str)
def test_over_several_chunks(sampler: Sampler) -> None:
    check(some_logits(2, 9000, seed=2), [(sampler,)] * 2)


def random_chain(seed: int) -> Chain:
    rng = np.random.default_rng(seed)
    kinds: list[Sampler] = [
        random_bias(seed),
        random_penalties(seed),
        random_dry(seed),
        TopNSigma(rng.uniform(0.5, 3)),
        Temperature(rng.uniform(0.3, 2), rng.uniform(0, 0.5), rng.uniform(0, 2)),
        Typical(rng.uniform(0.1, 0.99), int(rng.integers(0, 5))),
        MinP(rng.uniform(0, 0.3), int(rng.integers(0, 5))),
        TopK(int(rng.integers(1, 200))),
        TopP(rng.uniform(0.1, 0.99), int(rng.integers(0, 5))),
        XTC(rng.uniform(0, 1), rng.uniform(0.01, 0.3)),
    ]
    chain = [kinds[i] for i in rng.permutation(len(kinds))[: rng.integers(1, 6)]]
    return (*chain, Mirostat(int(rng.integers(1, 3)), rng.uniform(0, 8))) if seed % 3 == 0 else tuple(chain)


@pytest.mark.parametrize("seed", range(6))
def test_chains_among_rows_that_have_others(seed: int) -> None:
    """Rows with different samplers at the same place, and one without any."""
    chains = [random_chain(8 * seed), random_chain(8 * seed + 1), None, random_chain(8 * seed + 2)]
    check(some_logits(4, VOCAB, seed=seed), chains, temperature=0.0 if seed == 5 else 0.8)


def test_a_row_is_the_same_alone_and_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chain: Chain = (random_penalties(1), TopNSigma(2.5), Typical(0.9), TopP(0.9), Temperature(1, 0.5), Mirostat(1, 5.0))
    logits = some_logits(3, 1500)

    def left(rows: list[int]) -> torch.Tensor:
        chooser = Chooser(1500, 8)
        chooser.sample(on_device(logits[rows]), asked([chain if row else (TopK(5), *chain) for row in rows]))
        return chooser._space.scratch[: len(rows)].clone()

    together = left([0, 1, 2])
    for rows in ([1], [2, 0]):
        assert torch.equal(left(rows), together[rows])
    for module in (sample_space, sample, samplers):
        monkeypatch.setattr(module, "CHUNK", 512)
    for module in (sample, samplers):
        monkeypatch.setattr(module, "BLOCK", 1024)
    # Standard deviations alone are sums of rounded numbers: by another order they differ in the last bits of a float64.
    assert torch.equal(left([1]), together[[1]])


@pytest.mark.parametrize("chain", [(TopK(5),), (XTC(1.0, 0.1), TopP(0.5)), (Typical(0.5), Mirostat(1, 2.0))], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_bad(chain: Chain, bad: float) -> None:
    logits = some_logits(3, VOCAB)
    logits[1, 7] = bad
    logits[2] = -np.inf
    rows = asked([chain] * 3)
    tokens = Chooser(VOCAB, 8).sample(on_device(logits), rows).tolist()
    assert tokens[0] == reference.sample_row(logits[0], asked([chain] * 3), 0)
    assert tokens[1:] == [-1, -1]
    assert rows.surprise is not None
    assert rows.surprise[1:].tolist() == [-5, -5]


# --- DRY -------------------------------------------------------------------------------------------------------------


def by_twin(sampler: Dry, vocab: int = VOCAB) -> F32:
    return reference.apply(sampler, np.zeros(vocab, np.float32), 0.0)


def by_host(sampler: Dry, vocab: int = VOCAB) -> F32:
    scores = np.zeros(vocab, np.float32)
    ids, lost = dry.dry_penalties(sampler)
    assert len(set(ids.tolist())) == len(ids)
    scores[ids] -= lost
    return scores


@pytest.mark.parametrize("seed", range(30))
def test_dry_follows_the_twin(seed: int) -> None:
    np.testing.assert_allclose(by_host(random_dry(seed)), by_twin(random_dry(seed)), rtol=1e-6)


def periodic(size: int, period: int, base: float, multiplier: float = 1.5) -> Dry:
    history = np.tile(np.arange(period, dtype=np.int32), size // period + 1)[:size]
    return Dry(history, multiplier, base, 2, breakers([[299]]))


@pytest.mark.parametrize("base", [1.0, 1.0001, 1.75, 1e30])
@pytest.mark.parametrize(("size", "period"), [(100, 1), (101, 3), (150, 149), (2, 1), (1, 1), (0, 1)])
def test_dry_of_a_history_that_repeats_itself(size: int, period: int, base: float) -> None:
    """Long repetitions, in both ways to find them; some lose as much as there is."""
    sampler = periodic(size, period, base)
    np.testing.assert_allclose(by_host(sampler), by_twin(sampler), rtol=1e-6)


def test_dry_of_a_long_repetition_is_found_in_linear_time() -> None:
    """Comparing each token's past with the end would take 5 * 10^9 steps, of which there is no need."""
    sampler = periodic(100_000, 1, 1.0001)
    ids, lost = dry.dry_penalties(sampler)
    assert ids.tolist() == [0]
    assert lost[0] == pytest.approx(1.5 * 1.0001 ** (99_999 - 2), rel=1e-6)


def test_dry_of_nothing_that_can_lose() -> None:
    none: Breakers = breakers([])
    assert not by_host(replace(random_dry(1), multiplier=0.0, breakers=none)).any()
    assert len(dry.dry_penalties(Dry(np.zeros(0, np.int32), 1.0, 2.0, 0, none))[0]) == 0


def test_samplers_of_no_entry() -> None:
    """Lists of ids may be empty."""
    none = np.zeros(0, np.int32)
    empty: Chain = (Bias(none, np.zeros(0, np.float32)), Penalties(none, none, 2.0, 1.0, 1.0), random_dry(0))
    check(some_logits(2, VOCAB), [empty, (TopK(3),)])
