from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.ray.routing import choose, prompt_keys, ranked

NAMES = st.sets(st.text("abcdefgh0123456789", min_size=1, max_size=8), min_size=2, max_size=12)
LOADS = st.dictionaries(st.text("abcdefgh", min_size=1), st.integers(0, 200), min_size=1, max_size=12)
KEYS = st.binary(min_size=1, max_size=600)
SYSTEM = "You are the assistant of a firm that mends nets. " * 20


def keys(path: str, **fields: Any) -> tuple[bytes, ...]:
    return prompt_keys(path, json.dumps(fields).encode())


def chat(*texts: str, **fields: Any) -> tuple[bytes, ...]:
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return keys("/v1/chat/completions", messages=messages, **fields)


@given(KEYS, NAMES)
def test_a_replica_that_leaves_moves_its_own_keys_alone(prompt: bytes, names: set[str]) -> None:
    before = ranked(prompt, names)
    for gone in names:
        assert ranked(prompt, names - {gone}) == [name for name in before if name != gone]


@given(st.lists(KEYS, min_size=1, max_size=20), NAMES)
def test_one_that_comes_takes_keys_for_itself_alone(prompts: list[bytes], names: set[str]) -> None:
    for prompt in prompts:
        first = ranked(prompt, names | {"new"})[0]
        assert first in ("new", ranked(prompt, names)[0])


def test_a_long_key_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"net" * 100
    read: list[bytes] = []

    def counted(data: bytes, **how: Any) -> Any:
        read.append(data)
        return blake2b(data, **how)

    monkeypatch.setattr("shoal.ray.routing.blake2b", counted)
    assert ranked(key, "abcdef") == ["a", "b", "c", "f", "e", "d"]  # ingresses of two versions agree
    assert read.count(key) == 1


def test_keys_are_spread_evenly() -> None:
    owners = Counter(ranked(b"%d" % number, ("a", "b", "c", "d"))[0] for number in range(4000))
    assert all(850 < count < 1150 for count in owners.values())


@given(st.lists(KEYS, max_size=2), LOADS, st.integers(0, 100))
def test_nobody_is_given_more_while_above_the_limit_unless_nobody_has_less(
    prompt: list[bytes], loads: dict[str, int], spill_above: int
) -> None:
    chosen = choose(prompt, loads, spill_above)
    limit = max(spill_above, 1.25 * (sum(loads.values()) + 1) / len(loads) + 1)
    assert loads[chosen] == min(loads.values()) or loads[chosen] < limit


@given(KEYS, KEYS, NAMES, st.integers(1, 100))
def test_below_the_limit_a_key_has_one_owner(first: bytes, second: bytes, names: set[str], spill_above: int) -> None:
    owner = ranked(first, names)[0]
    loads = {name: spill_above - 1 if name == owner else 0 for name in names}
    assert choose([first, second], loads, spill_above) == owner


@given(KEYS, KEYS, NAMES, st.integers(1, 100))
def test_above_the_limit_the_next_key_has_one_owner(first: bytes, second: bytes, names: set[str], load: int) -> None:
    loads = dict.fromkeys(names, 0) | {ranked(first, names)[0]: 100 * load}
    own = ranked(second, names)[0]
    assert choose([first, second], loads, load) == own or loads[own]


def test_what_has_no_key_goes_to_who_has_least() -> None:
    assert choose((), {"a": 3, "b": 1, "c": 2}, 10) == "b"
    assert {choose((), {"a": 0, "b": 0}, 10) for _ in range(64)} == {"a", "b"}


def test_prompts_that_begin_alike_have_one_key() -> None:
    (first, how), (second, why) = chat(SYSTEM, "How?"), chat(SYSTEM, "Why?", temperature=1)
    assert first == second
    assert how != why
    assert chat(f"Now, {SYSTEM}", "How?")[0] != first
    assert keys("/v1/completions", prompt=SYSTEM + "a")[0] == keys("/v1/completions", prompt=SYSTEM + "b")[0]
    assert keys("/v1/completions", prompt=[list(range(900)), [5]]) == keys("/v1/completions", prompt=list(range(900)))


def test_a_short_system_prompt_does_not_keep_conversations_together() -> None:
    assert chat("Be brief.", "How?") != chat("Be brief.", "Why?")


@pytest.mark.parametrize("system", ["Be brief.", SYSTEM])
def test_a_conversation_has_the_same_keys_in_all_turns(system: str) -> None:
    assert chat(system, "How?") == chat(system, "How?", "So.", "And then?")
    assert chat(system, SYSTEM) == chat(system, SYSTEM, "So.", "And then?")


def test_tools_and_salts_are_part_of_the_key() -> None:
    tool = {"type": "function", "function": {"name": "weigh"}}
    assert len({chat(SYSTEM), chat(SYSTEM, tools=[tool]), chat(SYSTEM, cache_salt="a")}) == 3


def test_the_dialects_of_one_conversation_have_one_key() -> None:
    expected = chat("Be brief.", "How?")
    blocks = [{"type": "text", "text": "How?"}]
    assert expected == keys("/v1/responses", instructions="Be brief.", input="How?")
    assert expected == keys("/v1/messages", system="Be brief.", messages=[{"role": "user", "content": blocks}])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", b'{"input": "a"}'),
        ("/v1/chat/completions", b'{"messages": '),
        ("/v1/chat/completions", b'{"messages": []}'),
        ("/v1/chat/completions", b"[]"),
        ("/v1/completions", b'{"prompt": ""}'),
        ("/v1/completions", b'{"prompt": "\xff"}'),
        ("/v1/completions", b'{"prompt": [[[]]]}'),
        ("/v1/completions", b'{"prompt": ' + b"[" * 100_000),
    ],
)
def test_what_has_no_prompt_has_no_key(path: str, body: bytes) -> None:
    assert prompt_keys(path, body) == ()


@given(st.dictionaries(st.sampled_from(["messages", "prompt", "system", "input", "tools"]), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
)))  # fmt: skip
def test_no_body_is_too_odd(fields: dict[str, Any]) -> None:
    prompt_keys("/v1/responses", json.dumps(fields).encode())
