"""Structural tags, in both of the forms that vLLM takes, as a Lark grammar of llguidance.

    {"structures": [{"begin": ..., "schema": {...}, "end": ...}], "triggers": [...]}
    {"format": {"type": "triggered_tags", "triggers": [...], "tags": [{"begin": ..., "content": {...}, "end": ...}]}}

Text is free until a trigger appears; then one of the tags that begin with it has to follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from shoal.constrain.lark import schema_expression
from shoal.errors import ParameterError
from shoal.text.tokenizer import Tokenizer

FIELD = "structured_outputs.structural_tag"
_MAX_DEPTH = 20  # of formats within formats
_TEXT = r"/(.|\n)*/"


def structural_tag_grammar(
    tag: Mapping[str, Any], tokenizer: Tokenizer, options: Mapping[str, Any], closed: bool
) -> str:
    """The grammar of a structural tag. ``options`` go to every schema; ``closed``: see ``prepare_schema``.

    Control tokens that texts spell stand for the tokens. Raises ParameterError, naming the part at fault.
    """
    writer = _Writer(tokenizer, options, closed)
    if "structures" in tag:
        start = writer.triggered(_from_structures(tag))
    else:
        start = writer.format(_part(tag, "format", dict), "format", 0)
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.rules])


def _from_structures(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The older form as a format of the newer one."""
    tags = []
    for index, structure in enumerate(_part(tag, "structures", list)):
        place = f"structures[{index}]"
        if not isinstance(structure, Mapping):
            raise _wrong(place, structure, "an object")
        content = {"type": "json_schema", "json_schema": _part(structure, "schema", (dict, bool), place)}
        tags.append({"begin": structure.get("begin"), "content": content, "end": structure.get("end")})
    return {"tags": tags, "triggers": tag.get("triggers")}


