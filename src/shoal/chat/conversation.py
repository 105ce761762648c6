"""Conversations to prompts: what a request says beside its messages, and how its reply has to be read."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

from shoal.chat.choice import Tool, ToolChoice, checked_choice, checked_tools, schema_of, strict_tag
from shoal.chat.formats import REASONING_FORMATS, TOOL_FORMATS, reasoning_format_of, tool_format_of
from shoal.chat.messages import TemplateStyle, checked_messages, plain_messages, text_of, told_of_tools
from shoal.chat.reasoning import ReasoningFormat
from shoal.chat.reply import ReplyFormat
from shoal.chat.tools.base import ToolFormat
from shoal.errors import RequestError
from shoal.params import template_kwargs
from shoal.text.chat import ChatTemplate, Message
from shoal.text.tokenizer import Tokenizer

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_TAIL = 32  # tokens at the end of a prompt among which a mark is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A request of chat. ``messages``, ``tools`` and ``tool_choice`` are as OpenAI has them, the rest as vLLM has it.

    ``add_generation_prompt`` None: unless ``continue_final_message``. ``parallel_tool_calls`` False: at most one call.
    ``add_special_tokens`` puts BOS before what the template writes.
    """

    messages: Any
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool | None = None

    @classmethod
    def of(cls, prompt: Mapping[str, Any]) -> Conversation:
        """From a prompt ``{"messages": ..., ...}`` of an LLM. Raises RequestError that names the field at fault."""
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in prompt if name not in known), None)
        if unknown is not None:
            raise RequestError(f"{unknown}: no such part of a conversation (there are {', '.join(known)})", "prompt")
        return cls(**prompt)

    def __post_init__(self) -> None:
        for name in ("parallel_tool_calls", "add_generation_prompt", "continue_final_message", "add_special_tokens"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise RequestError(f"{name}: got {getattr(self, name)!r:.80}, must be true or false", name)
        if self.continue_final_message and self.add_generation_prompt:
            reason = "cannot be true together with continue_final_message"
            raise RequestError(f"add_generation_prompt: {reason}", "add_generation_prompt")
        if self.reasoning_effort is not None and self.reasoning_effort not in REASONING_EFFORTS:
            shown, wanted = str(self.reasoning_effort)[:60], ", ".join(REASONING_EFFORTS)
            raise RequestError(f"reasoning_effort: got {shown!r}, must be one of {wanted}", "reasoning_effort")
        if self.chat_template_kwargs is not None:
            template_kwargs(self.chat_template_kwargs)

    @property
    def most_calls(self) -> int | None:
        """How many calls a reply may hold."""
        return 1 if self.parallel_tool_calls is False else None


class EncodedConversation(NamedTuple):
    """A prompt, and how to read what follows it: ``reply`` is None where all of it is content.

    ``constraint``: what the reply must follow because calls are forced or strict, as a field of StructuredOutputsParams and its value.
    """

    ids: list[int]
    reply: ReplyFormat | None
    constraint: dict[str, Any] | None = None


class ConversationEncoder:
    """What turns conversations with one model into prompts. May be used from several threads.

    ``tool_format`` and ``reasoning_format`` are what its template shows, or what ``tool_call_parser`` and ``reasoning_parser``
    name ("none": no such thing). ``template_kwargs`` are for the template where a request gives no others.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tool_format = chosen_tool_format(template.source, tool_call_parser)
        self.reasoning_format = chosen_reasoning_format(template.source, reasoning_parser)
        self._template = template
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The prompt of a conversation. Raises RequestError and TemplateError that say what is wrong with it."""
        tools = checked_tools(conversation.tools or [])
        choice = checked_choice(conversation.tool_choice, tools)
        if choice.kind == "none":
            tools = []
        messages, shown_tools = self._written(conversation, tools)
        options = self._variables(conversation) | shown_tools
        options["continue_final_message"] = conversation.continue_final_message
        if conversation.continue_final_message or conversation.add_generation_prompt is not None:
            options["add_generation_prompt"] = bool(conversation.add_generation_prompt)
        ids = self._template.encode(self._tokenizer, messages, **options)
        return self._encoded(ids, conversation, tools, choice)

    def _written(self, conversation: Conversation, tools: Sequence[Tool]) -> tuple[Any, dict[str, Any]]:
        """Messages as the template takes them, and what it is given beside them for the tools."""
        messages = conversation.messages
        if not messages or not isinstance(messages, (list, tuple)) or not all(map(_is_object, messages)):
            return messages, {}  # which the template refuses
        messages = checked_messages(messages)
        if any(map(_has_calls, messages)):
            style = self._style
            messages = style.fitted(messages) if style.calls else plain_messages(messages, self._writing_format)
        if not tools or self._style.tools:
            return messages, {"tools": conversation.tools} if tools else {}
        return told_of_tools(messages, conversation.tools, self._writing_format, system=self._style.system), {}

    def _variables(self, conversation: Conversation) -> dict[str, Any]:
        """What the template is told beside messages and tools: a request's own words come first."""
        variables = dict(self._template_kwargs)
        effort = conversation.reasoning_effort
        if effort is not None:
            variables["reasoning_effort"] = effort
            if effort == "none" and "enable_thinking" in self._template.source:
                variables["enable_thinking"] = False
        return variables | dict(conversation.chat_template_kwargs or {})

    def _encoded(
        self, ids: list[int], conversation: Conversation, tools: Sequence[Tool], choice: ToolChoice
    ) -> EncodedConversation:
        reasoning = self.reasoning_format
        if reasoning is None and not tools:
            return EncodedConversation(ids, None)
        begun = "" if reasoning is None else self._begun(ids, conversation)
        reply = ReplyFormat(
            reasoning=reasoning,
            tool_format=self.tool_format,
            opened=reasoning is not None and begun.rfind(reasoning.start) > begun.rfind(reasoning.end),
            closed=reasoning is not None and begun.rfind(reasoning.end) > begun.rfind(reasoning.start),
            tools={tool.name: tool.parameter_schemas for tool in tools},
            choice=choice,
            most_calls=conversation.most_calls,
            key=secrets.token_hex(8),
            short_ids=bool(tools) and self._style.short_ids,
        )
        return EncodedConversation(ids, reply, self._constraint(choice, tools, conversation.most_calls))

    def _constraint(self, choice: ToolChoice, tools: Sequence[Tool], most_calls: int | None) -> dict[str, Any] | None:
        schema = schema_of(choice, tools, most_calls=most_calls)
        if schema is not None:
            return {"json": schema}
        tag = strict_tag(self.tool_format, self._template.source, tools, most_calls=most_calls)
        return None if tag is None else {"structural_tag": tag}

    def _begun(self, ids: Sequence[int], conversation: Conversation) -> str:
        """What the prompt has of the reply already, as far as that tells where the model's reasoning stands: its last mark."""
        if conversation.continue_final_message:
            return text_of(conversation.messages[-1])
        tail = self._tokenizer.decode(ids[-_TAIL:]).rstrip()
        assert self.reasoning_format is not None, "otherwise nobody asks"
        return next((mark for mark in self.reasoning_format.marks if tail.endswith(mark)), "")

    @cached_property
    def _style(self) -> TemplateStyle:
        return TemplateStyle.of(self._template)

    @property
    def _writing_format(self) -> ToolFormat:
        return self.tool_format or TOOL_FORMATS["generic"]


def chosen_tool_format(template: str, parser: str | None) -> ToolFormat | None:
    """The format that ``parser`` names, or the one that the template shows; None for "none"."""
    if parser == "none":
        return None
    return tool_format_of(template) if parser is None else TOOL_FORMATS[parser]


def chosen_reasoning_format(template: str, parser: str | None) -> ReasoningFormat | None:
    """The format that ``parser`` names, or the one that the template shows, if any; None for "none"."""
    if parser == "none":
        return None
    return reasoning_format_of(template) if parser is None else REASONING_FORMATS[parser]


def _has_calls(message: Message) -> bool:
    return message.get("role") == "tool" or "tool_calls" in message


def _is_object(message: Any) -> bool:
    return isinstance(message, Mapping)
