"""The scheduler: waiting -> running -> finished, with pages for those who run.

There is no prefill and no decode phase: each sequence's ``num_computed`` catches up with its ``num_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.engine.draft import Speculation
from shoal.engine.kv_group import PageGroup, longest_prefix
from shoal.engine.pace import StepPacer
from shoal.engine.page_pool import Origin
from shoal.engine.sequence import FinishReason, Logits, Metrics, Output, Request, Sequence, Status, TokenLogprobs
from shoal.engine.waiting import WaitingQueue
from shoal.errors import ConstraintError, ContextLengthError, RequestError
from shoal.params import MAX_N


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """As in EngineConfig. ``max_num_batched_tokens``: rows of one step. ``whole_inputs``: no prompt is computed in parts (encoders)."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    preempt_for_priority: bool = False
    whole_inputs: bool = False


class PageCopy(NamedTuple):
    """Page ``target`` of a KV group is to hold what page ``source`` holds."""

    group: int
    source: int
    target: int


@dataclass(slots=True)
class StepBatch:
    """What one step computes: ``sequences`` in the order of their rows, laid end to end.

    ``sampling`` get a token from this step (their last known token is computed). Those of ``forking`` complete a prompt that has
    further samples; these follow them in ``sampling`` and get their first token from the same row. ``scoring`` get logits or states;
    ``prompts`` get log-probabilities of prompt tokens; ``ending`` are done with their prompt and generate nothing. Those of
    ``beginning`` were waiting until now. ``drafting`` get a token, and one more for each token of their draft that is found right;
    they are not among ``sampling``.
    """

    sequences: list[Sequence] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    forking: list[Sequence] = field(default_factory=list)
    scoring: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)
    ending: list[Sequence] = field(default_factory=list)
    beginning: list[Sequence] = field(default_factory=list)
    drafting: list[Sequence] = field(default_factory=list)
    num_rows: int = 0
    num_drafted: int = 0  # rows of drafted tokens

    def add(self, seq: Sequence, count: int) -> None:
        """Compute the next ``count`` tokens of ``seq``."""
        seq.first_row = self.num_rows
        seq.num_scheduled = count
        self.num_rows += count
        self.sequences.append(seq)
        if seq.num_scored < seq.num_to_score and seq.unscored:
            (self.scoring if seq.wants_rows else self.prompts).append(seq)
        if seq.draft:
            self.drafting.append(seq)
            self.num_drafted += len(seq.draft)
        elif seq.num_computed + count == len(seq.token_ids) and not seq.wants_rows:
            generates = seq.request.generates
            (self.sampling if generates else self.ending).append(seq)
            if seq.siblings and generates:
                self._add_siblings(seq)

    def _add_siblings(self, seq: Sequence) -> None:
        self.forking.append(seq)
        self.sampling += seq.siblings
        for sibling in seq.siblings:
            sibling.first_row, sibling.num_scheduled = seq.first_row, seq.num_scheduled

    @property
    def choosing(self) -> list[Sequence]:
        """All that get tokens, in the order in which they are sampled."""
        return self.sampling + self.drafting if self.drafting else self.sampling

    def to_sample(self) -> tuple[list[Sequence], list[int] | None]:
        """The same, each once for every token that it may get, and how many tokens of its draft come before that one."""
        if not self.drafting:
            return self.sampling, None
        counts = [1] * len(self.sampling) + [1 + len(seq.draft) for seq in self.drafting]
        sequences = [seq for seq, count in zip(self.choosing, counts, strict=True) for _ in range(count)]
        return sequences, [ahead for count in counts for ahead in range(count)]

    def halves(self) -> tuple[StepBatch, StepBatch]:
        """The same work as two steps, nothing of it drafted. From now on the sequences' rows are those of the halves."""
        first, second = StepBatch(), StepBatch()
        middle = len(self.sequences) // 2
        for index, seq in enumerate(self.sequences):
            (first if index < middle else second).add(seq, seq.num_scheduled)
        return first, second


class DraftResult(NamedTuple):
    """Tokens, and their log-probabilities where wanted."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(slots=True)
class StepResult:
    """What a step brought: ``tokens`` and ``logprobs`` for the batch's ``sampling``, ``logits`` (or states) for its ``scoring``,
    ``prompt_logprobs`` for its ``prompts``.

    A token of -1 means that the row's logits hold NaN or leave no candidate. The others may hold NaN. ``drafted``, for each of the
    batch's ``drafting``: its next token, then what follows each token of its draft, as if that were right.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    logits: list[Logits]
    prompt_logprobs: list[list[TokenLogprobs]]
    drafted: list[DraftResult] = field(default_factory=list)