class _Writer:
    """Turns formats into expressions, and collects the rules that these refer to."""

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any], closed: bool) -> None:
        self.rules: list[str] = [f"ANY_TEXT: {_TEXT}"]
        self._tokenizer = tokenizer
        self._options = options
        self._closed = closed
        self._kinds: dict[str, Callable[[Mapping[str, Any], str, int], str]] = {
            "any_text": lambda form, place, depth: "ANY_TEXT",
            "const_string": lambda form, place, depth: self._literal(_part(form, "value", str, place)),
            "json_schema": lambda form, place, depth: schema_expression(
                _part(form, "json_schema", (dict, bool), place), self._options, self._closed
            ),
            "regex": lambda form, place, depth: f"/{regex_to_lark(_part(form, 'pattern', str, place))}/",
            "or": self._or,
            "sequence": self._sequence,
            "tag": lambda form, place, depth: self._tag(form, place, depth, ""),
            "triggered_tags": lambda form, place, depth: self.triggered(form, place, depth),
            "tags_with_separator": self._separated,
        }

    def format(self, form: Any, place: str, depth: int) -> str:
        """The expression of one format."""
        kind = form.get("type") if isinstance(form, Mapping) else None
        if kind not in self._kinds or depth > _MAX_DEPTH:
            raise _wrong(f"{place}.type", kind, f"one of {', '.join(self._kinds)}, nested at most {_MAX_DEPTH} deep")
        return self._kinds[kind](form, place, depth)

    def triggered(self, form: Mapping[str, Any], place: str = "", depth: int = 0) -> str:
        """Free text, and at any trigger in it a tag."""
        triggers = _texts(form, "triggers", place)
        tags = []
        for index, tag in enumerate(_objects(form, "tags", place)):
            where = f"{place}.tags[{index}]".lstrip(".")
            begin = _part(tag, "begin", str, where)
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise _wrong(f"{where}.begin", begin, f"begun with one of the triggers {triggers}")
            tags.append(self._tag(tag, where, depth, trigger))
        options = self._rule(" | ".join(tags))
        if form.get("stop_after_first"):
            return options if form.get("at_least_one") else f"({options} | ANY_TEXT)"
        return f"{options}{'+' if form.get('at_least_one') else '*'} ANY_TEXT"

    def _separated(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        tags = [
            self._tag(tag, f"{place}.tags[{index}]", depth, "")
            for index, tag in enumerate(_objects(form, "tags", place))
        ]
        options, separator = self._rule(" | ".join(tags)), self._literal(_part(form, "separator", str, place))
        some = options if form.get("stop_after_first") else f"{options} ({separator} {options})*"
        return some if form.get("at_least_one") else f"({some})?"

    def _or(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        elements = _objects(form, "elements", place)
        options = [self.format(item, f"{place}.elements[{index}]", depth + 1) for index, item in enumerate(elements)]
        return f"({' | '.join(options)})"

    def _sequence(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        """One after the other; free text ends where the text that must follow it first appears."""
        elements, parts, index = _objects(form, "elements", place), [], 0
        while index < len(elements):
            where, element = f"{place}.elements[{index}]", elements[index]
            last = index + 1 == len(elements)
            if element.get("type") == "any_text" and not last:
                after = elements[index + 1]
                if after.get("type") != "const_string":
                    raise _wrong(where, "any_text", "the last element, or followed by a const_string")
                parts.append(self._text_until(_part(after, "value", str, where)))
                index += 2
                continue
            parts.append(self.format(element, where, depth + 1))
            index += 1
        return " ".join(parts)

    def _tag(self, tag: Mapping[str, Any], place: str, depth: int, trigger: str) -> str:
        """``begin``, content and ``end`` as a rule, after free text if there is a ``trigger``."""
        begin, content = _part(tag, "begin", str, place), _part(tag, "content", dict, place)
        ends = tag.get("end")
        end = ends[0] if isinstance(ends, list) and len(ends) == 1 else ends
        if not isinstance(end, str):
            raise _wrong(f"{place}.end".lstrip("."), ends, "a text")
        head = (
            f"{self._text_until(trigger)} {self._literal(begin[len(trigger) :])}" if trigger else self._literal(begin)
        )
        if content.get("type") == "any_text" and end:
            return self._rule(f"{head} {self._text_until(end)}")
        return self._rule(
            f"{head} {self.format(content, f'{place}.content'.lstrip('.'), depth + 1)} {self._literal(end)}"
        )

    def _text_until(self, text: str) -> str:
        """Free text up to the first ``text``, that included."""
        pieces = self._pieces(text)
        first = pieces[0] if pieces else ""
        if isinstance(first, int):
            return f"ANY_TEXT {self._literal(text)}"
        rest = "".join(f" {self._piece(piece)}" for piece in pieces[1:])
        return self._rule(f"ANY_TEXT {json.dumps(first)}", "[lazy]") + rest

    def _literal(self, text: str) -> str:
        return " ".join(map(self._piece, self._pieces(text)))

    def _piece(self, piece: str | int) -> str:
        return f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece)

    def _pieces(self, text: str) -> list[str | int]:
        """A text cut at the control tokens that it spells."""
        return self._tokenizer.cut_at_control(text)

    def _rule(self, expression: str, options: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{options}: {expression}")
        return name


def _objects(form: Mapping[str, Any], name: str, place: str) -> Sequence[Mapping[str, Any]]:
    value = _part(form, name, list, place)
    if not value or not all(isinstance(item, Mapping) for item in value):
        raise _wrong(f"{place}.{name}".lstrip("."), value, "a list of objects that is not empty")
    return list(value)


def _texts(form: Mapping[str, Any], name: str, place: str) -> Sequence[str]:
    value = _part(form, name, list, place)
    if not value or not all(isinstance(item, str) and item for item in value):
        raise _wrong(f"{place}.{name}".lstrip("."), value, "a list of texts that is not empty")
    return list(value)


def _part(form: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], place: str = "") -> Any:
    value = form.get(name)
    if not isinstance(value, kinds):
        allowed: Iterable[type] = kinds if isinstance(kinds, tuple) else (kinds,)
        names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
        raise _wrong(f"{place}.{name}".lstrip("."), value, " or ".join(names[kind] for kind in allowed))
    return value


def _wrong(place: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"{FIELD}.{place}", value, allowed)
