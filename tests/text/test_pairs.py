"""Two texts that are compared: what stands between them and behind the second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.text.tokenizer import Tokenizer
from tests.text import tiny


def pair(path: Path) -> tuple[list[int], list[int], list[int]]:
    """The ids of both texts together, and of each alone without special tokens."""
    tokenizer = Tokenizer.from_gguf(path)
    return (
        tokenizer.encode_pair("a ab", "abc"),
        tokenizer.encode("a ab", add_special=False),
        tokenizer.encode("abc", add_special=False),
    )


def test_wordpiece_has_a_separator_behind_each(tmp_path: Path) -> None:
    both, first, second = pair(tiny.wordpiece(tmp_path / "v.gguf"))
    assert both == [2, *first, 3, *second, 3]


@pytest.mark.parametrize(
    ("changes", "between"),
    [
        ({}, [1]),
        ({"add_sep_token": True, "seperator_token_id": 1}, [1, 1]),  # as XLM-R has it
        ({"add_sep_token": False, "seperator_token_id": 1}, [1]),
        ({"add_sep_token": True}, [1]),  # asked for, and the file has none
        ({"add_eos_token": False, "add_sep_token": True, "seperator_token_id": 3}, [3]),
    ],
)
def test_others_have_what_the_file_asks_for(tmp_path: Path, changes: dict[str, Any], between: list[int]) -> None:
    both, first, second = pair(tiny.unigram(tmp_path / "v.gguf", **changes))
    assert both == [*first, *between, *second, *([1] if changes.get("add_eos_token", True) else [])]


def test_a_separator_that_is_no_token_is_none(tmp_path: Path) -> None:
    both, first, second = pair(tiny.unigram(tmp_path / "v.gguf", add_sep_token=True, seperator_token_id=999))
    assert both == [*first, 1, *second, 1]
