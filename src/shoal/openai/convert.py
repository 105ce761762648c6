"""From a request body to what LLM.submit takes, and from a RequestOutput to a response body."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from shoal.chat.choice import checked_choice, checked_tools
from shoal.chat.conversation import Conversation
from shoal.chat.reply import Reply
from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.openai import structured
from shoal.openai.fields import typed
from shoal.openai.logprobs import TextScores, chat_logprobs, joined, prompt_places
from shoal.openai.messages import conversation
from shoal.openai.schema import (
    APIError,
    ChatAnswer,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    CompletionBody,
    FinishReason,
    FunctionCall,
    PromptLogprobs,
    PromptTokensDetails,
    RequestBody,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    ToolCall,
    Usage,
    code_of,
)
from shoal.params import BeamSearchParams, SamplingParams, check_priority
from shoal.requests.prompts import TEXT_OPTIONS
from shoal.text.given import is_given

if TYPE_CHECKING:
    from shoal.llm import CompletionOutput, RequestOutput
    from shoal.text.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
MAX_PROMPTS = 2048  # of one body
_CONVERSATION = [field.name for field in fields(Conversation) if field.name != "messages"]
_NOTHING_SAID = ChatBody(messages=[])


@dataclass(frozen=True, slots=True)
class Call:
    """A body made ready: what goes into ``LLM.submit``, and what the answer has to look like.

    ``prompt`` is what LLM calls one; ``model`` is None where the body
    names none. ``echo``: the prompt comes back before the answer. ``prompt_logprobs``: those in ``params`` are asked for as
    vLLM's field, not only for the echo. ``constraint_field``: what the body calls ``params.structured_outputs``.
    ``include_reasoning``: what the model thought comes back. ``return_token_ids``: the ids of prompt and answer do.
    ``priority``: the lowest number comes first. ``beams``: the likeliest
    texts are looked for. ``cache_salt``: the prompt's beginning is shared with requests of the same alone.
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
    cache_salt: str | None = None


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
        cache_salt=chat.cache_salt,
    )


def parse_completion(body: Any) -> Call:
    """A body of /v1/completions with one prompt, decoded from JSON. Raises APIError that names the field at fault."""
    completion = typed(body, CompletionBody)
    prompts = _prompts(completion.prompt)
    if len(prompts) > 1:
        raise APIError(f"prompt: a list of {len(prompts)} prompts; give each a request of its own", "prompt")
    return _completion(completion, prompts[0])


