"""Which architectures there are: one row of data each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arch:
    """What sets an architecture apart. ``neox_rope``: rotary pairs are (i, i + n) instead of (2i, 2i + 1)."""

    neox_rope: bool


ARCHS: dict[str, Arch] = {
    "llama": Arch(neox_rope=False),
}
