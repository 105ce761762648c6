"""What becomes of states: embeddings and scores, in vLLM's classes, and how one is gathered step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.engine.engine import Metrics, Output
from shoal.params import Pooling, PoolingParams

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(slots=True)
class EmbeddingOutput:
    """``embedding``: the numbers of one input; with pooling "none" a list of them for each token."""

    embedding: list[float] | list[list[float]]

    @property
    def hidden_size(self) -> int:
        """How many numbers an embedding has."""
        first = self.embedding[0] if self.embedding else []
        return len(first) if isinstance(first, list) else len(self.embedding)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What became of one input. ``error`` says why ``outputs`` is empty, if it is: ``finish_reason`` is "stop" otherwise.

    ``num_cached_tokens`` of the prompt were not computed: another prompt began with them.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None
    finish_reason: str | None = None

    @classmethod
    def failed(cls, request_id: str, error: str) -> EmbeddingRequestOutput:
        """The output of an input that was refused."""
        return cls(request_id, EmbeddingOutput([]), [], finished=True, error=error, finish_reason="error")


@dataclass(slots=True)
class ScoringOutput:
    """``score``: how well a document answers a query; NaN where there is none."""

    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """What became of one pair. ``error`` says why it has no score, if it has none."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None

    @classmethod
    def failed(cls, output: EmbeddingRequestOutput) -> ScoringRequestOutput:
        """The output of a pair that was refused."""
        return cls(output.request_id, ScoringOutput(math.nan), [], finished=True, error=output.error)

    @classmethod
    def of_similarity(cls, first: EmbeddingRequestOutput, second: EmbeddingRequestOutput) -> ScoringRequestOutput:
        """The cosine of two embeddings; the ids are those of both texts."""
        error = first.error or second.error
        score = math.nan if error else similarity(first.outputs.embedding, second.outputs.embedding)
        ids = [*first.prompt_token_ids, *second.prompt_token_ids]
        cached = first.num_cached_tokens + second.num_cached_tokens
        return cls(first.request_id, ScoringOutput(score), ids, finished=True, num_cached_tokens=cached, error=error)


@dataclass(slots=True, eq=False)
class Pooled:
    """One input on its way: takes the engine's Outputs, gathers what is pooled. ``sink`` as in ``Generation``.

    States are added one position after another, in float64, so that it makes no difference in which steps they come.
    """

    request_id: str
    prompt_token_ids: list[int]
    pooling: Pooling
    params: PoolingParams
    sink: list[Any]
    finish_reason: str | None = None
    error: str | None = None
    metrics: Metrics | None = None
    _rows: list[F32] = field(default_factory=list)
    _sum: F64 | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing will be added."""
        return self.finish_reason is not None

    def take(self, output: Output) -> bool:
        """Add what a step brought. It never ends before the engine does: False."""
        self.metrics, self.error = output.metrics, output.error
        if output.finished:
            self.finish_reason = output.finish_reason
        if output.states is not None:
            self._add(output.states)
        self.sink.append(self)
        return False

    def abort(self) -> None:
        """End it where it is, unless it has ended."""
        if not self.finished:
            self.finish_reason = "abort"
            self.sink.append(self)

    def vector(self) -> F32:
        """What all states made: [n], or [tokens, n] with pooling "none"."""
        pooled = np.concatenate(self._rows) if self._sum is None else self._sum / len(self.prompt_token_ids)
        pooled = pooled if self.pooling in ("none", "mean") else pooled[0]
        pooled = pooled[..., : self.params.dimensions]
        return normalised(pooled) if self.params.normalize else pooled.astype(np.float32)

    def score(self) -> float:
        """What the classifier said first, through a sigmoid unless that is not wanted."""
        logit = float(self._rows[0][0, 0])
        return _sigmoid(logit) if self.params.use_activation else logit

    def snapshot(self) -> EmbeddingRequestOutput:
        """How far it is."""
        done = self.finish_reason == "stop"
        return EmbeddingRequestOutput(
            self.request_id,
            EmbeddingOutput(self.vector().tolist() if done else []),
            self.prompt_token_ids,
            finished=self.finished,
            num_cached_tokens=self.num_cached,
            error=self.reason,
            finish_reason=self.finish_reason,
        )

    def scored(self) -> ScoringRequestOutput:
        """The same of a score."""
        score = self.score() if self.finish_reason == "stop" else math.nan
        return ScoringRequestOutput(
            self.request_id,
            ScoringOutput(score),
            self.prompt_token_ids,
            finished=self.finished,
            num_cached_tokens=self.num_cached,
            error=self.reason,
        )

    @property
    def num_cached(self) -> int:
        """Tokens that were not computed."""
        return self.metrics.num_cached if self.metrics else 0

    @property
    def reason(self) -> str | None:
        """Why nothing came of it, if so."""
        reasons = {"abort": "the request was aborted", "timeout": "the request's time was up"}
        return self.error or reasons.get(self.finish_reason or "")

    def _add(self, states: F32) -> None:
        if self.pooling != "mean":
            self._rows.append(states)
            return
        before = np.zeros(states.shape[1]) if self._sum is None else self._sum
        # accumulate, not sum: that one adds in pairs where it likes to.
        self._sum = np.add.accumulate(np.vstack([before, states]), axis=0, dtype=np.float64)[-1]


def normalised(vectors: NDArray[Any]) -> F32:
    """Each of length 1, but for zeros, which stay."""
    wide = np.ascontiguousarray(vectors, np.float64)
    lengths = np.sqrt(np.add.accumulate(np.square(wide), axis=-1)[..., -1:])
    return (wide / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def similarity(a: Any, b: Any) -> float:
    """Cosine of the angle between two embeddings."""
    x, y = (normalised(np.array(vector, np.float64)).astype(np.float64) for vector in (a, b))
    return math.fsum((x * y).tolist())


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
