"""The samplers of a row: the NumPy twin against definitions written anew here, the kernel against the twin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shoal.kernels import reference_sampling as reference
from shoal.kernels.base import LOGIT_ROWS, SampleRows
from shoal.kernels.cpu.backend import CPUBackend, _Sampler
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
from tests.kernels.runner import said_by_each_isa

F32 = NDArray[np.float32]
VOCAB = 300


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


def rows(count: int, samplers: list[tuple[Sampler, ...] | None] | None, **fields: object) -> SampleRows:
    return SampleRows(
        temperature=np.full(count, fields.get("temperature", 1.0), np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        sample=np.zeros(count, np.uint32),
        position=np.arange(count, dtype=np.uint32) + 5,
        banned=[None] * count,
        samplers=samplers,
        surprise=np.zeros(count, np.float32),
    )


def some_logits(count: int, vocab: int, seed: int = 0, spread: float = 3.0) -> F32:
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * spread).astype(np.float32)


class Kernel:
    """The sampling kernel over rows of logits."""

    def __init__(self, backend: CPUBackend, logits: F32) -> None:
        count, vocab = logits.shape
        self.logits = np.full((LOGIT_ROWS, -(-vocab // 16) * 16), 9e9, np.float32)[:, :vocab]
        self.logits[:count] = logits
        self.space = np.array([count, 1, count], np.int64)
        self.pool, self.sampler = backend.pool, _Sampler(backend, self.logits, self.space.ctypes.data)
        self.program = self.sampler.program()

    def tokens(self, how: SampleRows) -> list[int]:
        self.sampler.set(how)
        self.pool.run(self.program)
        self.sampler.report(how)
        return [int(token) for token in self.sampler.tokens[: self.space[0]]]

    def adjusted(self, how: SampleRows) -> F32:
        """The logits that a lone row's token was drawn from."""
        self.tokens(how)
        return self.sampler._scratch[: 4 * self.logits.shape[1]].view(np.float32).copy()


def kernel_tokens(backend: CPUBackend, logits: F32, how: SampleRows) -> list[int]:
    return Kernel(backend, logits).tokens(how)


def twin_tokens(logits: F32, how: SampleRows) -> list[int]:
    return [reference.sample_row(logits[i], how, i) for i in range(len(logits))]


# --- definitions, in Python lists and probabilities ------------------------------------------------------------------


