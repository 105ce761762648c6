"""Kinds of tokenizers beside the two common ones, against ids that llama.cpp gave for the same small vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import GGUFError
from shoal.text.charsmap import CharsMap
from shoal.text.tokenizer import Tokenizer
from tests.text import tiny
from tests.text.charsmaps import NFKC, normaliser

RECORDED = json.loads(Path(__file__).with_name("llama_cpp_ids.json").read_text("ascii"))
BUILDERS: dict[str, Callable[..., Path]] = {
    "characters": tiny.characters,
    "characters-sarvam": partial(tiny.characters, model="gpt2", pre="sarvam-moe", add_bos_token=False),
    "wordpiece": tiny.wordpiece,
    "wordpiece-cased": lambda path: tiny.wordpiece(path, **{"normalizer.lowercase": False}),
    "unigram": tiny.unigram,
    "unigram-nfkc": partial(tiny.unigram, charsmap=NFKC),
    "unigram-prefix": partial(tiny.unigram, add_space_prefix=True),
    "unigram-merge": partial(tiny.unigram, add_space_prefix=True, remove_extra_whitespaces=True),
    "greedy": tiny.greedy,
}
CHARSMAP, NORMALISER = CharsMap(NFKC), normaliser()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    path = tmp_path_factory.mktemp("kind") / "v.gguf"
    return request.param, Tokenizer.from_gguf(BUILDERS[request.param](path))


def test_ids_are_those_of_llama_cpp(kind: tuple[str, Tokenizer]) -> None:
    name, tokenizer = kind
    records = RECORDED[name]
    assert [tokenizer.encode(text, False, False) for text, _, _, _ in records] == [ids for _, ids, _, _ in records]
    assert [tokenizer.encode(text, True, True) for text, _, _, _ in records] == [ids for _, _, ids, _ in records]


def test_text_is_that_of_llama_cpp(kind: tuple[str, Tokenizer]) -> None:
    name, tokenizer = kind
    for _, ids, _, pieces in RECORDED[name]:
        assert b"".join(map(tokenizer.token_bytes, ids)).hex() == pieces


@given(TEXT)
def test_every_kind_takes_any_text(kind: tuple[str, Tokenizer], text: str) -> None:
    _, tokenizer = kind
    ids = tokenizer.encode(text)
    assert len(ids) >= tokenizer.min_tokens_for(len(text.encode()))
    assert isinstance(tokenizer.decode(ids), str)


def test_unknown_words_may_be_of_any_length(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny.wordpiece(tmp_path / "v.gguf"))
    assert len(tokenizer.encode("q" * 10_000)) == 3
    assert tokenizer.min_tokens_for(10_000) == 0


@given(TEXT | st.text("\u00e9e\u0301\ufb01\u2460\u3000 \uac00\u1100\u1161\u33a1", max_size=20))
def test_the_charsmap_does_what_sentencepiece_does(text: str) -> None:
    assert CHARSMAP.apply(text) == NORMALISER.Normalize(text)


@pytest.mark.parametrize(
    "data",
    [
        b"\1",
        b"\0\0\0\0",
        b"\xff\xff\xff\x7fabcd",
        b"\4\0\0\0\0\0\0\0",
        NFKC.rstrip(b"\0"),
        b"\x08\0\0\0" + b"\0\0\0\0" + b"\x01\x04\0\0" + b"x\0",  # a node that is its own child
    ],
)
def test_a_broken_charsmap_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_gguf(tiny.unigram(tmp_path / "v.gguf", charsmap=data))
    assert caught.value.field == "tokenizer.ggml.precompiled_charsmap"


@pytest.mark.parametrize(
    ("build", "changes", "field"),
    [
        (tiny.wordpiece, {"seperator_token_id": 999}, "tokenizer.ggml.seperator_token_id"),
        (tiny.wordpiece, {"unknown_token_id": None}, "tokenizer.ggml.unknown_token_id"),
        (
            tiny.unigram,
            {"unknown_token_id": 999, "tokens": ["a"], "scores": [0.0], "token_type": [1]},
            "tokenizer.ggml.unknown_token_id",
        ),
        (tiny.unigram, {"scores": [float("nan")] * 20}, "tokenizer.ggml.scores"),
        (tiny.characters, {"merges": None}, "tokenizer.ggml.merges"),
    ],
)
def test_what_a_kind_needs_is_named(
    tmp_path: Path, build: Callable[..., Path], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(GGUFError) as caught:
        Tokenizer.from_gguf(build(tmp_path / "v.gguf", **changes))
    assert caught.value.field == field
