"""Which text of a reply is the model's reasoning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.chat import harmony
from shoal.chat.events import Parsing, Thought
from shoal.chat.reader import Reader


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model thinks: ``start``, its thoughts, ``end``, its answer. It thinks before it answers, or not at all."""

    name: str
    start: str
    end: str

    @property
    def marks(self) -> tuple[str, ...]:
        """Tokens that have to be seen in the text, even where they are control tokens."""
        return (self.start, self.end)

    @property
    def forced_end(self) -> str:
        """What to write where the model's reasoning has to end."""
        return self.end

    def shown_in(self, template: str) -> bool:
        """Whether a chat template shows this format. Many hold the end mark alone: they take old thoughts out."""
        return self.end in template

    def routine(self, opened: bool, calls: bool) -> Callable[[Reader], Parsing[None]]:
        """Splits a reply into Thought and Said. ``opened``: the prompt ends with the start mark.

        A format that has its own way to call tools gives out the calls too, with ``calls``.
        """
        return lambda reader: self._parse(reader, opened)

    def _parse(self, reader: Reader, opened: bool) -> Parsing[None]:
        start = reader.at
        yield from reader.spaces()
        if (yield from reader.literal(self.start)):
            opened = True
        else:
            reader.at = start
        if opened:
            yield from reader.until((self.end,), Thought)
        yield from reader.until(())


class _Channels(ReasoningFormat):
    @property
    def marks(self) -> tuple[str, ...]:
        return harmony.MARKS

    @property
    def forced_end(self) -> str:
        return harmony.FORCED_FINAL

    def shown_in(self, template: str) -> bool:
        return harmony.CHANNEL in template and "analysis" in template

    def routine(self, opened: bool, calls: bool) -> Callable[[Reader], Parsing[None]]:
        return lambda reader: harmony.parse(reader, calls)


CHANNELS = _Channels("harmony", harmony.ANALYSIS, harmony.FINAL)
# In the order in which a template is searched for them.
FORMATS = (
    CHANNELS,
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
)
