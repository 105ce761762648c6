from __future__ import annotations

from typing import Any

import pytest

from shoal.text.given import given_message, is_given, without_nulls

CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}


def test_nulls_of_objects_go_at_every_depth_and_those_of_lists_stay() -> None:
    value: dict[str, Any] = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 0}, None]}, "g": [], "h": ""}
    assert without_nulls(value) == {"b": {"d": [{"f": 0}, None]}, "g": [], "h": ""}


@pytest.mark.parametrize("value", [None, "", [], {}, (), [None, ""], {"a": {"b": [None]}}], ids=str)
def test_nothing_is_said(value: Any) -> None:
    assert not is_given(value)


@pytest.mark.parametrize("value", [0, False, " ", [0], {"a": {"b": [False]}}], ids=str)
def test_something_is_said(value: Any) -> None:
    assert is_given(value)


def test_a_message_keeps_its_content_and_what_is_given() -> None:
    empty: dict[str, Any] = {
        "tool_calls": [],
        "annotations": None,
        "name": "",
        "audio": {"id": None},
        "function_call": {},
        "refusal": None,
    }
    assert given_message({"role": "user", "content": "x", **empty}) == {"role": "user", "content": "x"}
    called = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "custom": None}]}
    assert given_message(called) == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert given_message({"role": "user", "content": "", "mine": ""}) == {"role": "user", "content": "", "mine": ""}
    assert given_message("text") == "text"
