"""What a job came to: for the end of a run, for ``shoal job status`` and for the manifest."""

from __future__ import annotations

import msgspec

from shoal.jobs.durable.ledger import Totals


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Rows, tokens and times of a job over all of its runs.

    ``state``: running, interrupted, finished, expired, cancelled or stopped (too many failures). ``rows`` of the input, None where
    it cannot be known. ``retried``: rows put back by --retry-errors. ``seconds`` of work; ``tokens_per_second`` generated. Of the
    engine's ``steps``, ``full_share`` ran as many sequences as there was room for; ``rows_per_step`` is how many they ran on
    average. ``resumed``: how often the job was taken up again. In the last run ``spec_decode_num_draft_tokens`` were computed on a
    guess, and ``spec_decode_num_accepted_tokens`` of them were right.
    """

    state: str
    rows: int | None
    done: int
    failed: int
    retried: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds: float
    tokens_per_second: float
    steps: int
    full_share: float
    rows_per_step: float
    resumed: int
    output: str
    errors: str
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0

    @classmethod
    def of(cls, totals: Totals, *, state: str, rows: int | None, resumed: int, output: str, errors: str) -> Summary:
        """From what the journal holds."""
        steps = max(1, totals.steps)
        return cls(
            state=state,
            rows=rows,
            done=totals.done,
            failed=totals.failed,
            retried=totals.retried,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            generated_tokens=totals.generated_tokens,
            seconds=round(totals.seconds, 3),
            tokens_per_second=round(totals.generated_tokens / max(totals.seconds, 1e-9), 2),
            steps=totals.steps,
            full_share=round(totals.full_steps / steps, 4),
            rows_per_step=round(totals.row_steps / steps, 2),
            resumed=resumed,
            output=output,
            errors=errors,
            spec_decode_num_draft_tokens=totals.draft_tokens,
            spec_decode_num_accepted_tokens=totals.accepted_tokens,
        )

    def lines(self) -> list[str]:
        """For people."""
        of = "" if self.rows is None else f" of {self.rows}"
        resumed = f", resumed {_times(self.resumed)}" if self.resumed else ""
        retried = f", {self.retried} retried" if self.retried else ""
        return [
            f"{self.state}: {self.done} rows done, {self.failed} failed{of}{retried}{resumed}",
            f"{self.prompt_tokens} prompt ({self.cached_tokens} cached) and {self.generated_tokens} generated tokens in"
            f" {self.seconds:.1f} s ({self.tokens_per_second:.1f} tokens/s);"
            f" {self.full_share:.0%} of {self.steps} steps ran a full batch, on average {self.rows_per_step:.1f} rows",
            *self._drafts(),
        ]

    def _drafts(self) -> list[str]:
        if not self.spec_decode_num_draft_tokens:
            return []
        share = self.spec_decode_num_accepted_tokens / self.spec_decode_num_draft_tokens
        return [f"{self.spec_decode_num_draft_tokens} tokens were computed on a guess, {share:.0%} of them were right"]


OVER = ("finished", "expired", "cancelled")  # every row has its record


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
