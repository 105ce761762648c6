"""What the engine half of a job needs of a model: an LLM has it, and so has whatever shares one with others."""

from __future__ import annotations

from typing import Protocol

from shoal.engine.engine import EngineStats
from shoal.params import BeamSearchParams, EngineConfig, PoolingParams, SamplingParams
from shoal.requests.outputs import RequestOutput
from shoal.requests.pooled import EmbeddingRequestOutput
from shoal.requests.prompts import Prompt
from shoal.text.tokenizer import Tokenizer


class Requests(Protocol):
    """Requests of one caller; the methods mean what they mean of ``shoal.llm.LLM``."""

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Put one request in line."""

    def submit_embedding(
        self,
        prompt: Prompt,
        params: PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Put a request for one embedding in line."""

    def embeddings(self) -> list[EmbeddingRequestOutput]:
        """Those that have ended since the last call."""

    def step(self) -> list[RequestOutput]:
        """How far each request is now that got something. May also wait for others' steps, but not for ever."""

    def abort(self, request_id: str) -> bool:
        """End a request; nothing more is reported of it."""


class JobModel(Requests, Protocol):
    """Requests, and the model that they are for."""

    @property
    def config(self) -> EngineConfig:
        """How the engine is sized."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the model."""

    def stats(self) -> EngineStats:
        """Where the engine stands now."""

    def close(self) -> None:
        """The job has no more use of it. Closing twice does nothing."""
