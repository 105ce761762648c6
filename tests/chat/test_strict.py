"""Structural tags of strict tools, as what they are compiled to takes and refuses texts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.chat.choice import Tool, strict_tag
from shoal.chat.formats import TOOL_FORMATS
from shoal.constrain.compiler import ConstraintCompiler
from shoal.errors import ConstraintError
from shoal.params import StructuredOutputsParams
from shoal.text.tokenizer import Tokenizer
from tests.chat.templates import write_tokenizer

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOLS = [Tool("strict", "", SCHEMA, True), Tool("free", "", SCHEMA, False), Tool("bare", "", None, True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.gguf")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[ConstraintCompiler]:
    compiler = ConstraintCompiler(tokenizer)
    yield compiler
    compiler.close()


def takes(compiler: ConstraintCompiler, tokenizer: Tokenizer, tag: dict[str, object], text: str) -> bool:
    """Whether a reply may be this text."""
    constraint = compiler.compile(StructuredOutputsParams(structural_tag=tag))
    try:
        for token in tokenizer.encode(text, add_special=False, parse_special=True):
            constraint.advance(token)
    except ConstraintError:
        return False
    return constraint.is_accepting


HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
OLD, NEW = '[TOOL_CALLS][{{"name": "{}", "arguments": {}}}]', "[TOOL_CALLS]{}[ARGS]{}"


@pytest.mark.parametrize(
    ("name", "template", "call"), [("hermes", "", HERMES), ("mistral", "", OLD), ("mistral", "[ARGS]", NEW)]
)
def test_arguments_of_strict_tools_follow_their_schema(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, name: str, template: str, call: str
) -> None:
    tag = strict_tag(TOOL_FORMATS[name], template, TOOLS, most_calls=None)
    assert tag is not None

    def taken(text: str) -> bool:
        return takes(compiler, tokenizer, tag, text)

    good, other = call.format("strict", '{"n": 1}'), call.format("free", '{"x": "y"}')
    for text in (
        "",
        "Just text, {not JSON}.",
        good,
        f"I look.\n{good}",
        other,
        f"{good}\n{other}",
        call.format("bare", "{}"),
    ):
        assert taken(text), text
        found = [one.name for one in _read(name, text)]
        assert len(found) == text.count(call[:11]), text
    wrong = (
        call.format("strict", '{"n": "1"}'),
        call.format("strict", "{}"),
        call.format("unheard_of", '{"n": 1}'),
        call.format("bare", '{"n": 1}'),
        good[:-3],
    )
    for text in wrong:
        assert not taken(text), text


def _read(name: str, text: str) -> list[Tool]:
    from shoal.chat.reply import ReplyFormat

    tools = {tool.name: tool.parameter_schemas for tool in TOOLS}
    reply = ReplyFormat(tool_format=TOOL_FORMATS[name], tools=tools).parse(text)
    return [next(tool for tool in TOOLS if tool.name == call.name) for call in reply.tool_calls]


def test_one_call_at_most(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    tag = strict_tag(TOOL_FORMATS["hermes"], "", TOOLS, most_calls=1)
    assert tag is not None
    good = HERMES.format("strict", '{"n": 1}')
    assert takes(compiler, tokenizer, tag, f"Text. {good}")
    assert takes(compiler, tokenizer, tag, "Text.")
    assert not takes(compiler, tokenizer, tag, good + good)


def test_without_strict_tools_or_marks_there_is_none() -> None:
    assert strict_tag(TOOL_FORMATS["hermes"], "", TOOLS[1:2], most_calls=None) is None
    assert strict_tag(TOOL_FORMATS["llama3_json"], "", TOOLS, most_calls=None) is None
    assert strict_tag(None, "", TOOLS, most_calls=None) is None
