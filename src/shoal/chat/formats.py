"""Which format a model uses: found by what its chat template contains, or given by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from shoal.chat.reasoning import FORMATS as _REASONING
from shoal.chat.reasoning import ReasoningFormat
from shoal.chat.tools.base import ToolFormat
from shoal.chat.tools.generic import GENERIC
from shoal.chat.tools.harmony import CHANNEL_CALLS
from shoal.chat.tools.hermes import HERMES
from shoal.chat.tools.llama3 import LLAMA3
from shoal.chat.tools.mistral import MISTRAL
from shoal.chat.tools.pythonic import PYTHONIC
from shoal.chat.tools.qwen3_coder import QWEN3_CODER

TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {form.name: form for form in (HERMES, QWEN3_CODER, LLAMA3, MISTRAL, PYTHONIC, CHANNEL_CALLS, GENERIC)}
)
REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType({form.name: form for form in _REASONING})

# In this order: what a template must contain (all of it) to be one of a format. ChatML and Gemma without a word of tools
# come last: their models that can call at all do it so.
_TOOL_SIGNS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<|channel|>", "commentary"), CHANNEL_CALLS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<|python_start|>",), PYTHONIC),
    (("func_name1(",), PYTHONIC),
    (("tool_code",), PYTHONIC),
    (("<|python_tag|>",), LLAMA3),
    (("<|start_header_id|>", '"parameters"'), LLAMA3),
    (("<function=", "<parameter="), QWEN3_CODER),
    (("<tool_call>", "<function="), GENERIC),
    (("<tool_call>", "<arg_key>"), GENERIC),
    (("<tool_call>",), HERMES),
    (("tools",), GENERIC),
    (("<|im_start|>",), HERMES),
    (("<start_of_turn>",), PYTHONIC),
)


def tool_format_of(template: str) -> ToolFormat:
    """The format of tool calls that a chat template shows; the generic one where it shows none."""
    return next((form for signs, form in _TOOL_SIGNS if all(sign in template for sign in signs)), GENERIC)


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The format of reasoning that a chat template shows, if any."""
    return next((form for form in _REASONING if form.shown_in(template)), None)
