"""The model of batches in a server: their rows run beneath interactive traffic, and others compute the steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Protocol, TypeVar

from shoal.engine.engine import EngineStats
from shoal.jobs.running.model import JobModel, Requests
from shoal.params import BeamSearchParams, EngineConfig, PoolingParams, SamplingParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.pooled import EmbeddingRequestOutput
from shoal.requests.prompts import Prompt
from shoal.text.tokenizer import Tokenizer

BENEATH = 1000  # is added to the priority of a row; of requests the lowest number comes first
_MOST = 999  # how far the priority that a row gives itself counts, either way: none can get above other traffic

_Output = TypeVar("_Output", RequestOutput, EmbeddingRequestOutput)
_NUMBERS = itertools.count()


class Model(Protocol):
    """What is asked of the LLM itself."""

    @property
    def config(self) -> EngineConfig:
        """How the engine is sized."""

    path: Path
    tokenizer: Tokenizer | None

    def stats(self) -> EngineStats:
        """Where the engine stands now."""


class LowPriority(JobModel):
    """``requests`` of ``model``, for the rows of one batch.

    The rows of all batches have the same names. What is left of an earlier one in the engine, or to be reported of it, is told apart by
    a number that the ids bear there.
    """

    def __init__(self, model: Model, requests: Requests) -> None:
        self._model, self._requests = model, requests
        self._number = next(_NUMBERS)

    @property
    def config(self) -> EngineConfig:
        """How the engine is sized."""
        return self._model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model."""
        return self._model.tokenizer

    def stats(self) -> EngineStats:
        """Where the engine stands now, with the requests of all."""
        return self._model.stats()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Put a row in line, behind all that is not of a batch."""
        return self._requests.submit(
            prompt,
            params,
            request_id=self._inside(request_id),
            priority=_beneath(priority),
            timeout=timeout,
        )

    def submit_embedding(
        self,
        prompt: Prompt,
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Put an input of a row in line, behind all that is not of a batch."""
        return self._requests.submit_embedding(
            prompt, params, request_id=self._inside(request_id), priority=_beneath(priority), timeout=timeout
        )

    def embeddings(self) -> list[EmbeddingRequestOutput]:
        """Those that have ended since the last call."""
        return self._own(self._requests.embeddings())

    def step(self) -> list[RequestOutput]:
        """How far each row is that got something."""
        return self._own(self._requests.step())

    def abort(self, request_id: str) -> bool:
        """End a row."""
        return self._requests.abort(self._inside(request_id))

    def close(self) -> None:
        """Nothing: others use the model too."""

    def _inside(self, request_id: str | None) -> str:
        assert request_id is not None, "rows have names"
        return f"{self._number}/{request_id}"

    def _own(self, outputs: list[_Output]) -> list[_Output]:
        """Those of this batch, by their own names."""
        own = self._inside("")
        kept = [output for output in outputs if output.request_id.startswith(own)]
        for output in kept:
            output.request_id = output.request_id.removeprefix(own)
        return kept


def _beneath(priority: int) -> int:
    return BENEATH + max(-_MOST, min(priority, _MOST))
