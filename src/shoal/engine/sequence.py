"""What goes through the engine: a Request, the Sequence that is its mutable life, and the Outputs it leaves behind."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from shoal.engine.constraint import Constraint
from shoal.engine.page_pool import Origin
from shoal.params import Pooling, SamplingParams

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
Order = tuple[int, int, int, int]  # who comes first: priority, turn, number of arrival, sample
Logits = Any  # float32 array [rows, vocab]; only passed through here


@dataclass(frozen=True, slots=True)
class TokenWords:
    """What words in the parameters are in tokens: ``bad_words``, and what DRY's sequence breakers are (``Breakers`` of the kernels)."""

    bad_words: tuple[tuple[int, ...], ...] = ()
    breakers: Any = None

    @property
    def longest(self) -> int:
        """Tokens of the longest bad word."""
        return max(map(len, self.bad_words), default=0)


@dataclass(frozen=True, slots=True)
class Request:
    """Immutable input. ``eos_ids`` are the model's end-of-generation ids (unused if ``params.ignore_eos``).

    ``seed`` and ``sample`` key the random numbers: the same request draws the same ones in any company. Its ``params.n`` samples
    have the keys ``sample``, ``sample + 1`` and so on. With
    ``want_logits`` nothing is sampled: the logits of every prompt position come back and the request is done.
    ``params.prompt_logprobs`` has no effect then. With ``pooling`` nothing is sampled either: what comes back are the states that
    it pools (scores, for "rank"). ``timeout``: seconds from its arrival in which it must have ended;
    ``queue_timeout``: in which it must have begun to run. ``words``: those of ``params``, in tokens. ``constraint``: what the
    output may be; the sequence takes a copy. Those of a lower ``priority`` number come first, among them those of a lower ``turn``,
    then in the order of arrival. Prefixes are shared among requests with the same ``cache_salt`` alone.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample: int = 0
    want_logits: bool = False
    timeout: float | None = None
    queue_timeout: float | None = None
    words: TokenWords | None = None
    constraint: Constraint | None = None
    priority: int = 0
    turn: int = 0
    cache_salt: str = ""
    pooling: Pooling | None = None

    @property
    def generates(self) -> bool:
        """Whether anything follows the prompt."""
        return not self.want_logits and self.pooling is None and self.params.max_tokens != 0


class TokenLogprobs(NamedTuple):
    """A chosen or given token's natural-log probability before temperature, and the best tokens at its place, best first.

    ``rank`` is the number of tokens at least as likely as this one (1: the likeliest, as in vLLM).
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]
    asked: tuple[tuple[int, float, int], ...] = ()  # of ``logprob_token_ids``: id, log-probability, rank


@dataclass(slots=True)
class Metrics:
    """Times of one request, all its samples together, on the engine's clock, in seconds: its arrival, when it first began to run, its
    first token, its end, or that of the last sample to have ended. How often its samples lost their pages, and how many tokens of its
    prompt were in the KV cache already when it began."""

    arrival_time: float
    begun_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached: int = 0


class Output(NamedTuple):
    """What one sample of a request got out of one step. A plain tuple, because one is made for each running sequence at each step.

    ``sample`` counts from 0; ``finished`` is this sample's. ``metrics`` is the request's own record and goes on changing until all
    are. ``new_token_ids`` never holds a
    stop token; ``stop_reason`` is its id if it came from ``stop_token_ids``, None for an end-of-generation id.
    ``logprobs`` is parallel to ``new_token_ids``, None if not asked for. ``logits``: float32 [rows, vocab], the prompt
    positions computed in this step, for ``want_logits`` alone; ``states``: the same for ``pooling``, float32 [rows, n_embd].
    ``prompt_logprobs``: all prompt tokens but the first, in the one output that comes when the prompt is complete, if asked for;
    sample 0 has it.
    """

    request_id: str
    metrics: Metrics
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finished: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    logits: Logits | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    sample: int = 0
    states: Logits | None = None


