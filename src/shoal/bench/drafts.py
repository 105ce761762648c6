"""What speculation did during a measurement: how many tokens were drafted, and how many of them were right."""

from __future__ import annotations

from typing import NamedTuple

from shoal.engine.engine import EngineStats
from shoal.llm import LLM


class Drafts(NamedTuple):
    """Tokens that were computed on a guess, and those that came to stay."""

    drafted: int
    accepted: int

    @classmethod
    def of(cls, stats: EngineStats) -> Drafts:
        """Since the engine's start."""
        return cls(stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens)

    @classmethod
    def since(cls, llm: LLM, before: EngineStats) -> Drafts | None:
        """Since ``before``; None where nothing was ever drafted, nor would be."""
        if llm.config.speculative_config is None and not llm.engine.stats().spec_decode_num_draft_tokens:
            return None
        now, then = cls.of(llm.engine.stats()), cls.of(before)
        return cls(now.drafted - then.drafted, now.accepted - then.accepted)

    def as_json(self) -> dict[str, int]:
        """As the server's metrics call them."""
        return {
            "spec_decode_num_draft_tokens": self.drafted,
            "spec_decode_num_accepted_tokens": self.accepted,
        }

    def __str__(self) -> str:
        share = self.accepted / max(1, self.drafted)
        return f"Drafted tokens: {self.drafted}, of which {self.accepted} ({share:.0%}) were right"
