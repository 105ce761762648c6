"""The engine: add, abort, step, close. Token ids in, token ids out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from shoal.engine.kv_group import PageGroup
from shoal.engine.masks import MaskFiller
from shoal.engine.memory_plan import MemoryPlan, kv_dtype, plan_memory
from shoal.engine.page_pool import PagePool
from shoal.engine.runner import ModelRunner
from shoal.engine.sampler import Sampler
from shoal.engine.scheduler import Scheduler, SchedulerLimits, StepBatch, StepResult
from shoal.engine.sequence import FinishReason, Metrics, Output, Request, Sequence, Status, TokenLogprobs
from shoal.errors import EngineError, RequestError
from shoal.kernels.base import PAGE_SIZE, Backend, KVGroup, StepLimits
from shoal.models.weights import Encoder, Model
from shoal.params import EngineConfig

__all__ = [
    "Engine",
    "EngineStats",
    "FinishReason",
    "Metrics",
    "Output",
    "Request",
    "TokenLogprobs",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where the engine stands, and totals since its start. A prompt counts once, however often it was computed; ``cached_tokens`` of
    all ``prompt_tokens`` came from the prefix cache. Pages are those of each KV group; the cache lies in free ones. ``broken``: what
    the engine raised when it last tried to compute, if it could compute nothing at all for any of several requests."""

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


def _scheduler_limits(plan: MemoryPlan, config: EngineConfig, *, encoder: bool) -> SchedulerLimits:
    return SchedulerLimits(
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        whole_inputs=encoder,
    )


def _step_limits(plan: MemoryPlan, config: EngineConfig) -> StepLimits:
    return StepLimits(
        max_rows=config.max_num_batched_tokens,
        max_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        max_pages_per_seq=-(-plan.max_model_len // PAGE_SIZE),
    )


class Engine:
    """Many requests, one step at a time. Not thread-safe: one thread owns it.

    ``backend`` must be the one that packed ``model``; it may serve other engines too and is not closed with this one.
    ``clock`` gives the seconds of ``Metrics`` and time limits. ``check_every_step`` asserts after each call that pages and sequences
    fit together. ``num_pages``: of each KV group. Raises as ``plan_memory``.
    """

    def __init__(
        self,
        model: Model | Encoder,
        backend: Backend,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        check_every_step: bool = False,
    ) -> None:
        self.memory_plan = plan = plan_memory(model.config, model.nbytes, config, backend)
        self.max_model_len = plan.max_model_len
        self.num_pages = plan.num_pages
        self._clock = clock
        self._check_every_step = check_every_step
        self._vocab_size = model.config.vocab_size
        self._sequences: dict[str, Sequence] = {}  # until their last Output has been handed out
        self._outputs: list[Output] = []  # that the next return of ``step`` hands out
        self._next_deadline = math.inf  # nobody's time is up before
        self._steps = 0
        self._broken: str | None = None
        groups = [PageGroup(PagePool(group.num_pages), group.use) for group in plan.groups]
        self._encoder = model.config.architecture if model.config.arch.encoder else None
        encoder = self._encoder is not None
        self._scheduler = Scheduler(
            groups,
            _scheduler_limits(plan, config, encoder=encoder),
            prefix_caching=config.enable_prefix_caching and not encoder,
        )
        limits = _step_limits(plan, config)
        self._masks = MaskFiller(self._vocab_size, limits.max_seqs)
        caches = [KVGroup(group.layers, group.num_pages) for group in plan.groups]
        runner = ModelRunner(model, backend, caches, kv_dtype(model.config, config), limits)
        self._compute: tuple[ModelRunner, Sampler] | None = (
            runner,
            Sampler(runner.network, self._vocab_size, limits.max_seqs),
        )

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to report."""
        return bool(self._sequences)

    def add(self, request: Request) -> None:
        """Put a request in line; its first Output comes from a later ``step``.

        Raises RequestError, naming the numbers, for an id that is in use, an empty prompt, a token that the model does
        not have, and a request that can never fit into ``max_model_len`` or the page pool; and for one that wants more of an encoder
        than states.
        """
        if self._compute is None:
            raise EngineError("the engine is closed")
        if self._encoder is not None and request.pooling is None:
            raise RequestError(f"{self._encoder} is an encoder, which embeds texts (LLM.embed) and continues none")
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is in use", "request_id")
        for token in request.prompt_token_ids:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                known = f"the vocabulary ends at {self._vocab_size - 1}"
                raise RequestError(f"the prompt holds token id {token!r}; {known}", "prompt_token_ids")
        seq = self._scheduler.add(request, self._clock())
        self._sequences[request.request_id] = seq
        self._next_deadline = min(self._next_deadline, seq.deadline)

    def abort(self, request_id: str) -> bool:
        """End a request and free its pages at once. The next ``step`` reports it as finished ("abort").

        False if there is no such request, or it has already ended.
        """
        seq = self._sequences.get(request_id)
        if seq is None or seq.status is Status.FINISHED:
            return False
        self._outputs.append(self._scheduler.abort(seq, self._clock()))
        self._check()
        return True

    def step(self) -> list[Output]:
        """Compute one step: an Output for each request that got something from it, or ended since the last one.

        A step that raises is computed again, and if it raises again, by halves: only requests that cannot be computed even
        alone end, with finish_reason "error". A step that is interrupted (KeyboardInterrupt) is computed by the next call.
        Requests whose time is up end before it, with finish_reason "timeout".
        """
        if self._next_deadline < math.inf:
            self._end_overdue(self._clock())
        batch = self._scheduler.schedule()
        if batch.sequences:
            self._run(batch)
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            if output.finished:
                del self._sequences[output.request_id]
        self._check()
        return outputs

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
        )

    def close(self) -> None:
        """Drop all requests and let go of the KV memory. Only ``stats`` and ``close`` are of use afterwards."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        self._sequences.clear()
        self._outputs.clear()
        self._masks.close()
        self._compute = None

    def _end_overdue(self, now: float) -> None:
        if now < self._next_deadline:
            return
        alive = [seq for seq in self._sequences.values() if seq.status is not Status.FINISHED]
        overdue = [seq for seq in alive if seq.deadline <= now]
        self._next_deadline = min((seq.deadline for seq in alive if seq.deadline > now), default=math.inf)
        self._outputs += [self._scheduler.abort(seq, now, "timeout") for seq in overdue]

    def _run(self, batch: StepBatch) -> None:
        self._steps += 1
        result = self._attempt(batch)
        if isinstance(result, Exception):
            _log.error("a step of %d rows failed; it is computed again", batch.num_rows, exc_info=result)
            result = self._attempt(batch)
        if isinstance(result, Exception) and len(batch.sequences) > 1:
            self._broken = _text(result)  # until a part of it succeeds
        self._settle(batch, result)

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
        self._masks.start(batch.sampling)
        try:
            runner.forward(batch)
        finally:
            masks = self._masks.wait(batch.sampling)
        tokens, logprobs = sampler.sample(batch.sampling, masks)
        rows = [runner.rows(seq) for seq in batch.scoring]
        return StepResult(tokens, logprobs, rows, sampler.score(batch.prompts))

    def _check(self) -> None:
        if self._check_every_step:
            self._scheduler.check()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
