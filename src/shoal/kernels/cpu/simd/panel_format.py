"""What products in assembly (panels.py) are given, and of which kinds they are; kept apart from them, as those need Numba."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PANEL_TOKENS = 4
PANEL_GROUPS = 8
FLOAT_BYTES = 256  # of a group

# What a product is given, int64 each, at one address; memory of its own follows.
(
    P_CODES,
    P_FLOATS,
    P_GROUPS,  # of the panel
    P_X,  # int8 [tokens, columns], from the first token and the first column of the panel on
    P_SCALES,  # float32 [tokens, columns / 16]
    P_OFFSETS,  # what m or 2^shift is multiplied by: float32 or int32, [tokens, columns / 16] or [tokens, columns / 32]
    P_STRIDE,  # bytes from one token's int8 to the next's; the others as far apart in proportion
    P_SUMS,  # float32 [tokens, 16]: added to
    P_TILES,  # of four tokens each, at least one; 0 afterwards
    P_AHEAD,  # packed weights to ask for meanwhile, from here
    P_AHEAD_END,  # to here, in two tiles
) = (8 * i for i in range(11))

# What products of bytes are summed in: int32 at once (vpdpbusd), or int16, which hold 4, 2 or 1 quads of 4 columns and are then
# widened; or products of words.
Dots = Literal["int32", "by 4", "by 2", "by 1", "words"]


@dataclass(frozen=True, slots=True)
class Product:
    """How codes are multiplied. ``bytes`` of a group of codes; cache ``lines`` to ask for with each group; ``halves``, ``shift``: as in
    groups.py."""

    dots: Dots
    bytes: int
    lines: int
    halves: bool
    shift: int | None
