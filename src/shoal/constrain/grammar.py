"""A specification -> the text that llguidance compiles, and the limits it compiles and runs under."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

MAX_SECONDS = 1.5  # for compiling
_MAX_REASON = 400  # characters
# Items bound what an ambiguous grammar costs: at a token's mask, and (those of a row) when the engine takes the token in; 120
# optional properties, or a choice of 500 objects, need about as many. Fuel bounds what a regular expression costs. A lexer
# state takes 1 to 2 kB.
LIMITS = LLParserLimits(
    step_max_items=2000,
    max_items_in_row=500,
    step_lexer_fuel=100_000,
    initial_lexer_fuel=300_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


class Spec(NamedTuple):
    """What is to be compiled. ``kind``: json, regex, choice (a JSON list), lark or gbnf; ``options``: llguidance's for JSON."""

    kind: str
    text: str
    options: dict[str, Any]


class GrammarError(ValueError):
    """A specification that cannot be compiled, and why."""


def compiled(spec: Spec, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at its beginning, its first mask computed: what that takes no step has to pay. Raises GrammarError."""
    matcher = LLMatcher(tokenizer, grammar_text(spec), log_level=0, limits=LIMITS)
    first = int.from_bytes(b"" if matcher.is_error() else matcher.compute_bitmask(), "little")
    if matcher.is_error():
        raise GrammarError(reason_of(matcher))
    if not first & ~sum(1 << token for token in set(tokenizer.eos_tokens)):
        raise GrammarError("it allows no text at all")
    return matcher


def reason_of(matcher: LLMatcher) -> str:
    """What is wrong with a matcher, on one line and without the parser's inner state."""
    reason = " ".join(matcher.get_error().partition("\n<")[0].split())
    return reason if len(reason) <= _MAX_REASON else reason[: _MAX_REASON - 3] + "..."


def grammar_text(spec: Spec) -> str:
    """The grammar as llguidance takes it. Raises GrammarError for GBNF that cannot be read."""
    if spec.kind == "json":
        return LLMatcher.grammar_from_json_schema(spec.text, overrides=spec.options)  # type: ignore[arg-type]
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    return LLMatcher.grammar_from_lark(_lark(spec))


def is_lark(text: str) -> bool:
    """Whether a grammar is Lark; otherwise it should be GBNF."""
    return bool(is_lark_syntax(text))


def _lark(spec: Spec) -> str:
    if spec.kind == "choice":  # one terminal: alternatives of a rule would be tried side by side
        choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(spec.text))
        return "start: CHOICE\nCHOICE: " + " | ".join(choices)
    if spec.kind == "lark":
        return spec.text
    try:
        return gbnf_to_lark(_plain_escapes(spec.text))
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except Exception as error:  # the converter raises plain exceptions for what it cannot read
        raise GrammarError(f"neither Lark (a rule start:) nor GBNF (a rule root ::=): {error}") from None


_ESCAPE = re.compile(r"\\(?:(\\)|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


def _plain_escapes(gbnf: str) -> str:
    """GBNF with letters in place of their codes, which the converter hands on in a form that is not understood."""

    def letter(match: re.Match[str]) -> str:
        code = match[2] or match[3] or match[4]
        if code is None:
            return match[0]
        char = chr(int(code, 16))
        return char if char.isalnum() or (len(code) > 2 and not char.isascii()) else match[0]

    try:
        return _ESCAPE.sub(letter, gbnf)
    except (ValueError, OverflowError):
        raise GrammarError("an escape \\U is past the last character") from None
