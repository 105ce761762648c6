"""Which replica gets a request: the one that has most likely computed the beginning of its prompt before.

Requests whose prompts begin alike have the same key, and each key has its own order of the replicas (rendezvous hashing, Thaler and
Ravishankar 1998): one that joins takes its share of the keys from all others, one that leaves gives up its own, no other key moves.
A replica that has too much to do passes on what comes to the one that has least (as consistent hashing with bounded loads, Mirrokni
et al. 2018).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import msgspec

# Bytes of a prompt that say where it goes: some 128 tokens. Of shared beginnings that are shorter each replica computes its own.
PREFIX_BYTES = 512
# A replica may have so many times the mean load before it passes on what comes.
_UNEVEN = 1.25

_PROMPTS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}


def prompt_key(path: str, body: bytes, prefix_bytes: int = PREFIX_BYTES) -> bytes | None:
    """The first ``prefix_bytes`` of what a request's prompt is made of: its cache_salt, tools, then texts in their order, each after
    its role. The same prompt has the same key in each of the four APIs. None for what has no prompt, or none that can be read."""
    if path not in _PROMPTS:
        return None
    try:
        fields = msgspec.json.decode(body)
        return _first(_parts(fields), prefix_bytes) if isinstance(fields, dict) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None  # the replica says what is wrong with it


def choose(key: bytes | None, loads: Mapping[str, int], spill_above: int) -> str:
    """The replica for a request with this key (None: any), by how many requests each of them has (at least one of them).

    It is the key's own, unless that has ``spill_above`` requests or more and also a quarter more than the mean; then it is the one that
    has least.
    """
    order = ranked(os.urandom(8) if key is None else key, loads)
    limit = max(spill_above, math.ceil(_UNEVEN * (sum(loads.values()) + 1) / len(loads)))
    if key is not None and loads[order[0]] < limit:
        return order[0]
    return min(order, key=loads.__getitem__)


def ranked(key: bytes, names: Iterable[str]) -> list[str]:
    """The names in the order of their weights for ``key``."""
    return sorted(names, key=lambda name: blake2b(name.encode(), key=_digest(key), digest_size=8).digest())


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=16).digest()


def _first(parts: Iterator[str], size: int) -> bytes | None:
    found = b""
    for part in parts:
        found += part[:size].encode("utf-8", "surrogatepass") + b"\0"
        if len(found) >= size:
            break
    return found[:size] if found.strip(b"\0") else None


def _parts(fields: dict[str, Any]) -> Iterator[str]:
    yield from (str(fields[name]) for name in ("cache_salt", "tools") if fields.get(name))
    for name in ("instructions", "system"):
        if fields.get(name):
            yield from ("system", _text(fields[name]))
    conversation = fields.get("messages", fields.get("input"))
    if isinstance(conversation, str):
        yield from ("user", conversation)
    elif isinstance(conversation, list):
        for message in conversation:
            if isinstance(message, dict):
                yield from (str(message.get("role")), _text(message.get("content")))
    elif fields.get("prompt"):
        yield _text(fields["prompt"])


def _text(content: Any) -> str:
    """Of a text, of blocks with texts, of token ids, or of several prompts the first."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return ""
    if isinstance(content[0], int):
        return str(content[:PREFIX_BYTES])
    if isinstance(content[0], dict):
        return "\0".join(str(block.get("text", "")) for block in content if isinstance(block, dict))
    return _text(content[0])
