"""A backend whose logits depend on the whole history of a sequence, read back through the page tables it was given.

In a KV group with a window, on the positions in the window. A wrong page, position, chunk or a KV entry that was never written
changes the tokens that follow. No arithmetic of a model is involved, so the tests of the engine are fast and exact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from shoal.engine.draft import Speculation, Wanted
from shoal.engine.draft_pace import DraftPace
from shoal.engine.engine import Engine, Output, Request
from shoal.engine.sequence import Sequence as Running
from shoal.gguf.quants import QuantFormat
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    AttentionShape,
    Backend,
    Head,
    IntArray,
    KVGroup,
    Layers,
    Linear,
    Norm,
    RawTensor,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.reference_sampling import sample_row
from shoal.models.archs import ARCHS
from shoal.models.config import ModelConfig, RopeScaling
from shoal.models.weights import Model
from shoal.params import EngineConfig, SamplingParams
from shoal.system.machine_limits import MemoryRoom

VOCAB = 61
NAN_TOKEN = 60  # in a prompt: the logits of its row are NaN
PAGE_BYTES = 2 * 2 * 4 * PAGE_SIZE  # of one layer: one KV head of size 4, f16
U64 = NDArray[np.uint64]


def mix(x: U64) -> U64:
    """SplitMix64's finisher: every bit of the input reaches every bit of the output."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


MIXED_TOKENS = mix(np.arange(VOCAB, dtype=np.uint64))
MIXED_POSITIONS = mix(np.arange(1 << 14, dtype=np.uint64))


@dataclass(eq=False)
class ToyBackend:
    """Remembers what it was asked. ``windows``: of each layer. ``before_step`` may raise. ``room``: memory of its own."""

    name: str = "toy"
    windows: tuple[int, ...] = (0,)
    before_step: Callable[[StepInput], None] = lambda step: None
    room: MemoryRoom | None = None
    steps: list[StepInput] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def describe(self) -> str:
        return "toy"

    def supports(self, format: QuantFormat) -> bool:
        return True

    def matrix(self, parts: Sequence[RawTensor]) -> None:
        return None

    def vector(self, tensor: RawTensor) -> None:
        return None

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        return 2 * kv_heads * head_dim * {"f16": 2, "f32": 4}[dtype]

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> list[ToyCache]:
        caches = []
        for group in groups:
            (window,) = {self.windows[layer] for layer in group.layers}
            caches.append(ToyCache(window, np.full((group.pages * PAGE_SIZE, 2), -1, np.int32)))
        return caches

    def copy_pages(self, cache: list[ToyCache], group: int, pairs: Sequence[tuple[int, int]]) -> None:
        slots = cache[group].slots
        for source, target in pairs:
            slots[target * PAGE_SIZE :][:PAGE_SIZE] = slots[source * PAGE_SIZE :][:PAGE_SIZE]

    def bind(
        self, layers: Layers, head: Head, cache: list[ToyCache], limits: StepLimits, states: Head | None = None
    ) -> ToyNetwork:
        return ToyNetwork(self, cache, limits)

    def bind_layers(self, layers: Layers, cache: list[ToyCache], limits: StepLimits) -> ToyNetwork:
        return ToyNetwork(self, cache, limits)

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        return (self,)

    def memory_room(self) -> MemoryRoom | None:
        return self.room

    def close(self) -> None:
        return None


@dataclass
class ToyCache:
    """One KV group: ``slots`` hold (token, position); -1 where nothing was ever written."""

    window: int
    slots: IntArray

    def states(self, table: IntArray, tokens: IntArray, positions: IntArray) -> U64:
        """Store a sequence's rows; then for each a hash of the tokens that it sees, its own among them."""
        first = max(0, int(positions[0]) - self.window + 1) if self.window else 0
        seen = np.arange(first, positions[-1] + 1, dtype=np.int32)
        slots = table[seen // PAGE_SIZE] * PAGE_SIZE + seen % PAGE_SIZE
        self.slots[slots[-len(positions) :]] = np.stack([tokens, positions], axis=1)
        stored, places = self.slots[slots].T
        assert np.array_equal(places, seen)
        sums = np.cumsum(MIXED_TOKENS[stored] * MIXED_POSITIONS[seen], dtype=np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), sums])
        begin = np.maximum(positions - self.window + 1, 0) if self.window else np.zeros_like(positions)
        return sums[positions + 1 - first] - sums[begin - first]


