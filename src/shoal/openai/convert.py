"""From a request body to what LLM.submit takes, and from a RequestOutput to a response body."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from shoal.chat.choice import checked_choice, checked_tools
from shoal.chat.conversation import Conversation
from shoal.chat.reply import Reply
from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.openai import structured
from shoal.openai.fields import typed
from shoal.openai.messages import conversation
from shoal.openai.schema import (
    APIError,
    ChatAnswer,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionBody,
    FinishReason,
    FunctionCall,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    RequestBody,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
    code_of,
)
from shoal.params import BeamSearchParams, SamplingParams, check_priority
from shoal.requests.prompts import TEXT_OPTIONS
from shoal.text.given import is_given

if TYPE_CHECKING:
    from shoal.llm import CompletionOutput, Logprob, RequestOutput
    from shoal.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
_CONVERSATION = [field.name for field in fields(Conversation) if field.name != "messages"]
_NOTHING_SAID = ChatBody(messages=[])
_LEAST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI sends this


@dataclass(frozen=True, slots=True)
class Call:
    """A body made ready: what goes into ``LLM.submit``, and what the answer has to look like.

    ``prompt`` is what LLM calls one; ``model`` is None where the body
    names none. ``echo``: the prompt comes back before the answer. ``prompt_logprobs``: those in ``params`` are asked for as
    vLLM's field, not only for the echo. ``constraint_field``: what the body calls ``params.structured_outputs``.
    ``include_reasoning``: what the model thought comes back. ``return_token_ids``: the ids of prompt and answer do.
    ``priority``: the lowest number comes first. ``beams``: the likeliest
    texts are looked for.
    """

    kind: Literal["chat", "completion"]
    model: str | None
    prompt: str | dict[str, Any]
    params: SamplingParams
    echo: bool = False
    prompt_logprobs: bool = False
    constraint_field: str = "structured_outputs"
    include_reasoning: bool = True
    return_token_ids: bool = False
    priority: int = 0
    beams: BeamSearchParams | None = None


# From a body to a request ---------------------------------------------------------------------------------------------


def parse_chat(body: Any) -> Call:
    """A body of /v1/chat/completions, decoded from JSON. Raises APIError that names the field at fault."""
    chat = typed(body, ChatBody)
    prompt = _conversation(chat)
    if chat.top_logprobs and not chat.logprobs:
        raise APIError("top_logprobs: needs logprobs to be true", "top_logprobs")
    names = {"logprobs": "top_logprobs"}
    if chat.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    field, constraint = structured.structured_outputs(chat)
    params = _params(
        chat,
        names,
        max_tokens=_chat_max_tokens(chat),
        logprobs=chat.top_logprobs if chat.logprobs else None,
        thinking_token_budget=chat.thinking_token_budget,
        structured_outputs=constraint,
    )
    return Call(
        "chat",
        chat.model,
        prompt,
        params,
        echo=chat.echo,
        prompt_logprobs=chat.prompt_logprobs is not None,
        constraint_field=field,
        include_reasoning=chat.include_reasoning,
        return_token_ids=chat.return_token_ids,
        priority=_priority(chat.priority),
        beams=_beams(chat, params),
    )


def parse_completion(body: Any) -> Call:
    """A body of /v1/completions, decoded from JSON. Raises APIError that names the field at fault."""
    completion = typed(body, CompletionBody)
    max_tokens = DEFAULT_COMPLETION_TOKENS if completion.max_tokens is None else completion.max_tokens
    scored = _prompt_logprobs_needed(completion)
    field, constraint = structured.structured_outputs(completion)
    params = _params(
        completion,
        {},
        max_tokens=max_tokens,
        logprobs=completion.logprobs,
        prompt_logprobs=scored,
        structured_outputs=constraint,
    )
    return Call(
        "completion",
        completion.model,
        _prompt(completion),
        params,
        echo=completion.echo,
        prompt_logprobs=completion.prompt_logprobs is not None,
        constraint_field=field,
        return_token_ids=completion.return_token_ids,
        priority=_priority(completion.priority),
        beams=_beams(completion, params),
    )


PARSERS: dict[str, Callable[[Any], Call]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
}


def check_model(model: str | None, served: Collection[str]) -> None:
    """Raise APIError (404) where a body names a model that is not ``served``."""
    if model is not None and model not in served:
        raise APIError(
            f"model: {model!r} is not served here; there is {', '.join(sorted(served))}",
            "model",
            status=404,
            code="model_not_found",
        )


def refusal(call: Call, error: RequestError | ParameterError | TemplateError) -> APIError:
    """What ``LLM.submit`` had against a request, in the words of its body."""
    if isinstance(error, ParameterError) and error.field.startswith("structured_outputs"):
        return structured.in_words_of(call.constraint_field, error)
    own = "messages" if call.kind == "chat" else "prompt"
    field = own if isinstance(error, TemplateError) else error.field
    return APIError(
        str(error), own if field in ("prompt_token_ids", "prompt", "messages") else field, code=code_of(error)
    )


def failure(output: RequestOutput) -> APIError | None:
    """Why a request has no answer, as soon as one of its answers has failed; None as long as none has."""
    reasons = {given.finish_reason for given in output.outputs}
    if "timeout" in reasons:
        late = "the request was not finished in time"
        return APIError(late, status=504, kind="timeout_error", code="request_timeout")
    if "error" in reasons:
        return APIError(output.error or "the request failed", status=500, kind="server_error")
    if "abort" in reasons:
        return APIError("the request was aborted", status=503, kind="server_error")
    return None


def _beams(body: RequestBody, params: SamplingParams) -> BeamSearchParams | None:
    """The beam search that a body asks for, as wide as its ``n``; nothing is drawn in it."""
    if not body.use_beam_search:
        return None
    if params.reports_logprobs or params.prompt_logprobs is not None:
        raise APIError("use_beam_search: without logprobs and prompt_logprobs", "use_beam_search")
    if params.structured_outputs is not None:
        raise APIError("use_beam_search: without a form that the answer has to have", "use_beam_search")
    if params.max_tokens is None:
        raise APIError("use_beam_search: needs max_tokens", "max_tokens")
    try:
        return BeamSearchParams(
            params.n,
            params.max_tokens,
            params.ignore_eos,
            length_penalty=body.length_penalty,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )
    except ParameterError as error:
        name = "n" if error.field == "beam_width" else error.field
        raise APIError(f"{name}{str(error).removeprefix(error.field)}", name) from None


_NOT_SAMPLING = {"model", "priority", "use_beam_search", "length_penalty"}


def _conversation(chat: ChatBody) -> dict[str, Any]:
    """A conversation as LLM takes it. What can be found out about it without the model is."""
    prompt: dict[str, Any] = {"messages": conversation(chat.messages)}
    for name in _CONVERSATION:
        value = getattr(chat, name)
        if is_given(value) and value != getattr(_NOTHING_SAID, name):
            prompt[name] = value
    try:
        Conversation(**prompt)
        checked_choice(prompt.get("tool_choice"), checked_tools(prompt.get("tools", [])))
    except (RequestError, ParameterError) as error:
        raise APIError(str(error), error.field) from None
    return prompt


def _params(body: RequestBody, names: dict[str, str], **chosen: Any) -> SamplingParams:
    """The sampling parameters of a body; ``names`` says what the body calls a parameter that has another name there."""
    others = {*_NOT_SAMPLING, *structured.FIELDS, *chosen}
    shared = {name: getattr(body, name) for name in RequestBody.__struct_fields__ if name not in others}
    shared["allowed_token_ids"] = body.allowed_token_ids or None
    try:
        return SamplingParams(**shared, **chosen)
    except ParameterError as error:
        name = names.get(error.field, error.field)
        raise APIError(f"{name}{str(error).removeprefix(error.field)}", name) from None


def _priority(priority: int) -> int:
    try:
        return check_priority(priority)
    except ParameterError as error:
        raise APIError(str(error), "priority") from None


def _prompt_logprobs_needed(body: CompletionBody) -> int | None:
    """As vLLM: an echoed prompt has as many log-probabilities as the answer, unless the body says how many."""
    if body.prompt_logprobs is not None or not body.echo:
        return body.prompt_logprobs
    if body.logprobs is None and (body.max_tokens == 0 or body.logprob_token_ids):
        return 0
    return body.logprobs


def _chat_max_tokens(chat: ChatBody) -> int | None:
    if chat.max_completion_tokens is None:
        return chat.max_tokens
    if chat.max_tokens not in (None, chat.max_completion_tokens):
        reason = f"{chat.max_tokens} contradicts max_completion_tokens {chat.max_completion_tokens}"
        raise APIError(f"max_tokens: {reason}", "max_tokens")
    return chat.max_completion_tokens


def _prompt(body: CompletionBody) -> str | dict[str, Any]:
    """A text, or token ids; a list of one prompt stands for that prompt."""
    prompt = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise APIError(f"prompt: a list of {len(prompt)} prompts; give each a request of its own", "prompt")
        prompt = prompt[0]
    if not prompt:
        raise APIError("prompt: is empty; it needs at least 1 token", "prompt")
    if isinstance(prompt, str):
        options = {name: getattr(body, name) for name in TEXT_OPTIONS}
        return prompt if options == TEXT_OPTIONS else {"prompt": prompt, **options}
    if not all(type(token) is int for token in prompt):
        raise APIError("prompt: must be a text or a list of token ids", "prompt")
    return {"prompt_token_ids": prompt}


# From an output to a response -----------------------------------------------------------------------------------------


def answer(
    call: Call, output: RequestOutput, *, response_id: str, model: str, tokenizer: Tokenizer
) -> ChatCompletion | TextCompletion:
    """The response body of a finished request. Its answers must have ended with "stop" or "length"."""
    created, usage, prompt_logprobs = int(time.time()), _usage(output), _prompt_logprobs(call, output)
    if call.kind == "chat":
        return ChatCompletion(
            f"chatcmpl-{response_id}",
            created,
            model,
            [_chat_choice(call, given, tokenizer) for given in output.outputs],
            usage,
            prompt_logprobs=prompt_logprobs,
            prompt_token_ids=_ids(call, output.prompt_token_ids),
        )
    prompt = _prompt_text(output, call.params, tokenizer) if call.echo else ""
    text_choices = [
        TextChoice(
            given.index,
            prompt + given.text,
            _text_logprobs(call, output, given, prompt, tokenizer),
            _reason(given.finish_reason),
            prompt_logprobs,
            _ids(call, given.token_ids),
            _ids(call, output.prompt_token_ids),
        )
        for given in output.outputs
    ]
    return TextCompletion(f"cmpl-{response_id}", created, model, text_choices, usage)


def _chat_choice(call: Call, given: CompletionOutput, tokenizer: Tokenizer) -> ChatChoice:
    reply = given.reply
    return ChatChoice(
        given.index,
        _chat_answer(call, reply),
        _chat_logprobs(given, call.params, tokenizer),
        _reason(reply.finish_reason(given.finish_reason)),
        _ids(call, given.token_ids),
    )


def _chat_answer(call: Call, reply: Reply) -> ChatAnswer:
    """The message that goes on with the conversation, or with its last message."""
    assert isinstance(call.prompt, dict), "a chat has messages"
    last = call.prompt["messages"][-1]
    continues = call.prompt.get("continue_final_message") or call.prompt.get("add_generation_prompt") is False
    role = last["role"] if continues else "assistant"
    content: str | None = reply.content
    if call.echo and last["role"] == role:
        content = f"{last['content'] or ''}{content}"
    if not content and (reply.tool_calls or reply.reasoning):
        content = None
    answer = ChatAnswer(content, role)
    if reply.tool_calls:
        answer.tool_calls = [ToolCall(one.id, FunctionCall(one.name, one.arguments)) for one in reply.tool_calls]
    if reply.reasoning and call.include_reasoning:
        answer.reasoning = answer.reasoning_content = reply.reasoning
    return answer


def _reason(reason: str | None) -> FinishReason:
    if reason == "stop":
        return "stop"
    return "tool_calls" if reason == "tool_calls" else "length"


def _ids(call: Call, token_ids: list[int]) -> list[int] | msgspec.UnsetType:
    return token_ids if call.return_token_ids else msgspec.UNSET


def _usage(output: RequestOutput) -> Usage:
    """The prompt counts once, the tokens of all answers."""
    prompt, completion = len(output.prompt_token_ids), sum(len(given.token_ids) for given in output.outputs)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(output.num_cached_tokens))


def _prompt_logprobs(call: Call, output: RequestOutput) -> PromptLogprobs | msgspec.UnsetType:
    """vLLM's field, where the body asks for it."""
    if not call.prompt_logprobs or output.prompt_logprobs is None:
        return msgspec.UNSET
    return [None if place is None else _prompt_place(place) for place in output.prompt_logprobs]


