"""Integers that are known without running a function: constants, and the numbers of iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from depthsmooth.depth.leaves import Shape

Loop = tuple[int, ...]
"""A loop, named by the equations that lead to it."""


class Number(NamedTuple):
    """The integers ``start + step * k``, for k from 0 to before ``length``.

    Attributes:
      start: the first.
      step: the distance between them; 0 for a constant.
      length: how many there are; None if that is not known.
      loop: the loop whose iterations they are for; empty for a constant, and for an array
        that has them along its only dimension.
    """

    start: int
    step: int = 0
    length: int | None = 1
    loop: Loop = ()

    @property
    def in_array(self) -> bool:
        """Whether they are the elements of an array."""
        return self.step != 0 and not self.loop

    @property
    def last(self) -> int | None:
        """The last of them, if that is known."""
        return None if self.length is None else self.start + self.step * (self.length - 1)

    def reverse(self) -> Number | None:
        """The same from the last to the first."""
        return None if self.last is None else self._replace(start=self.last, step=-self.step)

    def by(self, loop: Loop, backwards: bool) -> Number | None:
        """The same for the iterations of a loop, or, without one, as the elements of an array."""
        numbers = self.reverse() if backwards else self
        return numbers and numbers._replace(loop=loop)

    def times(self, factor: int) -> Number:
        """Each of them, multiplied."""
        return self._replace(start=factor * self.start, step=factor * self.step)

    def plus(self, other: Number) -> Number | None:
        """The sum with a constant, or with other numbers of the same loop."""
        if other.step == 0:
            return self._replace(start=self.start + other.start)
        if self.step == 0:
            return other.plus(self)
        if (self.loop, self.length) != (other.loop, other.length):
            return None
        return self._replace(start=self.start + other.start, step=self.step + other.step)

    def below(self, bound: int) -> Number | None:
        """1 if all are below a bound, 0 if none is."""
        # A loop of unknown length that counts places ends before it leaves the array.
        is_below = {end < bound for end in (self.start, self.last) if end is not None}
        return Number(int(is_below.pop())) if len(is_below) == 1 else None


def fold(
    primitive: str,
    numbers: Sequence[Number | None],
    before: Sequence[Shape],
    result: Shape,
    params: Mapping[str, Any],
) -> Number | None:
    """The numbers that a primitive makes of others; None where they are not known.

    Example:
      >>> fold("add", [Number(0, 1, 6, (7,)), Number(3)], [(), ()], (), {})
      Number(start=3, step=1, length=6, loop=(7,))
    """
    if primitive == "iota":
        return Number(0, 1, *result) if len(result) == 1 else None
    if primitive == "select_n":
        which, *cases = numbers
        return cases[which.start] if which is not None and which.step == 0 else None
    known = [number for number in numbers if number is not None]
    kept = zip(known, before, strict=False)
    if len(known) < len(numbers) or any(n.in_array and shape != result for n, shape in kept):
        return None
    match primitive, known:
        case "broadcast_in_dim" | "convert_element_type" | "copy" | "reshape" | "squeeze", [one]:
            return one
        case "neg", [one]:
            return one.times(-1)
        case "rev", [one]:
            return one.reverse() if one.in_array else one
        case "add", [one, two]:
            return one.plus(two)
        case "sub", [one, two]:
            return one.plus(two.times(-1))
        case "mul", [one, two] if one.step == 0 or two.step == 0:
            return one.times(two.start) if two.step == 0 else two.times(one.start)
        case "lt", [one, two] if two.step == 0:
            return one.below(two.start)
    return None