def probabilities(logits: list[float]) -> list[float]:
    best = max(logits)
    weights = [math.exp(x - best) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def kept_by(sampler: Sampler, logits: list[float], coin: float) -> set[int]:
    """The ids that a truncating sampler leaves, by its definition; all logits are finite."""
    p = probabilities(logits)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    if isinstance(sampler, TopK):
        return set(ranked[: sampler.k])
    if isinstance(sampler, TopP):
        return until(ranked, p, lambda mass: mass >= sampler.p, sampler.min_keep)
    if isinstance(sampler, MinP):
        return {i for n, i in enumerate(ranked) if p[i] >= sampler.p * max(p) or n < sampler.min_keep}
    if isinstance(sampler, Typical):
        entropy = -math.fsum(x * math.log(x) for x in p)
        near = sorted(range(len(p)), key=lambda i: abs(-math.log(p[i]) - entropy))
        return until(near, p, lambda mass: mass > sampler.p, sampler.min_keep)
    if isinstance(sampler, TopNSigma):
        mean = math.fsum(logits) / len(logits)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
        return {i for i, x in enumerate(logits) if x >= max(logits) - sampler.n * deviation}
    if isinstance(sampler, XTC):
        top = [i for i in ranked if p[i] >= sampler.threshold]
        dropped = set(top[:-1])
        applies = coin < sampler.probability and len(p) - len(dropped) >= sampler.min_keep
        return set(ranked) - (dropped if applies else set())
    assert isinstance(sampler, Mirostat)
    if sampler.version == 2:
        return {i for i in ranked if -math.log2(p[i]) <= sampler.mu} or {ranked[0]}
    return set(ranked[: mirostat_1(sampler.mu, sorted(p, reverse=True))])


def until(order: list[int], p: list[float], enough: object, least: int) -> set[int]:
    kept: list[int] = []
    for i in order:
        kept.append(i)
        if enough(math.fsum(p[j] for j in kept)) and len(kept) >= least:  # type: ignore[operator]
            break
    return set(kept)


def mirostat_1(mu: float, p: list[float]) -> int:
    """Algorithm 1 of the paper, with m = 100."""
    pairs = [(math.log((i + 2) / (i + 1)), math.log(p[i] / p[i + 1])) for i in range(min(99, len(p) - 1))]
    s = sum(t * b for t, b in pairs) / sum(t * t for t, _ in pairs)
    e = s - 1
    return max(1, int(((e * 2**mu) / (1 - len(p) ** -e)) ** (1 / s)))


KEEPING = st.one_of(
    st.builds(TopK, st.integers(1, 2 * VOCAB)),
    st.builds(TopP, st.floats(0.001, 0.999), st.integers(0, 9)),
    st.builds(MinP, st.floats(0.001, 1), st.integers(0, 9)),
    st.builds(Typical, st.floats(0.001, 0.999), st.integers(0, 9)),
    st.builds(TopNSigma, st.floats(0.01, 4)),
    st.builds(XTC, st.floats(0, 1), st.floats(0.001, 0.5), st.integers(0, VOCAB)),
    st.builds(Mirostat, st.sampled_from([1, 2]), st.floats(0, 12)),
)
CHANGING = st.one_of(
    st.builds(Temperature, st.floats(0.2, 3), st.sampled_from([0.0, 0.5, 5.0]), st.floats(0, 3)),
    st.integers(0, 2**32).map(lambda seed: random_penalties(seed)),
    st.integers(0, 2**32).map(lambda seed: random_dry(seed)),
    st.integers(0, 2**32).map(lambda seed: random_bias(seed)),
)


def random_bias(seed: int, vocab: int = VOCAB) -> Bias:
    rng = np.random.default_rng(seed)
    ids = rng.choice(vocab, 7, replace=False).astype(np.int32)
    return Bias(ids, rng.uniform(-5, 5, 7).astype(np.float32))


def random_penalties(seed: int, vocab: int = VOCAB) -> Penalties:
    rng = np.random.default_rng(seed)
    ids = rng.choice(vocab, 60, replace=False).astype(np.int32)
    counts = rng.integers(0, 4, 60).astype(np.int32)
    return Penalties(ids, counts, *map(float, rng.uniform([0.5, -2, -2], [2, 2, 2])))


def words(ids: list[int], vocab: int = VOCAB) -> NDArray[np.uint32]:
    """Ids as a mask."""
    flags = np.zeros(-(-vocab // 32) * 32, np.uint8)
    flags[ids] = 1
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)


def breakers(sequences: list[list[int]], vocab: int = VOCAB) -> Breakers:
    longer = [tokens for tokens in sequences if len(tokens) > 1]
    flat = [n for tokens in longer for n in (len(tokens), *tokens)]
    single = [tokens[0] for tokens in sequences if len(tokens) == 1]
    return Breakers(words(single, vocab), words([tokens[0] for tokens in sequences], vocab), np.array(flat, np.int32))


def random_dry(seed: int) -> Dry:
    """A history of few different tokens, so that much repeats."""
    rng = np.random.default_rng(seed)
    history = rng.integers(0, 4, rng.integers(0, 40)).astype(np.int32) * 50
    sequences = [[[], [[150]], [[100, 50]], [[150], [0, 0, 50]]][rng.integers(0, 4)]]
    return Dry(history, 1.5, 1.75, int(rng.integers(0, 4)), breakers(sequences[0]))


@settings(max_examples=300, deadline=None)
@given(sampler=KEEPING, seed=st.integers(0, 2**32), spread=st.floats(0.5, 6), coin=st.floats(0, 0.999))
def test_what_the_twin_keeps(sampler: Sampler, seed: int, spread: float, coin: float) -> None:
    logits = some_logits(1, VOCAB, seed, spread)[0]
    left = reference.apply(sampler, logits.copy(), coin)
    expected = kept_by(sampler, logits.astype(float).tolist(), coin)
    assert set(np.flatnonzero(left > -np.inf).tolist()) == expected
    np.testing.assert_array_equal(left[sorted(expected)], logits[sorted(expected)])


@given(seed=st.integers(0, 2**32), value=st.floats(0.2, 3), spread=st.floats(0, 4), exponent=st.floats(0, 3))
def test_dynamic_temperature(seed: int, value: float, spread: float, exponent: float) -> None:
    logits = some_logits(1, VOCAB, seed)[0]
    p = probabilities(logits.astype(float).tolist())
    share = -math.fsum(x * math.log(x) for x in p) / math.log(VOCAB)
    low = max(0.0, value - spread)
    expected = low + (value + spread - low) * share**exponent if spread else value
    got = reference.apply(Temperature(value, spread, exponent), logits.copy(), 0.0)
    np.testing.assert_allclose(got, logits / expected, rtol=1e-5)


@given(seed=st.integers(0, 2**32))
def test_penalties_follow_vllm(seed: int) -> None:
    logits, given_ = some_logits(1, VOCAB, seed)[0], random_penalties(seed)
    got = reference.apply(given_, logits.copy(), 0.0)
    counts = dict(zip(given_.ids.tolist(), given_.counts.tolist(), strict=True))
    for token, before in enumerate(logits.astype(float)):
        expected = before
        if token in counts:
            expected = before / given_.repetition if before > 0 else before * given_.repetition
            expected -= given_.frequency * counts[token] + given_.presence * (counts[token] > 0)
        assert got[token] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def dry_penalties(sampler: Dry, sequences: list[list[int]]) -> dict[int, float]:
    """By its description: for each token the longest end of the history that it has followed before, not across a breaker."""
    history = sampler.history.tolist()
    since = len(history)
    for start in range(len(history)):
        hits = [len(s) for s in sequences if history[start : start + len(s)] == s]
        if hits:
            since = len(history) - start - max(hits)
    found: dict[int, float] = {}
    for token in set(history) - {s[0] for s in sequences if len(s) == 1}:
        lengths = [
            n
            for n in range(min(since, len(history) - 1) + 1)
            for at in range(len(history) - n)
            if at + n > 0 and history[at : at + n + 1] == [*history[len(history) - n :], token]
        ]
        if len(history) > sampler.allowed_length <= since and max(lengths, default=-1) >= sampler.allowed_length:
            found[token] = sampler.multiplier * sampler.base ** (max(lengths) - sampler.allowed_length)
    return found


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(st.integers(0, 4), max_size=30),
    sequences=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=2),
    allowed=st.integers(0, 4),
)
def test_dry_by_its_description(
    backend: CPUBackend, history: list[int], sequences: list[list[int]], allowed: int
) -> None:
    sampler = Dry(np.array(history, np.int32), 0.8, 1.5, allowed, breakers(sequences))
    logits = some_logits(1, VOCAB)
    expected = logits[0].copy()
    for token, penalty in dry_penalties(sampler, sequences).items():
        expected[token] -= penalty
    twin = reference.apply(sampler, logits[0].copy(), 0.0)
    np.testing.assert_allclose(twin, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(Kernel(backend, logits).adjusted(rows(1, [(sampler,)])), twin)


def test_dry_knows_no_limit_of_length(backend: CPUBackend) -> None:
    """A repetition of 5,000 tokens: the penalty is as large as a float32 can hold, and found without trying all pairs."""
    sampler = Dry(np.zeros(5000, np.int32), 1.0, 2.0, 2, breakers([]))
    logits = some_logits(1, 100)
    sampler = replace(sampler, breakers=breakers([], 100))
    assert Kernel(backend, logits).adjusted(rows(1, [(sampler,)]))[0] < -1e38


# --- the kernel ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    chain=st.lists(st.one_of(KEEPING, CHANGING), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([0, 7, 40]),
)
def test_the_kernel_equals_the_twin(backend: CPUBackend, chain: list[Sampler], seed: int, levels: int) -> None:
    chain.sort(key=lambda sampler: isinstance(sampler, Mirostat))
    logits = some_logits(16, VOCAB, seed)
    if levels and not any(isinstance(sampler, Typical) for sampler in chain):
        logits = np.random.default_rng(seed).integers(0, levels, (16, VOCAB)).astype(np.float32) * np.float32(0.37)
    logits[:, 17] = -np.inf
    kernel, twin = rows(16, [tuple(chain)] * 16), rows(16, [tuple(chain)] * 16)
    assert kernel_tokens(backend, logits, kernel) == twin_tokens(logits, twin)
    assert kernel.surprise is not None
    assert twin.surprise is not None
    np.testing.assert_allclose(kernel.surprise, twin.surprise, rtol=1e-5, atol=1e-5)


