"""The channels of gpt-oss: ``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``."""

from __future__ import annotations

import re

from shoal.chat.events import CallEnd, CallStart, Parsing, Thought
from shoal.chat.json_calls import json_arguments
from shoal.chat.reader import Reader

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
MARKS = (CHANNEL, MESSAGE, "<|constrain|>", *_ENDS)
FORCED_FINAL = f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}"
ANALYSIS, FINAL = f"{CHANNEL}analysis{MESSAGE}", f"{CHANNEL}final{MESSAGE}"
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


def parse(reader: Reader, calls: bool) -> Parsing[None]:
    """One message after the other: analysis is thought, a message to a function is a call (with ``calls``), the rest is said."""
    while (yield from reader.peek()):
        start = reader.at
        header = (yield from reader.before(MESSAGE)) if (yield from _is_header(reader)) else None
        if header is None:
            yield from reader.until(_ENDS)
        elif CHANNEL + "analysis" in header:
            yield from reader.until(_ENDS, Thought)
        elif calls and (recipient := _RECIPIENT.search(header)):
            yield CallStart(recipient[1])
            if (yield from json_arguments(reader)):
                yield CallEnd()
            yield from reader.until(_ENDS)
        else:
            yield from reader.until(_ENDS)
        assert reader.at > start, "an empty message still has its end mark"


def _is_header(reader: Reader) -> Parsing[bool]:
    """Whether a header follows; a message may also begin without one, which is then said."""
    start = reader.at
    for beginning in (START, CHANNEL, "assistant", " to="):
        if (yield from reader.literal(beginning)):
            reader.at = start
            return True
    return False
