"""What a reply says in its channels: content, reasoning, tool calls; as a whole and as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from shoal.chat.choice import ToolChoice, named_call, required_calls
from shoal.chat.events import Arguments, CallStart, Event, Said, Thought
from shoal.chat.reader import Parser
from shoal.chat.reasoning import CHANNELS, ReasoningFormat
from shoal.chat.tools.base import ToolFormat, Tools
from shoal.chat.tools.harmony import CHANNEL_CALLS

NO_ARGUMENTS = "{}"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool; ``arguments`` is the JSON text that the model wrote, ``{}`` where it wrote none."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of tool call number ``index``. The first one has its ``id`` and ``name``, the others more ``arguments``."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a reply has grown by: in one of its channels."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply, whole or as far as it came. ``calls_whole``: there are tool calls, and none breaks off."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    calls_whole: bool = False

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason in OpenAI's words. Calls are "tool_calls" only if the model ended by itself, behind a whole one."""
        return "tool_calls" if reason == "stop" and self.calls_whole else reason


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How the reply to one request is to be read.

    ``opened``: the prompt ends inside the model's reasoning; ``closed``: behind it, so that none will follow.
    ``tools``: those that may be called, each with its
    parameters; without any, calls are text. ``choice`` "required": the reply is a list of calls; "named": it is the
    arguments of one. ``most_calls``: those behind are dropped. ``key`` makes ids of calls unique;
    ``short_ids`` have nine characters, as templates of Mistral want them.
    """

    reasoning: ReasoningFormat | None = None
    tool_format: ToolFormat | None = None
    opened: bool = False
    closed: bool = False
    tools: Tools = field(default_factory=dict)
    choice: ToolChoice = field(default_factory=ToolChoice)
    most_calls: int | None = None
    key: str = ""
    short_ids: bool = False

    @property
    def marks(self) -> frozenset[str]:
        """Tokens that have to be seen in the text of the reply, even where they are control tokens."""
        formats = (self.reasoning, self.tool_format if self.tools else None)
        return frozenset(mark for form in formats if form is not None for mark in form.marks)

    def parse(self, text: str) -> Reply:
        """What a whole text says."""
        stream = ReplyStream(self)
        stream.push(text)
        stream.flush()
        return stream.reply

    def call_id(self, index: int) -> str:
        """The id of a tool call: the same whenever the same reply is read."""
        digest = blake2b(f"{self.key}:{index}".encode()).hexdigest()
        return digest[:9] if self.short_ids else f"call_{digest[:24]}"


class ReplyStream:
    """Reads a reply that comes in pieces. All deltas together are what ``ReplyFormat.parse`` finds in the whole text.

    White space where two channels meet belongs to neither.
    """

    def __init__(self, form: ReplyFormat) -> None:
        self._form = form
        self._split, self._calls = _parsers(form)
        self._channel: type[Event] = Said
        self._held = ""  # white space that may be the end of its channel
        self._begins = False  # whether nothing has been shown since the channel changed
        self._dropping = False  # whether the current call is one too many
        self._call_is_open = False
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._called: list[tuple[str, list[str]]] = []

    def push(self, text: str) -> list[Delta]:
        """Take in a piece; by how much that makes the channels grow."""
        return self._deltas(self._split.push(text), ends=False)

    def flush(self) -> list[Delta]:
        """What is left, once it is known that nothing follows."""
        deltas = self._deltas(self._split.flush(), ends=True)
        if self._held and not self._begins:
            deltas.append(self._shown(self._held))
        self._held = ""
        return deltas

    @property
    def reply(self) -> Reply:
        """The reply as far as it came."""
        calls = tuple(
            ToolCall(self._form.call_id(index), name, "".join(pieces))
            for index, (name, pieces) in enumerate(self._called)
        )
        whole = bool(calls) and not self._call_is_open
        return Reply("".join(self._content), "".join(self._reasoning), calls, whole)

    def _deltas(self, events: list[Event], *, ends: bool) -> list[Delta]:
        found: list[Event] = []
        for event in events:
            found += self._calls.push(event.text) if self._calls and isinstance(event, Said) else [event]
        if ends and self._calls:
            found += self._calls.flush()
        return [delta for event in found if (delta := self._delta(event))]

    def _delta(self, event: Event) -> Delta | None:
        if isinstance(event, Thought) and self._form.reasoning is None:
            event = Said(event.text)
        if isinstance(event, (Said, Thought)):
            return self._text_delta(event)
        self._channel, self._held = CallStart, ""
        if isinstance(event, CallStart):
            return self._begun(event.name)
        if self._dropping:
            return None
        if isinstance(event, Arguments):
            return self._argued(event.text)
        self._call_is_open = False
        return None if self._called[-1][1] else self._argued(NO_ARGUMENTS)

    def _text_delta(self, event: Said | Thought) -> Delta | None:
        if type(event) is not self._channel:
            self._channel, self._held, self._begins = type(event), "", True
        text = self._held + event.text
        if self._begins and not (self._channel is Said and self._content):  # content that goes on keeps what parts it
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if not shown:
            return None
        self._begins = False
        return self._shown(shown)

    def _shown(self, text: str) -> Delta:
        if self._channel is Thought:
            self._reasoning.append(text)
            return Delta(reasoning=text)
        self._content.append(text)
        return Delta(content=text)

    def _begun(self, name: str) -> Delta | None:
        index, most = len(self._called), self._form.most_calls
        self._dropping = most is not None and index >= most
        if self._dropping:
            return None
        self._called.append((name, []))
        self._call_is_open = True
        return Delta(call=CallDelta(index, id=self._form.call_id(index), name=name))

    def _argued(self, text: str) -> Delta | None:
        if not text:
            return None
        self._called[-1][1].append(text)
        return Delta(call=CallDelta(len(self._called) - 1, text))


def _parsers(form: ReplyFormat) -> tuple[Parser, Parser | None]:
    """What splits a reply into its channels, and what finds calls in the content; None where that is done already."""
    tool_format = form.tool_format if form.tools else None
    in_channels = tool_format is CHANNEL_CALLS
    reasoning = CHANNELS if in_channels else form.reasoning
    opened, choice, tools = form.opened, form.choice, form.tools
    split = Parser((lambda reader: reader.until(())) if reasoning is None else reasoning.routine(opened, in_channels))
    if tools and choice.kind == "named":
        return split, Parser(lambda reader: named_call(reader, choice.name))
    if tools and choice.kind == "required":
        return split, Parser(required_calls)
    if tool_format is None or in_channels:
        return split, None
    return split, Parser(lambda reader: tool_format.parse(reader, tools))
