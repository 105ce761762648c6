"""The bodies of /v1/chat/completions and /v1/completions, in and out, and the error object.

Field names and shapes are those of OpenAI's API reference; sampling fields that OpenAI does not have are vLLM's.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from shoal.errors import ContextLengthError, ShoalError
from shoal.params import DRY_BREAKERS

_MAX_MESSAGE = 500


class APIError(ShoalError):
    """A request that has no answer, as the client will read it.

    ``status`` is that of HTTP; ``param``, the field at fault; ``kind``, the ``type`` in the body: "invalid_request_error",
    "authentication_error", "rate_limit_error", "timeout_error" or "server_error"; ``code``, OpenAI's word for what is wrong
    ("model_not_found", "context_length_exceeded", "invalid_api_key", "rate_limit_exceeded", ...), None where it has none.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        super().__init__(_sendable(message))
        self.status = status
        self.kind = kind
        self.code = code
        self.param = None if param is None else _sendable(param)

    def body(self, line: int | None = None) -> ErrorBody:
        """The error object; ``line`` where the request stood in a file."""
        place = msgspec.UNSET if line is None else line
        return ErrorBody(ErrorInfo(str(self), self.kind, self.param, self.code, place))


def code_of(error: ShoalError) -> str | None:
    """OpenAI's word for what is wrong with a request, where it has one."""
    return "context_length_exceeded" if isinstance(error, ContextLengthError) else None


def _sendable(text: str) -> str:
    """What a client sent, fit to be sent back: valid UTF-8 and not long."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."


def parse_json(data: bytes) -> Any:
    """Any JSON value. NaN, Infinity, 1e999 and lone surrogates pass, so that they can be refused where they stand.

    Raises APIError for what is not JSON and for nesting too deep to follow.
    """
    try:
        return msgspec.json.decode(data)
    except RecursionError:
        raise APIError("the JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise APIError("the JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise APIError(f"not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise APIError(f"not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise APIError("not valid JSON: a number has thousands of digits") from None


# Requests -------------------------------------------------------------------------------------------------------------


class RequestBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. Meaning, defaults and ranges are those of SamplingParams; requests of a lower ``priority`` number
    come first; the last four are read by ``openai.structured``."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    cache_salt: str | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    bad_words: list[str] = []
    allowed_token_ids: list[int] = []
    logprob_token_ids: list[int] = []
    min_keep: int = 0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: str | tuple[str, ...] = DRY_BREAKERS
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    samplers: str | list[str] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    n: int = 1
    priority: int = 0
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None


class ChatBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """A body of /v1/chat/completions. Without a limit the answer may fill the context. ``messages``: see ``shoal.openai.messages``.

    Those of ``tools`` to ``add_special_tokens`` are the parts of a ``shoal.chat.conversation.Conversation``. ``echo`` puts the last
    message before the answer that continues it; ``return_token_ids`` adds the ids of prompt and answer.
    """

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    thinking_token_budget: int | None = None
    include_reasoning: bool = True
    echo: bool = False
    return_token_ids: bool = False


class CompletionBody(RequestBody, kw_only=True, forbid_unknown_fields=True):
    """A body of /v1/completions. ``prompt``: a text, a list of token ids, or a list with one of those.

    ``echo`` puts the prompt before the answer, in the text and in its log-probabilities. With it, or with
    ``prompt_logprobs``, ``max_tokens`` may be 0: nothing is generated. ``add_special_tokens`` (BOS) and ``parse_special`` (spelled
    control tokens become these tokens) are for a text. ``return_token_ids`` adds the ids of prompt and answer.
    """

    prompt: str | list[Any]
    add_special_tokens: bool = True
    parse_special: bool = False
    logprobs: int | None = None
    echo: bool = False
    return_token_ids: bool = False


class EmbeddingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A body of /v1/embeddings. ``input``: a text, a list of token ids, or a list of either. ``truncate_prompt_tokens`` is vLLM's."""

    model: str | None = None
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None


# Responses ------------------------------------------------------------------------------------------------------------

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct):
    """``cached_tokens`` of the prompt were not computed again."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The token that was chosen, and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities in the shape of /v1/chat/completions."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct):
    """A token of the prompt, or one that could have stood there; ``rank`` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


# vLLM's addition: for each token of the prompt itself and the likeliest ones by id, null for the first token.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class FunctionCall(msgspec.Struct):
    """Which function, with which arguments: the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call of a tool by the model."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatAnswer(msgspec.Struct):
    """The message of the model. ``content`` is null where it only thought or called tools; ``reasoning_content`` is another name of
    ``reasoning``. ``role`` is that of the message that is continued, otherwise "assistant"."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One answer to a conversation."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct):
    """The response of /v1/chat/completions. ``created`` in seconds since 1970; ``prompt_logprobs`` where asked for."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextLogprobs(msgspec.Struct):
    """Log-probabilities in the shape of /v1/completions: parallel lists; null for the first token of an echoed prompt.

    ``text_offset``: where in the text, in characters, the first character begins that the token completes.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One continuation of a prompt; ``prompt_logprobs`` where asked for."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(msgspec.Struct):
    """The response of /v1/completions. ``created`` in seconds since 1970."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    object: Literal["text_completion"] = "text_completion"


class FunctionDelta(msgspec.Struct):
    """A piece of a call: its ``name`` first, then the text of its ``arguments``, which adds up."""

    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct):
    """A piece of tool call number ``index``; the first one has ``id``, ``type`` and name."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct):
    """What a message has grown by. The first one has the ``role``."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct):
    """What one answer to a conversation has grown by; ``logprobs`` and ``token_ids`` are those of the new tokens."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    """A part of a streamed response of /v1/chat/completions. ``usage`` is null in all but the last one, and left out if it is not
    asked for; what is about the prompt is in the first one."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextChunkChoice(msgspec.Struct):
    """What one continuation of a prompt has grown by; what is about the prompt is in its first one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextChunk(msgspec.Struct):
    """A part of a streamed response of /v1/completions. ``usage`` as in ``ChatChunk``."""

    id: str
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class EmbeddingItem(msgspec.Struct):
    """The embedding of one input: numbers, or the base64 of them as little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    """The response of /v1/embeddings. ``created`` in seconds since 1970; it and ``id`` are vLLM's."""

    id: str
    created: int
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class ErrorInfo(msgspec.Struct):
    """Why a request has no answer; the number of HTTP is in the status line. ``line`` counts from 1 in a batch file."""

    message: str
    type: str
    param: str | None
    code: str | None
    line: int | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct):
    """The response of a request that was refused."""

    error: ErrorInfo
