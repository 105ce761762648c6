"""The scheduler: waiting -> running -> finished, with pages for those who run.

There is no prefill and no decode phase: each sequence's ``num_computed`` catches up with its ``num_tokens``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

from shoal.engine.kv_group import PageGroup, longest_prefix
from shoal.engine.page_pool import Origin
from shoal.engine.sequence import FinishReason, Logits, Metrics, Output, Request, Sequence, Status, TokenLogprobs
from shoal.errors import ConstraintError, RequestError


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """As in EngineConfig. ``max_num_batched_tokens``: rows of one step. ``whole_inputs``: no prompt is computed in parts (encoders)."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    whole_inputs: bool = False


@dataclass(slots=True)
class StepBatch:
    """What one step computes: ``sequences`` in the order of their rows, laid end to end.

    ``sampling`` get a token from this step (their last known token is computed); ``scoring`` get logits or states; ``prompts`` get
    log-probabilities of prompt tokens; ``ending`` are done with their prompt and generate nothing.
    """

    sequences: list[Sequence] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    scoring: list[Sequence] = field(default_factory=list)
    prompts: list[Sequence] = field(default_factory=list)
    ending: list[Sequence] = field(default_factory=list)
    num_rows: int = 0

    def add(self, seq: Sequence, count: int) -> None:
        """Compute the next ``count`` tokens of ``seq``."""
        seq.first_row = self.num_rows
        seq.num_scheduled = count
        self.num_rows += count
        self.sequences.append(seq)
        if seq.num_scored < seq.num_to_score and seq.unscored:
            (self.scoring if seq.wants_rows else self.prompts).append(seq)
        if seq.num_computed + count == len(seq.token_ids) and not seq.wants_rows:
            (self.sampling if seq.request.generates else self.ending).append(seq)

    def halves(self) -> tuple[StepBatch, StepBatch]:
        """The same work as two steps. From now on the sequences' rows are those of the halves."""
        first, second = StepBatch(), StepBatch()
        middle = len(self.sequences) // 2
        for index, seq in enumerate(self.sequences):
            (first if index < middle else second).add(seq, seq.num_scheduled)
        return first, second


@dataclass(slots=True)
class StepResult:
    """What a step brought: ``tokens`` and ``logprobs`` for the batch's ``sampling``, ``logits`` (or states) for its ``scoring``,
    ``prompt_logprobs`` for its ``prompts``.

    A token of -1 means that the row's logits hold NaN or leave no candidate. The others may hold NaN.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    logits: list[Logits]
    prompt_logprobs: list[list[TokenLogprobs]]


@dataclass(slots=True)
class Counters:
    """Totals since the start. A prompt is counted once, when it is first complete in the KV cache; ``cached_tokens`` of it were there
    before it began."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0


