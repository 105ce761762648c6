"""Regular expressions, choices, GBNF, Lark and structural tags: what they allow, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shoal.constrain.compiler import ConstraintCompiler
from shoal.errors import ConstraintError, ParameterError
from shoal.params import StructuredOutputsParams
from shoal.text.tokenizer import Tokenizer
from tests.constrain.walks import accepts, allowed, walk

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a", "b"],
}
GBNF_ARITHMETIC = r"""
# sums of products
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t]*
"""
GBNF_LIST = r"""
root ::= "1. " paragraph "\n" ([0-9] [0-9]? ". " paragraph "\n"){1,3}
paragraph ::= [a-zA-Z'.,; ]+
"""
LARK_SQL = r"""
start: "SELECT " columns " FROM " NAME where?
columns: "*" | NAME ("," " "? NAME)*
where: " WHERE " NAME " " OPERATOR " " (NUMBER | STRING)
OPERATOR: "=" | "<" | ">"
NAME: /[a-z_]{1,10}/
NUMBER: /[0-9]{1,5}/
STRING: /'[^']{0,10}'/
"""
TAG_FUNCTION = {"begin": "<function=add>", "schema": SCHEMA, "end": "</function>"}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<function="],
    "tags": [
        {"begin": "<function=add>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</function>"},
        {"begin": "<function=say>", "content": {"type": "any_text"}, "end": "</function>"},
    ],
}
GOOD, BAD = '<function=add>{"a":1,"b":[]}</function>', '<function=add>{"a":"x"}</function>'


def params(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def tag(form: dict[str, Any]) -> StructuredOutputsParams:
    return params(structural_tag={"type": "structural_tag", "format": form})


def const(value: str) -> dict[str, str]:
    return {"type": "const_string", "value": value}


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        (params(regex=r"\d{3}-[a-c]+"), ["123-a", "000-abc"], ["12-a", "123-", "123-d"]),
        (params(regex="^yes$|^no$"), ["yes", "no"], ["maybe"]),
        (params(regex="[äöü]{2}|😀"), ["äö", "😀"], ["ä", "ab"]),
        (params(choice=["red", "redder", 'q"\\\n', "é"]), ["red", "redder", 'q"\\\n', "é"], ["re", "green"]),
        (params(grammar=GBNF_ARITHMETIC), ["a=1\n", "(a+2)*b1 = 7\n"], ["1=\n", "a=1"]),
        (params(grammar=GBNF_LIST), ["1. Eggs\n2. Milk\n"], ["1. Eggs\n", "2. x\n"]),
        (params(grammar='root ::= "\\u0041" [\\u00e0-\\u00ff\\x30] "\\x42"'), ["AéB", "A0B"], ["AxB"]),
        (params(grammar='root ::= "a" | "b" root'), ["a", "bba"], ["b", "ab"]),
        (
            params(grammar=LARK_SQL),
            ["SELECT * FROM t", "SELECT a, b FROM t WHERE a = 'x'"],
            ["SELECT", "SELECT * FROM T"],
        ),
        (params(grammar='start: "[" %json {"type": "integer"} "]"'), ["[12]"], ["[a]"]),
        (
            params(grammar='start: "%json {" x // %json {"not": 1}\nx: /%json [{]/ %json {"type": "null"}'),
            ["%json {%json {null"],
            ["%json {null"],
        ),
        (
            params(
                grammar='start: a\na: "x" %json {"type": "array", "items": {"type": "null"}, "uniqueItems": false} "y"'
            ),
            ["x[null, null]y", "x[]y"],
            ["x[   null]y", "x[1]y"],
        ),
        (params(json=SCHEMA), ['{"a": 1, "b": [1, 2]}', '{"a":1,"b":[]}'], ['{"a":1}', "[]"]),
        (params(json=json.dumps(SCHEMA)), ['{"a":1,"b":[],"c":null}'], ['{"a":1.5,"b":[]}']),
        (params(json=SCHEMA, disable_additional_properties=True), ['{"a":1,"b":[]}'], ['{"a":1,"b":[],"c":null}']),
        (params(json=SCHEMA, disable_any_whitespace=True), ['{"a":1,"b":[]}'], ['{"a": 1,"b":[]}']),
        (params(json=SCHEMA, whitespace_pattern=" ?"), ['{"a": 1,"b" : []}'], ['{"a":  1,"b":[]}', '{\n"a":1,"b":[]}']),
        (params(json_object=True), ["{}", '{"x": [1, {"y": null}]}'], ["[]", "1"]),
        (
            params(structural_tag={"structures": [TAG_FUNCTION], "triggers": ["<func"]}),
            ["hi", f"x{GOOD}y{GOOD}"],
            [BAD],
        ),
        (tag(TRIGGERED), ["", "hi", GOOD, f"{GOOD}<function=say>well, well</function>"], [BAD, "<function=x>"]),
        (tag({**TRIGGERED, "at_least_one": True}), [f"so: {GOOD} ok"], ["hi"]),
        (tag({**TRIGGERED, "at_least_one": True, "stop_after_first": True}), [f"so: {GOOD}"], [f"{GOOD} ok", "hi"]),
        (tag({**TRIGGERED, "stop_after_first": True}), ["hi", GOOD], [f"{GOOD}{GOOD}"]),
        (
            tag({"type": "tags_with_separator", "separator": ";", "tags": TRIGGERED["tags"]}),
            ["", GOOD, f"{GOOD};{GOOD}"],
            [f"{GOOD}{GOOD}", "hi"],
        ),
        (
            tag(
                {
                    "type": "sequence",
                    "elements": [const("<think>"), {"type": "any_text"}, const("</think>"), const("a")],
                }
            ),
            ["<think>hm</think>a"],
            ["a", "<think>hm</think>"],
        ),
        (
            tag({"type": "or", "elements": [const("x"), {"type": "regex", "pattern": "[0-9]/[0-9]"}]}),
            ["x", "1/2"],
            ["y"],
        ),
    ],
)
def test_what_is_allowed(
    given: StructuredOutputsParams, good: list[str], bad: list[str], compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(given)
    assert [text for text in good if not accepts(constraint, tokenizer, text)] == []
    assert [text for text in bad if accepts(constraint, tokenizer, text)] == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (params(regex="(a"), "unclosed group"),
        (params(regex="a(?=b)"), "look-around"),
        (params(grammar="hello"), "neither Lark (a rule start:) nor GBNF"),
        (params(grammar='root ::= "a" other'), "Rule 'other' not found"),
        (params(grammar='root ::= "\\U99999999"'), "past the last character"),
        (params(grammar="start: b"), "unknown name"),
        (params(grammar='start: <nothing> "a"'), "unknown special token"),
        (params(grammar='start: ""'), "allows no text"),
        (params(grammar='start: %json {"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (params(grammar='start: %json {"x-guidance": {"lenient": true}}'), "x-guidance at #"),
        (params(grammar="start: %json {"), "json"),
        (params(json="{"), "not valid JSON"),
        (params(json="[1]"), "an object, true or false"),
        (params(json="[" * 100_000), "nested"),
        (params(json={"not": {"enum": [{1}]}}), "not JSON serializable"),
        (params(json_object=True, whitespace_pattern="(a"), "unclosed group"),
        (params(structural_tag="{"), "JSON"),
        (params(structural_tag={"x": 1}), "structural_tag.format: got None"),
        (params(structural_tag={"structures": [], "triggers": ["<"]}), "tags: got []"),
        (params(structural_tag={"structures": [{**TAG_FUNCTION, "end": None}], "triggers": ["<"]}), "end: got None"),
        (params(structural_tag={"structures": [TAG_FUNCTION], "triggers": ["["]}), "begun with one of the triggers"),
        (
            params(structural_tag={"structures": [{**TAG_FUNCTION, "schema": {"x-guidance": {}}}], "triggers": ["<"]}),
            "x-guidance at #",
        ),
        (tag({"type": "qwen_xml_parameter"}), "must be one of any_text, const_string"),
        (
            tag({"type": "sequence", "elements": [{"type": "any_text"}, {"type": "regex", "pattern": "a"}]}),
            "const_string",
        ),
    ],
)
def test_what_is_wrong_is_said_on_one_line(
    given: StructuredOutputsParams, said: str, compiler: ConstraintCompiler
) -> None:
    with pytest.raises(ParameterError) as refused:
        compiler.compile(given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.field.startswith("structured_outputs")


def test_runs_of_white_space_are_bounded(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(params(json=SCHEMA))
    (brace, newline, space) = tokenizer.encode_more("{\n ")
    constraint.advance(brace)
    for white in (newline, space):
        loop, count = constraint.copy(), 0
        while white in allowed(loop, tokenizer.vocab_size):
            loop.advance(white)
            count += 1
        assert 1 <= count <= 2
    pretty = json.dumps({"a": 1, "b": [1, 2]}, indent=4)
    assert accepts(compiler.compile(params(json=SCHEMA)), tokenizer, pretty)


def test_an_ambiguous_grammar_ends_at_its_limit(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(params(grammar='start: e\ne: e e | "a" | "b" | e e e'))
    (a,) = tokenizer.encode_more("a")

    def write_for_ever() -> None:
        while a in allowed(constraint, tokenizer.vocab_size):
            constraint.advance(a)

    with pytest.raises(ConstraintError, match="items"):
        write_for_ever()


def test_a_token_that_is_not_allowed_is_an_error(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(params(choice=["a"]))
    with pytest.raises(ConstraintError, match=r"structured_outputs: .*doesn't satisfy the grammar"):
        constraint.advance(tokenizer.encode_more("b")[0])


def test_a_copy_goes_its_own_way(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    one = compiler.compile(params(choice=["ab", "cd"]))
    other = one.copy()
    a, b, c, d = tokenizer.encode_more("abcd")
    one.advance(a)
    assert allowed(other, tokenizer.vocab_size) == sorted((a, c))
    other.advance(c)
    assert (allowed(one, tokenizer.vocab_size), allowed(other, tokenizer.vocab_size)) == ([b], [d])
    one.advance(b)
    assert (one.is_complete, other.is_complete) == (True, False)


def test_gbnf_texts_are_what_the_grammar_says(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(params(grammar='root ::= [0-9]{2,4} ("." [0-9]+)? " " ("km" | "m" | "cm")'))
    for seed in range(20):
        text = walk(constraint.copy(), tokenizer, np.random.default_rng(seed), 40)
        if text is not None:
            number, unit = text.decode().split(" ")
            float(number)
            assert unit in ("km", "m", "cm")