class ToyNetwork:
    """Each row's state is a hash of the tokens it sees in each KV group; its logits are a hash of that."""

    def __init__(self, backend: ToyBackend, caches: list[ToyCache], limits: StepLimits) -> None:
        self._backend, self._caches, self._limits = backend, caches, limits
        self._states: U64 = np.zeros(0, np.uint64)
        self._tokens: IntArray = np.zeros(0, np.int32)
        self.last_logits: NDArray[np.float32] = np.zeros((0, VOCAB), np.float32)

    def layers(self, step: StepInput) -> None:
        step = StepInput(*(getattr(step, name).copy() for name in StepInput.__slots__))
        self._backend.steps.append(step)
        self._backend.calls.append("layers")
        self._backend.before_step(step)
        assert 0 < len(step.token_ids) == len(step.positions) == step.row_start[-1] <= self._limits.max_rows
        assert len(step.kv_len) == len(step.row_start) - 1 <= self._limits.max_seqs
        assert step.page_table.shape == (len(self._caches), len(step.kv_len), self._limits.max_pages_per_seq)
        states = [self._sequence(step, s) for s in range(len(step.kv_len))]
        self._states, self._tokens = np.concatenate(states), step.token_ids

    def _sequence(self, step: StepInput, s: int) -> U64:
        """The states of the rows of sequence s, all groups together."""
        rows = slice(step.row_start[s], step.row_start[s + 1])
        tokens, positions = step.token_ids[rows], step.positions[rows]
        assert len(positions) > 0
        assert np.array_equal(positions, np.arange(step.kv_len[s])[-len(positions) :])
        states = np.zeros(len(positions), np.uint64)
        for cache, table in zip(self._caches, step.page_table[:, s], strict=True):
            states = states * np.uint64(0x9E3779B97F4A7C15) + cache.states(table, tokens, positions)
        return states

    @property
    def hidden(self) -> NDArray[np.float32]:
        raise AssertionError("the engine reads logits and states")

    def receive(self, rows: NDArray[np.float32]) -> None:
        raise AssertionError("nothing comes from elsewhere")

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        assert 0 < len(rows) <= LOGIT_ROWS
        self._backend.calls.append("logits")
        hashes = mix(self._states[rows][:, None] ^ MIXED_TOKENS)
        self.last_logits = ((hashes >> np.uint64(40)).astype(np.float32) / np.float32(2**21)).astype(np.float32)
        self.last_logits[self._tokens[rows] == NAN_TOKEN, 3] = np.nan
        return self.last_logits

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        assert 0 < len(rows) <= LOGIT_ROWS
        self._backend.calls.append("states")
        states = (self._states[rows] >> np.uint64(40)).astype(np.float32)
        states[self._tokens[rows] == NAN_TOKEN] = np.nan
        return np.stack([states, -states], axis=1)

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        logits = self.logits(rows)
        self._backend.calls[-1] = "sample"
        return np.array([sample_row(logits[i], how, i) for i in range(len(rows))], np.int32)


def toy_model(context: int = 4096, windows: tuple[int, ...] = (0,)) -> Model:
    """A layer for each of ``windows``, no weights."""
    config = ModelConfig(
        architecture="llama",
        arch=ARCHS["llama"],
        n_layers=len(windows),
        n_embd=4,
        n_ff=4,
        n_heads=1,
        n_kv_heads=1,
        head_dim=4,
        rope_dim=4,
        rope_base=1e4,
        rope_scaling=RopeScaling(),
        norm_eps=1e-5,
        vocab_size=VOCAB,
        context_length=context,
        windows=windows,
        rotated=(True,) * len(windows),
        attention_scale=0.5,
    )
    return Model(
        config=config,
        embedding=None,
        positions=None,
        embedding_norm=None,
        layers=(None,) * len(windows),  # type: ignore[arg-type]
        output_norm=Norm(None, 1e-5),
        head=Linear(None),
        shape=AttentionShape(1, 1, 4, 0.5),
        nbytes=1000,
    )


class Guesses:
    """A drafter that knows what comes, and says it, or something else, or first the one and then the other."""

    longest = 6

    def __init__(self, windows: tuple[int, ...] = (0,), seed: int = 0) -> None:
        self._windows, self._rng = windows, random.Random(seed)
        self._known: dict[Running, list[int]] = {}

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._guess(one) for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        assert isinstance(key, Running)
        self._known.pop(key, None)

    def _guess(self, wanted: Wanted) -> list[int]:
        assert isinstance(wanted.key, Running)
        assert wanted.token_ids is wanted.key.token_ids
        place = len(wanted.token_ids) - wanted.key.num_prompt
        coming = self._coming(wanted.key)[place : place + wanted.most]
        coming += [self._rng.randrange(VOCAB) for _ in range(wanted.most - len(coming))]
        right = self._rng.choice([0.0, 0.7, 0.7, 1.0])
        return [token if self._rng.random() < right else self._rng.randrange(VOCAB) for token in coming]

    def _coming(self, seq: Running) -> list[int]:
        if seq not in self._known:
            asked = replace(seq.request, timeout=None, queue_timeout=None)
            name = asked.request_id + (f"/{seq.sample}" if seq.sample else "")
            self._known[seq] = solo([asked], self._windows)[name]
        return self._known[seq]