LARGE: list[tuple[Sampler, ...]] = [
    (TopK(1), Temperature(0.7)),
    (TopK(40), TopP(0.9)),
    (TopP(0.95, 3),),
    (MinP(0.05, 2),),
    (Typical(0.9),),
    (TopNSigma(1.5),),
    (XTC(1.0, 0.01),),
    (Temperature(1.0, 0.9, 1.5), Typical(0.5, 4), TopP(0.7)),
    (Mirostat(1, 6.0),),
    (Temperature(0.8), Mirostat(2, 5.0)),
]


@pytest.mark.parametrize("chain", LARGE, ids=str)
@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 49_152])
def test_other_sizes(backend: CPUBackend, chain: tuple[Sampler, ...], vocab: int) -> None:
    logits = some_logits(3, vocab)
    for row in range(3):
        how = rows(1, [chain])
        left, twin = Kernel(backend, logits[row : row + 1]).adjusted(how), reference.adjusted(logits[row], how, 0)
        differ = np.flatnonzero(left != twin)
        # Where thousands of candidates are left, rounding may move the edge by one of them, and a temperature's last bit.
        np.testing.assert_allclose(left[left > -np.inf], logits_at(twin, left, logits[row]), rtol=1e-4)
        assert np.count_nonzero((left > -np.inf) != (twin > -np.inf)) <= len(differ) <= vocab
        assert abs(np.count_nonzero(left > -np.inf) - np.count_nonzero(twin > -np.inf)) <= vocab // 10_000


