"""The fields of a request body: which are used, which change nothing, and what shoal lacks for the others.

None is dropped silently. null and an empty text mean "not given", and 4.0 is 4: tables know no better.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import msgspec

from shoal.openai.schema import APIError, ChatBody, CompletionBody, EmbeddingBody
from shoal.openai.structured import FIELDS as CONSTRAINT_FIELDS
from shoal.text.given import is_given, without_nulls

# Fields of OpenAI's and vLLM's that say nothing about the answer itself.
IGNORED = frozenset(
    (
        "cache_prompt",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)

# What shoal lacks: fields of OpenAI's and vLLM's that ask for it, each with the values that ask for nothing.
LACKS: dict[str, dict[str, tuple[object, ...]]] = {
    "only chats have it, in /v1/chat/completions": {
        "add_generation_prompt": (True,),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "include_reasoning": (True,),
        "parallel_tool_calls": (True, False),
        "reasoning_effort": (),
        "thinking_token_budget": (),
        "tool_choice": ({}, "none", "auto"),
        "tools": ([],),
    },
    "functions are called as tools": {
        "function_call": ({}, "none", "auto"),
        "functions": ([],),
    },
    "answers are not ranked": {
        "best_of": (1,),
    },
    "requests cannot bring code": {"logits_processors": ([],)},
    "give structured_outputs.choice": {"guided_choice": ([],)},
    "give structured_outputs.grammar": {"guided_grammar": ()},
    "give structured_outputs.json": {"guided_json": ()},
    "give structured_outputs.json_object": {"guided_json_object": (False,)},
    "give structured_outputs.regex": {"guided_regex": ()},
    "give structured_outputs.structural_tag": {"structural_tag": ()},
    "give structured_outputs.whitespace_pattern": {"guided_whitespace_pattern": ()},
    "there is one backend for structured_outputs": {"guided_decoding_backend": ()},
    "answers are given whole, not as a stream": {
        "stream": (False,),
        "stream_options": ({}, {"include_usage": False}),
    },
    "models read and write text alone": {
        "audio": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": ([], ["text"]),
    },
    "requests bring no chat template of their own": {"chat_template": ()},
    "a chat template is given documents in chat_template_kwargs": {"documents": ([],)},
    "answers are as long as max_tokens lets them be": {"verbosity": ("medium",)},
    "models answer from what they know and are told": {"web_search_options": ({},)},
    "nothing is moderated": {"moderation": ({},)},
    "requests are known by their custom_id": {"request_id": ()},
    "the answer's text and logprobs are all that is reported": {
        "return_tokens_as_token_ids": (False,),
        "spaces_between_special_tokens": (True,),
    },
    "a prompt is taken whole or refused": {"truncate_prompt_tokens": ()},
    "prompts are text or token ids": {"prompt_embeds": ([],)},
    "text is only gone on with, not filled in": {"suffix": ()},
    "control tokens spelled in messages are always text": {"parse_special": (False,)},
    "it belongs to vLLM's own machinery": {"kv_transfer_params": ({},), "vllm_xargs": ({},)},
}
_LACKING = {field: (lack, off) for lack, fields in LACKS.items() for field, off in fields.items()}

_AnyBody: TypeAlias = type[ChatBody] | type[CompletionBody] | type[EmbeddingBody]
_AS_WRITTEN = ("chat_template_kwargs", "messages", "tools")  # what the chat template gets, to the letter
_MOST_HINTED = 40  # characters of a name that may be a typing error
_HOMES: dict[_AnyBody, str] = {
    ChatBody: "/v1/chat/completions",
    CompletionBody: "/v1/completions",
    EmbeddingBody: "/v1/embeddings",
}
_FIELDS = {body: tuple(body.__struct_fields__) for body in _HOMES}

_Body = TypeVar("_Body", ChatBody, CompletionBody, EmbeddingBody)


def typed(body: Any, kind: type[_Body]) -> _Body:
    """A body decoded from JSON as a struct, after everything that shoal does not use has been looked at.

    Raises APIError that names the field at fault.
    """
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    given = {name: value for name, value in given_fields(body).items() if name not in IGNORED}
    _refuse_unsendable(given)
    if {"repeat_penalty", "repetition_penalty"} <= given.keys():
        reason = "is llama.cpp's name of repetition_penalty; give one of them"
        raise APIError(f"repeat_penalty: {reason}", "repeat_penalty")
    try:
        used = dict(_used(given, kind))
    except RecursionError:
        raise APIError("the body is nested too deeply") from None
    try:
        return msgspec.convert(used, kind)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None


def given_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a body that are given. (A prompt or input that is empty is: it is refused as that.)"""
    return {
        name: value
        for name, value in body.items()
        if value is not None and (value != "" or name in ("prompt", "input"))
    }


@lru_cache(maxsize=64)  # one typing error may be in a million rows
def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """The end of a message about a name that is not known."""
    near = get_close_matches(name, known, n=1, cutoff=0.75) if len(name) <= _MOST_HINTED else []
    return f"; did you mean {near[0]}?" if near else ""


def _used(given: dict[str, Any], kind: _AnyBody) -> Iterator[tuple[str, Any]]:
    """The fields that ``kind`` has; the others must be ones that ask for nothing."""
    for name, value in given.items():
        if name in _FIELDS[kind]:
            kept = value if name in CONSTRAINT_FIELDS else without_nulls(value)  # in a schema null may be a value
            yield name, kept if name in _AS_WRITTEN else _whole(kept)
        else:
            _refuse_unless_off(name, value, kind)


def _refuse_unless_off(name: str, value: Any, kind: _AnyBody) -> None:
    if name in _LACKING:
        lack, off = _LACKING[name]
        if isinstance(value, dict):  # of a struct, a table has all fields
            value = {key: item for key, item in value.items() if is_given(item)}
        if not any(_same(value, nothing) for nothing in off):
            raise APIError(f"{name}: not supported: {lack}", name)
        return
    home = next((home for body, home in _HOMES.items() if name in _FIELDS[body]), None)
    if home is not None:
        raise APIError(f"{name}: is a field of {home}, not of {_HOMES[kind]}", name)
    hint = did_you_mean(name, (*_FIELDS[kind], *_LACKING, *IGNORED))
    raise APIError(f"{name}: no such field{hint}", name)


def _same(value: object, off: object) -> bool:
    return value == off and isinstance(value, bool) == isinstance(off, bool)


def _whole(value: Any) -> Any:
    """Whole numbers as integers, which stand for floats too where those are due; JSON has one kind of number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return value


def _refuse_unsendable(given: dict[str, Any]) -> None:
    """Refuse numbers that are not finite and text that is not UTF-8, wherever they stand in a field."""
    for name, field in given.items():
        waiting = [name, field]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting.extend(value)
                waiting.extend(value.values())
            elif isinstance(value, list):
                waiting.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise APIError(f"{name}: {value} is not a finite number", name)
            elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                raise APIError(f"{name}: holds a lone surrogate, which no text has", name)


_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPE_ERROR = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def _type_error(message: str) -> APIError:
    """msgspec's words ("Expected `int`, got `str` - at `$.seed`") as an error that names the field."""
    match = _TYPE_ERROR.fullmatch(message)
    assert match is not None, "every text matches"
    missing = _MISSING.fullmatch(match["what"])
    if missing:
        return APIError(f"{missing[1]}: this field is required", missing[1])
    what = match["what"].replace("`", "").replace(" | null", "")
    return APIError(f"{match['path']}: {what}", match["path"])
