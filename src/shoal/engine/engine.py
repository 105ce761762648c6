"""The engine: add, abort, step, close. Token ids in, token ids out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest
from traceback import clear_frames
from typing import NamedTuple

from shoal.engine.draft import Drafter, Speculation
from shoal.engine.draft_model import ModelDrafter
from shoal.engine.draft_model_pace import ModelPace
from shoal.engine.draft_ngram import NgramDrafter
from shoal.engine.draft_pace import DraftPace
from shoal.engine.draft_suffix import SuffixDrafter
from shoal.engine.masks import MaskFiller
from shoal.engine.memory_plan import NOTHING, MemoryPlan, OwnedPages, plan_memory
from shoal.engine.pace import StepPacer
from shoal.engine.runner import ModelRunner
from shoal.engine.sampler import Sampler
from shoal.engine.sampling_state import check_ids
from shoal.engine.scheduler import DraftResult, Scheduler, SchedulerLimits, StepBatch, StepResult
from shoal.engine.sequence import FinishReason, Metrics, Output, Request, Sequence, Status, TokenLogprobs, TokenWords
from shoal.errors import EngineError, RequestError
from shoal.kernels.base import Backend
from shoal.models.weights import Encoder, Model
from shoal.params import MAX_N, EngineConfig, SpeculativeConfig

__all__ = [
    "Engine",
    "EngineStats",
    "FinishReason",
    "Metrics",
    "Output",
    "Request",
    "Slot",
    "TokenLogprobs",
    "TokenWords",
]

_SLACK = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where the engine stands, and totals since its start. A prompt counts once, however often it was computed; ``cached_tokens`` of
    all ``prompt_tokens`` came from the prefix cache. Of ``spec_decode_num_draft_tokens`` that were computed on a guess
    ``spec_decode_num_accepted_tokens`` were right. Pages are those of each KV group; the cache lies in free ones. ``broken``: what
    the engine raised when it last tried to compute, if it could compute nothing at all for any of several requests. ``batch_sequences``
    and ``batch_rows``: those of the last step."""

    running: int
    waiting: int
    free_pages: tuple[int, ...]
    num_pages: tuple[int, ...]
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    broken: str | None
    batch_sequences: int = 0
    batch_rows: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0


class Slot(NamedTuple):
    """Where one sequence is. ``state``: "waiting", "preempted" (it waits again), "prefill" or "decode". ``num_computed`` tokens are in
    the KV cache, ``max_tokens`` is the most that may follow the prompt, ``rows`` were its share of the last step."""

    request_id: str
    sample: int
    state: str
    num_prompt: int
    num_computed: int
    num_output: int
    max_tokens: int
    arrival_time: float
    rows: int


def _slot(seq: Sequence) -> Slot:
    state = "decode" if seq.num_computed >= seq.num_prompt else "prefill"
    if seq.status is not Status.RUNNING:
        state = "preempted" if seq.metrics.num_preemptions else "waiting"
    return Slot(
        seq.request.request_id,
        seq.sample,
        state,
        seq.num_prompt,
        seq.num_computed,
        seq.num_tokens - seq.num_prompt,
        seq.max_len - seq.num_prompt,
        seq.metrics.arrival_time,
        seq.num_scheduled if seq.status is Status.RUNNING else 0,
    )


def _scheduler_limits(plan: MemoryPlan, config: EngineConfig, *, encoder: bool) -> SchedulerLimits:
    return SchedulerLimits(
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        whole_inputs=encoder,
        preempt_for_priority=config.preempt_for_priority,
    )


def _speculation(
    drafter: Drafter | None, config: EngineConfig, clock: Callable[[], float], vocab_size: int
) -> Speculation | None:
    """With ``drafter``, or with the one that ``config`` names."""
    wanted, target = config.speculative_config, _target_seconds(config)
    if drafter is None and wanted is not None:
        assert isinstance(wanted, SpeculativeConfig), "EngineConfig made it one"
        drafter = _drafter(wanted)
    if drafter is None:
        return None
    pace = drafter.pace if isinstance(drafter, ModelDrafter) else DraftPace(target, clock)
    return Speculation(drafter, pace, vocab_size)


