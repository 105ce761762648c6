"""ChatTemplate: a conversation to a prompt, with the model's own Jinja template."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, TypeAlias

from shoal.errors import GGUFError, RequestError, TemplateError, UnsupportedError
from shoal.gguf.reader import GGUFFile, StringArray
from shoal.text.marking import Marker, all_words, strings_in
from shoal.text.sandbox import problem_of
from shoal.text.special import Span
from shoal.text.template_process import TemplateProcess, World
from shoal.text.tokenizer import Tokenizer
from shoal.text.vocab import special_id

__all__ = ["ChatTemplate", "Message"]

_LOG = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, Any]

MAX_SOURCE = 1 << 20  # characters
_TIMEOUT = 5.0  # seconds for one rendering


class ChatTemplate:
    """A chat template, rendered as Hugging Face transformers does. May be used from several threads.

    It runs in a process of its own (see ``shoal.text.sandbox``), which is killed when a rendering takes longer than
    ``timeout`` seconds. ``bos_token`` and ``eos_token`` are what the template knows under these names.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", timeout: float = _TIMEOUT) -> None:
        _check_length(source)
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._process = TemplateProcess(timeout)

    @classmethod
    def from_gguf(cls, file: GGUFFile, source: str | None = None) -> ChatTemplate | None:
        """The template that stands in the file, or ``source`` with the file's tokens; None where there is neither.

        Completion needs none, so what is wrong with the file's own gets a warning in the log: one that is no text or over a million
        characters counts as none, one that cannot be compiled raises TemplateError when it is used. Raises UnsupportedError where
        ``source`` is too long.
        """
        source = _own_source(file) if source is None else source
        if source is None:
            return None
        if problem := problem_of(source):
            _warn(f"tokenizer.chat_template: {problem}")
        return cls(source, bos_token=_token_text(file, "bos"), eos_token=_token_text(file, "eos"))

    def render(
        self,
        messages: Sequence[Message],
        /,
        add_generation_prompt: bool = True,
        *,
        strftime_now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text. ``variables`` are for the template (``tools``, ``enable_thinking``, ...).

        ``strftime_now`` is the moment that the template's function of this name tells, in its own time zone; default: that of
        the call. What is random in a template follows from the messages and the variables.

        Content given as a list of text parts goes to the template as a list, as transformers does; ``text_messages``
        suits it to the template. Raises RequestError for no messages, or ones that are not text; TemplateError where
        the template fails, refuses the conversation, takes too long or produces too much.
        """
        world = _world(messages, variables, strftime_now)
        return self._render(messages, {**variables, "add_generation_prompt": add_generation_prompt}, world)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        /,
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        strftime_now: datetime | None = None,
        **variables: Any,
    ) -> list[int]:
        """The prompt as token ids. What users wrote is text, even where it spells a control token.

        Apart from that the ids are those of the rendered prompt as a whole. BOS is there if the template writes it.
        Text parts are joined where the template takes only strings. ``continue_final_message`` ends the prompt with the last
        word of the last message. Other arguments and errors as in ``render``.
        """
        world = _world(messages, variables, strftime_now)
        messages = self.text_messages(messages)
        if continue_final_message:
            messages = _with_end(messages)
        variables = {**variables, "add_generation_prompt": add_generation_prompt}
        text, user_spans = self._render_traced(messages, variables, world, tokenizer.control_spans)
        if continue_final_message:
            text, user_spans = _up_to_end(text, user_spans)
        return tokenizer.encode_template(text, user_spans)

    def text_messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with lists of text parts joined by newlines if the template cannot take lists."""
        if all(not _is_parts(message) for message in messages) or self._takes_parts:
            return messages
        return [
            {**message, "content": _joined(message["content"])} if _is_parts(message) else message
            for message in messages
        ]

    def close(self) -> None:
        """End the template's process. It starts anew if the template is used again."""
        self._process.close()

    def _render(self, messages: Any, variables: Mapping[str, Any], world: World) -> str:
        # transformers gives templates these two even where the caller does not.
        defaults = {"tools": None, "documents": None}
        seen = {**defaults, **variables, **self._tokens, "messages": messages}
        return self._process.render(self.source, seen, world)

    def _render_traced(
        self, messages: Any, variables: Mapping[str, Any], world: World, control_spans: Callable[[str], list[Span]]
    ) -> tuple[str, list[Span]]:
        """The prompt, and the (start, end) of what users wrote in it.

        Marks all words first. If the template then renders something else (it looks into the messages), only the
        spellings of control tokens are marked, and that rendering is taken even where it differs: to the template,
        too, such a spelling is then mere text.
        """
        user = {"messages": messages, "variables": variables}
        marker = Marker([self.source, *self._tokens.values(), *strings_in(user)])

        def rendered(spans_of: Callable[[str], list[Span]]) -> tuple[str, list[Span]]:
            marked = marker.marked(user, spans_of, control_spans)
            return marker.unmarked(self._render(marked["messages"], marked["variables"], world))

        plain = self._render(messages, variables, world)
        try:
            text, spans = rendered(all_words)
        except TemplateError:
            text = ""
        return (text, spans) if text == plain else rendered(control_spans)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the text of a content list (and not the list itself, or nothing)."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            rendered = self._render(probe, {"add_generation_prompt": True}, World(datetime.now(), ""))
        except TemplateError:
            return False
        return "probe" in rendered and "'type'" not in rendered


_END = "\U0010fffe"  # marks the end of the message that is to be continued; Unicode says that it is no character


def _with_end(messages: Sequence[Message]) -> list[Message]:
    """Messages with a mark at the end of the text of the last one."""
    if any(_END in text for text in strings_in(messages)):
        raise RequestError("messages: hold U+10FFFE, which is no character", "messages")
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + _END}]
    if isinstance(content, list) and content:
        part = {**content[-1], "text": content[-1]["text"] + _END}
        return [*messages[:-1], {**last, "content": [*content[:-1], part]}]
    raise RequestError("continue_final_message: the last message has no text", "continue_final_message")