def logits_at(twin: F32, left: F32, logits: F32) -> F32:
    """The twin's logits of what the kernel has left; of what the twin has not, by the scale of the rest."""
    kept = np.flatnonzero(twin > -np.inf)[0]
    scale = twin[kept] / logits[kept]
    return np.where(twin > -np.inf, twin, logits * scale)[left > -np.inf].astype(np.float32)


def test_equal_logits_rank_by_id(backend: CPUBackend) -> None:
    logits = np.zeros((1, 600), np.float32)
    for sampler, expected in ((TopK(5), 5), (TopP(0.5), 300), (Typical(0.25), 151), (Typical(0.25, 400), 400)):
        left = Kernel(backend, logits).adjusted(rows(1, [(sampler,)]))
        assert np.flatnonzero(left > -np.inf).tolist() == list(range(expected))
        np.testing.assert_array_equal(left, reference.apply(sampler, logits[0].copy(), 0.0))


def test_xtc_keeps_the_last_of_equal_top_choices(backend: CPUBackend) -> None:
    logits = np.full((1, 100), -5.0, np.float32)
    logits[0, [3, 50, 70]] = 4.0
    left = Kernel(backend, logits).adjusted(rows(1, [(XTC(1.0, 0.1),)]))
    assert sorted(set(range(100)) - set(np.flatnonzero(left > -np.inf).tolist())) == [3, 50]
    np.testing.assert_array_equal(left, reference.apply(XTC(1.0, 0.1), logits[0].copy(), 0.0))


def test_xtc_tosses_a_coin_of_its_own() -> None:
    """Half of the time, and whatever token is drawn."""
    logits = np.zeros((1, 4), np.float32)
    logits[0, 0] = 1.0
    found: Counter[bool] = Counter()
    for position in range(400):
        how = rows(1, [(XTC(0.5, 0.1),)])
        how.position[:] = position
        left = reference.adjusted(logits[0], how, 0)
        found[bool(left[0] == -np.inf)] += 1
        if reference.row_draw(how, 0) < 0.1 and left[0] > -np.inf:
            assert reference.sample_row(logits[0], how, 0) == 0
    assert 150 < found[True] < 250


def test_masks_and_banned_ids_go_together(backend: CPUBackend) -> None:
    logits = some_logits(4, VOCAB)
    allowed = [3, 40, 41, 255, 256, 299]
    how = replace(rows(4, None, temperature=0.0), mask=[words(allowed), None, words(allowed), words([])])
    best = int(logits[2, allowed].argmax())
    how.banned[2:3] = [np.array([allowed[best]], np.int32)]  # type: ignore[index]
    got = kernel_tokens(backend, logits, how)
    assert got == twin_tokens(logits, how)
    assert got[0] == allowed[int(logits[0, allowed].argmax())]
    assert got[1] == int(logits[1].argmax())
    assert got[2] in set(allowed) - {allowed[best]}
    assert got[3] == -1


