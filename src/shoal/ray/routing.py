"""Which replica gets a request: the one that has most likely computed the beginning of its prompt before.

Requests whose prompts begin alike have the same key, and each key has its own order of the replicas (rendezvous hashing, Thaler and
Ravishankar 1998): one that joins takes its share of the keys from all others, one that leaves gives up its own, no other key moves.
A replica that has too much to do (as with bounded loads, Mirrokni et al. 2018) passes on what comes: the turns of a conversation to
a replica of their own, and if that has too much to do as well, to the one that has least.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import msgspec

# Bytes of a prompt that say where it goes: some 64 tokens. Of shared beginnings that are shorter each replica computes its own.
PREFIX_BYTES = 256
# A replica may have so many times the mean load before it passes on what comes.
_UNEVEN = 1.25

_PROMPTS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}


def prompt_keys(path: str, body: bytes, prefix_bytes: int = PREFIX_BYTES) -> tuple[bytes, ...]:
    """Keys by which a request looks for its replica, the first one first; none if it has no prompt, or none that can be read.

    What counts is the prompt up to its first message of a user, the same in all turns of a conversation: cache_salt, tools, then texts
    in their order, each after its role. Its first ``prefix_bytes`` are one key; if there is more, all of it is another. The same prompt
    has the same keys in each of the four APIs.
    """
    if path not in _PROMPTS:
        return ()
    try:
        fields = msgspec.json.decode(body)
        head = _head(fields) if isinstance(fields, dict) else b""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ()  # the replica says what is wrong with it
    if not head.strip(b"\0"):
        return ()
    return (head,) if len(head) <= prefix_bytes else (head[:prefix_bytes], head)


def choose(keys: Sequence[bytes], loads: Mapping[str, int], spill_above: int) -> str:
    """The replica for a request with these keys, by how many requests each of them has (at least one of them).

    It is the first key's own, unless that has ``spill_above`` requests or more and also a quarter more than the mean; then so with the
    next key, and at last the one that has least.
    """
    limit = max(spill_above, math.ceil(_UNEVEN * (sum(loads.values()) + 1) / len(loads)))
    for key in keys:
        own = ranked(key, loads)[0]
        if loads[own] < limit:
            return own
    return min(ranked(os.urandom(8), loads), key=loads.__getitem__)


def ranked(key: bytes, names: Iterable[str]) -> list[str]:
    """The names in the order of their weights for ``key``."""
    seed = blake2b(key, digest_size=16).digest()  # a key of blake2b's has at most 64 bytes
    return sorted(names, key=lambda name: blake2b(name.encode(), key=seed, digest_size=8).digest())


def _head(fields: dict[str, Any]) -> bytes:
    return b"".join(part.encode("utf-8", "surrogatepass") + b"\0" for part in _parts(fields))


def _parts(fields: dict[str, Any]) -> Iterator[str]:
    yield from (str(fields[name]) for name in ("cache_salt", "tools") if fields.get(name))
    for name in ("instructions", "system"):
        if fields.get(name):
            yield from ("system", _text(fields[name]))
    conversation = fields.get("messages", fields.get("input"))
    if isinstance(conversation, str):
        yield from ("user", conversation)
    elif isinstance(conversation, list):
        yield from _of_messages(conversation)
    elif fields.get("prompt"):
        yield _text(fields["prompt"])


def _of_messages(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        if isinstance(message, dict):
            yield from (str(message.get("role")), _text(message.get("content")))
            if message.get("role") == "user":
                return


def _text(content: Any) -> str:
    """Of a text, of blocks with texts, of token ids, or of several prompts the first."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return ""
    if isinstance(content[0], int):
        return str(content)
    if isinstance(content[0], dict):
        return "\0".join(str(block.get("text", "")) for block in content if isinstance(block, dict))
    return _text(content[0])