def _up_to_end(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """What stands before the mark."""
    place = text.rfind(_END)
    if place < 0:
        raise TemplateError("chat template: does not write the message that is to be continued")
    return text[:place], [(start, min(end, place)) for start, end in spans if start < place]


def _own_source(file: GGUFFile) -> str | None:
    """The template in a file, if it has one that can be used."""
    try:
        source: str | None = file.get("tokenizer.chat_template", str, None)
        _check_length(source or "")
    except (GGUFError, UnsupportedError) as problem:
        _warn(str(problem))
        return None
    return source


def _check_length(source: str) -> None:
    if len(source) > MAX_SOURCE:
        raise UnsupportedError(f"tokenizer.chat_template: {len(source)} characters, at most {MAX_SOURCE}")


def _warn(problem: str) -> None:
    _LOG.warning("%s; chat will fail, completion works", problem)


def _token_text(file: GGUFFile, role: str) -> str:
    tokens = file.get("tokenizer.ggml.tokens", StringArray, None)
    token = None if tokens is None else special_id(file, role, len(tokens))
    return "" if tokens is None or token is None else tokens[token]


def _world(messages: Any, variables: Mapping[str, Any], now: Any) -> World:
    """What the template will see of the world. Raises RequestError for messages and variables that are not good."""
    if now is not None and not isinstance(now, datetime):
        raise RequestError(f"strftime_now: got {type(now).__name__}, must be a datetime", "chat_template_kwargs")
    seed = hashlib.blake2b(_checked(messages, variables), digest_size=8).hexdigest()
    return World(now or datetime.now(), seed)


def _checked(messages: Any, variables: Mapping[str, Any]) -> bytes:
    """Messages and variables as JSON."""
    if not isinstance(messages, (list, tuple)) or not messages:
        shown = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise RequestError(f"messages: got {shown}, must be a list of at least one message", "messages")
    for i, message in enumerate(messages):
        _check_message(f"messages[{i}]", message)
    try:
        return json.dumps([messages, variables], ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        found = f"lone surrogate (U+{ord(problem.object[problem.start]):04X})"
        raise RequestError(f"messages: not valid Unicode: {found}", "messages") from None
    except (TypeError, ValueError, RecursionError) as problem:
        raise RequestError(f"messages: not plain JSON data: {problem}", "messages") from None


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where}: must be an object with a role, a string", "messages")
    content = message.get("content")
    if isinstance(content, list):
        for j, part in enumerate(content):
            _check_part(f"{where}.content[{j}]", part)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        kind = type(content).__name__
        raise RequestError(f"{where}.content: got {kind}, must be a string or a list of text parts", "messages")


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise RequestError(f"{where}: type {str(kind)[:40]!r} is not supported, only 'text' is", "messages")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text: must be a string", "messages")


def _is_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list)


def _joined(parts: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(part["text"] for part in parts)
