"""Where each layer finds the layers that a stencil reads: in which array, and where in it."""

from __future__ import annotations

from collections.abc import Sequence

from depthsmooth.arrays.layers import Tensor
from depthsmooth.operators.stencil import Stencil

Sources = Sequence[tuple[int, int] | None]
"""For each layer of an array, where a tap finds its neighbour: an array, and an index in it."""


def reads_of(stencil: Stencil, tensor: Tensor) -> list[list[Sources]]:
    """For each array and each offset of a stencil, the sources of its layers.

    A source is None where there is no such neighbour, because the run of layers ends.
    """
    held = {layer: (j, i) for j, piece in enumerate(tensor) for i, layer in enumerate(piece.layers)}
    source_of = {None: None} | held
    taps = [stencil.neighbours(offset) for offset in stencil.offsets]
    return [[[source_of[tap[layer]] for layer in piece.layers] for tap in taps] for piece in tensor]


def shifts_in(sources: Sources) -> set[tuple[int, int]]:
    """The arrays that the sources lie in, each with the distance from a layer to its source."""
    return {(source[0], source[1] - i) for i, source in enumerate(sources) if source is not None}


def offsets_in(j: int, reads: Sequence[Sequence[Sources]]) -> list[int]:
    """The distances by which array j is shifted as a whole."""
    shifts = [shifts_in(sources) for read in reads for sources in read]
    return [offset for found in shifts if len(found) == 1 for at, offset in found if at == j]