class Scheduler:
    """Decides who runs, and what becomes of the tokens.

    ``running`` is in the order of admission, and a sequence gets rows only once all before it got every row they
    lack. So those that decode always come before the one that is still in its prompt, and no prompt, however long,
    delays their next token.

    A sequence has the same number of pages in each of the KV ``groups``, but some of the first ones of a group with a window
    are given back as soon as no token that it still has to compute sees them. With ``prefix_caching`` full pages are registered
    when their step is committed, and a sequence begins after the longest prefix that others have left there.
    """

    def __init__(self, groups: Row[PageGroup], limits: SchedulerLimits, *, prefix_caching: bool) -> None:
        self.groups = groups
        self.limits = limits
        self._prefix_caching = prefix_caching
        self._windowed = [(index, group) for index, group in enumerate(groups) if group.use.window]
        self._page_size = groups[0].use.page_size
        self._most_tokens = min(g.use.most_tokens(g.pool.num_pages, limits.max_model_len) for g in groups)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = Counters()

    def add(self, request: Request, now: float) -> Sequence:
        """Put a request at the end of the line. Raises RequestError, with both numbers, if it can never fit."""
        seq = Sequence(request, self._max_len(request), Metrics(now))
        self.waiting.append(seq)
        return seq

    def abort(self, seq: Sequence, now: float, reason: FinishReason = "abort") -> Output:
        """End a sequence, wherever it is, between two steps."""
        self._retire(seq, now)
        return Output(seq.request.request_id, seq.metrics, finished=True, finish_reason=reason)

    def schedule(self) -> StepBatch:
        """The next step. No token counts as computed until ``commit``, so a dropped step is scheduled again."""
        batch = StepBatch()
        self._continue_running(batch)
        self._admit_waiting(batch)
        assert batch.sequences or not (self.running or self.waiting), "work is left and nothing can run"
        return batch

    def commit(self, batch: StepBatch, result: StepResult, now: float) -> list[Output]:
        """Take in what a step brought: append, stop, release, report."""
        if self._prefix_caching:
            self._register(batch)
        self._give_back(batch)
        for seq in batch.sequences:
            seq.num_computed += seq.num_scheduled
        outputs = self._take_prompts(batch, result, now)  # failures, which leave the step at once
        outputs += [
            self._accept(seq, token, logprobs, now)
            for seq, token, logprobs in zip(batch.sampling, result.tokens, result.logprobs, strict=True)
            if seq.status is Status.RUNNING
        ]
        outputs += [self._score(seq, rows, now) for seq, rows in zip(batch.scoring, result.logits, strict=True)]
        outputs += [self._end(seq, now) for seq in batch.ending if seq.status is Status.RUNNING]
        return outputs

    def fail(self, batch: StepBatch, error: str, now: float) -> list[Output]:
        """End every sequence of a step that could not be computed."""
        return [self._fail(seq, error, now) for seq in batch.sequences]

    def check(self) -> None:
        """Assert that pages and sequences fit together."""
        for index, group in enumerate(self.groups):
            held = [seq.pages[index][group.use.num_passed(seq.num_computed) :] for seq in self.running]
            group.pool.check(held)
            for seq, pages in zip(self.running, held, strict=True):
                assert len(pages) <= group.use.most_pages(seq.num_tokens)
        # Admission takes a row that all others left over, so there is a row for each running sequence at every step.
        assert len(self.running) <= min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)
        assert all(seq.status is Status.WAITING and not seq.pages for seq in self.waiting)
        for seq in self.running:
            assert seq.status is Status.RUNNING
            assert seq.num_computed < seq.num_tokens <= seq.max_len
            (count,) = {len(pages) for pages in seq.pages}
            assert self._pages_for(seq.num_computed) <= count <= self._pages_for(seq.num_tokens)

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
            raise RequestError(reason, "prompt_token_ids")
        max_len = self._longest_output(prompt, request.params.max_tokens) if request.generates else prompt
        stored = max_len - output  # the last sampled token never needs a place in the KV cache
        if stored > self._most_tokens:
            needs = f"the request needs KV memory for {stored} tokens"
            raise RequestError(f"{needs}; the whole pool holds {self._most_tokens}")
        return max_len

    def _longest_output(self, prompt: int, max_tokens: int | None) -> int:
        """Tokens of prompt and output: without ``max_tokens``, as many as the context and the pool have room for."""
        if max_tokens is not None:
            return min(self.limits.max_model_len, prompt + max_tokens)
        return min(self.limits.max_model_len, max(self._most_tokens, prompt) + 1)

    def _continue_running(self, batch: StepBatch) -> None:
        budget = self.limits.max_num_batched_tokens
        index = 0
        while index < len(self.running) and batch.num_rows < budget:
            seq = self.running[index]
            count = min(len(seq.token_ids) - seq.num_computed, budget - batch.num_rows)
            if not self._reserve(seq, count):
                return
            batch.add(seq, count)
            index += 1

    def _admit_waiting(self, batch: StepBatch) -> None:
        """First come, first served: the first one that does not fit holds up the rest."""
        budget = self.limits.max_num_batched_tokens
        while self.waiting and len(self.running) < self.limits.max_num_seqs and batch.num_rows < budget:
            seq = self.waiting[0]
            if self.limits.whole_inputs and seq.num_tokens > budget - batch.num_rows:
                return
            keys = self._keys_to_share(seq)
            # Room for all it has, not only for its first chunk: else it would be preempted half way, again and again.
            if not all(group.has_room(seq.num_tokens, keys) for group in self.groups):
                return
            self.waiting.popleft()
            self._start(seq, keys)
            count = min(seq.num_tokens - seq.num_computed, budget - batch.num_rows)
            self._extend(seq, self._short(seq, count))
            batch.add(seq, count)

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
        if not seq.metrics.num_preemptions:
            seq.metrics.num_cached = seq.num_computed

    def _reserve(self, seq: Sequence, count: int) -> bool:
        """Pages for ``count`` more tokens, at the cost of the last admitted if need be; False if that was ``seq``."""
        short = self._short(seq, count)
        if not short:
            return True
        while any(short > group.pool.num_free for group in self.groups):
            last = self.running[-1]
            self._preempt(last)
            if last is seq:
                return False
        self._extend(seq, short)
        return True

    def _short(self, seq: Sequence, count: int) -> int:
        """Pages that it lacks for ``count`` more tokens; a dropped step may have left more than enough."""
        return max(0, self._pages_for(seq.num_computed + count) - len(seq.pages[0]))

    def _extend(self, seq: Sequence, count: int) -> None:
        for pages, group in zip(seq.pages, self.groups, strict=True):
            pages += group.pool.allocate(count)

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
        """Send the last of those that run back to the head of the line; its tokens stay and are computed again."""
        assert len(self.running) > 1, "the only running sequence always fits: add() saw to that"
        self.running.pop()
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_computed = 0
        seq.metrics.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.appendleft(seq)

    def _accept(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> Output:
        """A sampled token joins its sequence, or ends it."""
        if seq.constraint_error is not None:
            return self._fail(seq, seq.constraint_error, now)
        if token < 0:
            error = f"the logits at position {seq.num_computed - 1} hold NaN or leave no token to choose"
            return self._fail_unsound(seq, error, now)
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
            return Output(name, seq.metrics, (), none, True, "stop", reason, prompt_logprobs=prompt)
        seq.token_ids.append(token)
        self.counters.generation_tokens += 1
        reported = None if logprobs is None else (logprobs,)
        try:
            complete = seq.constraint is not None and seq.follow(token)
        except ConstraintError as error:
            return self._fail(seq, str(error), now)
        if len(seq.token_ids) < seq.max_len and not complete:
            return Output(name, seq.metrics, (token,), reported, prompt_logprobs=prompt)
        self._retire(seq, now)
        why: FinishReason = "stop" if complete else "length"
        return Output(name, seq.metrics, (token,), reported, True, why, prompt_logprobs=prompt)

    def _take_prompts(self, batch: StepBatch, result: StepResult, now: float) -> list[Output]:
        """Log-probabilities of prompt tokens join their sequences; NaN among them ends the sequence."""
        failures = []
        for seq, found in zip(batch.prompts, result.prompt_logprobs, strict=True):
            first, seq.num_scored = seq.num_scored, seq.num_computed
            seq.prompt_logprobs += found
            bad = next((index for index, token in enumerate(found) if math.isnan(token.logprob)), None)
            if bad is not None:
                error = f"the logits at position {first + bad} hold NaN or +infinity"
                failures.append(self._fail_unsound(seq, error, now))
        return failures

    def _finish_prompt(self, seq: Sequence) -> tuple[TokenLogprobs, ...] | None:
        """Count a prompt that is complete, and hand over its log-probabilities, where wanted."""
        self.counters.prompt_tokens += seq.num_prompt
        self.counters.cached_tokens += seq.metrics.num_cached
        if seq.request.params.prompt_logprobs is None:
            return None
        found, seq.prompt_logprobs = tuple(seq.prompt_logprobs), []
        return found

    def _end(self, seq: Sequence, now: float) -> Output:
        """The prompt was all there is to do."""
        found = self._finish_prompt(seq)
        self._retire(seq, now)
        name = seq.request.request_id
        return Output(name, seq.metrics, finished=True, finish_reason="length", prompt_logprobs=found)

    def _score(self, seq: Sequence, rows: Logits, now: float) -> Output:
        """Logits or states of prompt positions; those of the last one that is wanted end the sequence, and so does NaN."""
        first, seq.num_scored = seq.num_scored, seq.num_computed
        name, what = seq.request.request_id, "states" if seq.request.pooling else "logits"
        is_bad = _is_infinite if seq.request.pooling else _holds_nan
        bad = next((index for index, row in enumerate(rows) if is_bad(row)), None)
        if bad is not None:
            reason = "are not finite" if seq.request.pooling else "hold NaN"
            return self._fail_unsound(seq, f"the {what} at position {first + bad} {reason}", now)
        found = {what: rows}
        if seq.num_scored < seq.num_to_score:
            return Output(name, seq.metrics, **found)
        self._finish_prompt(seq)
        self._retire(seq, now)
        return Output(name, seq.metrics, finished=True, finish_reason="stop", **found)

    def _fail_unsound(self, seq: Sequence, error: str, now: float) -> Output:
        """End a sequence with NaN in its logits: its KV may hold some too, so nobody may find the pages it has registered."""
        seq.origin.sound = False
        return self._fail(seq, error, now)

    def _fail(self, seq: Sequence, error: str, now: float) -> Output:
        self._retire(seq, now)
        return Output(seq.request.request_id, seq.metrics, finished=True, finish_reason="error", error=error)

    def _retire(self, seq: Sequence, now: float) -> None:
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
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


def _holds_nan(row: Logits) -> bool:
    return math.isnan(row.max())


def _is_infinite(row: Logits) -> bool:
    return not (math.isfinite(row.max()) and math.isfinite(row.min()))