class Status(Enum):
    """Where a sequence is on its way. HELD: until the first sample of its request has computed the prompt."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable life of one sample of a request; all of its state is here.

    Of its ``token_ids`` (prompt, then output) the first ``num_computed`` are in the KV cache, in KV group g position p in
    ``pages[g][p // page_size]``. All lists have the same length and only ever grow; losing the pages means new lists. Where
    a group has a window, the first pages of its list belong to others again (``PageUse.num_passed``).
    ``num_scheduled`` and ``first_row`` say which rows of the current step are its own. Of the first ``num_to_score``
    positions the logits or states are wanted; ``num_scored`` of them are done, or were never wanted. That, and ``prompt_logprobs``
    (gathered here until the prompt is complete), outlives a preemption, so that nothing is lost or reported twice.
    Some of the first pages may be shared with other sequences; pages that it registers have its ``origin``.
    The ``siblings`` of sample 0 are the other samples, until the prompt is complete.
    ``constraint`` moves on only when a token is accepted, so a preemption leaves it as it is;
    ``constraint_error``: why it had no mask for the step being computed.
    ``draft``: tokens that are guessed to follow; the current step computes them too, and no token of them counts before ``commit``.
    ``chance``: how likely a guess is right, as far as is known.
    """

    request: Request
    max_len: int  # prompt and output together never exceed this
    metrics: Metrics
    sample: int = 0  # of its request's samples
    order: Order = (0, 0, 0, 0)
    token_ids: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    eos_ids: frozenset[int] = field(init=False)
    stop_ids: frozenset[int] = field(init=False)  # all ids that end it, eos_ids among them
    wants_rows: bool = field(init=False)  # something at positions of its prompt, logits or states, and no token
    num_to_score: int = field(init=False)
    constraint: Constraint | None = field(init=False)
    constraint_error: str | None = None
    status: Status = Status.WAITING
    pages: list[list[int]] = field(default_factory=list)  # empty while it waits
    num_computed: int = 0
    num_scheduled: int = 0
    first_row: int = 0
    num_scored: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    sampling: Any = None  # its SamplingState, from when its first token is sampled on
    origin: Origin = field(default_factory=Origin)
    siblings: tuple[Sequence, ...] = ()
    draft: list[int] = field(default_factory=list)
    chance: float = 0.5
    _page_keys: list[bytes] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        params = self.request.params
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        constraint = self.request.constraint
        self.constraint = None if constraint is None else constraint.copy()
        ignore_eos = params.ignore_eos and constraint is None  # where nothing but an end token is left, it ends
        self.eos_ids = frozenset() if ignore_eos else self.request.eos_ids
        self.stop_ids = self.eos_ids.union(params.stop_token_ids or ())
        self.wants_rows = self.request.want_logits or self.request.pooling is not None
        if self.wants_rows:
            self.num_scored, self.num_to_score = _pooled(self.request.pooling, self.num_prompt)
        elif self.sample:  # the prompt is scored once
            self.num_to_score = 0
        else:  # the logits at a position say how likely the token after it was
            self.num_to_score = 0 if params.prompt_logprobs is None else self.num_prompt - 1

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output so far."""
        return len(self.token_ids)

    @property
    def deadline(self) -> float:
        """When its request's time is up, on the engine's clock; infinity without a limit. Once that has run, it may be later than
        before."""
        limits = [self.request.timeout]
        begun = self.metrics.num_preemptions or self.metrics.first_token_time is not None
        if self.status is Status.WAITING and not begun:
            limits.append(self.request.queue_timeout)
        return self.metrics.arrival_time + min((limit for limit in limits if limit is not None), default=math.inf)

    @property
    def decodes(self) -> bool:
        """Whether the next token is all that it lacks, and not the first one of its output."""
        return self.num_prompt <= self.num_computed == len(self.token_ids) - 1

    def is_too_short(self, ahead: int = 0) -> bool:
        """Whether the token behind so many of its draft is still one of the first ``min_tokens``."""
        return len(self.token_ids) + ahead - self.num_prompt < self.request.params.min_tokens

    def must_not_stop(self, ahead: int = 0) -> bool:
        """Whether that token may be none of ``stop_ids``; a constraint says that in its mask."""
        return self.constraint is None and self.is_too_short(ahead)

    def follow(self, token: int) -> bool:
        """Let the constraint take in a token that has been appended; whether the output is complete. Raises ConstraintError."""
        assert self.constraint is not None
        self.constraint.advance(token)
        return self.constraint.is_complete

    @property
    def unscored(self) -> range:
        """The positions of this step whose logits are wanted and have not been reported."""
        computed = self.num_computed + self.num_scheduled
        return range(max(self.num_computed, self.num_scored), min(computed, self.num_to_score))

    def row_of(self, position: int) -> int:
        """The row of this step that computes a position."""
        return self.first_row + position - self.num_computed

    def page_keys(self, page_size: int, count: int) -> list[bytes]:
        """What names the content of its first ``count`` pages: for each a hash of all tokens up to its end, 16 bytes. Drafted tokens
        in them must have been found right."""
        keys = self._page_keys
        known = self.token_ids + self.draft if self.draft else self.token_ids
        for start in range(len(keys) * page_size, count * page_size, page_size):
            tokens = array("i", known[start : start + page_size]).tobytes()
            before = keys[-1] if keys else self.request.cache_salt.encode()
            keys.append(blake2b(before + tokens, digest_size=16).digest())
        return keys[:count]


def _pooled(pooling: Pooling | None, num_prompt: int) -> tuple[int, int]:
    """From which position to which the rows of a prompt are wanted."""
    if pooling in ("cls", "rank"):
        return 0, 1
    return (num_prompt - 1 if pooling == "last" else 0), num_prompt