def test_rows_that_need_nothing_are_read_in_place(backend: CPUBackend) -> None:
    logits = some_logits(3, VOCAB)
    plain = kernel_tokens(backend, logits, rows(3, None))
    kernel = Kernel(backend, logits)
    mixed = replace(rows(3, [None, (TopK(1),), None]), mask=[None, words([5, 9]), None])
    assert [kernel.tokens(mixed)[i] for i in (0, 2)] == [plain[0], plain[2]]
    np.testing.assert_array_equal(kernel.logits[:3], logits)
    assert kernel.tokens(rows(3, None)) == plain  # and nothing of the call before is left


def test_nothing_is_left_for_the_rows_of_later_calls(backend: CPUBackend) -> None:
    """Many rows with samplers, a few without, many without."""
    logits = some_logits(20, VOCAB)
    kernel = Kernel(backend, logits)
    plain = kernel.tokens(rows(20, None, temperature=0.0))
    for special in (rows(20, [(XTC(1.0, 0.0),)] * 20), replace(rows(20, None), mask=[words([3])] * 20)):
        assert kernel.tokens(special) != plain
        kernel.space[0] = 2
        assert kernel.tokens(rows(2, None, temperature=0.0)) == plain[:2]
        kernel.space[0] = 20
        assert kernel.tokens(rows(20, None, temperature=0.0)) == plain


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_reported_whatever_its_samplers_drop(backend: CPUBackend, bad: float) -> None:
    logits = some_logits(3, VOCAB)
    chains: list[tuple[Sampler, ...] | None] = [(TopK(3),), (MinP(0.5), TopP(0.5)), (Typical(0.5),)]
    clean = kernel_tokens(backend, logits, rows(3, chains))
    logits[1, 77] = bad
    assert kernel_tokens(backend, logits, rows(3, chains)) == [clean[0], -1, clean[2]]
    assert twin_tokens(logits, rows(3, chains)) == [clean[0], -1, clean[2]]


def test_a_row_is_the_same_in_any_batch(backend: CPUBackend) -> None:
    logits = some_logits(len(LARGE), 5000)
    how = rows(len(LARGE), list(LARGE))
    together = kernel_tokens(backend, logits, how)
    for i, chain in enumerate(LARGE):
        one = rows(1, [chain])
        one.seed[:], one.position[:] = how.seed[i], how.position[i]
        assert kernel_tokens(backend, logits[i : i + 1], one) == [together[i]]
        assert how.surprise is not None
        assert one.surprise is not None
        assert one.surprise[0] == how.surprise[i]


def test_draws_follow_what_is_left(backend: CPUBackend) -> None:
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.tile(np.log(shares).astype(np.float32), (64, 1))
    counts = np.zeros(4)
    for batch in range(60):
        how = rows(64, [(Bias(np.array([0], np.int32), np.array([-math.log(2)], np.float32)), TopP(0.85))] * 64)
        how.position[:] = np.arange(64) + 64 * batch
        counts += np.bincount(kernel_tokens(backend, logits, how), minlength=4)
    expected = np.array([0.2, 0.3, 0.2, 0]) / 0.7 * counts.sum()
    assert counts[3] == 0
    assert float(((counts[:3] - expected[:3]) ** 2 / expected[:3]).sum()) < 18.4  # chi-square, p = 1e-4


TOKENS = """
import hashlib
import numpy as np
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels import test_samplers as t

backend, digest = CPUBackend(2), hashlib.sha256()
chains = [*t.LARGE, (t.random_bias(1), t.random_penalties(2), t.random_dry(3))]
for vocab in (300, 49_152):
    for chain in chains[: 11 if vocab == 300 else 10]:
        logits, how = t.some_logits(8, vocab), t.rows(8, [chain] * 8)
        print(t.kernel_tokens(backend, logits, how))
        digest.update(how.surprise.tobytes())
        digest.update(t.Kernel(backend, logits[:1]).adjusted(t.rows(1, [chain])).tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    assert len(set(said_by_each_isa(TOKENS))) == 1