def _prompt_place(place: dict[int, Logprob]) -> dict[int, PromptLogprob]:
    return {
        token: PromptLogprob(_finite(found.logprob), found.rank, found.decoded_token) for token, found in place.items()
    }


def _prompt_text(output: RequestOutput, params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The text of a prompt; ids are decoded as those of the answer are."""
    if output.prompt is not None:
        return output.prompt
    known = [token for token in output.prompt_token_ids if token < tokenizer.vocab_size]
    return tokenizer.decode(known, skip_special=params.skip_special_tokens)


def _chat_logprobs(given: CompletionOutput, params: SamplingParams, tokenizer: Tokenizer) -> ChatLogprobs | None:
    if given.logprobs is None:
        return None

    def entry(token: int, found: Logprob) -> TopLogprob:
        data = _bytes(token, tokenizer)
        return TopLogprob(data.decode("utf-8", "replace"), _finite(found.logprob), list(data))

    content = []
    k, asked = params.logprobs or 0, params.logprob_token_ids or ()
    for chosen, candidates in zip(given.token_ids, given.logprobs, strict=True):
        ranked = sorted(candidates.items(), key=lambda item: item[1].rank)
        best = [item for place, item in enumerate(ranked) if place < k or item[0] in asked]
        own = entry(chosen, candidates[chosen])
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, [entry(*item) for item in best]))
    return ChatLogprobs(content)


def _text_logprobs(
    call: Call, output: RequestOutput, given: CompletionOutput, prompt: str, tokenizer: Tokenizer
) -> TextLogprobs | None:
    """Log-probabilities of an answer, after those of the tokens of ``prompt`` if that is echoed."""
    if given.logprobs is None:
        return None
    echoed: list[int] = []
    places: list[dict[int, Logprob] | None] = [*given.logprobs]
    if call.echo:
        assert output.prompt_logprobs is not None, "parse_completion asks for them"
        echoed, places = output.prompt_token_ids, [*output.prompt_logprobs, *given.logprobs]
    ids = [*echoed, *given.token_ids]
    parsed = isinstance(call.prompt, dict) and call.prompt.get("parse_special", False)
    lengths = _lengths(ids, tokenizer, skip_special=call.params.skip_special_tokens and not parsed)
    # Its tokens may spell more than the prompt: a BOS, a space put in front. What is too much is at the start.
    start = len(prompt) - sum(lengths[: len(echoed)])
    offsets = [max(0, offset) for offset in accumulate(lengths, initial=start)][:-1]
    logprobs = TextLogprobs([], [], [], offsets)
    for token, place in zip(ids, places, strict=True):
        logprobs.tokens.append(_spelled(token, tokenizer))
        logprobs.token_logprobs.append(None if place is None else _finite(place[token].logprob))
        logprobs.top_logprobs.append(None if place is None else _best(place, token, call.params, tokenizer))
    return logprobs


def _best(place: dict[int, Logprob], token: int, params: SamplingParams, tokenizer: Tokenizer) -> dict[str, float]:
    """The token at a place, the ``logprobs`` likeliest there and those of ``logprob_token_ids``; ``prompt_logprobs`` may have asked for
    more."""
    k, asked = params.logprobs or 0, (token, *(params.logprob_token_ids or ()))
    shown = {other: found for other, found in place.items() if found.rank <= k or other in asked}
    return {_spelled(other, tokenizer): _finite(found.logprob) for other, found in shown.items()}


def _lengths(ids: list[int], tokenizer: Tokenizer, *, skip_special: bool) -> list[int]:
    """How many characters each token completes."""
    decoder = tokenizer.stream(skip_special=skip_special)
    return [len(decoder.push(token)) if token < tokenizer.vocab_size else 0 for token in ids]


def _bytes(token: int, tokenizer: Tokenizer) -> bytes:
    """The bytes of a token. Models may have more rows than tokens: those have no text."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def _spelled(token: int, tokenizer: Tokenizer) -> str:
    """The text of a token; one that is a piece of a character in the spelling of OpenAI: ``bytes:\\xe2\\x80``."""
    data = _bytes(token, tokenizer)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