@dataclass(slots=True)
class Counters:
    """Totals since the start. A prompt is counted once, when it is first complete in the KV cache; ``cached_tokens`` of it were there
    before it began. Of all ``draft_tokens`` that were computed ``accepted_tokens`` were right."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Decides who runs, and what becomes of the tokens.

    ``running`` is in the order of admission, and a sequence gets rows only once all before it got every row they
    lack. So those that decode always come before the one that is still in its prompt, and no prompt, however long,
    delays their next token.

    Requests are admitted by priority, the lowest number first, and in the order of arrival where it is the same. Where pages run
    out, the last in this order loses its own. With ``preempt_for_priority`` a request that has no slot or no pages takes those of
    requests with a higher number, the last one's first.

    ``pacer`` limits what prompts add to a step beside sequences that decode. It makes no difference to a token how a prompt is cut.

    A sequence has the same number of pages in each of the KV ``groups``, but some of the first ones of a group with a window
    are given back as soon as no token that it still has to compute sees them. With ``prefix_caching`` full pages are registered
    when their step is committed, and a sequence begins after the longest prefix that others have left there.

    With ``speculation`` those that decode may have a draft of what comes next. A step computes its tokens as further rows of the
    sequence and samples a token at each of them, the one that would come there anyway; those behind the first guess that is wrong are
    forgotten. A draft never costs anybody pages, and there is none beside a prompt, which fills the step already.
    """

    def __init__(
        self,
        groups: Row[PageGroup],
        limits: SchedulerLimits,
        *,
        prefix_caching: bool,
        pacer: StepPacer | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._take(groups, limits)
        self._speculation = speculation
        self._prefix_caching = prefix_caching
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.copies: list[PageCopy] = []  # to be made before the next step is computed
        self.counters = Counters()
        self._arrivals = 0
        self._pacer = pacer
        self._further = 0  # rows that prompts may yet add to this step

    def _take(self, groups: Row[PageGroup], limits: SchedulerLimits) -> None:
        self.groups = groups
        self.limits = limits
        self._windowed = [(index, group) for index, group in enumerate(groups) if group.use.window]
        self._page_size = groups[0].use.page_size
        self._most_tokens = min(g.use.most_tokens(g.pool.num_pages, limits.max_model_len) for g in groups)
        self._most_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)

    def add(self, request: Request, now: float) -> Sequence:
        """Put a request in line: its first sample, which has the others for ``siblings``. Raises RequestError, with both numbers, if it
        can never fit."""
        max_len, metrics = self._max_len(request), Metrics(now)
        self._arrivals += 1
        seq, *others = (
            Sequence(
                request,
                max_len,
                metrics,
                sample,
                (request.priority, request.turn, self._arrivals, sample),
                status=Status.HELD,
            )
            for sample in range(request.params.n)
        )
        seq.siblings = tuple(others)
        self.waiting.push(seq)
        return seq

    def check_length(self, request: Request) -> None:
        """Raise RequestError, with both numbers, if a request can never fit."""
        self._max_len(request)

    def abort(self, seq: Sequence, now: float, reason: FinishReason = "abort") -> list[Output]:
        """End a sequence, wherever it is, between two steps, and those that wait for what it computes."""
        return [
            Output(one.request.request_id, one.metrics, finished=True, finish_reason=reason, sample=one.sample)
            for one in self._retire_all(seq, now)
        ]

    def preempt_all(self) -> None:
        """Between two steps: let everyone who runs lose his pages."""
        while self.running:
            self._preempt(self.running[-1])
        self.copies = []

    def resize(self, groups: Row[PageGroup], limits: SchedulerLimits, now: float) -> list[Output]:
        """Go on with other pages and limits; nobody may be running. What can never fit into them ends, with an error; an answer that
        may be as long as there is room ends where there is none left. None becomes longer than it could have been before."""
        assert not self.running, "preempt_all comes first"
        self._take(groups, limits)
        in_line = sorted(self.waiting, key=lambda seq: seq.order)
        return [output for seq in in_line for output in self._fit(seq, now)]

    def _fit(self, seq: Sequence, now: float) -> list[Output]:
        try:
            max_len = min(seq.max_len, self._max_len(seq.request))
        except RequestError as error:
            return self._fail(seq, str(error), now)
        for one in (seq, *seq.siblings):
            one.max_len = max_len
        full = seq.request.generates and seq.num_tokens >= max_len
        return self.abort(seq, now, "length") if full else []

    def schedule(self) -> StepBatch:
        """The next step. No token counts as computed until ``commit``, so a dropped step is scheduled again."""
        batch = StepBatch()
        if self._speculation is not None:
            self._forget_drafts()  # of a step that was dropped
        if self.limits.preempt_for_priority:
            self._make_way()
        if self._speculation is not None and not self._somebody_begins():
            self._draft(self._speculation)
        self._continue_running(batch)
        self._admit_waiting(batch)
        assert batch.sequences or not (self.running or self.waiting), "work is left and nothing can run"
        return batch

    def commit(self, batch: StepBatch, result: StepResult, now: float) -> list[Output]:
        """Take in what a step brought: append, stop, release, report."""
        if batch.drafting:
            self._settle_drafts(batch, result)
        if self._prefix_caching:
            self._register(batch)
        self._give_back(batch)
        for seq in batch.sequences:
            seq.num_computed += seq.num_scheduled
        outputs = self._take_prompts(batch, result, now)  # failures, which leave the step at once
        for seq in batch.forking:
            self._fork(seq)
        outputs += [
            self._accept(seq, token, logprobs, now)
            for seq, token, logprobs in zip(batch.sampling, result.tokens, result.logprobs, strict=True)
            if seq.status is not Status.FINISHED
        ]
        for seq, found in zip(batch.drafting, result.drafted, strict=True):
            outputs += self._accept_drafted(seq, found, now)
        outputs += [self._score(seq, rows, now) for seq, rows in zip(batch.scoring, result.logits, strict=True)]
        for seq in batch.ending:
            if seq.status is Status.RUNNING:
                outputs += self._end(seq, now)
        return outputs

    def is_marred(self, batch: StepBatch, result: StepResult) -> bool:
        """Whether a sequence with a draft is about to fail by NaN. That may come from its own guesses: attention weighs by 0 what
        a row does not see, which hides no NaN and no infinity."""
        return any(
            -1 in found.tokens[: 1 + _num_alike(seq.draft, found.tokens)]
            for seq, found in zip(batch.drafting, result.drafted, strict=True)
            if seq.draft
        )

    def without_drafts(self, batch: StepBatch) -> StepBatch:
        """A step that could not be computed, without what was drafted: that may have been the reason, and counts as guessed wrong."""
        if not batch.drafting:
            return batch
        plain, drafting = StepBatch(), set(batch.drafting)
        for seq in batch.sequences:
            if seq in drafting:
                if self._speculation is not None:
                    self._speculation.settled(seq, seq.num_scheduled - 1, 0)
                self._forget_draft(seq)
            plain.add(seq, 1 if seq in drafting else seq.num_scheduled)
        return plain

    def fail(self, batch: StepBatch, error: str, now: float) -> list[Output]:
        """End every sequence of a step that could not be computed."""
        return [output for seq in batch.sequences for output in self._fail(seq, error, now)]

    def check(self) -> None:
        """Assert that pages and sequences fit together."""
        for index, group in enumerate(self.groups):
            held = [seq.pages[index][group.use.num_passed(seq.num_computed) :] for seq in self.running]
            group.pool.check(held)
            for seq, pages in zip(self.running, held, strict=True):
                assert len(pages) <= group.use.most_pages(seq.num_tokens + len(seq.draft))
        # Admission takes a row that all others left over, so there is a row for each running sequence at every step.
        assert len(self.running) <= self._most_running
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        assert not any(seq.pages for seq in waiting)
        for seq in self.running:
            assert seq.status is Status.RUNNING
            assert seq.num_computed < seq.num_tokens <= seq.max_len
            (count,) = {len(pages) for pages in seq.pages}
            assert self._pages_for(seq.num_computed) <= count <= self._pages_for(seq.num_tokens + len(seq.draft))

    def _max_len(self, request: Request) -> int:
        """The most tokens a request may come to have: its own limit, or the context's."""
        prompt = len(request.prompt_token_ids)
        longest = self.limits.max_model_len
        output = 1 if request.generates else 0
        if prompt == 0:
            raise RequestError("the prompt is empty; it needs at least 1 token", "prompt_token_ids")
        if prompt + output > longest:
            reason = f"the prompt has {prompt} tokens; max_model_len {longest} leaves it {longest - output}"
            if self.limits.whole_inputs:
                reason += f" (an encoder takes all of it in one step of max_num_batched_tokens {self.limits.max_num_batched_tokens})"
            raise ContextLengthError(reason, "prompt_token_ids")
        max_len = self._longest_output(prompt, request.params.max_tokens) if request.generates else prompt
        stored = max_len - output  # the last sampled token never needs a place in the KV cache
        if stored > self._most_tokens:
            needs = f"the request needs KV memory for {stored} tokens"
            raise ContextLengthError(f"{needs}; the whole pool holds {self._most_tokens}")
        return max_len

    def _longest_output(self, prompt: int, max_tokens: int | None) -> int:
        """Tokens of prompt and output: without ``max_tokens``, as many as the context and the pool have room for."""
        if max_tokens is not None:
            return min(self.limits.max_model_len, prompt + max_tokens)
        return min(self.limits.max_model_len, max(self._most_tokens, prompt) + 1)

    def _make_way(self) -> None:
        """Preempt sequences of a lower priority until the first in line can start, or none is left."""
        while self.waiting and self.running and not self._can_start(self.waiting.first):
            last = self._last()
            if last.request.priority <= self.waiting.first.request.priority:
                return
            self._preempt(last)

    def _can_start(self, seq: Sequence) -> bool:
        return len(self.running) < self._most_running and self._has_room(seq, self._keys_to_share(seq))

    def _continue_running(self, batch: StepBatch) -> None:
        """Rows for those that run, in their order, and pages for the rows, at the cost of the last in line where there are not
        enough."""
        counts, short = self._shares()
        if self._speculation is not None and self._is_too_much(short):
            self._forget_drafts()
            counts, short = self._shares()
        while self._is_too_much(short):
            assert len(self.running) > 1, "the only running sequence always fits: add() saw to that"
            self._preempt(self._last())
            counts, short = self._shares()
        for seq, count in zip(self.running, counts, strict=False):  # the last ones may get none
            if short:
                self._extend(seq, self._short(seq, count))
            batch.add(seq, count)

    def _is_too_much(self, pages: int) -> bool:
        return pages > 0 and any(pages > group.pool.num_free for group in self.groups)

    def _shares(self) -> tuple[list[int], int]:
        """How many rows each of those that run gets, as far as they go; how many pages of each group all together lack for them."""
        left, size, short, counts = self.limits.max_num_batched_tokens, self._page_size, 0, []
        self._further = self._most_further()
        for seq in self.running:
            if not left:
                break
            lack = len(seq.token_ids) - seq.num_computed
            if lack == 1:
                count = 1 + len(seq.draft)
                left -= count
            else:
                count = self._chunk(lack, left)
                left = left - count if count == lack else 0
            counts.append(count)
            if seq.num_computed + count > size * len(seq.pages[0]):
                short += self._short(seq, count)
        return counts, short

    def _chunk(self, lack: int, left: int) -> int:
        """How many of the rows that a sequence lacks it gets."""
        count = min(lack, left, 1 + self._further)
        self._further -= count - 1
        return count

    def _most_further(self) -> int:
        """How many rows prompts may add to a step; nobody has to wait for it unless he decodes."""
        most = self.limits.max_num_batched_tokens
        if self._pacer is None or not any(seq.num_computed == len(seq.token_ids) - 1 for seq in self.running):
            return most
        return min(most, self._pacer.further_rows)

    def _last(self) -> Sequence:
        """Of those that run the one that has to make way first."""
        return max(self.running, key=lambda seq: seq.order)

    def _admit_waiting(self, batch: StepBatch) -> None:
        """In the order of the line: the first one that does not fit holds up the rest."""
        budget, most = self.limits.max_num_batched_tokens, self.limits.max_num_seqs
        while self.waiting and len(self.running) < most and batch.num_rows < budget and self._further:
            seq = self.waiting.first
            if self.limits.whole_inputs and seq.num_tokens > budget - batch.num_rows:
                return
            keys = self._keys_to_share(seq)
            if not self._has_room(seq, keys):
                return
            self.waiting.pop()
            self._start(seq, keys)
            batch.beginning.append(seq)
            count = self._chunk(seq.num_tokens - seq.num_computed, budget - batch.num_rows)
            self._extend(seq, self._short(seq, count))
            batch.add(seq, count)

    def _has_room(self, seq: Sequence, keys: list[bytes]) -> bool:
        """Room for all it has, not only for its first chunk: else it would be preempted half way, again and again."""
        return all(group.has_room(seq.num_tokens, keys) for group in self.groups)

    def _keys_to_share(self, seq: Sequence) -> list[bytes]:
        """The longest prefix that ``seq`` need not compute: not its last token, nor positions whose logits or states are wanted."""
        if not self._prefix_caching:
            return []
        most = seq.num_tokens - 1
        if seq.num_scored < seq.num_to_score:
            most = min(most, seq.num_scored)
        keys = seq.page_keys(self._page_size, most // self._page_size)
        return keys[: longest_prefix(self.groups, keys)]

    def _start(self, seq: Sequence, keys: list[bytes]) -> None:
        """Let a sequence run, with the registered pages ``keys`` for a beginning."""
        seq.status = Status.RUNNING
        self.running.append(seq)
        seq.origin = Origin()  # what it fills from now on is yet to be seen by a sound token
        seq.pages = [group.share(keys) for group in self.groups]
        seq.num_computed = len(keys) * self._page_size
        if not seq.metrics.num_preemptions and seq.metrics.first_token_time is None:
            seq.metrics.num_cached = seq.num_computed

    def _short(self, seq: Sequence, count: int) -> int:
        """Pages that it lacks for ``count`` more tokens; a dropped step may have left more than enough."""
        return max(0, self._pages_for(seq.num_computed + count) - len(seq.pages[0]))

    def _extend(self, seq: Sequence, count: int) -> None:
        for pages, group in zip(seq.pages, self.groups, strict=True):
            pages += group.pool.allocate(count)

    def _somebody_begins(self) -> bool:
        """Whether the first in line needs not wait: then neither rows nor pages are for guesses."""
        return bool(self.waiting) and self._can_start(self.waiting.first)

    def _draft(self, speculation: Speculation) -> None:
        """Drafts for this step."""
        if all(seq.decodes for seq in self.running):
            speculation.draft(self.running, self._room_for_drafts())

    def _room_for_drafts(self) -> int:
        """How many tokens drafts may have, all together, so that there are rows and pages for them: none is to be made in vain. So many
        tokens of so many sequences begin no more pages than there are tokens, nor than one for each sequence and each full page."""
        rows, seqs = self.limits.max_num_batched_tokens - len(self.running), len(self.running)
        spare = min(group.pool.num_free for group in self.groups)
        if spare < 2 * seqs + rows // self._page_size:
            spare -= sum(self._short(seq, 1) for seq in self.running)
            rows = max(0, min(rows, max(spare, (spare - seqs) * self._page_size)))
        return rows

    def _forget_drafts(self) -> None:
        for seq in self.running:
            self._forget_draft(seq)  # a draft may be cut to nothing, and its pages are left

    def _forget_draft(self, seq: Sequence) -> None:
        """Give back the pages that a draft would have filled. The list of pages is another one then: the old one only ever grew."""
        seq.draft = []
        count = self._pages_for(seq.num_tokens)
        if count < len(seq.pages[0]):
            for pages, group in zip(seq.pages, self.groups, strict=True):
                group.pool.release(pages[count:])
            seq.pages = [pages[:count] for pages in seq.pages]

    def _settle_drafts(self, batch: StepBatch, result: StepResult) -> None:
        """The rows of a draft up to the first wrong guess are rows like any other; those behind it have computed nothing."""
        assert self._speculation is not None
        for seq, found in zip(batch.drafting, result.drafted, strict=True):
            kept = _num_alike(seq.draft, found.tokens)
            self.counters.draft_tokens += seq.num_scheduled - 1
            self.counters.accepted_tokens += kept
            self._speculation.settled(seq, seq.num_scheduled - 1, kept)
            seq.num_scheduled = 1 + kept

    def _accept_drafted(self, seq: Sequence, found: DraftResult, now: float) -> Iterator[Output]:
        """The tokens of a sequence with a draft, one after the other, until it ends or a guess was wrong."""
        for token, logprobs in zip(found.tokens[: seq.num_scheduled], found.logprobs, strict=False):
            yield self._accept(seq, token, logprobs, now)
            if seq.status is Status.FINISHED:
                return
        self._forget_draft(seq)

    def _register(self, batch: StepBatch) -> None:
        """Let the pages be found that this step has filled. Nobody vouches for those of a sequence that samples nothing."""
        for seq in batch.sequences:
            first = seq.num_computed // self._page_size
            stop = (seq.num_computed + seq.num_scheduled) // self._page_size
            if first < stop and seq.request.generates:
                keys = seq.page_keys(self._page_size, stop)[first:]
                for pages, group in zip(seq.pages, self.groups, strict=True):
                    group.pool.register(keys, pages[first:stop], seq.origin)

    def _give_back(self, batch: StepBatch) -> None:
        """Let go of the pages that no token behind this step's sees."""
        for index, group in self._windowed:
            for seq in batch.sequences:
                gone = group.use.num_passed(seq.num_computed)
                passed = group.use.num_passed(seq.num_computed + seq.num_scheduled)
                if passed > gone:
                    group.pool.release(seq.pages[index][gone:passed])

    def _preempt(self, seq: Sequence) -> None:
        """Send one of those that run back to its place in line; its tokens stay and are computed again."""
        self.running.remove(seq)
        self._release(seq)
        seq.draft = []
        seq.num_computed = 0
        seq.metrics.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.push(seq)

    def _fork(self, seq: Sequence) -> None:
        """Let the other samples of a request go on from the prompt that ``seq`` has computed. Where there is no room for one it waits,
        and computes what is missing as if it had been preempted."""
        siblings, seq.siblings = [one for one in seq.siblings if one.status is Status.HELD], ()
        if seq.status is Status.FINISHED or not siblings:
            return
        count = min(len(siblings), max(0, self._most_running - len(self.running)), self._copies_that_fit(seq))
        place = self.running.index(seq) + 1  # before a prompt that is not complete
        self.running[place:place] = siblings[:count]
        for sibling in siblings[:count]:
            self._share_pages(seq, sibling)
        for sibling in siblings[count:]:
            self.waiting.push(sibling)
        for sibling in siblings:  # should the first one fail, the next has them
            sibling.prompt_logprobs = seq.prompt_logprobs

    def _copies_that_fit(self, seq: Sequence) -> int:
        """How many times its last page can be copied, unless that is full."""
        if seq.num_computed % self._page_size == 0:
            return MAX_N
        return min(group.pool.num_free for group in self.groups)

    def _share_pages(self, seq: Sequence, sibling: Sequence) -> None:
        """Give a sibling the full pages of ``seq``, and a copy of the last one if that is not full."""
        full = seq.num_computed // self._page_size
        for index, (pages, group) in enumerate(zip(seq.pages, self.groups, strict=True)):
            group.pool.share_pages(pages[group.use.num_passed(seq.num_computed) : full])
            copied = group.pool.allocate(len(pages) - full)
            self.copies += [PageCopy(index, pages[full], page) for page in copied]
            sibling.pages.append(pages[:full] + copied)
        sibling.status = Status.RUNNING
        sibling.num_computed = seq.num_computed

    def _accept(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> Output:
        """A sampled token joins its sequence, or ends it."""
        if seq.constraint_error is not None:
            (output,) = self._fail(seq, seq.constraint_error, now)
            return output
        if token < 0:
            error = f"the logits at position {len(seq.token_ids) - 1} hold NaN or leave no token to choose"
            (output,) = self._fail_unsound(seq, error, now)
            return output
        seq.origin.sound = True
        prompt = None
        if seq.metrics.first_token_time is None:
            seq.metrics.first_token_time = now
            prompt = self._finish_prompt(seq)
        name = seq.request.request_id
        if token in seq.stop_ids:
            self._retire(seq, now)
            reason = None if token in seq.eos_ids else token
            none = None if logprobs is None else ()
            return Output(name, seq.metrics, (), none, True, "stop", reason, prompt_logprobs=prompt, sample=seq.sample)
        seq.token_ids.append(token)
        self.counters.generation_tokens += 1
        reported = None if logprobs is None else (logprobs,)
        try:
            complete = seq.constraint is not None and seq.follow(token)
        except ConstraintError as error:
            (output,) = self._fail(seq, str(error), now)
            return output
        if len(seq.token_ids) < seq.max_len and not complete:
            return Output(name, seq.metrics, (token,), reported, prompt_logprobs=prompt, sample=seq.sample)
        self._retire(seq, now)
        why: FinishReason = "stop" if complete else "length"
        return Output(name, seq.metrics, (token,), reported, True, why, prompt_logprobs=prompt, sample=seq.sample)

    def _take_prompts(self, batch: StepBatch, result: StepResult, now: float) -> list[Output]:
        """Log-probabilities of prompt tokens join their sequences; NaN among them ends the sequence."""
        failures: list[Output] = []
        for seq, found in zip(batch.prompts, result.prompt_logprobs, strict=True):
            first, seq.num_scored = seq.num_scored, seq.num_computed
            seq.prompt_logprobs += found
            bad = next((index for index, token in enumerate(found) if math.isnan(token.logprob)), None)
            if bad is not None:
                error = f"the logits at position {first + bad} hold NaN or +infinity"
                failures += self._fail_unsound(seq, error, now)
        return failures

    def _finish_prompt(self, seq: Sequence) -> tuple[TokenLogprobs, ...] | None:
        """Count a prompt that is complete, and hand over its log-probabilities, where wanted."""
        self.counters.prompt_tokens += seq.num_prompt
        self.counters.cached_tokens += seq.metrics.num_cached
        if seq.request.params.prompt_logprobs is None:
            return None
        found, seq.prompt_logprobs = tuple(seq.prompt_logprobs), []
        return found

    def _end(self, seq: Sequence, now: float) -> list[Output]:
        """The prompt was all there is to do."""
        found = self._finish_prompt(seq)
        first, *others = self.abort(seq, now, "length")
        return [first._replace(prompt_logprobs=found), *others]

    def _score(self, seq: Sequence, rows: Logits, now: float) -> Output:
        """Logits or states of prompt positions; those of the last one that is wanted end the sequence, and so does NaN."""
        first, seq.num_scored = seq.num_scored, seq.num_computed
        name, what = seq.request.request_id, "states" if seq.request.pooling else "logits"
        is_bad = _is_infinite if seq.request.pooling else _holds_nan
        bad = next((index for index, row in enumerate(rows) if is_bad(row)), None)
        if bad is not None:
            reason = "are not finite" if seq.request.pooling else "hold NaN"
            (output,) = self._fail_unsound(seq, f"the {what} at position {first + bad} {reason}", now)
            return output
        found = {what: rows}
        if seq.num_scored < seq.num_to_score:
            return Output(name, seq.metrics, **found)
        self._finish_prompt(seq)
        self._retire(seq, now)
        return Output(name, seq.metrics, finished=True, finish_reason="stop", **found)

    def _fail_unsound(self, seq: Sequence, error: str, now: float) -> list[Output]:
        """End a sequence with NaN in its logits: its KV may hold some too, so nobody may find the pages it has registered."""
        seq.origin.sound = False
        return self._fail(seq, error, now)

    def _fail(self, seq: Sequence, error: str, now: float) -> list[Output]:
        return [output._replace(error=error) for output in self.abort(seq, now, "error")]

    def _retire_all(self, seq: Sequence, now: float) -> list[Sequence]:
        """End a sequence and the siblings that wait for it; those that ended by it."""
        ended = [seq, *(sibling for sibling in seq.siblings if sibling.status is Status.HELD)]
        for one in ended:
            self._retire(one, now)
        return ended

    def _retire(self, seq: Sequence, now: float) -> None:
        if self._speculation is not None:
            self._speculation.ended(seq)
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.drop(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        seq.metrics.finished_time = now

    def _release(self, seq: Sequence) -> None:
        seq.origin.sound = seq.origin.sound is True  # what no token has vouched for by now none will
        for pages, group in zip(seq.pages, self.groups, strict=False):  # one that waits has none
            group.pool.release(pages[group.use.num_passed(seq.num_computed) :])
        seq.pages = []

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _num_alike(draft: list[int], tokens: list[int]) -> int:
    """How many tokens of a draft are those that have come."""
    return next((index for index, token in enumerate(draft) if token != tokens[index]), len(draft))


def _holds_nan(row: Logits) -> bool:
    return math.isnan(row.max())


def _is_infinite(row: Logits) -> bool:
    return not (math.isfinite(row.max()) and math.isfinite(row.min()))
