"""A set of sequence numbers as sorted, disjoint ranges: one per device and conversation, here and in the bench."""

from __future__ import annotations

from bisect import bisect_right


class Runs:
    """A set of sequence numbers as sorted, disjoint ranges: a complete log of any length is one of them."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def add(self, sequence: int) -> None:
        firsts, lasts = self._firsts, self._lasts
        if lasts and sequence == lasts[-1] + 1:
            lasts[-1] = sequence
            return
        at = bisect_right(firsts, sequence)
        if at and sequence <= lasts[at - 1]:
            return
        joins_left = bool(at) and lasts[at - 1] + 1 == sequence
        joins_right = at < len(firsts) and firsts[at] == sequence + 1
        if joins_left and joins_right:
            lasts[at - 1] = lasts.pop(at)
            del firsts[at]
        elif joins_left:
            lasts[at - 1] = sequence
        elif joins_right:
            firsts[at] = sequence
        else:
            firsts.insert(at, sequence)
            lasts.insert(at, sequence)

    def outside(self, allowed: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts that are in none of the allowed ranges."""
        found = list(zip(self._firsts, self._lasts, strict=True))
        for first, last in allowed:
            rest = []
            for low, high in found:
                if low < first:
                    rest.append((low, min(high, first - 1)))
                if high > last:
                    rest.append((max(low, last + 1), high))
            found = rest
        return found

    def missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of first..last that are not in the set."""
        holes = []
        for low, high in zip(self._firsts, self._lasts, strict=True):
            if high < first:
                continue
            if low > last:
                break
            if low > first:
                holes.append((first, low - 1))
            first = high + 1
        if first <= last:
            holes.append((first, last))
        return holes
