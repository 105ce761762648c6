"""Inputs to embed and pairs to score: through the tokenizer into the engine, and what comes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from shoal.engine.engine import Engine, Request
from shoal.errors import ParameterError, RequestError
from shoal.models.config import ModelConfig
from shoal.params import Pooling, PoolingParams, SamplingParams
from shoal.requests.dispatch import Dispatcher
from shoal.requests.pooled import EmbeddingRequestOutput, Pooled, ScoringRequestOutput
from shoal.requests.prompts import Prompt, PromptEncoder
from shoal.requests.submission import Limits, Prepared

Pair = tuple[str, str]
Count = Callable[[int], None]  # hears how many inputs are done
_Encode = Callable[[], list[int]]


class Embedder:
    """Embeddings and scores of one model. May be used from several threads, as the dispatcher may."""

    def __init__(self, prompts: PromptEncoder, dispatcher: Dispatcher, engine: Engine, model: ModelConfig) -> None:
        config = engine.config
        self.pooling: Pooling = config.pooling_type or model.pooling_type
        self._prompts, self._dispatcher, self._engine, self._model = prompts, dispatcher, engine, model
        self._numbers = itertools.count()
        if config.pooling_type == "rank" and model.pooling != "rank":
            raise ParameterError(
                "pooling_type", "rank", "what the model file says: only one for ranking has a classifier"
            )

    def refuse_encoder(self, method: str) -> None:
        """Raise RequestError for a model that continues no text."""
        if self._model.arch.encoder:
            name = self._model.architecture
            raise RequestError(
                f"{name} is an encoder, which continues no text: {method} needs another model (embed does not)"
            )

    def refuse_many(self, what: str) -> None:
        """Raise RequestError where an input has as many embeddings as tokens and ``what`` needs one."""
        if self.pooling == "none":
            reason = "pooling none gives an embedding for each token"
            raise RequestError(f"{reason}; {what} needs one for each text: choose another pooling_type")

    def embed(
        self, inputs: Sequence[Prompt], params: PoolingParams, limits: Limits, count: Count
    ) -> list[EmbeddingRequestOutput]:
        """An output for each input, in their order."""
        if not inputs:
            raise RequestError("the batch is empty; it needs at least 1 prompt", "prompts")
        self._check(params)
        most = self._most(params)
        encode = [partial(self._encode, prompt, most) for prompt in inputs]
        found = self._pool(encode, params, limits, count)
        return [item.snapshot() if isinstance(item, Pooled) else item for item in found]

    def score(
        self, pairs: Sequence[Pair], params: PoolingParams, limits: Limits, count: Count
    ) -> list[ScoringRequestOutput]:
        """An output for each pair, in their order."""
        if self.pooling != "rank":
            return self._compare(pairs, params, limits, count)
        if not self._model.arch.encoder:
            raise RequestError(
                f"{self._model.architecture}: only encoders can rank; this one can embed with another pooling_type"
            )
        most = self._most(params)
        encode = [partial(self._prompts.encode_pair, query, document, most) for query, document in pairs]
        found = self._pool(encode, params, limits, count)
        return [item.scored() if isinstance(item, Pooled) else ScoringRequestOutput.failed(item) for item in found]

    def prepare(
        self, prompt: Prompt, params: PoolingParams, limits: Limits, sink: list[Pooled], request_id: str
    ) -> Prepared:
        """One input, ready to be put in line; its item goes to ``sink``. Raises RequestError or ParameterError."""
        self._check(params)
        self.refuse_many("submit_embedding")
        return self._prepared(self._encode(prompt, self._most(params)), params, limits, sink, request_id)

    def _compare(
        self, pairs: Sequence[Pair], params: PoolingParams, limits: Limits, count: Count
    ) -> list[ScoringRequestOutput]:
        """Cosines of embeddings; each text is embedded once."""
        self.refuse_many("score")
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found = dict(zip(texts, self.embed(texts, params, limits, lambda done: None), strict=True))
        count(len(pairs))
        return [ScoringRequestOutput.of_similarity(found[query], found[document]) for query, document in pairs]

    def _pool(
        self, encode: Sequence[_Encode], params: PoolingParams, limits: Limits, count: Count
    ) -> list[Pooled | EmbeddingRequestOutput]:
        sink: list[Pooled] = []
        started: list[Pooled | EmbeddingRequestOutput] = []
        try:
            started.extend(self._try_to_start(ids, params, limits, sink) for ids in encode)
            waiting = {item for item in started if isinstance(item, Pooled)}
            count(len(started) - len(waiting))
            while waiting:
                waiting -= {item for item in self._dispatcher.next_changed(sink) if item.finished}
                count(len(started) - len(waiting))
        finally:
            self._dispatcher.drop(item for item in started if isinstance(item, Pooled))
        return started

    def _try_to_start(
        self, encode: _Encode, params: PoolingParams, limits: Limits, sink: list[Pooled]
    ) -> Pooled | EmbeddingRequestOutput:
        """One input of many: its fault becomes its output."""
        request_id = f"pooled-{next(self._numbers)}"
        try:
            request, item = self._prepared(encode(), params, limits, sink, request_id)
            self._dispatcher.start(request, item)
        except RequestError as error:
            return EmbeddingRequestOutput.failed(request_id, str(error))
        assert isinstance(item, Pooled)
        return item

    def _encode(self, prompt: Prompt, most: int | None) -> list[int]:
        return self._prompts.encode_input(prompt, most).ids

    def _prepared(
        self, ids: list[int], params: PoolingParams, limits: Limits, sink: list[Pooled], request_id: str
    ) -> Prepared:
        item = Pooled(request_id, ids, self.pooling, params, sink)
        request = Request(request_id, tuple(ids), SamplingParams(), pooling=self.pooling, **limits._asdict())
        return Prepared(request, item)

    def _check(self, params: PoolingParams) -> None:
        """Raises RequestError for a model that ranks, ParameterError for more dimensions than an embedding has."""
        if self.pooling == "rank":
            raise RequestError(
                f"{self._model.architecture} with pooling rank scores pairs of texts (LLM.score) and embeds none"
            )
        if (params.dimensions or 0) > self._model.n_embd:
            raise ParameterError("dimensions", params.dimensions, f"at most the model's {self._model.n_embd}")

    def _most(self, params: PoolingParams) -> int | None:
        """How many tokens of an input are taken, if not all of them."""
        most, longest = params.truncate_prompt_tokens, self._engine.max_model_len
        if most is not None and most > longest:
            raise ParameterError("truncate_prompt_tokens", most, f"at most max_model_len {longest}")
        return longest if most == -1 else most


def text_pairs(queries: str | Sequence[str], documents: str | Sequence[str]) -> list[Pair]:
    """Each document with its query. Raises RequestError for no documents, ParameterError where the numbers differ."""
    first = [queries] if isinstance(queries, str) else list(queries)
    second = [documents] if isinstance(documents, str) else list(documents)
    if not first or not second:
        raise RequestError("the batch is empty; it needs at least 1 query and 1 document", "data_2")
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ParameterError("data_1", f"{len(first)} items", f"one, or as many as data_2 has ({len(second)})")
    for text in (*first, *second):
        if not isinstance(text, str):
            raise ParameterError("data_1", text, "texts")
    return list(zip(first, second, strict=True))
