"""Schemas of the OpenAPI document that are not those of structs: bodies and answers that are read and made as plain tables."""

from __future__ import annotations

from typing import Any

from shoal.anthropic.messages import MESSAGES
from shoal.openai.dialect import Dialect
from shoal.openai.fields import IGNORED
from shoal.openai.responses import RESPONSES

Schema = dict[str, Any]
REF = "#/components/schemas/"

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_FLAG: Schema = {"type": "boolean"}
_TABLE: Schema = {"type": "object"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_TABLES: Schema = {"type": "array", "items": _TABLE}


def of(name: str) -> Schema:
    """A schema of this document by its name."""
    return {"$ref": REF + name}


def either(*schemas: Schema) -> Schema:
    """One of them."""
    return {"anyOf": list(schemas)}


def table(about: str, required: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with these properties, and perhaps others."""
    return {"description": about, "type": "object", "required": list(required), "properties": properties}


def _word(*words: str) -> Schema:
    return {"type": "string", "enum": list(words)}


_OWN_OF_RESPONSES: dict[str, Schema] = {
    "include": _TEXTS,
    "input": either(_TEXT, _TABLES),
    "instructions": _TEXT,
    "max_output_tokens": _WHOLE,
    "model": _TEXT,
    "reasoning": table("How much to think.", effort=_TEXT, summary=_TEXT),
    "stream": _FLAG,
    "text": table("The form of the answer.", format=_TABLE, verbosity=_TEXT),
    "tool_choice": either(_TEXT, _TABLE),
    "tools": _TABLES,
    "top_logprobs": _WHOLE,
    "truncation": _word("disabled"),
}
_OWN_OF_MESSAGES: dict[str, Schema] = {
    "max_tokens": _WHOLE,
    "messages": {"type": "array", "items": of("MessageParam")},
    "model": _TEXT,
    "output_config": table("The form of the answer, and how much to think.", effort=_TEXT, format=_TABLE),
    "stop_sequences": _TEXTS,
    "stream": _FLAG,
    "system": either(_TEXT, _TABLES),
    "thinking": table(
        "Whether to think.", ("type",), type=_word("enabled", "disabled", "adaptive"), budget_tokens=_WHOLE
    ),
    "tool_choice": table("Which tool.", ("type",), type=_word("auto", "any", "tool", "none"), name=_TEXT),
    "tools": _TABLES,
}

# The parts of requests that are looked at one by one, and what answers are made of.
PARTS: dict[str, Schema] = {
    "ChatMessage": table(
        "A message of a conversation. Its content is text, or parts of the type text.",
        ("role",),
        role=_word("system", "developer", "user", "assistant", "tool"),
        content=either(_TEXT, _TABLES, {"type": "null"}),
        name=_TEXT,
        tool_calls=_TABLES,
        tool_call_id=_TEXT,
        reasoning=_TEXT,
    ),
    "Tool": table(
        "A function that the model may call; its parameters are a JSON schema.",
        ("type", "function"),
        type=_word("function"),
        function=table(
            "The function.", ("name",), name=_TEXT, description=_TEXT, parameters=_TABLE, strict={"type": "boolean"}
        ),
    ),
    "StreamOptions": table(
        "What a stream has besides.", include_usage=_FLAG, continuous_usage_stats=_FLAG, include_obfuscation=_FLAG
    ),
    "MessageParam": table(
        "A message of a conversation. Its content is text, or blocks of text, calls, results and thoughts.",
        ("role", "content"),
        role=_word("user", "assistant", "system"),
        content=either(_TEXT, _TABLES),
    ),
    "Response": table(
        "An answer in the form of OpenAI's Responses. It is not stored.",
        ("id", "object", "created_at", "status", "model", "output"),
        id=_TEXT,
        object=_word("response"),
        created_at=_WHOLE,
        status=_word("in_progress", "completed", "incomplete", "failed"),
        model=_TEXT,
        output=_TABLES,
        usage=either(_TABLE, {"type": "null"}),
        store={"const": False},
    ),
    "ResponseEvent": table(
        "An event of a stream, named as its type, from response.created to response.completed, .incomplete or .failed.",
        ("type", "sequence_number"),
        type=_TEXT,
        sequence_number=_WHOLE,
    ),
    "Message": table(
        "An answer in the form of Anthropic's Messages.",
        ("id", "type", "role", "model", "content", "stop_reason", "usage"),
        id=_TEXT,
        type=_word("message"),
        role=_word("assistant"),
        model=_TEXT,
        content=_TABLES,
        stop_reason=_word("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        stop_sequence=either(_TEXT, {"type": "null"}),
        usage=table("Tokens.", ("input_tokens", "output_tokens"), input_tokens=_WHOLE, output_tokens=_WHOLE),
    ),
    "MessageEvent": table(
        "An event of a stream, named as its type, from message_start to message_stop.", ("type",), type=_TEXT
    ),
    "AnthropicError": table(
        "Why there is no answer, in Anthropic's shape.",
        ("type", "error"),
        type=_word("error"),
        error=table("What was wrong.", ("type", "message"), type=_TEXT, message=_TEXT),
    ),
    "Upload": table("A file of requests.", ("file", "purpose"), file=_TEXT, purpose=_word("batch"))
    | {"additionalProperties": False},
    "Deleted": table("What is no more.", ("id", "deleted"), id=_TEXT, object=_word("file"), deleted={"const": True}),
    "BatchBody": table(
        "What to run: a file that was uploaded.",
        ("input_file_id", "endpoint", "completion_window"),
        input_file_id=_TEXT,
        endpoint=_word("/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
        completion_window=_word("24h"),
        metadata=either({"type": "object", "additionalProperties": _TEXT}, {"type": "null"}),
    )
    | {"additionalProperties": False},
    "TokenCount": table("Tokens of a prompt.", ("input_tokens",), input_tokens=_WHOLE),
}


def completed(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """The schemas of the structs, and with them those of this file. Fields that are read apart from the structs are added to bodies."""
    streamed = {"stream": _FLAG, "stream_options": of("StreamOptions")}
    ignored = {name: {"description": "Taken and not used."} for name in sorted(IGNORED)}
    for name, more in (("ChatBody", streamed), ("CompletionBody", streamed), ("EmbeddingBody", {})):
        schemas[name]["properties"] |= more | ignored
        schemas[name]["required"] = ["model", *schemas[name].get("required", [])]
    chat = schemas["ChatBody"]["properties"]
    chat["messages"] = {"type": "array", "items": of("ChatMessage")}
    chat["tools"] = either({"type": "array", "items": of("Tool")}, {"type": "null"})
    required = ("model", "input")
    bodies = {
        "ResponseBody": _of_dialect(RESPONSES, _OWN_OF_RESPONSES, required, chat),
        "MessageBody": _of_dialect(MESSAGES, _OWN_OF_MESSAGES, ("model", "max_tokens", "messages"), chat),
        "CountBody": _of_dialect(MESSAGES, _OWN_OF_MESSAGES, ("model", "messages"), chat),
    }
    return schemas | PARTS | bodies


def _of_dialect(dialect: Dialect, own: dict[str, Schema], required: tuple[str, ...], chat: dict[str, Schema]) -> Schema:
    """A body of a dialect: its own fields, and those that mean the same as in a chat."""
    assert own.keys() == dialect.own, "each field has a schema"
    passed = {name: chat[name] for name in sorted(dialect.passed)}
    ignored = {name: {"description": "Taken and not used."} for name in sorted(dialect.ignored)}
    return table(f"A body of {dialect.endpoint}.", required, **own, **passed, **ignored) | {
        "additionalProperties": False
    }