class AnyPace(DraftPace):
    """Has as many tokens drafted as chance will have it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._rng = random.Random(seed)

    def counts(self, chances: list[float], most: list[int], room: int) -> list[int]:
        counts = []
        for count in most:
            counts.append(self._rng.randint(0, max(0, min(count, room))))
            room -= counts[-1]
        return counts


def guessing(windows: tuple[int, ...] = (0,), seed: int = 0) -> Speculation:
    """Drafts that are right, wrong and mixed, of any length."""
    return Speculation(Guesses(windows, seed), AnyPace(seed))


DRAFTING = False  # what ``toy_engine`` does where nothing is said; see conftest.py


def toy_engine(
    *,
    backend: Backend | None = None,
    pages: int = 1000,
    seqs: int = 64,
    budget: int = 512,
    longest: int = 512,
    windows: tuple[int, ...] = (0,),
    prefix_caching: bool = True,
    preempt_for_priority: bool = False,
    target_step_ms: float | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    speculation: Speculation | None = None,
    drafts: bool = True,
) -> Engine:
    """An engine on the toy, with memory for ``pages`` pages of 16 tokens in one layer, that checks itself at every step.

    Without ``drafts`` it has none in tests that run with and without them.
    """
    config = EngineConfig(
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        kv_cache_memory=pages * PAGE_BYTES,
        enable_prefix_caching=prefix_caching,
        preempt_for_priority=preempt_for_priority,
        target_step_ms=target_step_ms,
    )
    backend = backend or ToyBackend(windows=windows)
    if DRAFTING and drafts:
        speculation = speculation or guessing(windows)
    model = toy_model(windows=windows)
    return Engine(model, backend, config, clock=clock, check_every_step=True, speculation=speculation)


def greedy(name: str, prompt: Iterable[int], max_tokens: int = 8) -> Request:
    """A request without randomness."""
    return Request(name, tuple(prompt), SamplingParams(temperature=0, max_tokens=max_tokens))


def mixed_requests(count: int, rng: np.random.Generator, longest_prompt: int = 100) -> list[Request]:
    """Requests of many lengths, greedy and sampled."""
    requests = []
    for i in range(count):
        prompt = rng.integers(0, NAN_TOKEN, int(rng.integers(1, longest_prompt + 1))).tolist()
        max_tokens = int(rng.integers(1, 25))
        params = (
            SamplingParams(temperature=0, max_tokens=max_tokens)
            if i % 2
            else SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_tokens=max_tokens)
        )
        requests.append(Request(f"r{i}", tuple(prompt), params, seed=i * 7919, sample=i % 3))
    return requests


@dataclass
class Result:
    """All outputs of one request put together."""

    token_ids: list[int] = field(default_factory=list)
    last: Output | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def end(self) -> tuple[str | None, int | None]:
        """Why it ended: (finish_reason, stop_reason)."""
        assert self.last is not None
        assert self.last.finished
        return self.last.finish_reason, self.last.stop_reason

    @property
    def error(self) -> str:
        """The error it ended with."""
        assert self.last is not None
        assert self.last.error is not None
        return self.last.error


def collect(outputs: Iterable[Output], results: dict[str, Result]) -> None:
    """Add the outputs of a step to what each request has so far; further samples of "name" are called "name/1" and so on."""
    for output in outputs:
        name = output.request_id + (f"/{output.sample}" if output.sample else "")
        result = results.setdefault(name, Result())
        assert result.last is None or not result.last.finished, "an output after the last one"
        result.token_ids += output.new_token_ids
        result.last = output
        result.outputs.append(output)


def drain(engine: Engine, results: dict[str, Result]) -> None:
    """Step until nothing is left."""
    while engine.has_work:
        collect(engine.step(), results)


def run(engine: Engine, requests: Iterable[Request] = ()) -> dict[str, Result]:
    """Add the requests, then step until nothing is left; no page may be lost."""
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
    drain(engine, results)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, engine.num_pages)
    return results


def tokens(results: dict[str, Result]) -> dict[str, list[int]]:
    """Request id -> its output tokens."""
    return {name: result.token_ids for name, result in results.items()}


def samples(request: Request) -> list[Request]:
    """A request for each of the samples."""
    params = replace(request.params, n=1)
    names = [request.request_id, *(f"{request.request_id}/{index}" for index in range(1, request.params.n))]
    return [
        replace(request, request_id=name, params=params, sample=request.sample + index)
        for index, name in enumerate(names)
    ]


def solo(requests: Iterable[Request], windows: tuple[int, ...] = (0,)) -> dict[str, list[int]]:
    """The tokens of each sample of each request run alone, whatever its id, and computed from its beginning."""
    engine = toy_engine(windows=windows, prefix_caching=False, drafts=False)
    alone = [one for request in requests for one in samples(request)]
    return {request.request_id: _alone(engine, request, windows) for request in alone}


_KNOWN: dict[str, list[int]] = {}  # many tests ask for the same requests in other company


def _alone(engine: Engine, request: Request, windows: tuple[int, ...]) -> list[int]:
    """The tokens of one request; what tells it from others is in its repr, but for a constraint, which may have states."""
    key = repr((replace(request, priority=0), windows))  # nobody is there to come before
    if request.constraint is not None or key not in _KNOWN:
        _KNOWN[key] = tokens(run(engine, [request]))[request.request_id]
    return list(_KNOWN[key])
