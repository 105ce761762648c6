"""What is asked of a model becomes a request in line: encoded, checked, constrained, with a number and a seed of its own."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from shoal.constrain.compiler import ConstraintCompiler
from shoal.engine.constraint import Constraint
from shoal.engine.engine import Engine, Request
from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.params import SamplingParams, StructuredOutputsParams, check_priority, check_seconds
from shoal.requests.dispatch import Dispatcher
from shoal.requests.outputs import Generation, RequestOutput, Scoring
from shoal.requests.pooled import Pooled
from shoal.requests.prompts import (
    Encoded,
    Params,
    Priority,
    Prompt,
    PromptEncoder,
    paired,
    paired_priorities,
    token_ids,
)
from shoal.requests.thinking import ThinkingConstraint, ThinkingMarks
from shoal.requests.words import WordFinder


class Limits(NamedTuple):
    """What time a request has, in seconds, its priority, and what else is between it and others (see ``Request``)."""

    timeout: float | None = None
    queue_timeout: float | None = None
    priority: int = 0
    turn: int = 0
    cache_salt: str = ""

    @classmethod
    def checked(cls, timeout: float | None, queue_timeout: float | None, priority: int = 0) -> Limits:
        """Raises ParameterError for a time that is not positive and a priority that is no integer."""
        check_seconds("timeout", timeout)
        check_seconds("queue_timeout", queue_timeout)
        return cls(timeout, queue_timeout, check_priority(priority))


Asked = tuple[Prompt, SamplingParams, Limits]


class Prepared(NamedTuple):
    """A request, and what takes in what comes of it."""

    request: Request
    item: Generation | Pooled


def all_asked(prompts: Prompt | Sequence[Prompt], params: Params, priority: Priority, limits: Limits) -> list[Asked]:
    """Each prompt with all that is its own. Raises as ``paired``."""
    pairs = paired(prompts, params)
    priorities = paired_priorities(len(pairs), priority)
    return [(*pair, limits._replace(priority=number)) for pair, number in zip(pairs, priorities, strict=True)]


class Submitter:
    """Puts requests in line for one engine. May be used from several threads: what takes long is done by the thread that asks."""

    def __init__(self, prompts: PromptEncoder, dispatcher: Dispatcher, engine: Engine, vocab_size: int) -> None:
        self.prompts, self.engine = prompts, engine
        self.eos_ids = prompts.tokenizer.eog_ids if prompts.tokenizer else frozenset[int]()
        self._dispatcher = dispatcher
        self._vocab_size = vocab_size
        self._constraints = ConstraintCompiler(prompts.tokenizer) if prompts.tokenizer else None
        self._words = WordFinder(prompts.tokenizer, vocab_size)
        self._numbers = itertools.count()
        self._prepared = itertools.count()  # which of a model's requests one is: what its seed comes from

    def start(
        self, prompt: Prompt, params: SamplingParams, limits: Limits, sink: list[Generation]
    ) -> Generation | RequestOutput:
        """Submit a request of many: its fault becomes its output."""
        name = self.next_name()
        try:
            return self.submit(prompt, params, limits, sink, name)
        except (RequestError, ParameterError, TemplateError) as error:
            return RequestOutput.failed(name, prompt if isinstance(prompt, str) else None, str(error))

    def submit(
        self, prompt: Prompt, params: SamplingParams, limits: Limits, sink: list[Generation], name: str
    ) -> Generation:
        """Put a request in line, called ``name``. Raises RequestError, ParameterError and TemplateError."""
        request, generation = self.prepare(prompt, params, limits, sink, name)
        assert isinstance(generation, Generation)
        self._dispatcher.start(request, generation)
        return generation

    def prepare(
        self, prompt: Prompt, params: SamplingParams, limits: Limits, sink: list[Generation], name: str
    ) -> Prepared:
        """All of ``submit`` that takes long and waits for no step. Raises RequestError, ParameterError and TemplateError."""
        number = next(self._prepared)
        encoded = self.prompts.encode(prompt)
        seed = _derived_seed(self.engine.config.seed, number) if params.seed is None else params.seed
        request = Request(
            name,
            tuple(encoded.ids),
            params,
            self.eos_ids,
            seed,
            words=self._words.find(params),
            constraint=self._constraint(params, encoded),
            **limits._asdict(),
        )
        generation = Generation(name, encoded.text, encoded.ids, params, self.prompts.tokenizer, sink, encoded.reply)
        return Prepared(request, generation)

    def score(self, ids: Sequence[int], sink: list[Scoring]) -> Scoring:
        """Put a request for the logits of all positions in line. Raises RequestError."""
        request_id = f"logits-{next(self._numbers)}"
        request = Request(request_id, tuple(token_ids(ids)), SamplingParams(), want_logits=True)
        scoring = Scoring(request_id, np.empty((len(ids), self._vocab_size), np.float32), sink)
        self._dispatcher.start(request, scoring)
        return scoring

    def next_name(self) -> str:
        """The number that the next request would have, as its name."""
        return str(next(self._numbers))

    def drop(self, started: Iterable[Generation | RequestOutput]) -> None:
        """Abort what nobody waits for any more."""
        self._dispatcher.drop(item for item in started if isinstance(item, Generation))

    def close(self) -> None:
        """End the process that compiles constraints."""
        if self._constraints is not None:
            self._constraints.close()

    def _constraint(self, params: SamplingParams, encoded: Encoded) -> Constraint | None:
        """What the request's text may be, and when. Compiled by the thread that submits it: no step waits for that."""
        asked, budget = _asked(params, encoded), params.thinking_token_budget
        reply, tokenizer = encoded.reply, self.prompts.tokenizer
        if budget is not None and (reply is None or reply.reasoning is None):
            problem = "no reasoning is told apart from answers here"
            raise RequestError(f"thinking_token_budget: {problem}", "thinking_token_budget")
        if asked is None and budget is None:
            return None
        if self._constraints is None or tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer, which skip_tokenizer_init left out")
        try:
            constraint = None if asked is None else self._constraints.compile(asked)
        except ParameterError as error:
            if asked is params.structured_outputs:
                raise
            raise RequestError(f"tools: their schemas cannot be enforced: {error}", "tools") from None
        if reply is None or reply.reasoning is None:
            return constraint
        return ThinkingConstraint(ThinkingMarks.of(reply.reasoning, tokenizer), reply, constraint, budget)


def _asked(params: SamplingParams, encoded: Encoded) -> StructuredOutputsParams | None:
    """What the text may be: as the request says, or as its tools need it."""
    if encoded.constraint is None:
        return params.structured_outputs
    if params.structured_outputs is None:
        return StructuredOutputsParams(**encoded.constraint)
    if encoded.reply is not None and encoded.reply.choice.forces:
        raise RequestError("tool_choice: a forced call cannot follow structured_outputs too", "tool_choice")
    return params.structured_outputs


def _derived_seed(seed: int, number: int) -> int:
    """A seed for request ``number`` of an engine: 64 bits that depend on both and look unrelated."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "little")
