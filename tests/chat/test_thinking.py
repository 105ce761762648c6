"""The gate opens behind the model's reasoning, in whatever pieces that comes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.chat.formats import REASONING_FORMATS
from shoal.chat.thinking import ThinkingGate
from tests.chat.replies import chunkings


def parted(name: str, opened: bool, pieces: list[str]) -> tuple[str, str, bool]:
    gate = ThinkingGate(REASONING_FORMATS[name], opened)
    pairs = [gate.push(piece) for piece in pieces]
    return "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs) + gate.flush(), gate.open


@pytest.mark.parametrize(
    ("text", "opened", "thought", "is_open"),
    [
        ("<think>a</think>b</think>", False, "<think>a</think>", True),
        (" \n<think>a</think>b", False, " \n<think>a</think>", True),
        ("a</think>b", True, "a</think>", True),
        ("</think>b", True, "</think>", True),
        ("<think>a</thin", False, "<think>a</thin", False),
        ("a<think>b</think>", False, "", True),
        ("<thin", False, "", False),
        ("<thing>", False, "", True),
        ("", False, "", False),
    ],
)
def test_it_parts_the_text_behind_the_end_mark(text: str, opened: bool, thought: str, is_open: bool) -> None:
    for pieces in chunkings(text):
        assert parted("think", opened, pieces) == (thought, text.removeprefix(thought), is_open)


@given(st.text("<think>/ a", max_size=40), st.booleans(), st.lists(st.integers(0, 40), max_size=4))
def test_nothing_is_lost(text: str, opened: bool, places: list[int]) -> None:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    found = parted("think", opened, pieces)
    assert found == parted("think", opened, [text])
    assert found[0] + found[1] == text


def test_the_channels_of_gpt_oss() -> None:
    thought = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>"
    for pieces in chunkings(thought + "y"):
        assert parted("harmony", False, pieces) == (thought, "y", True)
