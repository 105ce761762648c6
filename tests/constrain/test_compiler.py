"""What is kept, what compiling may take, several threads, and vocabularies of every kind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.constrain import compiler as module
from shoal.constrain.compiler import ConstraintCompiler
from shoal.errors import ParameterError
from shoal.params import StructuredOutputsParams
from shoal.text.tokenizer import Tokenizer
from tests.constrain.walks import accepts, allowed, validate, walk
from tests.text import tiny

CHOICE = StructuredOutputsParams(choice=["hello", "hell"])


def chain_of_references(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "integer"}}}


# --- limits


@pytest.mark.parametrize(
    "given",
    [
        StructuredOutputsParams(json=chain_of_references(20_000)),
        StructuredOutputsParams(
            grammar="start: A0\n" + "".join(f'A{i}: A{i + 1} "x"\n' for i in range(5000)) + 'A5000: "z"'
        ),
        StructuredOutputsParams(grammar="start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(1, 60))),
    ],
    ids=["overflows the stack", "overflows it too", "takes for ever"],
)
def test_what_cannot_be_compiled_harms_nothing_else(
    given: StructuredOutputsParams, compiler: ConstraintCompiler
) -> None:
    with pytest.raises(ParameterError, match=r"process died|did not end within 1.5 s"):
        compiler.compile(given)
    assert compiler.compile(CHOICE)


def test_a_chain_that_people_write_is_no_chain_too_long(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    assert accepts(compiler.compile(StructuredOutputsParams(json=chain_of_references(100))), tokenizer, "17")


def test_long_specifications_are_refused_unread(compiler: ConstraintCompiler) -> None:
    long = "x" * (module.MAX_LENGTH + 1)
    for given in (
        StructuredOutputsParams(regex=long),
        StructuredOutputsParams(choice=[long]),
        StructuredOutputsParams(json={"const": long}),
    ):
        with pytest.raises(ParameterError, match=f"must be at most {module.MAX_LENGTH} characters"):
            compiler.compile(given)


# --- what is kept


class Counting(ConstraintCompiler):
    """Counts what it compiles."""

    tried = 0

    def _try(self, *args: Any) -> Any:
        self.tried += 1
        return super()._try(*args)


@pytest.fixture
def counting(tokenizer: Tokenizer) -> Any:
    counting = Counting(tokenizer)
    yield counting
    counting.close()


def test_equal_ones_are_compiled_once_and_errors_too(counting: Counting) -> None:
    for _ in range(3):
        assert counting.compile(StructuredOutputsParams(choice=["hello", "hell"])) is not counting.compile(CHOICE)
        with pytest.raises(ParameterError, match="unclosed"):
            counting.compile(StructuredOutputsParams(regex="(a"))
    assert counting.tried == 2


def test_options_and_the_order_of_properties_tell_them_apart(counting: Counting) -> None:
    a, b = {"type": "integer"}, {"type": "null"}
    for properties in ({"a": a, "b": b}, {"b": b, "a": a}):
        for compact in (False, True):
            schema = {"type": "object", "properties": properties}
            counting.compile(StructuredOutputsParams(json=schema, disable_any_whitespace=compact))
    assert counting.tried == 4


def test_what_is_kept_is_bounded(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    for text in "abcdabcd":
        counting.compile(StructuredOutputsParams(choice=[text]))
    assert len(counting._kept) == 3
    assert counting.tried == 8
    monkeypatch.setattr(module, "_KEPT_LENGTH", 20)
    counting.compile(StructuredOutputsParams(choice=["x" * 10]))
    assert [key.text for key in counting._kept] == ['["d"]', '["xxxxxxxxxx"]']


def test_what_took_too_long_is_tried_again_later(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StructuredOutputsParams(grammar="start: A\nA: " + " & ".join(f"/.*a.{{{i}}}/" for i in range(1, 60)))
    for _ in range(2):
        with pytest.raises(ParameterError, match="did not end"):
            counting.compile(slow)
    assert counting.tried == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    with pytest.raises(ParameterError, match="did not end"):
        counting.compile(slow)
    assert counting.tried == 2


def test_a_model_that_is_never_constrained_pays_nothing(tokenizer: Tokenizer) -> None:
    compiler = ConstraintCompiler(tokenizer)
    assert compiler._child is None
    compiler.close()


def test_close_ends_the_process_and_the_next_use_starts_one(tokenizer: Tokenizer) -> None:
    compiler = ConstraintCompiler(tokenizer)
    compiler.compile(CHOICE)
    assert compiler._child is not None
    process = compiler._child._process
    assert process is not None
    compiler.close()
    assert process.poll() is not None
    compiler.compile(StructuredOutputsParams(choice=["other"]))
    compiler.close()


def test_threads_may_compile_at_once(tokenizer: Tokenizer) -> None:
    compiler, errors = ConstraintCompiler(tokenizer), []

    def work(number: int) -> None:
        try:
            for item in range(5):
                text = f"{item % 3 + number % 2}"
                assert accepts(compiler.compile(StructuredOutputsParams(choice=[text])), tokenizer, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compiler.close()
    assert errors == []


# --- vocabularies

SCHEMA = {"type": "object", "properties": {"hello": {"type": "integer"}}, "required": ["hello"]}
KINDS: list[Callable[..., Path]] = [tiny.byte_level, tiny.sentencepiece, tiny.characters]


@pytest.mark.parametrize("make", KINDS)
def test_vocabularies_that_have_every_byte(make: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(make(tmp_path / "model.gguf"))
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(json=SCHEMA))
    compiler.close()
    assert accepts(constraint, tokenizer, '{"hello": 12}')
    text = walk(constraint, tokenizer, np.random.default_rng(1), 500)
    assert text is not None
    validate(text, SCHEMA)


@pytest.mark.parametrize("make", KINDS)
def test_forced_text_comes_as_the_model_is_used_to_see_it(make: Callable[..., Path], tmp_path: Path) -> None:
    """``hello`` is one token, not five; and no space is put in front of it."""
    tokenizer = Tokenizer.from_gguf(make(tmp_path / "model.gguf"))
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(choice=["hello"]))
    compiler.close()
    (token,) = tokenizer.encode_more("hello")
    assert tokenizer.token_bytes(token) == b"hello"
    assert allowed(constraint, tokenizer.vocab_size) == [token]
    constraint.advance(token)
    assert constraint.is_complete
    assert allowed(constraint, tokenizer.vocab_size) == sorted(tokenizer.eog_ids)


@pytest.mark.parametrize("make", [tiny.wordpiece, tiny.unigram])
def test_vocabularies_that_lack_bytes_write_what_they_can(make: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(make(tmp_path / "model.gguf"))
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(regex="[a-z ]{1,10}"))
    compiler.close()
    tokens = allowed(constraint, tokenizer.vocab_size)
    assert tokens
    assert all(set(tokenizer.token_bytes(token)) <= set(b"abcdefghijklmnopqrstuvwxyz ") for token in tokens)


def test_tokens_that_are_no_text_and_rows_without_a_token_are_never_allowed(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path / "model.gguf")
    tokenizer = Tokenizer.from_gguf(path)
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(regex="(.|\n)*"))
    compiler.close()
    tokens = set(allowed(constraint, tokenizer.vocab_size + 500))
    assert tokens.isdisjoint(tokenizer.control_ids - tokenizer.eog_ids)
    assert tokens >= tokenizer.eog_ids
    assert max(tokens) < tokenizer.vocab_size
    few = np.zeros(2, np.uint32)  # a model with fewer rows than tokens
    constraint.fill_mask(few)
    assert {token for token in tokens if token < 64} == set(
        np.flatnonzero(np.unpackbits(few.astype("<u4").view(np.uint8), bitorder="little")).tolist()
    )


def test_a_model_without_an_end_token_completes_all_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "model.gguf"))
    tokenizer.eog_ids = frozenset()
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(regex="x"))
    compiler.close()
    (token,) = allowed(constraint, tokenizer.vocab_size + 64)
    constraint.advance(token)
    assert constraint.is_complete
    assert allowed(constraint, tokenizer.vocab_size + 64) == []


def test_structural_tags_use_the_control_tokens_that_they_spell(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny.byte_level(tmp_path / "model.gguf"))
    (control,) = tokenizer.encode("<|x|>", add_special=False, parse_special=True)
    tag = {
        "type": "triggered_tags",
        "triggers": ["<|x|>"],
        "tags": [
            {"begin": "<|x|>f", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "<|x|>"},
            {"begin": "<|x|>g", "content": {"type": "any_text"}, "end": "<|x|>"},
        ],
    }
    compiler = ConstraintCompiler(tokenizer)
    constraint = compiler.compile(StructuredOutputsParams(structural_tag={"format": tag}))
    compiler.close()
    for middle in ('f{"hello":1}', "g well <|x|>"):
        inside = constraint.copy()
        assert accepts(inside, tokenizer, "some <|x|> text")  # spelled, not the token
        inside.advance(control)
        for token in tokenizer.encode_more(middle):
            assert token in allowed(inside, tokenizer.vocab_size)
            inside.advance(token)
        assert not inside.is_accepting
        inside.advance(control)
        assert inside.is_accepting


def test_schemas_as_text_and_as_objects_are_one(counting: Counting) -> None:
    counting.compile(StructuredOutputsParams(json=SCHEMA))
    counting.compile(StructuredOutputsParams(json=json.dumps(SCHEMA, indent=2)))
    assert counting.tried == 1
