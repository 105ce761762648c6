"""Beam search: the likeliest texts, found by keeping the best few beginnings after each token (vLLM's classes and rules)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.chat.reply import ReplyFormat
from shoal.params import BeamSearchParams, SamplingParams
from shoal.requests.outputs import CompletionOutput, Generation, Logprob, RequestOutput

Candidates = dict[int, Logprob]


@dataclass(slots=True)
class BeamSearchSequence:
    """One text. ``tokens`` begin with the prompt's; ``logprobs``: for each token after it all candidates at its place. ``cum_logprob``
    is the sum of the chosen ones'. ``text`` is that of all tokens, None without a tokenizer."""

    tokens: list[int]
    logprobs: list[Candidates] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What was found for one prompt: at most ``beam_width`` sequences, the best first; none where ``error`` says why."""

    sequences: list[BeamSearchSequence]
    error: str | None = None


class Beams:
    """A beam search that was submitted: ``asked`` are the requests for the next tokens of its beams. ``request_id``, ``prompt``
    and ``reply`` as in ``Generation``."""

    def __init__(
        self, request_id: str, prompt: str | None, search: BeamSearch, reply: ReplyFormat | None = None
    ) -> None:
        self.request_id = request_id
        self.search = search
        self.asked: list[Generation] = []
        self.limits: Any = None  # those of each request
        self._prompt, self._reply = prompt, reply

    @property
    def answered(self) -> bool:
        """Whether all that was asked for is there."""
        return all(item.finished for item in self.asked)

    def take(self) -> RequestOutput | None:
        """Go on with the answers; the output if that is the end."""
        answers = [item.snapshot() for item in self.asked]
        found = [answer.outputs[0].logprobs for answer in answers]
        broken = next((answer for answer, logprobs in zip(answers, found, strict=True) if not logprobs), None)
        if broken is not None:
            return self.ended(broken.outputs[0].finish_reason or "error", broken.error)
        self.search.take([logprobs[0] for logprobs in found if logprobs])
        return self.ended("stop") if self.search.finished else None

    def ended(self, reason: str, error: str | None = None) -> RequestOutput:
        """The output. For another ``reason`` than stop it has one answer, without text."""
        prompt = self.search.prompt
        answers = [CompletionOutput(0, "", [], finish_reason=reason)]
        if reason == "stop":
            answers = [
                CompletionOutput(
                    index,
                    "",
                    beam.tokens[len(prompt) :],
                    beam.cum_logprob,
                    finish_reason=beam.finish_reason,
                    stop_reason=beam.stop_reason,
                    reply_format=self._reply and replace(self._reply, key=f"{self._reply.key}.{index}"),
                )
                for index, beam in enumerate(self.search.best())
            ]
        return RequestOutput(self.request_id, self._prompt, prompt, answers, finished=True, error=error)


class BeamSearch:
    """The search for one prompt, token by token: ``beams`` want their next token, until ``finished``.

    ``longest``: the tokens that a model's context has room for, prompt and output.
    """

    def __init__(self, prompt: Sequence[int], params: BeamSearchParams, eos_ids: Collection[int], longest: int) -> None:
        self.prompt = list(prompt)
        self.beams = [BeamSearchSequence(self.prompt)]
        self._params = params
        self._eos_ids = () if params.ignore_eos else eos_ids
        self._stop = min(len(prompt) + params.max_tokens, longest)
        self._completed: list[tuple[float, BeamSearchSequence]] = []

    @property
    def finished(self) -> bool:
        """Whether no beam wants another token."""
        return not self.beams or len(self.beams[0].tokens) >= self._stop

    def step_params(self) -> SamplingParams:
        """How the next tokens of the beams are to be asked for."""
        width, temperature = self._params.beam_width, self._params.temperature
        return SamplingParams(max_tokens=1, logprobs=2 * width, temperature=temperature, ignore_eos=True)

    def take(self, candidates: Sequence[Candidates]) -> None:
        """The likeliest next tokens of each beam."""
        grown: list[BeamSearchSequence] = []
        for beam, found in zip(self.beams, candidates, strict=True):
            for token, logprob in found.items():
                longer = BeamSearchSequence(
                    [*beam.tokens, token], [*beam.logprobs, found], beam.cum_logprob + logprob.logprob
                )
                if token in self._eos_ids:
                    self._complete(longer, token)
                else:
                    grown.append(longer)
        self.beams = sorted(grown, key=self._score, reverse=True)[: self._params.beam_width]

    def best(self) -> list[BeamSearchSequence]:
        """The best sequences so far, those first that score highest."""
        for beam in self.beams:
            beam.finish_reason = "length"
        ranked = [*self._completed, *((self._score(beam), beam) for beam in self.beams)]
        ranked.sort(key=lambda item: item[0], reverse=True)
        return [beam for _, beam in ranked[: self._params.beam_width]]

    def _complete(self, beam: BeamSearchSequence, token: int) -> None:
        score = self._score(beam, len(beam.tokens) - 1)  # the end does not count as a token
        beam.finish_reason, beam.stop_reason = "stop", token
        if not self._params.include_stop_str_in_output:
            beam.tokens.pop()
            beam.logprobs.pop()
        self._completed.append((score, beam))

    def _score(self, beam: BeamSearchSequence, length: int | None = None) -> float:
        """As in vLLM: the prompt counts in the length."""
        score: float = beam.cum_logprob / (length or len(beam.tokens)) ** self._params.length_penalty
        return score