def parse_completions(body: Any) -> list[Call]:
    """A body of /v1/completions, decoded from JSON: a call for each of its prompts. Raises APIError that names the field at fault."""
    completion = typed(body, CompletionBody)
    prompts = _prompts(completion.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise APIError(f"prompt: has {len(prompts)} prompts, must have 1 to {MAX_PROMPTS}", "prompt")
    first = _completion(completion, prompts[0])
    others = enumerate(prompts[1:], start=1)
    return [
        first,
        *(replace(first, prompt=_prompt(completion, prompt, f"prompt[{place}]")) for place, prompt in others),
    ]


def _completion(completion: CompletionBody, prompt: Any) -> Call:
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
        _prompt(completion, prompt),
        params,
        echo=completion.echo,
        prompt_logprobs=completion.prompt_logprobs is not None,
        constraint_field=field,
        return_token_ids=completion.return_token_ids,
        priority=_priority(completion.priority),
        beams=_beams(completion, params),
        cache_salt=completion.cache_salt,
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


_NOT_SAMPLING = {"cache_salt", "model", "priority", "use_beam_search", "length_penalty"}


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


def _prompts(given: str | list[Any]) -> list[Any]:
    """The prompts of a body: a text and a list of token ids are one, a list of either is many."""
    return given if isinstance(given, list) and given and isinstance(given[0], (str, list)) else [given]


def _prompt(body: CompletionBody, prompt: Any, name: str = "prompt") -> str | dict[str, Any]:
    """A text, or token ids; ``name`` says which one of the body."""
    if prompt in ("", []):
        raise APIError(f"{name}: is empty; it needs at least 1 token", "prompt")
    if isinstance(prompt, str):
        options = {name: getattr(body, name) for name in TEXT_OPTIONS}
        return prompt if options == TEXT_OPTIONS else {"prompt": prompt, **options}
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise APIError(f"{name}: must be a text or a list of token ids", "prompt")
    return {"prompt_token_ids": prompt}


# From an output to a response -----------------------------------------------------------------------------------------


def answer(
    call: Call, output: RequestOutput, *, response_id: str, model: str, tokenizer: Tokenizer
) -> ChatCompletion | TextCompletion:
    """The response body of a finished request. Its answers must have ended with "stop" or "length" (see ``failure``)."""
    if call.kind == "completion":
        return completions_answer([(call, output)], response_id=response_id, model=model, tokenizer=tokenizer)
    return ChatCompletion(
        f"chatcmpl-{response_id}",
        int(time.time()),
        model,
        [_chat_choice(call, given, tokenizer) for given in output.outputs],
        usage([output]),
        prompt_logprobs=prompt_logprobs(call, output),
        prompt_token_ids=reported_ids(call, output.prompt_token_ids),
    )


def completions_answer(
    answered: Sequence[tuple[Call, RequestOutput]], *, response_id: str, model: str, tokenizer: Tokenizer
) -> TextCompletion:
    """The response body for all prompts of one body, each finished as ``answer`` wants it: answer j to prompt i is choice
    i * n + j."""
    choices = []
    for number, (call, output) in enumerate(answered):
        for choice in _text_choices(call, output, tokenizer):
            choice.index += number * call.params.n
            choices.append(choice)
    total = usage([output for _, output in answered])
    return TextCompletion(f"cmpl-{response_id}", int(time.time()), model, choices, total)


def _text_choices(call: Call, output: RequestOutput, tokenizer: Tokenizer) -> list[TextChoice]:
    prompt = prompt_text(output, call.params, tokenizer) if call.echo else ""
    return [
        TextChoice(
            given.index,
            prompt + given.text,
            _text_logprobs(call, output, given, prompt, tokenizer),
            _reason(given.finish_reason),
            prompt_logprobs(call, output),
            reported_ids(call, given.token_ids),
            reported_ids(call, output.prompt_token_ids),
        )
        for given in output.outputs
    ]


def _text_logprobs(
    call: Call, output: RequestOutput, given: CompletionOutput, prompt: str, tokenizer: Tokenizer
) -> TextLogprobs | None:
    """Log-probabilities of an answer, after those of the tokens of ``prompt`` if that is echoed."""
    if given.logprobs is None:
        return None
    scores = text_scores(call, tokenizer)
    if not call.echo:
        return scores.more(given.token_ids, given.logprobs)
    assert output.prompt_logprobs is not None, "parse_completion asks for them"
    echoed = scores.prompt(prompt, output.prompt_token_ids, output.prompt_logprobs)
    return joined(echoed, scores.more(given.token_ids, given.logprobs))


def _chat_choice(call: Call, given: CompletionOutput, tokenizer: Tokenizer) -> ChatChoice:
    reply = given.reply
    return ChatChoice(
        given.index,
        _chat_answer(call, reply),
        None if given.logprobs is None else chat_logprobs(given.token_ids, given.logprobs, call.params, tokenizer),
        _reason(reply.finish_reason(given.finish_reason)),
        reported_ids(call, given.token_ids),
    )


def _chat_answer(call: Call, reply: Reply) -> ChatAnswer:
    """The message that goes on with the conversation, or with its last message."""
    role, echoed = opening(call)
    content: str | None = echoed + reply.content
    if not content and (reply.tool_calls or reply.reasoning):
        content = None
    answer = ChatAnswer(content, role)
    if reply.tool_calls:
        answer.tool_calls = [ToolCall(one.id, FunctionCall(one.name, one.arguments)) for one in reply.tool_calls]
    if reply.reasoning and call.include_reasoning:
        answer.reasoning = answer.reasoning_content = reply.reasoning
    return answer


def opening(call: Call) -> tuple[str, str]:
    """How the answer to a chat begins: its role, and the echo of the message that it continues."""
    assert isinstance(call.prompt, dict), "a chat has messages"
    last = call.prompt["messages"][-1]
    continues = call.prompt.get("continue_final_message") or call.prompt.get("add_generation_prompt") is False
    role = last["role"] if continues else "assistant"
    return role, last["content"] or "" if call.echo and last["role"] == role else ""


def _reason(reason: str | None) -> FinishReason:
    if reason == "stop":
        return "stop"
    return "tool_calls" if reason == "tool_calls" else "length"


def reported_ids(call: Call, token_ids: list[int]) -> list[int] | msgspec.UnsetType:
    """Token ids, where the body asks for them."""
    return token_ids if call.return_token_ids else msgspec.UNSET


def usage(outputs: Sequence[RequestOutput]) -> Usage:
    """The tokens of one response: each prompt counts once, the tokens of all its answers."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(given.token_ids) for output in outputs for given in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def prompt_logprobs(call: Call, output: RequestOutput) -> PromptLogprobs | msgspec.UnsetType:
    """vLLM's field, where the body asks for it."""
    if not call.prompt_logprobs or output.prompt_logprobs is None:
        return msgspec.UNSET
    return prompt_places(output.prompt_logprobs)


def text_scores(call: Call, tokenizer: Tokenizer) -> TextScores:
    """What makes the log-probabilities of an answer to a completion. Control tokens that the prompt spells count as its text."""
    parsed = isinstance(call.prompt, dict) and call.prompt.get("parse_special", False)
    return TextScores(call.params, tokenizer, skip_special=call.params.skip_special_tokens and not parsed)


def prompt_text(output: RequestOutput, params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The text of a prompt; ids are decoded as those of the answer are."""
    if output.prompt is not None:
        return output.prompt
    known = [token for token in output.prompt_token_ids if token < tokenizer.vocab_size]
    return tokenizer.decode(known, skip_special=params.skip_special_tokens)
