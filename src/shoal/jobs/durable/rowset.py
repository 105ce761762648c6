"""A set of row numbers."""

from __future__ import annotations


class RowSet:
    """A set of row numbers that takes one bit for each number up to its largest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, row: int) -> bool:
        place, bit = divmod(row, 8)
        return place < len(self._bits) and bool(self._bits[place] >> bit & 1)

    def add(self, row: int) -> None:
        """Put ``row`` (0 or more) into the set."""
        if row in self:
            return
        place, bit = divmod(row, 8)
        if place >= len(self._bits):
            self._bits.extend(bytes(place + 1 - len(self._bits)))
        self._bits[place] |= 1 << bit
        self._count += 1

    def remove_all(self, other: RowSet) -> None:
        """Take the rows of ``other`` out of this set."""
        left = int.from_bytes(self._bits, "little") & ~int.from_bytes(other._bits, "little")
        self._bits[:] = left.to_bytes(len(self._bits), "little")
        self._count = left.bit_count()
