"""How long sequences may be and how many KV pages there are for them, given the memory at hand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import NamedTuple

from shoal.engine.kv_group import PageGroup, PageUse
from shoal.engine.page_pool import PagePool
from shoal.errors import MemoryLimitError, ParameterError
from shoal.kernels.base import PAGE_SIZE, Backend, StepLimits
from shoal.models.config import ModelConfig
from shoal.params import EngineConfig, parse_size
from shoal.system.machine_limits import MemoryRoom, memory_room

DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_KV_MEMORY = 1 << 30
DEFAULT_KV_SHARE = 0.4  # of the memory available


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One KV group: its layers, what a sequence holds of its pages, bytes of a page in all its layers, and how many there are."""

    layers: tuple[int, ...]
    use: PageUse
    page_bytes: int
    num_pages: int

    def num_seqs(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit at once while at most one of them is in its prompt."""
        most = self.use.most_pages(length)
        return 0 if self.num_pages < most else 1 + (self.num_pages - most) // self.use.settled_pages(length)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine takes; ``max_model_len`` in tokens. ``draft``: what its draft model takes beside that."""

    weights_bytes: int
    max_model_len: int
    groups: tuple[GroupPlan, ...]
    draft: MemoryPlan | None = None

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each group."""
        return tuple(group.num_pages for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens that all pages together hold: those of the largest group."""
        return max(self.num_pages) * PAGE_SIZE

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(group.num_pages * group.page_bytes for group in self.groups)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one position in all layers."""
        return sum(group.page_bytes for group in self.groups) // PAGE_SIZE

    def num_seqs(self, length: int) -> int:
        """How many sequences of ``length`` tokens fit at once; 0 if not even one does."""
        return min(group.num_seqs(length) for group in self.groups)

    def page_groups(self) -> list[PageGroup]:
        """The groups with all their pages free."""
        return [PageGroup(PagePool(group.num_pages), group.use) for group in self.groups]

    def step_limits(self, config: EngineConfig) -> StepLimits:
        """The largest step."""
        return StepLimits(
            max_rows=config.max_num_batched_tokens,
            max_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
            max_pages_per_seq=-(-self.max_model_len // PAGE_SIZE),
        )


class DraftSize(NamedTuple):
    """A draft model, and bytes of its weights in the file."""

    model: ModelConfig
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class OwnedPages:
    """KV pages of each group that give way to the new ones, a draft model's after the others; ``filled`` of them have been written to,
    as far as is known."""

    total: tuple[int, ...] = ()
    filled: tuple[int, ...] = ()


NOTHING = OwnedPages()


def plan_memory(
    model: ModelConfig,
    weights_bytes: int,
    config: EngineConfig,
    backend: Backend,
    owned: OwnedPages = NOTHING,
    *,
    unloaded: Mapping[Backend, int] | None = None,
    draft: DraftSize | None = None,
) -> MemoryPlan:
    """How long sequences may be and how many KV pages of ``backend`` there will be, given the memory available now and what is
    ``owned`` already. ``unloaded``: bytes of weights that each backend is still to get.

    Without ``kv_cache_memory``: what ``max_num_seqs`` sequences of ``max_model_len`` need, at most 1 GiB (or one such
    sequence, if that is more) and 40 % of the memory available, to a container if it has less; in a GPU's own memory, all that is left.
    Where layers lie on two backends, there are as many pages as the tighter has room for. A ``draft`` model has pages for as many
    tokens, out of the same memory; its sequences are no longer than its own context. What the user gives must hold a sequence of both
    then, so that no request is refused and no answer ends for want of pages that there would be without it.

    Raises MemoryLimitError with needed and available bytes, ParameterError for a ``max_model_len`` that the model does not have.
    """
    longest = max_model_len(model, config)
    if model.arch.encoder:
        return MemoryPlan(weights_bytes, longest, (_encoder_group(model, config, backend),))
    uses = _uses(model, longest, config)
    draft_longest = 0 if draft is None else min(longest, draft.model.context_length)
    draft_uses = {} if draft is None else _uses(draft.model, draft_longest, config)
    homes = []
    for owner, page_bytes in _page_bytes(model, config, backend).items():
        groups = _groups(uses, page_bytes)
        if draft is not None:
            at_home = owner is draft_home(backend)
            groups += _groups(draft_uses, _page_bytes(draft.model, config, owner)[owner] if at_home else {})
        sizes = _Sizes(groups, longest, config.max_num_seqs)
        homes.append(_Home(owner, sizes, owned, (unloaded or {}).get(owner, 0)))
    # In all homes together a page of a group takes what it takes in each.
    everywhere = _together([home.sizes for home in homes])
    level = _level(config, everywhere, homes)
    if draft is not None and level < everywhere.seq_level:
        needed = everywhere.num_bytes(everywhere.seq_level)
        raise MemoryLimitError(
            f"kv_cache_memory: KV pages of both models for one sequence of max_model_len need {needed} bytes,"
            f" {config.kv_cache_memory} bytes are given: lower max_model_len, or have no draft model"
        )
    pages = everywhere.pages(level)
    planned = tuple(replace(g, num_pages=n) for g, n in zip(everywhere.groups, pages, strict=True))
    of_draft = None if draft is None else MemoryPlan(draft.weights_bytes, draft_longest, planned[len(uses) :])
    return MemoryPlan(weights_bytes, longest, planned[: len(uses)], of_draft)


def draft_home(backend: Backend) -> Backend:
    """Which of the backends that ``backend`` is made of computes a draft model: the one with the head, which is the faster."""
    return backend.owners("output.weight")[0]


def kv_dtype(model: ModelConfig, config: EngineConfig) -> str:
    """How K and V are stored. An encoder keeps those of one layer of one step, which may as well be exact."""
    return "f32" if model.arch.encoder else config.kv_cache_dtype


def max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    """The most tokens of a sequence: those of an encoder go through one step. Raises ParameterError for more than the model has."""
    if model.arch.encoder:
        return _longest_step(model, config)
    if config.max_model_len is None:
        return min(model.context_length, DEFAULT_MAX_MODEL_LEN)
    if config.max_model_len > model.context_length:
        raise ParameterError(
            "max_model_len", config.max_model_len, f"at most the model's context {model.context_length}"
        )
    return config.max_model_len


def _longest_step(model: ModelConfig, config: EngineConfig) -> int:
    most = min(model.context_length, config.max_num_batched_tokens)
    if (config.max_model_len or 0) > most:
        both = (
            f"the model's context {model.context_length} and of max_num_batched_tokens {config.max_num_batched_tokens}"
        )
        raise ParameterError("max_model_len", config.max_model_len, f"for an encoder at most the lesser of {both}")
    return config.max_model_len or most


def _encoder_group(model: ModelConfig, config: EngineConfig, backend: Backend) -> GroupPlan:
    """Pages of one layer, which all layers use in turn, for all rows of a step: each sequence may leave a page half empty."""
    page_bytes = PAGE_SIZE * backend.kv_token_bytes(model.n_kv_heads, model.head_dim, kv_dtype(model, config))
    rows, seqs = config.max_num_batched_tokens, min(config.max_num_seqs, config.max_num_batched_tokens)
    return GroupPlan((0,), PageUse(PAGE_SIZE, rows), page_bytes, -(-rows // PAGE_SIZE) + seqs)


def _uses(model: ModelConfig, longest: int, config: EngineConfig) -> dict[tuple[int, ...], PageUse]:
    """The KV groups by their layers."""
    return {
        layers: PageUse(PAGE_SIZE, config.max_num_batched_tokens, window)
        for window, layers in _layers_by_window(model.windows, longest).items()
    }


def _layers_by_window(windows: tuple[int, ...], longest: int) -> dict[int, tuple[int, ...]]:
    """Layers of each window; one that no sequence outgrows is none (0)."""
    found: dict[int, tuple[int, ...]] = {}
    for layer, window in enumerate(windows):
        effective = window if window < longest else 0
        found[effective] = (*found.get(effective, ()), layer)
    return found


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How the pages of the groups grow together. ``level`` is the number of pages where no window makes it less."""

    groups: list[GroupPlan]
    longest: int
    max_seqs: int

    @property
    def seq_level(self) -> int:
        """Pages of a sequence of greatest length."""
        return -(-self.longest // PAGE_SIZE)

    def pages(self, level: int) -> list[int]:
        """Pages of each group: as many as one sequence needs first, then as many as more of them need.

        For each page without a window, sequences shorter than the window need one with it, those of greatest length
        window / length. The geometric mean of the two is never far from what a mix of both needs.
        """
        return [min(level, self._of_use(group, level - self.seq_level)) for group in self.groups]

    def num_bytes(self, level: int) -> int:
        """Bytes of all of them."""
        return sum(g.page_bytes * n for g, n in zip(self.groups, self.pages(level), strict=True))

    def level_within(self, budget: int) -> int:
        """The highest that ``budget`` bytes hold, as far as it is of use."""
        levels = range(1, self.seq_level * self.max_seqs + 1)
        return bisect_right(levels, budget, key=self.num_bytes)

    def _of_use(self, group: GroupPlan, beyond: int) -> int:
        first, more = group.use.most_pages(self.longest), group.use.settled_pages(self.longest)
        share = sqrt(more / self.seq_level)
        return first + min(ceil(max(0, beyond) * share), (self.max_seqs - 1) * more)


def _page_bytes(model: ModelConfig, config: EngineConfig, backend: Backend) -> dict[Backend, dict[int, int]]:
    """For each of the backends that hold the model, of each of its layers what a page takes."""
    found: dict[Backend, dict[int, int]] = {}
    for owner in backend.owners("output.weight"):  # may hold no layer at all
        found[owner] = {}
    for layer in range(model.n_layers):
        (owner,) = backend.owners(f"blk.{layer}.")
        token_bytes = owner.kv_token_bytes(model.n_kv_heads, model.head_dim, kv_dtype(model, config))
        found.setdefault(owner, {})[layer] = PAGE_SIZE * token_bytes
    return found


def _groups(uses: Mapping[tuple[int, ...], PageUse], page_bytes: Mapping[int, int]) -> list[GroupPlan]:
    """All groups, of which only layers with ``page_bytes`` take memory."""
    return [
        GroupPlan(layers, use, sum(page_bytes.get(layer, 0) for layer in layers), 0) for layers, use in uses.items()
    ]


def _together(parts: list[_Sizes]) -> _Sizes:
    columns = zip(*(part.groups for part in parts), strict=True)
    groups = [replace(column[0], page_bytes=sum(group.page_bytes for group in column)) for column in columns]
    return replace(parts[0], groups=groups)


@dataclass(frozen=True, slots=True)
class _Home:
    """A backend with what pages take in its memory, those that give way, and bytes of weights that it is still to get."""

    backend: Backend
    sizes: _Sizes
    owned: OwnedPages
    unloaded: int

    def room(self) -> MemoryRoom:
        """Where there are no pages but the old ones. The machine's memory is taken when pages are first written, a GPU's at once."""
        own = self.backend.memory_room()
        if own is None:
            room = memory_room()
            return replace(room, available=room.available + self._bytes(self.owned.filled))
        return replace(own, available=own.available + self._bytes(self.owned.total) - self.unloaded)

    def require(self, level: int) -> None:
        """Raise MemoryLimitError without the memory for pages up to ``level``; what is owned can always be had again."""
        needed, room = self.sizes.num_bytes(level), self.room()
        if needed > max(room.available, self._bytes(self.owned.total)):
            raise MemoryLimitError(f"kv_cache_memory: {needed} bytes are needed{self._place}, {room}")

    def default_level(self) -> int:
        """Where the user gives no size. Raises MemoryLimitError where it is less than a sequence needs."""
        sizes, room = self.sizes, self.room()
        seq_bytes = sizes.num_bytes(sizes.seq_level)
        budget = room.available
        if self.backend.memory_room() is None:
            budget = min(max(DEFAULT_KV_MEMORY, seq_bytes), int(room.available * DEFAULT_KV_SHARE))
        if budget < seq_bytes:
            raise MemoryLimitError(
                f"KV pages for one sequence of max_model_len need {seq_bytes} bytes{self._place}, {room}, of which {budget} may be"
                " used: lower max_model_len or set kv_cache_memory"
            )
        return sizes.level_within(budget)

    @property
    def _place(self) -> str:
        return "" if self.backend.memory_room() is None else f" on {self.backend.name}"

    def _bytes(self, pages: tuple[int, ...]) -> int:
        return sum(n * group.page_bytes for n, group in zip(pages, self.sizes.groups, strict=False))


def _level(config: EngineConfig, everywhere: _Sizes, homes: list[_Home]) -> int:
    """How many pages, no more than are of use. What the user gives may hold less than one full-length sequence."""
    if config.kv_cache_memory is None:
        return min(home.default_level() for home in homes)
    budget, page_bytes = parse_size("kv_cache_memory", config.kv_cache_memory), everywhere.num_bytes(1)
    if budget < page_bytes:
        raise MemoryLimitError(f"kv_cache_memory: one page needs {page_bytes} bytes, {budget} bytes are given")
    level = everywhere.level_within(budget)
    for home in homes:
        home.require(level)
    return level
