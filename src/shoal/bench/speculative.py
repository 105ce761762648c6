"""Speculation beside none: the same answers, in turns, and how much sooner they come."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.bench.copying import loops
from shoal.bench.drafts import Drafts
from shoal.bench.rates import Ratio
from shoal.bench.workload import Prompt, answers
from shoal.engine.draft import Wanted
from shoal.engine.sequence import Sequence as Running
from shoal.errors import EngineError
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput

Asked = Prompt | dict[str, Any]  # conversations too


@dataclass(frozen=True, slots=True)
class SpeculativeResult:
    """Seconds of each round for the same ``tokens``, which came behind the first of each answer: without and with guesses."""

    requests: int
    batch_size: int
    tokens: int
    plain_seconds: tuple[float, ...]
    seconds: tuple[float, ...]
    drafts: Drafts | None

    @property
    def gain(self) -> Ratio:
        """How many times as many tokens a second."""
        return Ratio.of(self.seconds, self.plain_seconds)

    def as_json(self) -> dict[str, Any]:
        """All of it, and the medians."""
        drafts = {} if self.drafts is None else self.drafts.as_json()
        found = asdict(self) | {"gain": asdict(self.gain)}
        return {name: value for name, value in found.items() if name != "drafts"} | drafts

    def __str__(self) -> str:
        drafts = "" if self.drafts is None else f"; {self.drafts.accepted} of {self.drafts.drafted} guesses right"
        return f"{self.requests} answers, {self.batch_size} at once, {self.tokens} tokens: {self.gain} times the tokens/s{drafts}"


class Replay:
    """A drafter that knows the answers, and says each token of them right with a chance of ``right``, else another one."""

    def __init__(self, longest: int, right: float, vocab_size: int) -> None:
        self.longest, self._right, self._vocab_size = longest, right, vocab_size
        self.answers: dict[tuple[int, ...], list[int]] = {}

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """What comes, or something else: the same at the same place each time."""
        return [self._draft(one) for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        """Nothing is to be forgotten."""

    def _draft(self, wanted: Wanted) -> list[int]:
        assert isinstance(wanted.key, Running)
        place = len(wanted.token_ids) - wanted.key.num_prompt
        coming = self.answers.get(wanted.key.request.prompt_token_ids, [])[place : place + wanted.most]
        return self._said(coming, place)

    def _said(self, coming: list[int], place: int) -> list[int]:
        rng = random.Random(place)
        return [token if rng.random() < self._right else (token + 1) % self._vocab_size for token in coming]


def without_loops(llm: LLM, prompts: Sequence[Asked], params: SamplingParams, count: int) -> list[Asked]:
    """The first ``count`` prompts whose answers do not loop, nor end at once. Raises EngineError where there are fewer."""
    found: list[Asked] = []
    for prompt in prompts:
        (output,) = answers(llm, [prompt], params)
        tokens = output.outputs[0].token_ids
        if len(tokens) > 16 and not loops(tokens):
            found.append(prompt)
        if len(found) == count:
            return found
    raise EngineError(f"only {len(found)} of {len(prompts)} prompts have answers that do not loop; {count} are wanted")


def remember(llm: LLM, replay: Replay, prompts: Sequence[Asked], params: SamplingParams) -> None:
    """Let a replay know the answers."""
    for output in answers(llm, prompts, params):
        replay.answers[tuple(output.prompt_token_ids)] = output.outputs[0].token_ids


def measure_speculative(
    plain: LLM, guessing: LLM, prompts: Sequence[Asked], params: SamplingParams, *, batch_size: int, rounds: int
) -> SpeculativeResult:
    """All prompts, ``batch_size`` at once, with the one and the other, ``rounds`` times in turns, after a round that is not timed.

    Raises EngineError where they do not answer the same.
    """
    (expected, _), (found, _) = (_round(llm, prompts, params, batch_size) for llm in (plain, guessing))
    if expected != found:
        raise EngineError("the answers with guesses are not those without")
    before, seconds = guessing.engine.stats(), {True: list[float](), False: list[float]()}
    for number in range(rounds):
        for guesses in (False, True) if number % 2 else (True, False):
            seconds[guesses].append(_round(guessing if guesses else plain, prompts, params, batch_size)[1])
    return SpeculativeResult(
        requests=len(prompts),
        batch_size=batch_size,
        tokens=sum(len(answer) - 1 for answer in expected),
        plain_seconds=tuple(seconds[False]),
        seconds=tuple(seconds[True]),
        drafts=Drafts.since(guessing, before),
    )


def _round(
    llm: LLM, prompts: Sequence[Asked], params: SamplingParams, batch_size: int
) -> tuple[list[list[int]], float]:
    """All answers, and the seconds from first tokens on."""
    found, seconds = list[list[int]](), 0.0
    for start in range(0, len(prompts), batch_size):
        outputs = answers(llm, prompts[start : start + batch_size], params)
        found += [output.outputs[0].token_ids for output in outputs]
        seconds += time.monotonic() - _last_first_token(outputs)
    return found, seconds


def _last_first_token(outputs: list[RequestOutput]) -> float:
    """When all of them decoded."""
    return max(output.metrics.first_token_time or 0.0 for output in outputs if output.metrics is not None)
