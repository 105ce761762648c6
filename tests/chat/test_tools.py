"""Every parser reads the same calls out of a text, in whatever pieces it comes."""

from __future__ import annotations

import itertools
import json
import keyword

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.chat.formats import TOOL_FORMATS
from shoal.chat.tools.base import Call
from tests.chat.replies import Case, check, form, streamed

PARIS = '{"city": "Paris"}'
BRACES = '{"code": "if (a) { b = \\"}\\"; } // ]", "options": {"x": [1, {"y": null}]}}'
FOREIGN = '{"note": "caf\u00e9 \U0001f600 \u65e5\u672c", "\u00fc": "\\u00e9"}'

HERMES = [
    Case(
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [("get_weather", PARIS)]
    ),
    Case(
        'Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\nDone.',
        [("get_weather", PARIS), ("now", "{}")],
        content="Let me look.\nDone.",
    ),
    Case(f'<tool_call>{{"name": "run", "arguments": {BRACES}}}</tool_call>', [("run", BRACES)]),
    Case(f'<tool_call>{{"arguments": {FOREIGN}, "name": "save"}}</tool_call>', [("save", FOREIGN)]),
    Case('<tool_call>{"name": "now"}</tool_call>', [("now", "{}")]),
    Case('<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", "{}")]),
    Case('<tool_call>{"name": "now", "arguments": ""}</tool_call>', [("now", "{}")]),
    Case('<tool_call>{"arguments": null, "name": "now"}</tool_call>', [("now", "{}")]),
    Case(
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        [("get_weather", PARIS)],
    ),
    Case(
        '<tool_call>{"type": "function", "id": 3, "name": "get_weather", "parameters": {"city": "Paris"}, "x": [{}]}</tool_call>',
        [("get_weather", PARIS)],
    ),
    Case(
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now"}]</tool_call>',
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case('<tool_call>{"name": "now"}\n{"name": "now"}</tool_call>', [("now", "{}"), ("now", "{}")]),
    Case('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}', [("get_weather", PARIS)]),
    Case(
        '<tool_call>{"name": "save", "arguments": {"note": "a\nb\tc"}}</tool_call>', [("save", '{"note": "a\\nb\\tc"}')]
    ),
    Case(
        '<tool_call>{"name": "save", "arguments": {"note": "</tool_call>"}}</tool_call>',
        [("save", '{"note": "</tool_call>"}')],
    ),
    # Broken off: in the arguments, behind the name, before it.
    Case(
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par', [("get_weather", '{"city": "Par')], whole=False
    ),
    Case(
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par\\',
        [("get_weather", '{"city": "Par\\')],
        whole=False,
    ),
    Case(
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "get_weather", "arg',
        [("now", "{}"), ("get_weather", "")],
        whole=False,
    ),
    Case('<tool_call>{"name": "get_wea', content='<tool_call>{"name": "get_wea'),
    Case("I <tool", content="I <tool"),
    Case('<tool_call>{"name": "now"}\n</tool_c', [("now", "{}")]),
    Case('<tool_call>{"name": "now"}\n<', [("now", "{}")]),
    Case('<tool_call>{"name": "now"}\n<b>', [("now", "{}")], content="<b>"),
    # Brackets that do not belong together end a call where it is.
    Case(
        '<tool_call>{"name": "save", "arguments": {"note": [1}}</tool_call>',
        [("save", '{"note": [1')],
        content="}}</tool_call>",
        whole=False,
    ),
    # No calls at all.
    Case("Write <tool_call> around it.", content="Write <tool_call> around it."),
    Case('<tool_call>{"name": ""}</tool_call>', content='<tool_call>{"name": ""}</tool_call>'),
    Case('<tool_call>{"name": "\\ud800"}</tool_call>', content='<tool_call>{"name": "\\ud800"}</tool_call>'),
    Case("<tool_call>{}</tool_call>", content="<tool_call>{}</tool_call>"),
    Case("<tool_call>[]</tool_call>", content="<tool_call>[]</tool_call>"),
    Case('<tool_call>"name": "now"}</tool_call>', content='<tool_call>"name": "now"}</tool_call>'),
    Case('<tool_call>oops <tool_call>{"name": "now"}</tool_call>', [("now", "{}")], content="<tool_call>oops"),
    Case('{"name": "now", "arguments": {}}', content='{"name": "now", "arguments": {}}'),
    Case("  plain \n", content="  plain \n"),
    Case("", content=""),
]

LLAMA3 = [
    Case('{"name": "get_weather", "parameters": {"city": "Paris"}}', [("get_weather", PARIS)]),
    Case(
        '\n\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}\n', [("get_weather", PARIS)]
    ),
    Case('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [("get_weather", PARIS)]),
    Case(
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case(
        'I look.<|python_tag|>{"name": "unheard_of", "parameters": {}};{"name": "now"}',
        [("unheard_of", "{}"), ("now", "{}")],
        content="I look.",
    ),
    Case(f'{{"name": "run", "parameters": {BRACES}}}', [("run", BRACES)]),
    Case('{"name": "Ada", "parameters": {"age": 3}}', content='{"name": "Ada", "parameters": {"age": 3}}'),
    Case('{"a": {"name": "now"}}', content='{"a": {"name": "now"}}'),
    Case('Say {"name": "now"}', content='Say {"name": "now"}'),
    Case('<|python_tag|>brave_search.call(query="x")', content='<|python_tag|>brave_search.call(query="x")'),
    Case('{"name": "now"} and more', [("now", "{}")], content="and more"),
    Case('{"name": "now"}; and more', [("now", "{}")], content="; and more"),
    Case('{"name": "get_weather", "parameters": {"ci', [("get_weather", '{"ci')], whole=False),
    Case('{"name": "get', content='{"name": "get'),
]

MISTRAL = [
    Case('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', [("get_weather", PARIS)]),
    Case(
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case(
        'I look. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        [("get_weather", PARIS), ("now", "{}")],
        content="I look.",
    ),
    Case('[TOOL_CALLS]get_weather[CALL_ID]aB3dE6gH9[ARGS]{"city": "Paris"}', [("get_weather", PARIS)]),
    Case('[TOOL_CALLS]get_weather{"city": "Paris"}', [("get_weather", PARIS)]),
    Case(f"[TOOL_CALLS]run[ARGS]{BRACES}", [("run", BRACES)]),
    Case('[TOOL_CALLS]get_weather[ARGS]{"city": "Pa', [("get_weather", '{"city": "Pa')], whole=False),
    Case("[TOOL_CALLS]get_weather[AR", content="[TOOL_CALLS]get_weather[AR"),
    Case("[TOOL_CALLS] nothing here", content="[TOOL_CALLS] nothing here"),
    Case("The mark [TOOL_CALLS", content="The mark [TOOL_CALLS"),
    Case("[TOOL_CALLS][]", content="[TOOL_CALLS][]"),
]

PYTHONIC = [
    Case("[get_weather(city='Paris')]", [("get_weather", PARIS)]),
    Case('[get_weather(city="Paris"), now()]', [("get_weather", PARIS), ("now", "{}")]),
    Case('```tool_code\nget_weather(city="Paris")\n```', [("get_weather", PARIS)]),
    Case(
        'Okay.\n```tool_code\nprint(get_weather("Paris"))\nnow()\n```\n',
        [("get_weather", PARIS), ("now", "{}")],
        content="Okay.",
    ),
    Case("<|python_start|>[now(), now()]<|python_end|>", [("now", "{}"), ("now", "{}")]),
    Case(
        "[run(code='a, \"b\" )] \\'c\\' \\\\', options={'t': True, 'n': None, 'l': (1, 2.5), 'j': [true, null]})]",
        [
            (
                "run",
                '{"code": "a, \\"b\\" )] \'c\' \\\\", "options": {"t": true, "n": null, "l": [1, 2.5], "j": [true, null]}}',
            )
        ],
    ),
    Case("[save(note='caf\u00e9 \U0001f600')]", [("save", '{"note": "caf\u00e9 \U0001f600"}')]),
    Case("[save(note='''a\n'b' ''')]", [("save", '{"note": "a\\n\'b\' "}')]),
    Case("[save(note='\\d')]", [("save", '{"note": "\\\\d"}')]),
    Case("[save(note='', x=-1, y=unquoted words)]", [("save", '{"note": "", "x": -1, "y": "unquoted words"}')]),
    Case("[get_weather('Paris', 'C', 3)]", [("get_weather", '{"city": "Paris", "unit": "C", "argument3": 3}')]),
    Case("```tool_code\nnow()\n``", [("now", "{}")]),
    Case("[get_weather(city='Paris',", [("get_weather", PARIS[:-1])], whole=False),
    Case("[get_weather(city='Par", [("get_weather", "")], whole=False),
    Case("[save(note='x", [("save", "")], whole=False),
    Case("[1, 2, 3]", content="[1, 2, 3]"),
    Case("[unheard_of(a=1)]", content="[unheard_of(a=1)]"),
    Case("```tool_code\nimport os\n```", content="```tool_code\nimport os\n```"),
    Case("print(1)", content="print(1)"),
    Case("[get_wea", content="[get_wea"),
    Case("Use [now()] here", content="Use [now()] here"),
]

HARMONY = [
    Case(
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        [("get_weather", PARIS)],
        reasoning="I look.",
    ),
    Case(" to=functions.now<|channel|>commentary json<|message|>{}", [("now", "{}")]),
    Case(
        "<|channel|>commentary<|message|>First the time.<|end|><|start|>assistant to=functions.now<|channel|>commentary<|message|>{}",
        [("now", "{}")],
        content="First the time.",
    ),
    Case(
        "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        content="Yes.",
        reasoning="a < b",
    ),
    Case("<|channel|>analysis<|message|>I th", reasoning="I th"),
    Case("<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>", content=""),
    Case('<|channel|>commentary to=functions.now<|message|>{"a', [("now", '{"a')], whole=False),
    Case("<|channel|>anal", content="<|channel|>anal"),
    Case("No channel.", content="No channel."),
]

QWEN3_CODER = [
    Case(
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n",
        [("get_weather", PARIS)],
        content="I look.",
    ),
    Case("<tool_call><function=now></function></tool_call>", [("now", "{}")]),
    Case("<function=now>\n</function>\n<function=now></function>", [("now", "{}"), ("now", "{}")]),
    Case(
        '<tool_call><function=run><parameter=code>\na < b\n\n"c"\n</parameter>'
        '<parameter=options>{"x": [1]}</parameter></function></tool_call>',
        [("run", '{"code": "a < b\\n\\n\\"c\\"", "options": {"x": [1]}}')],
    ),
    Case(
        "<tool_call><function=save><parameter=note>12</parameter><parameter=flag>True</parameter></function></tool_call>",
        [("save", '{"note": "12", "flag": true}')],
    ),
    Case("<function=save><parameter=note>null</parameter></function>", [("save", '{"note": null}')]),
    Case("<function=get_weather><parameter=unit>1</parameter></function>", [("get_weather", '{"unit": 1}')]),
    Case("<function=f><parameter=\u00fc>\u00e9</parameter></function>", [("f", '{"\u00fc": "\u00e9"}')]),
    Case('<tool_call>{"name": "now"}</tool_call>', [("now", "{}")]),
    Case("<function=get_weather><parameter=city>Paris</parameter><param", [("get_weather", PARIS[:-1])], whole=False),
    Case("<function=get_weather><parameter=city>Par", [("get_weather", "")], whole=False),
    Case("<tool_call><function=get_w", content="<tool_call><function=get_w"),
    Case("<tool_call><function=>", content="<tool_call><function=>"),
    Case("<function=a b>", content="<function=a b>"),
    Case("A <tool_call> alone", content="A <tool_call> alone"),
]

GENERIC = [
    *(case for case in HERMES if not case.text.startswith("{")),
    *LLAMA3,
    *MISTRAL,
    *(case for case in PYTHONIC),
    Case('```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', [("get_weather", PARIS)]),
    Case('```json\n{"name": "Ada"}\n```', content='```json\n{"name": "Ada"}\n```'),
    Case('<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', [("get_weather", PARIS)]),
    Case('<|tool_call|>[{"name": "now"}]<|/tool_call|>', [("now", "{}")]),
]

TABLES = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "llama3_json": LLAMA3,
    "mistral": MISTRAL,
    "pythonic": PYTHONIC,
    "generic": GENERIC,
}


def test_every_parser_has_a_table() -> None:
    assert {*TABLES, "harmony"} == set(TOOL_FORMATS)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, table in TABLES.items() for case in table])
def test_a_reply_is_read_the_same_in_any_pieces(name: str, case: Case) -> None:
    check(form(name), case)


@pytest.mark.parametrize("case", HARMONY)
def test_channels_are_read_the_same_in_any_pieces(case: Case) -> None:
    check(form("harmony", "harmony"), case)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
identifiers = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
cuts = st.lists(st.integers(0, 400), max_size=6)


def pieces_of(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "generic"])
@given(arguments=st.dictionaries(st.text(), json_values, max_size=4), places=cuts, ascii_only=st.booleans())
def test_any_arguments_in_json_come_back(
    name: str, arguments: dict[str, object], places: list[int], ascii_only: bool
) -> None:
    """What a format writes it reads again, in any pieces, and the text of the arguments is the model's own."""
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    text = TOOL_FORMATS[name].write([Call("run", {"?": 0})] * 2).replace('{"?": 0}', written)
    reply = streamed(form(name), pieces_of(text, places))
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("run", written)] * 2
    assert (reply.content, reply.calls_whole) == ("", True)


@given(arguments=st.dictionaries(identifiers, st.text("ab<>/=\n\u00e9 1"), max_size=4), places=cuts)
def test_any_texts_between_tags_come_back(arguments: dict[str, str], places: list[int]) -> None:
    text = TOOL_FORMATS["qwen3_coder"].write([Call("run", arguments)])
    schemas = {name: {"type": "string"} for name in arguments}
    reply = streamed(form("qwen3_coder", offered={"run": schemas}), pieces_of(text, places))
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [("run", arguments)]


@given(arguments=st.dictionaries(identifiers, json_values, max_size=4), places=cuts)
def test_any_arguments_in_python_come_back(arguments: dict[str, object], places: list[int]) -> None:
    text = TOOL_FORMATS["pythonic"].write([Call("run", arguments)])
    reply = streamed(form("pythonic"), pieces_of(text, places))
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [("run", arguments)]
    assert reply.calls_whole


@pytest.mark.parametrize("name", TABLES)
@given(text=st.text('<tool_call>{}[]"name:\\`(),\n \u00e9', max_size=60), places=cuts)
def test_nonsense_is_never_lost(name: str, text: str, places: list[int]) -> None:
    """Where no call is found, the content is the text, and it does not depend on the pieces."""
    reply = streamed(form(name), pieces_of(text, places))
    if not reply.tool_calls:
        assert reply.content == text
    assert reply == streamed(form(name), [text])


def test_at_most_one_call_where_they_may_not_be_parallel() -> None:
    text = 'A<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "run", "arguments": {"code": "x"}}</tool_call>B'
    for pieces in ([text], list(text)):
        reply = streamed(form("hermes", most_calls=1), pieces)
        assert [call.name for call in reply.tool_calls] == ["now"]
        assert (reply.content, reply.calls_whole) == ("AB", True)


def test_ids_differ_between_calls_and_requests_and_stay_with_theirs() -> None:
    text = '<tool_call>{"name": "now"}{"name": "now"}</tool_call>'
    ids = [[call.id for call in form("hermes", key=key).parse(text).tool_calls] for key in ("a", "b", "a")]
    assert ids[0] == ids[2]
    assert len({*ids[0], *ids[1]}) == 4
    assert all(call.startswith("call_") for call in ids[0])
    short = form("hermes", key="a", short_ids=True).parse(text).tool_calls
    assert all(len(call.id) == 9 and call.id.isalnum() for call in short)


def test_without_tools_calls_are_text() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    assert form("hermes", offered={}).parse(text).content == text
