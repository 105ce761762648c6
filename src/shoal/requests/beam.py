"""Beam search: the likeliest texts, found by keeping the best few beginnings after each token (vLLM's classes and rules)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from shoal.chat.reply import ReplyFormat
from shoal.errors import RequestError, TemplateError
from shoal.params import BeamSearchParams, SamplingParams
from shoal.requests.outputs import CompletionOutput, Generation, Logprob, RequestOutput
from shoal.requests.prompts import Prompt
from shoal.requests.submission import Limits, Submitter

Candidates = dict[int, Logprob]
NextTokens = Callable[[list[list[int]], list[SamplingParams]], list[RequestOutput]]  # of beams, with their logprobs


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
    """A beam search that was submitted: ``asked`` are the requests for the next tokens of its beams, each with ``limits``.
    ``request_id``, ``prompt`` and ``reply`` as in ``Generation``."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        search: BeamSearch,
        limits: Limits,
        reply: ReplyFormat | None = None,
    ) -> None:
        self.request_id = request_id
        self.search, self.limits = search, limits
        self.asked: list[Generation] = []
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


class BeamSearches:
    """The beam searches of an LLM: those that are asked for together, and those that were submitted."""

    def __init__(self, submitter: Submitter) -> None:
        self._submitter = submitter
        self._tokenizer = submitter.prompts.tokenizer
        self._submitted: dict[str, Beams] = {}
        self._turn = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._submitted)

    def together(
        self, prompts: Sequence[Prompt], params: BeamSearchParams, next_tokens: NextTokens
    ) -> list[BeamSearchOutput]:
        """What is found for each of ``prompts``, token by token for all of them at once."""
        searches = [self._search(prompt, params) for prompt in prompts]
        while asking := [search for search in searches if isinstance(search, BeamSearch) and not search.finished]:
            wanted = [(beam.tokens, search.step_params()) for search in asking for beam in search.beams]
            answers = iter(next_tokens([tokens for tokens, _ in wanted], [step for _, step in wanted]))
            for search in asking:
                found = [next(answers) for _ in search.beams]
                broken = next((answer for answer in found if not answer.outputs[0].logprobs), None)
                if broken is None:
                    search.take([answer.outputs[0].logprobs[0] for answer in found if answer.outputs[0].logprobs])
                else:
                    why = broken.error or f"the request ended with {broken.outputs[0].finish_reason}"
                    searches[searches.index(search)] = BeamSearchOutput([], why)
        return [self._found(item) for item in searches]

    def _search(self, prompt: Prompt, params: BeamSearchParams) -> BeamSearch | BeamSearchOutput:
        """The beginning of a search, or the output that says why there is none."""
        try:
            return self._begun(self._submitter.prompts.encode(prompt).ids, params)
        except (RequestError, TemplateError) as error:
            return BeamSearchOutput([], str(error))

    def _found(self, item: BeamSearch | BeamSearchOutput) -> BeamSearchOutput:
        """What a search has found, with its texts."""
        if isinstance(item, BeamSearchOutput):
            return item
        best = item.best()
        for sequence in best if self._tokenizer else ():
            sequence.text = self._decoded(sequence.tokens)
        return BeamSearchOutput(best)

    def submit(self, prompt: Prompt, params: BeamSearchParams, limits: Limits, name: str | None) -> str:
        """Put a search in line and return its name. Raises as ``Submitter.submit``."""
        name = self._submitter.next_name() if name is None else name
        encoded = self._submitter.prompts.encode(prompt)
        if name in self._submitted:
            raise RequestError(f"request_id {name!r} is in use", "request_id")
        beams = Beams(name, encoded.text, self._begun(encoded.ids, params), limits, encoded.reply)
        self._ask(beams)
        self._submitted[name] = beams
        return name

    def step(self) -> list[RequestOutput]:
        """Move on the searches of which all beams have their next token; what has ended."""
        if not self._submitted:
            return []
        ended = []
        with self._turn:
            for beams in [item for item in self._submitted.values() if item.answered]:
                output = beams.take()
                if output is None:
                    self._ask(beams)
                elif self._submitted.pop(beams.request_id, None) is not None:
                    for answer in output.outputs if self._tokenizer else ():
                        answer.text = self._decoded(answer.token_ids)
                    ended.append(output)
        return ended

    def abort(self, name: str) -> bool:
        """End a search that was submitted. False if there is none such."""
        beams = self._submitted.pop(name, None)
        if beams is not None:
            self._submitter.drop(beams.asked)
        return beams is not None

    def clear(self) -> None:
        """Forget all of them."""
        self._submitted.clear()

    def _begun(self, ids: list[int], params: BeamSearchParams) -> BeamSearch:
        return BeamSearch(ids, params, self._submitter.eos_ids, self._submitter.engine.max_model_len)

    def _ask(self, beams: Beams) -> None:
        """Put a request for the next token of each beam in line."""
        beams.asked, params, sink = [], beams.search.step_params(), list[Generation]()
        for beam in beams.search.beams:
            name = f"{beams.request_id}/beam-{self._submitter.next_name()}"
            prompt = {"prompt_token_ids": beam.tokens}
            beams.asked.append(self._submitter.submit(prompt, params, beams.limits, sink, name))

    def _decoded(self, ids: list[int]) -> str:
        """The text of ids. Models may have more rows than tokens: those have none."""
        assert self._tokenizer is not None
        return self._tokenizer.decode([token for token in ids if token < self._tokenizer.vocab_size], skip_special=True)
