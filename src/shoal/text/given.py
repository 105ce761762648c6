"""What is given and what is not. Tables fill what a row does not have: Arrow and pandas with null, others with empty values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a message may have besides role and content in OpenAI's API; empty, these mean that it has none.
_EXTRAS = (
    "annotations",
    "audio",
    "function_call",
    "name",
    "reasoning_content",
    "refusal",
    "tool_call_id",
    "tool_calls",
)


def without_nulls(value: Any) -> Any:
    """A copy of JSON data in which no object has a key that is null, at any depth."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def is_given(value: Any) -> bool:
    """Whether anything is said: not by null, nor by texts, lists and objects that are empty or hold only such."""
    if isinstance(value, Mapping):
        return any(map(is_given, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(is_given, value))
    return value is not None and value != ""


def given_message(message: Any) -> Any:
    """A message for a chat template, without what is not given. A ``content`` of null stays: templates ask for it."""
    if not isinstance(message, Mapping):
        return message
    extras = {name for name in _EXTRAS if name in message and not is_given(message[name])}
    return {
        name: without_nulls(item)
        for name, item in message.items()
        if name == "content" or (item is not None and name not in extras)
    }
