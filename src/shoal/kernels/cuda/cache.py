"""K and V pages on the device.

For each KV group one tensor holds the pages of all its layers:

    values   [layers][pages + 1][kv_heads][16 positions][head_dim]                float16, float32 or (q8_0) int8
    scales   [layers][pages + 1][kv_heads][16 positions][head_dim / 32, up]       float16, q8_0 alone

so that a page of one KV head is one run of memory. The last page is the scratch page: rows that pad a step store there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.kernels.base import PAGE_SIZE, AttentionShape, KVGroup
from shoal.kernels.cuda.launch import Tensor, device
from shoal.kernels.cuda.memory import placing
from shoal.kernels.reference import KV_GROUP

_TYPES = {"f16": torch.float16, "f32": torch.float32, "q8_0": torch.int8}


@dataclass(frozen=True, slots=True)
class Pages:
    """K and V of one layer, or of all layers of a group. Where there are no scales, ``k_scales`` and ``v_scales`` are k and v."""

    k: Tensor
    v: Tensor
    k_scales: Tensor
    v_scales: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each once."""
        scales = () if self.k_scales is self.k else (self.k_scales, self.v_scales)
        return self.k, self.v, *scales

    def of_layer(self, place: int) -> Pages:
        """Of one layer of a group."""
        k, v = self.k[place], self.v[place]
        return Pages(k, v, *((k, v) if self.k_scales is self.k else (self.k_scales[place], self.v_scales[place])))


@dataclass(frozen=True, slots=True)
class PagedCache:
    """All pages. ``group`` and ``layers`` are by layer, ``groups`` and ``scratch_pages`` by KV group."""

    dtype: str
    groups: tuple[Pages, ...]
    scratch_pages: tuple[int, ...]
    group: dict[int, int]
    layers: dict[int, Pages]


def kv_cache(groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> PagedCache:
    """Zeroed pages. Raises MemoryLimitError where the device has too little memory."""
    page_bytes = token_bytes(shape.kv_heads, shape.head_dim, dtype) * PAGE_SIZE
    with placing("the KV pages", page_bytes * sum(len(group.layers) * (group.pages + 1) for group in groups)):
        pages = tuple(_group_pages(group, shape, dtype) for group in groups)
    places = [(index, place, layer) for index, group in enumerate(groups) for place, layer in enumerate(group.layers)]
    group_of = {layer: index for index, _, layer in places}
    layers = {layer: pages[index].of_layer(place) for index, place, layer in places}
    return PagedCache(dtype, pages, tuple(group.pages for group in groups), group_of, layers)


def token_bytes(kv_heads: int, head_dim: int, dtype: str) -> int:
    """What K and V of one position take in one layer."""
    value_bytes: int = _TYPES[dtype].itemsize
    scale_bytes = 2 * scale_count(head_dim) if dtype == "q8_0" else 0
    return 2 * kv_heads * (head_dim * value_bytes + scale_bytes)


def scale_count(head_dim: int) -> int:
    """Scales of one position of a KV head in q8_0."""
    return -(-head_dim // KV_GROUP)


def copy_pages(cache: PagedCache, group: int, pairs: Sequence[tuple[int, int]]) -> None:
    """In all layers of a group, copy for each pair the first page onto the second. No page is both first and second."""
    sources, targets = torch.tensor(pairs, dtype=torch.int64, device=device()).view(-1, 2).unbind(1)
    for pages in cache.groups[group].tensors:
        pages.index_copy_(1, targets, pages.index_select(1, sources))


def _group_pages(group: KVGroup, shape: AttentionShape, dtype: str) -> Pages:
    def zeros(width: int, kind: torch.dtype) -> Tensor:
        size = (len(group.layers), group.pages + 1, shape.kv_heads, PAGE_SIZE, width)
        return torch.zeros(size, dtype=kind, device=device())

    k, v = (zeros(shape.head_dim, _TYPES[dtype]) for _ in range(2))
    if dtype != "q8_0":
        return Pages(k, v, k, v)
    k_scales, v_scales = (zeros(scale_count(shape.head_dim), torch.float16) for _ in range(2))
    return Pages(k, v, k_scales, v_scales)
