"""The kernel: layers shifted, weighted and added, wherever arrays hold them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthsmooth.arrays.dense import multiply
from depthsmooth.arrays.layers import Halo, Layers, Shift, narrowed, pad, some_of, widened
from depthsmooth.depth.leaves import Axes
from depthsmooth.mesh import AxisName
from depthsmooth.operators.stencil import Stencil, exists, matrix_of


def apply(
    stencil: Stencil,
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    zero: jax.typing.ArrayLike = 0,
    *,
    shards: Sequence[int] | None = None,
    axis_name: AxisName | None = None,
    halos: Sequence[Halo] | None = None,
    wide: bool = False,
) -> list[jax.Array]:
    r"""Mixes the layers that several arrays hold between them: :math:`(S \otimes I)\, u`.

    One fused read and write of each array, which are never brought together into
    one. Layers that are dealt to the arrays in turn are shifted as a whole. Types
    narrower than 32 bits are mixed in float32 and cast back; float32, float64 and
    complex types keep their own arithmetic.

    Where devices split the layers into shards, each gets the layers that the stencil reads
    beyond its own from those that hold them, as they are, and nothing else.

    A stencil of more than 16 offsets is applied as a matrix instead, to all the layers
    brought together: faster from there on (``benchmarks/large_radius.py``), at the cost
    of a copy, and of a NaN in one layer reaching every other of its run. Each shard then
    passes every device that reads of it.

    Args:
      stencil: the operator, for all the layers.
      updates: arrays of any inexact dtype, alike but for their depth axes.
      axes: for each array its depth axes, outer to inner.
      layers: for each array the layers it holds, in row-major order of its depth
        axes. Every layer is held once.
      zero: a scalar 0. If it is traced, so that a compiler cannot know that it is 0,
        the result of shifts is the same in every bit, however the layers are laid out.
      shards: for each array into how many parts devices split its layers; 1, unless said.
      axis_name: in ``jax.shard_map``, where a device has one shard of each array: the mesh
        axis along which the others are.
      halos: what :func:`exchange` gives for the same arguments, if it is at hand.
      wide: whether results of narrow types stay in float32.

    Returns:
      Arrays of the shapes, shardings and, unless ``wide``, dtypes and weak types of
      ``updates``.

    Example:
      >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
      >>> [stacked] = apply(halves, [jnp.array([1.0, 2.0, 5.0])], [(0,)], [(0, 1, 2)])
      >>> stacked.tolist()
      [2.0, 3.0, 2.0]
      >>> dealt = apply(halves, [jnp.array([1.0, 5.0]), jnp.array(2.0)], [(0,), ()], [(0, 2), (1,)])
      >>> [array.tolist() for array in dealt]
      [[2.0, 2.0], 3.0]
    """
    if stencil.is_identity:
        return [widened(update) for update in updates] if wide else list(updates)
    layout = _layout(updates, axes, layers, shards)
    if stencil.is_dense:
        runs = stencil.runs or (stencil.layers,)
        reach = max(map(abs, stencil.offsets))
        mixed: list[jax.Array] = multiply(
            list(updates), matrix_of(stencil), *layout, axis_name, runs, reach
        )
    else:
        if halos is None:
            halos = exchange(stencil, updates, axes, layers, shards=shards, axis_name=axis_name)
        mixed = _shift_and_add(
            list(updates),
            list(halos),
            list(stencil.weights),
            zero,
            _neighbours(stencil),
            *layout,
            axis_name,
        )
    return mixed if wide else list(map(narrowed, mixed, updates))


def exchange(
    stencil: Stencil,
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    *,
    shards: Sequence[int] | None = None,
    axis_name: AxisName | None = None,
) -> list[Halo]:
    """What a stencil reads of other shards: r layers from either side for the radius r.

    Args:
      stencil: as the others in :func:`apply`.
      updates: the arrays.
      axes: their depth axes.
      layers: the layers they hold.
      shards: into how many parts devices split these.
      axis_name: the mesh axis that the parts are along, in ``jax.shard_map``.

    Returns:
      For each array its halo, of its type.
    """
    layout = _layout(updates, axes, layers, shards)
    if stencil.is_identity or stencil.is_dense or set(layout.shards) <= {1}:
        return [(None, None)] * len(updates)
    halos: list[Halo] = _exchange(list(updates), _neighbours(stencil), *layout, axis_name)
    return halos


class _Layout(NamedTuple):
    axes: tuple[Axes, ...]
    layers: tuple[tuple[int, ...], ...]
    shards: tuple[int, ...]


def _layout(
    updates: Sequence[jax.Array],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int] | None,
) -> _Layout:
    split = (1,) * len(updates) if shards is None else tuple(shards)
    return _Layout(tuple(axes), tuple(map(tuple, layers)), split)


def _neighbours(stencil: Stencil) -> tuple[tuple[int | None, ...], ...]:
    return tuple(map(tuple, map(stencil.neighbours, stencil.offsets)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _exchange(
    updates: Sequence[jax.Array],
    neighbours: Sequence[Sequence[int | None]],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
) -> list[Halo]:
    reads = _reads(neighbours, layers)
    arrays = [Layers(*each, axis_name) for each in zip(updates, axes, shards, strict=True)]
    return [array.halo(_offsets_in(j, reads)) for j, array in enumerate(arrays)]


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _shift_and_add(
    updates: Sequence[jax.Array],
    halos: Sequence[Halo],
    weights: Sequence[jax.Array],
    zero: jax.Array,
    neighbours: Sequence[Sequence[int | None]],
    axes: Sequence[Axes],
    layers: Sequence[Sequence[int]],
    shards: Sequence[int],
    axis_name: AxisName | None,
) -> list[jax.Array]:
    reads = _reads(neighbours, layers)
    whole = [Layers(*each, axis_name) for each in zip(updates, axes, shards, strict=True)]
    arrays = [array.split() for array in whole]
    shifts = [array.shifts(halo) for array, halo in zip(arrays, halos, strict=True)]
    results = []
    for original, array, ours, read in zip(whole, arrays, layers, reads, strict=True):
        wide = widened(array.array)
        taps = []
        for row, places in zip(weights, read, strict=True):
            gathered = widened(_gather(arrays, shifts, places, array)).astype(wide.dtype)
            product = array.over_layers(some_of(row, ours), wide.dtype) * gathered
            # Compilers round a product that meets a sum, or do not, as they like. A sum with a 0
            # that they do not see through rounds it always.
            taps.append(product + zero.astype(product.dtype))
        results.append(original.join(functools.reduce(jnp.add, taps)))
    return results


Places = Sequence[tuple[int, int] | None]
"""Where a tap finds its layers: for each an array, and an index in it; None where there is none."""


def _reads(
    neighbours: Sequence[Sequence[int | None]], layers: Sequence[Sequence[int]]
) -> list[list[Places]]:
    """For each array and each tap where it finds its layers."""
    held = {layer: (j, i) for j, ours in enumerate(layers) for i, layer in enumerate(ours)}
    place_of = {None: None} | held
    return [[[place_of[tap[layer]] for layer in ours] for tap in neighbours] for ours in layers]


def _found(places: Places) -> set[tuple[int, int]]:
    """The arrays that the layers are in, and the offsets in these."""
    return {(place[0], place[1] - i) for i, place in enumerate(places) if place is not None}


def _offsets_in(j: int, reads: Sequence[Sequence[Places]]) -> list[int]:
    """The offsets at which any tap finds its layers in one array."""
    founds = [_found(places) for read in reads for places in read]
    return [offset for found in founds if len(found) == 1 for at, offset in found if at == j]


def _gather(
    arrays: Sequence[Layers], shifts: Sequence[Shift], places: Places, like: Layers
) -> jax.Array:
    """An array like ``like`` whose layers come from those places."""
    zeros = jnp.zeros_like(like.array)
    found = _found(places)
    if not found:
        return zeros
    if len(found) == 1:
        [(j, offset)] = found
        if (arrays[j].axes, arrays[j].array.shape) == (like.axes, like.array.shape):
            shifted = shifts[j](offset).astype(zeros.dtype)
            exist = np.array([place is not None for place in places])
            inside = exists((offset,), len(places))[0]
            if (exist == inside).all():
                return shifted
            return like.only(exist, shifted)
    merged = {j: arrays[j].merged().astype(zeros.dtype) for j in {j for j, _ in found}}
    nothing = jnp.zeros(next(iter(merged.values())).shape[1:], zeros.dtype)
    layers = [nothing if place is None else merged[place[0]][place[1]] for place in places]
    return like.unmerge(jnp.stack(layers))


def scaled_stencil(stencil: Stencil, factors: jax.Array) -> Stencil:
    r"""The operator that scales first: :math:`S\, \mathrm{diag}(\mathrm{factors})`.

    Args:
      stencil: S.
      factors: for each layer, of shape ``(L,)``.

    Example:
      >>> halves = Stencil((-1, 1), np.array([[0, 0.5, 1], [1, 0.5, 0]]))
      >>> matrix_of(scaled_stencil(halves, jnp.array([1.0, 0.0, 2.0]))).tolist()
      [[0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    weights = []
    for offset, row in zip(stencil.offsets, stencil.weights, strict=True):
        scales = pad(factors, offset, 0)
        exist = np.array([layer is not None for layer in stencil.neighbours(offset)])
        if (exist != exists((offset,), stencil.layers)[0]).any():
            scales = jnp.where(exist, scales, 0)  # what is read of another run may be NaN
        dtype = np.promote_types(jnp.asarray(row).dtype, factors.dtype)
        weights.append(jnp.asarray(row, dtype) * scales.astype(dtype))
    return Stencil(stencil.offsets, weights, stencil.runs)