def _target_seconds(config: EngineConfig) -> float | None:
    return None if config.target_step_ms is None else config.target_step_ms / 1000


def _model_drafter(draft: Model, backend: Backend, config: EngineConfig, clock: Callable[[], float]) -> ModelDrafter:
    wanted = config.speculative_config
    assert isinstance(wanted, SpeculativeConfig), "a draft model comes with the config that names it"
    return ModelDrafter(draft, backend, wanted.num_speculative_tokens, ModelPace(_target_seconds(config), clock))


def _drafter(wanted: SpeculativeConfig) -> Drafter | None:
    """None where it is a model, which has to be given."""
    if wanted.method == "draft_model":
        return None
    if wanted.method == "suffix":
        return SuffixDrafter(
            wanted.num_speculative_tokens,
            depth=wanted.suffix_decoding_max_tree_depth,
            factor=wanted.suffix_decoding_max_spec_factor,
            least_share=wanted.suffix_decoding_min_token_prob,
            most_texts=wanted.suffix_decoding_max_cached_requests,
        )
    least, most = wanted.prompt_lookup_min, wanted.prompt_lookup_max
    assert least is not None
    assert most is not None
    return NgramDrafter(wanted.num_speculative_tokens, least, most)


class Engine:
    """Many requests, one step at a time. Not thread-safe: one thread owns it.

    ``backend`` must be the one that packed ``model``; it may serve other engines too and is not closed with this one.
    ``clock`` gives the seconds of ``Metrics`` and time limits. ``check_every_step`` asserts after each call that pages and sequences
    fit together. ``draft``: the draft model that ``config`` names, packed by ``draft_home(backend)``. ``drafter``, or ``speculation``
    as a whole: in place of what ``config`` says. ``num_pages``: of each KV group. Raises as ``plan_memory``.
    """

    def __init__(
        self,
        model: Model | Encoder,
        backend: Backend,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        check_every_step: bool = False,
        draft: Model | None = None,
        drafter: Drafter | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._model, self._backend = model, backend
        self._draft = None if draft is None else _model_drafter(draft, backend, config, clock)
        plan = self._plan(config)
        self._clock = clock
        self._check_every_step = check_every_step
        self._vocab_size = model.config.vocab_size
        self._sequences: dict[str, list[Sequence]] = {}  # all samples, until their last Output has been handed out
        self._outputs: list[Output] = []  # that the next return of ``step`` hands out
        self._deadlines: list[
            tuple[float, int, Sequence]
        ] = []  # a heap, with the number of the entry; for whole requests
        self._num_deadlines = 0
        self._steps = 0
        self._batch = (0, 0)  # sequences and rows of the last step
        self._broken: str | None = None
        self._encoder = model.config.architecture if model.config.arch.encoder else None
        encoder = self._encoder is not None
        target = None if encoder else _target_seconds(config)  # the inputs of an encoder are not cut
        self._pacer = None if target is None else StepPacer(target)
        speculation = speculation or _speculation(self._draft or drafter, config, clock, self._vocab_size)
        self._speculation = None if encoder else speculation
        self._scheduler = Scheduler(
            plan.page_groups(),
            _scheduler_limits(plan, config, encoder=encoder),
            prefix_caching=config.enable_prefix_caching and not encoder,
            pacer=self._pacer,
            speculation=self._speculation,
        )
        self._compute: tuple[ModelRunner, Sampler] | None = self._bound(plan, config)
        self._adopt(plan, config)

    def _plan(self, config: EngineConfig, owned: OwnedPages = NOTHING) -> MemoryPlan:
        draft = None if self._draft is None else self._draft.size
        return plan_memory(self._model.config, self._model.nbytes, config, self._backend, owned, draft=draft)

    def _bound(self, plan: MemoryPlan, config: EngineConfig) -> tuple[ModelRunner, Sampler]:
        """KV memory and buffers, and what computes with them; those of the draft model too."""
        limits = plan.step_limits(config)
        most = MAX_N * limits.max_seqs  # all samples of a prompt get their first token in one step
        if self._speculation is not None:
            most = max(most, limits.max_rows)
        self._masks = MaskFiller(self._vocab_size, most)
        runner = ModelRunner.planned(self._model, self._backend, plan, config)
        if self._draft is not None:
            assert plan.draft is not None, "it was planned for"
            self._draft.bind(plan.draft, config)
        return runner, Sampler(runner.network, self._vocab_size, most)

    def _adopt(self, plan: MemoryPlan, config: EngineConfig) -> None:
        self.memory_plan, self.config = plan, config
        self.max_model_len, self.num_pages = plan.max_model_len, plan.num_pages

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to report."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Put a request in line; its first Output comes from a later ``step``.

        Raises RequestError, naming the numbers, for an id that is in use, an empty prompt, a token that the model does
        not have, in the prompt or in a parameter, and a request that can never fit into ``max_model_len`` or the page pool; and for
        one that wants more of an encoder than states.
        """
        if self._compute is None:
            raise EngineError("the engine is closed")
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is in use", "request_id")
        self.check(request)
        seq = self._scheduler.add(request, self._clock())
        self._sequences[request.request_id] = [seq, *seq.siblings]
        self._watch(seq)

    def check(self, request: Request) -> None:
        """Raise as ``add`` what is wrong with a request as the engine is now; any thread may ask."""
        if self._encoder is not None and request.pooling is None:
            raise RequestError(f"{self._encoder} is an encoder, which embeds texts (LLM.embed) and continues none")
        for token in request.prompt_token_ids:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                known = f"the vocabulary ends at {self._vocab_size - 1}"
                raise RequestError(f"the prompt holds token id {token!r}; {known}", "prompt_token_ids")
        check_ids(request.params, self._vocab_size)
        self._scheduler.check_length(request)

    def abort(self, request_id: str, sample: int | None = None) -> bool:
        """End a request, or one sample of it that has begun, and free its pages at once. The next ``step`` reports it as finished
        ("abort").

        False if there is no such request, or it has already ended.
        """
        samples = self._sequences.get(request_id, [])
        alive = _alive(samples if sample is None else samples[sample : sample + 1])
        self._end(alive, self._clock(), "abort")
        self._check()
        return bool(alive)

    def step(self) -> list[Output]:
        """Compute one step: an Output for each request that got something from it, or ended since the last one.

        A step that raises is computed again, and if it raises again, by halves: only requests that cannot be computed even
        alone end, with finish_reason "error". A step that is interrupted (KeyboardInterrupt) is computed by the next call.
        Requests whose time is up end before it, with finish_reason "timeout".
        """
        if self._deadlines:
            self._end_overdue(self._clock())
        batch = self._scheduler.schedule()
        if batch.beginning:
            self._begin(batch.beginning, self._clock())
        if batch.sequences:
            self._run(batch) if self._pacer is None and self._speculation is None else self._run_timed(batch)
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        self._check()
        return outputs

    def resize(self, config: EngineConfig) -> None:
        """Go on with the sizes of ``config``, which differs from the one before in nothing else. The weights stay; KV memory is given
        back and taken anew, so that those that run are preempted, and what the prefix cache held is lost.

        A request that can never fit into the new size ends, with an error; no other result changes. Raises as ``plan_memory``, and
        nothing has changed then. Whatever is raised because the memory cannot be had after all, the engine goes on with the old size.
        """
        if self._compute is None:
            raise EngineError("the engine is closed")
        if config == self.config:
            return
        plan = self._plan(config, self._owned_pages())
        self._scheduler.preempt_all()
        self._let_go()  # the old pages go before the new ones come
        try:
            self._compute = self._bound(plan, config)
        except BaseException as error:
            clear_frames(error.__traceback__)  # which may hold a part of the new memory
            self._restore()
            raise
        self._adopt(plan, config)
        self._resize_scheduler()

    def _restore(self) -> None:
        """The pages of before, all free. Without them nothing can be computed any more."""
        self._let_go()
        try:
            self._compute = self._bound(self.memory_plan, self.config)
        except BaseException as error:
            alive = [seq for samples in self._sequences.values() for seq in _alive(samples)]
            self._end(alive, self._clock(), "error", _text(error))
            raise EngineError(f"the engine could not go on with its old size either: {_text(error)}") from error
        self._resize_scheduler()

    def _resize_scheduler(self) -> None:
        plan = self.memory_plan
        limits = _scheduler_limits(plan, self.config, encoder=self._encoder is not None)
        self._outputs += self._scheduler.resize(plan.page_groups(), limits, self._clock())
        self._check()

    def _let_go(self) -> None:
        """Of KV memory, and of what computes with it."""
        self._compute = None
        if self._draft is not None:
            self._draft.unbind()

    def _owned_pages(self) -> OwnedPages:
        total, filled = self.num_pages, tuple(group.pool.num_filled for group in self._scheduler.groups)
        if self._draft is not None and self.memory_plan.draft is not None:
            total, filled = total + self.memory_plan.draft.num_pages, filled + self._draft.num_filled
        return OwnedPages(total, filled)

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_pages=tuple(group.pool.num_free for group in scheduler.groups),
            num_pages=self.num_pages,
            steps=self._steps,
            preemptions=scheduler.counters.preemptions,
            prompt_tokens=scheduler.counters.prompt_tokens,
            cached_tokens=scheduler.counters.cached_tokens,
            generation_tokens=scheduler.counters.generation_tokens,
            broken=self._broken,
            batch_sequences=self._batch[0],
            batch_rows=self._batch[1],
            spec_decode_num_draft_tokens=scheduler.counters.draft_tokens,
            spec_decode_num_accepted_tokens=scheduler.counters.accepted_tokens,
        )

    def slots(self, most_waiting: int) -> list[Slot]:
        """Those that run, in their order, then the first in line, at most ``most_waiting`` of them."""
        in_line = nsmallest(most_waiting, self._scheduler.waiting, key=lambda seq: seq.order)
        return [_slot(seq) for seq in (*self._scheduler.running, *in_line)]

    def close(self) -> None:
        """Drop all requests and let go of the KV memory. Only ``stats`` and ``close`` are of use afterwards."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        self._sequences.clear()
        self._outputs.clear()
        self._masks.close()
        self._let_go()

    def _begin(self, sequences: list[Sequence], now: float) -> None:
        for seq in sequences:
            if seq.metrics.begun_time is None:
                seq.metrics.begun_time = now

    def _watch(self, seq: Sequence) -> None:
        """See to the end of a request, named by its first sample, when its time is up."""
        if seq.deadline < math.inf:
            self._num_deadlines += 1
            heappush(self._deadlines, (seq.deadline, self._num_deadlines, seq))
        if len(self._deadlines) > 2 * len(self._sequences) + _SLACK:  # most requests end in time
            self._deadlines = [entry for entry in self._deadlines if self._is_known(entry[2])]
            heapify(self._deadlines)

    def _is_known(self, seq: Sequence) -> bool:
        """Whether this is the first sample of a request that has not ended."""
        return self._sequences.get(seq.request.request_id, [None])[0] is seq

    def _end_overdue(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heappop(self._deadlines)[2]
            if not self._is_known(seq):
                continue
            if seq.deadline <= now:
                self._end(_alive(self._sequences[seq.request.request_id]), now, "timeout")
            else:  # it has begun to run since
                self._watch(seq)

    def _end(self, sequences: list[Sequence], now: float, reason: FinishReason, error: str | None = None) -> None:
        for seq in sequences:
            if seq.status is not Status.FINISHED:  # one that waits for another ends with it
                ended = self._scheduler.abort(seq, now, reason)
                self._outputs += [output._replace(error=error) for output in ended]

    def _forget(self, request_id: str) -> None:
        """Let go of a request of which a sample has ended, if that was the last."""
        if not _alive(self._sequences.get(request_id, [])):
            self._sequences.pop(request_id, None)

    def _run(self, batch: StepBatch) -> bool:
        """Compute a step; whether that was done at once, so that its time tells something."""
        whole = batch
        self._steps += 1
        self._batch = len(batch.sequences), batch.num_rows
        result = self._attempt(batch)
        if batch.drafting and isinstance(result, StepResult) and self._scheduler.is_marred(batch, result):
            batch = self._scheduler.without_drafts(batch)
            result = self._attempt(batch)
        failed = isinstance(result, Exception)
        if isinstance(result, Exception):
            _log.error("a step of %d rows failed; it is computed again", batch.num_rows, exc_info=result)
            batch = self._scheduler.without_drafts(batch)
            result = self._attempt(batch)
        if isinstance(result, Exception) and len(batch.sequences) > 1:
            self._broken = _text(result)  # until a part of it succeeds
        self._settle(batch, result)
        return batch is whole and not failed

    def _run_timed(self, batch: StepBatch) -> None:
        start = self._clock()
        if not self._run(batch):
            return
        seconds, sequences = self._clock() - start, len(batch.sequences)
        further = batch.num_rows - sequences - batch.num_drafted  # of prompts
        if self._pacer is not None and not batch.num_drafted:
            self._pacer.record(further, seconds)
        if self._speculation is not None and not further:
            self._speculation.pace.record(sequences, batch.num_rows, seconds)

    def _settle(self, batch: StepBatch, result: StepResult | Exception) -> None:
        """Commit what could be computed. Compute by halves what could not, down to the requests that fail alone."""
        if isinstance(result, StepResult):
            self._broken = None
            self._outputs += self._scheduler.commit(batch, result, self._clock())
        elif len(batch.sequences) == 1:
            self._outputs += self._scheduler.fail(batch, _text(result), self._clock())
        else:
            for half in batch.halves():
                self._settle(half, self._attempt(half))

    def _attempt(self, batch: StepBatch) -> StepResult | Exception:
        """Compute a step. That changes nothing that counts until ``commit``, so it may be done again."""
        try:
            return self._result(batch)
        except Exception as error:  # whatever the arithmetic raises is a matter of this step's requests
            return error

    def _result(self, batch: StepBatch) -> StepResult:
        assert self._compute is not None, "a closed engine has no sequences"
        runner, sampler = self._compute
        if self._scheduler.copies:
            runner.copy_pages(self._scheduler.copies)
            self._scheduler.copies = []
        choosing = batch.choosing
        self._masks.start(choosing)
        try:
            runner.forward(batch)
        finally:
            masks = self._masks.wait(choosing)
        tokens, logprobs = sampler.sample(*batch.to_sample(), masks)
        drafted = _cut_off_drafted(batch, tokens, logprobs) if batch.drafting else []
        rows = [runner.rows(seq) for seq in batch.scoring]
        return StepResult(tokens, logprobs, rows, sampler.score(batch.prompts), drafted)

    def _check(self) -> None:
        if self._check_every_step:
            self._scheduler.check()
            if self._draft is not None:
                self._draft.check()


def _cut_off_drafted(batch: StepBatch, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> list[DraftResult]:
    """Those with drafts were sampled last; what is theirs goes from the end of the lists."""
    place, drafted = len(batch.sampling), []
    for seq in batch.drafting:
        stop = place + 1 + len(seq.draft)
        drafted.append(DraftResult(tokens[place:stop], logprobs[place:stop]))
        place = stop
    del tokens[len(batch.sampling) :], logprobs[len(batch.sampling) :]
    return drafted


def _alive(samples: list[Sequence]) -> list[Sequence]:
    return [seq for seq in samples if seq.status is not Status.FINISHED]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
