"""Drafts from a second model of the same vocabulary (vLLM's draft_model): it goes on with a text as the text itself is gone on with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass, field, replace
from itertools import takewhile

from shoal.engine.draft import Wanted
from shoal.engine.draft_model_pace import ModelPace
from shoal.engine.kv_group import PageGroup, longest_prefix
from shoal.engine.masks import MaskFiller, Masks
from shoal.engine.memory_plan import DraftSize, MemoryPlan, draft_home
from shoal.engine.runner import ModelRunner
from shoal.engine.sampler import Sampler
from shoal.engine.scheduler import StepBatch
from shoal.engine.sequence import Metrics, Sequence, Status
from shoal.kernels.base import PAGE_SIZE, Backend
from shoal.models.weights import Model
from shoal.params import EngineConfig

_AT_ONCE = (
    8  # tokens that a text may lack where guesses begin: what the last step has brought, and a few without guesses
)


@dataclass(slots=True, eq=False)
class _Text:
    """A text as the draft model has it. ``key``: the sequence whose it is. ``seq``: its tokens, the last guesses behind them, and their
    pages. ``known`` of its tokens are no guesses; the first ``settled`` are computed for good. ``reading``: it has begun to take in
    more than one round does."""

    key: Sequence
    seq: Sequence
    settled: int = 0
    known: int = 0
    reading: bool = False
    most: int = 0  # guesses that are wanted
    draft: list[int] = field(default_factory=list)

    @property
    def lack(self) -> int:
        """Tokens that have no KV."""
        return len(self.seq.token_ids) - self.seq.num_computed

    @property
    def goes_on(self) -> bool:
        """Whether another guess makes sense."""
        return len(self.draft) < self.most and self.draft[-1] not in self.seq.stop_ids

    def take(self, tokens: list[int], most: int) -> None:
        """Take in what has come, of which the last guesses may be a part, and forget those that were wrong. The last token is yet to be
        computed, or is so again: guesses begin at its row."""
        known = self.seq.token_ids
        same = self.settled + _num_alike(known[self.settled :], tokens[self.settled :])
        del known[same:]
        known += tokens[same:]
        self.known, self.most, self.draft = len(tokens), most, []
        self.seq.num_computed = min(self.seq.num_computed, same, len(tokens) - 1)


class ModelDrafter:
    """Guesses for all texts together: a step of the ``model`` for each place of the drafts.

    Its pages hold a text from one draft to the next, so that each token is computed once; what was guessed wrong is written over.
    Prompts begin after the longest prefix that others have left. Where pages run out, those texts lose theirs for which nothing is
    wanted now, the least recently wanted first. A text that lacks much is read first, as much of it at a time as a step holds, if
    ``pace`` finds that worth it; meanwhile it has no drafts. ``backend``: that of the model that the guesses are for.
    """

    def __init__(self, model: Model, backend: Backend, longest: int, pace: ModelPace) -> None:
        self.longest, self.pace = longest, pace
        self.rows = 0  # tokens computed since the start
        self._model, self._backend = model, draft_home(backend)
        self._texts = OrderedDict[object, _Text]()  # the least recently wanted first
        self._asked: set[object] = set()  # those that are wanted now
        self._groups: list[PageGroup] = []
        self._compute: tuple[ModelRunner, Sampler, MaskFiller] | None = None

    @property
    def size(self) -> DraftSize:
        """For the memory plan."""
        return DraftSize(self._model.config, self._model.nbytes)

    @property
    def num_filled(self) -> tuple[int, ...]:
        """Pages of each group that hold something."""
        return tuple(group.pool.num_filled for group in self._groups)

    def bind(self, plan: MemoryPlan, config: EngineConfig) -> None:
        """Take the memory that was planned."""
        limits = plan.step_limits(config)
        runner = ModelRunner.planned(self._model, self._backend, plan, config)
        vocab_size, most = self._model.config.vocab_size, limits.max_seqs
        self._compute = runner, Sampler(runner.network, vocab_size, most), MaskFiller(vocab_size, most)
        self._groups, self._most_rows = plan.page_groups(), limits.max_rows
        self._max_len, self._share = plan.max_model_len, config.enable_prefix_caching

    def unbind(self) -> None:
        """Let go of it, and of all texts."""
        if self._compute is not None:
            self._compute[2].close()
        self._compute = None
        self._texts.clear()
        self._groups = []

    def draft(self, wanted: Row[Wanted]) -> list[list[int]]:
        """A draft for each."""
        self._asked = {one.key for one in wanted}
        asked = [text for one in wanted if (text := self._taken(one)) is not None]
        self._read([text for text in asked if self._is_behind(text)])
        ready = [text for text in asked if self._is_ready(text)]
        if ready:
            with self.pace.rounds(max(text.most for text in ready)):
                self._guess(ready)
        return [self._texts[one.key].draft if one.key in self._texts else [] for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        """Forget a text."""
        text = self._texts.pop(key, None)
        if text is not None:
            self._release(text)

    def check(self) -> None:
        """Assert that pages and texts fit together."""
        for index, group in enumerate(self._groups):
            group.pool.check([self._held(text, index) for text in self._texts.values()])

    def _taken(self, one: Wanted) -> _Text | None:
        """The text that guesses are wanted for, brought up to date; None if it has outgrown the draft model's context."""
        most = min(one.most, self._max_len - len(one.token_ids) + 1)
        if most < 1:
            self.ended(one.key, [])
            return None
        if one.key not in self._texts:
            self._texts[one.key] = self._new(one.key)
        self._texts.move_to_end(one.key)
        text = self._texts[one.key]
        text.take(one.token_ids, most)
        return text

    def _new(self, key: object) -> _Text:
        """What the request asks of its tokens goes for the guesses too, as far as that says which tokens come. Its constraint is copied
        for each draft anew."""
        assert isinstance(key, Sequence), "the engine's keys are its sequences"
        plain = replace(key.request.params, n=1, logprobs=None, logprob_token_ids=None, prompt_logprobs=None)
        request = replace(key.request, params=plain, constraint=None)
        seq = Sequence(request, key.max_len, Metrics(0.0), key.sample, status=Status.RUNNING)
        seq.pages = [[] for _ in self._groups]
        return _Text(key, seq)

    # -- what texts lack -------------------------------------------------------------------------------------------

    def _is_behind(self, text: _Text) -> bool:
        """Whether it lacks more than the first round takes in."""
        return text.lack > min(_AT_ONCE, self._most_rows)

    def _is_ready(self, text: _Text) -> bool:
        """Whether it lacks no more, and has pages for its guesses."""
        alive = self._texts.get(text.key) is text
        return alive and not self._is_behind(text) and self._extend(text, text.lack + text.most - 1)

    def _read(self, behind: list[_Text]) -> None:
        """Compute what texts lack but for the last token, as much as a step holds."""
        left, may_begin = self.pace.rows_to_read(self._most_rows), self.pace.may_begin
        busy: set[int] = set()  # requests: the other samples of one wait for the prompt that the first of them reads
        texts, counts = list[_Text](), list[int]()
        for text in behind:
            begun, request = bool(text.seq.pages[0]), id(text.key.request)
            if not left or not (text.reading or may_begin) or (request in busy and not begun):
                continue
            if self._share and not begun:
                self._begin(text)
            if self._share and text.settled < text.seq.num_prompt // PAGE_SIZE * PAGE_SIZE:
                busy.add(request)
            count = min(text.lack - 1, left)
            if self._is_behind(text) and self._extend(text, count):
                texts.append(text)
                counts.append(count)
                left -= count
        if texts:
            with self.pace.reading(sum(counts)):
                self._forward(texts, counts)
        for text in texts:
            text.reading = self._is_behind(text)
            self._settle(text)

    def _begin(self, text: _Text) -> None:
        """Begin with the pages that others have left."""
        keys = text.seq.page_keys(PAGE_SIZE, (text.known - 1) // PAGE_SIZE)
        keys = keys[: longest_prefix(self._groups, keys)]
        text.seq.pages = [group.share(keys) for group in self._groups]
        text.seq.num_computed = text.settled = len(keys) * PAGE_SIZE

    def _settle(self, text: _Text) -> None:
        """What has come is computed: let others find its full pages, and let go of those that no later token sees."""
        seq, before = text.seq, text.settled
        text.settled = min(seq.num_computed, text.known - 1)
        first, stop = before // PAGE_SIZE, text.settled // PAGE_SIZE
        if self._share and first < stop:
            keys = seq.page_keys(PAGE_SIZE, stop)[first:]
            for pages, group in zip(seq.pages, self._groups, strict=True):
                group.pool.register(keys, pages[first:stop], seq.origin)
        for pages, group in zip(seq.pages, self._groups, strict=True):
            group.pool.release(pages[group.use.num_passed(before) : group.use.num_passed(text.settled)])

    # -- guesses ---------------------------------------------------------------------------------------------------

    def _guess(self, texts: list[_Text]) -> None:
        """Rounds, until all that is wanted is guessed."""
        for text in texts:  # what samplers and constraints remember is the text's; what guesses add goes with them
            seq, key = text.seq, text.key
            seq.sampling = None if key.sampling is None else key.sampling.copy()
            seq.constraint = None if key.constraint is None else key.constraint.copy()
        going_on = texts
        while going_on:
            for part in self._parts(going_on):
                self._round(part)
            going_on = [text for text in going_on if text.goes_on]
        for text in texts:
            self._settle(text)

    def _parts(self, texts: list[_Text]) -> Iterator[list[_Text]]:
        """As many at a time as a step has rows for."""
        part, rows = list[_Text](), 0
        for text in texts:
            if rows + text.lack > self._most_rows:
                yield part
                part, rows = [], 0
            part.append(text)
            rows += text.lack
        yield part

    def _round(self, texts: list[_Text]) -> None:
        """A further guess for each."""
        batch, masks = self._forward(texts, [text.lack for text in texts])
        _, sampler, _ = self._bound
        tokens, _ = sampler.sample(batch.sampling, None, masks)
        for text, token in zip(texts, tokens, strict=True):
            if token < 0 or text.seq.constraint_error is not None:  # NaN, or no mask: this is as far as it goes
                text.most = 0
                continue
            text.seq.origin.sound = True
            text.seq.token_ids.append(token)
            if text.seq.constraint is not None and _is_complete(text.seq, token):
                text.most = 0  # nothing follows it: it comes with the token before it
            else:
                text.draft.append(token)

    def _forward(self, texts: list[_Text], counts: list[int]) -> tuple[StepBatch, Masks | None]:
        """Compute so many further tokens of each, and masks of those that are sampled."""
        runner, _, filler = self._bound
        batch = StepBatch()
        for text, count in zip(texts, counts, strict=True):
            batch.add(text.seq, count)
        filler.start(batch.sampling)
        try:
            runner.forward(batch)
        finally:
            masks = filler.wait(batch.sampling)
        self.rows += batch.num_rows
        for seq in batch.sequences:
            seq.num_computed += seq.num_scheduled
        return batch, masks

    @property
    def _bound(self) -> tuple[ModelRunner, Sampler, MaskFiller]:
        assert self._compute is not None, "it is bound before anything is wanted"
        return self._compute

    # -- pages -----------------------------------------------------------------------------------------------------

    def _extend(self, text: _Text, count: int) -> bool:
        """Pages for so many further tokens; without them the text is forgotten, for others to go on."""
        seq = text.seq
        short = max(0, -(-(seq.num_computed + count) // PAGE_SIZE) - len(seq.pages[0]))
        while any(short > group.pool.num_free for group in self._groups):
            if not self._make_room():
                self.ended(text.key, [])
                return False
        for pages, group in zip(seq.pages, self._groups, strict=True):
            pages += group.pool.allocate(short)
        return True

    def _make_room(self) -> bool:
        """Forget the text that has not been wanted for the longest time; False if all are wanted now."""
        key = next((key for key in self._texts if key not in self._asked), None)
        if key is None:
            return False
        self.ended(key, [])
        return True

    def _held(self, text: _Text, group: int) -> list[int]:
        return text.seq.pages[group][self._groups[group].use.num_passed(text.settled) :]

    def _release(self, text: _Text) -> None:
        text.seq.origin.sound = text.seq.origin.sound is True
        for index, group in enumerate(self._groups):
            group.pool.release(self._held(text, index))


def _is_complete(seq: Sequence, token: int) -> bool:
    """Whether nothing follows a guess, for the constraint has all that it wants, or does not allow it."""
    try:
        return seq.follow(token)
    except Exception:  # should it come to that, the same is raised for the sequence itself
        return True


def _num_alike(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
