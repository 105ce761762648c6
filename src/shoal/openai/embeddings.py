"""From a body of /v1/embeddings to what LLM.submit_embedding takes, and from its outputs to a response body."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import ParameterError, RequestError
from shoal.openai.fields import typed
from shoal.openai.schema import (
    APIError,
    EmbeddingBody,
    EmbeddingItem,
    EmbeddingList,
    EmbeddingUsage,
    code_of,
)
from shoal.params import PoolingParams

if TYPE_CHECKING:
    from shoal.requests.pooled import EmbeddingRequestOutput

EMBEDDINGS = "/v1/embeddings"
MAX_INPUTS = 2048  # as OpenAI

_Input = str | dict[str, Any]


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """A body made ready: each of ``inputs`` is a prompt of LLM's. ``base64``: how the numbers are written."""

    model: str | None
    inputs: tuple[_Input, ...]
    params: PoolingParams
    base64: bool


def parse_embedding(body: Any) -> EmbeddingCall:
    """A body decoded from JSON. Raises APIError that names the field at fault."""
    given = typed(body, EmbeddingBody)
    try:
        params = PoolingParams(dimensions=given.dimensions, truncate_prompt_tokens=given.truncate_prompt_tokens)
    except ParameterError as error:
        raise APIError(str(error), error.field) from None
    return EmbeddingCall(
        given.model, tuple(map(_prompt, _inputs(given.input))), params, given.encoding_format == "base64"
    )


def embedding_refusal(error: RequestError | ParameterError) -> APIError:
    """What ``LLM.submit_embedding`` had against an input, in the words of its body."""
    field = "input" if error.field in ("prompt_token_ids", "prompt") else error.field
    return APIError(str(error), field, code=code_of(error))


def embedding_answer(
    call: EmbeddingCall, outputs: Sequence[EmbeddingRequestOutput], *, response_id: str, model: str
) -> EmbeddingList:
    """The response body for outputs that have all ended with "stop", in the order of the inputs."""
    items = [
        EmbeddingItem(index, _base64(output) if call.base64 else _numbers(output))
        for index, output in enumerate(outputs)
    ]
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return EmbeddingList(f"embd-{response_id}", int(time.time()), model, items, EmbeddingUsage(tokens, tokens))


def _inputs(given: str | list[Any]) -> list[Any]:
    """A text, a list of ids, or a list of either."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not 0 < len(given) <= MAX_INPUTS:
        raise APIError(f"input: has {len(given)} items, must have 1 to {MAX_INPUTS}", "input")
    return given


def _prompt(item: Any) -> _Input:
    if item in ("", []):
        raise APIError("input: is empty; it needs at least 1 token", "input")
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not all(type(token) is int for token in item):
        raise APIError("input: must be a text, a list of token ids, or a list of those", "input")
    return {"prompt_token_ids": item}


def _numbers(output: EmbeddingRequestOutput) -> list[float]:
    numbers: Any = output.outputs.embedding
    return list(numbers)


def _base64(output: EmbeddingRequestOutput) -> str:
    return base64.b64encode(np.array(output.outputs.embedding, "<f4").tobytes()).decode()
