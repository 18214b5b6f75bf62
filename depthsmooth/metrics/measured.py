"""What is measured together: blocks of a group, or each of their tensors."""

from __future__ import annotations

import collections
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from depthsmooth.depth.layout import Depth, Layout, Where, selected
from depthsmooth.depth.leaves import Track
from depthsmooth.depth.names.find import depth_in

By = Literal["group", "tensor"]
"""What is measured: the blocks of each group, or each of their tensors by itself."""


def check_measure(depth: Layout, by: By) -> None:
    """Raises unless these say what can be measured."""
    if not isinstance(depth, Layout):
        raise ValueError(
            f"depth is a {type(depth).__name__}, but has to be a Depth, such as "
            "trace_depth(loss_fn, params, batch) gives. Updates come before it."
        )
    if by not in ("group", "tensor"):
        raise ValueError(f"by is {by!r}, but has to be 'group' or 'tensor'.")


def places_of(updates: optax.Updates, depth: Layout, where: Where | None) -> Depth:
    """The places of the leaves that count."""
    places = depth_in(updates, depth)
    return places if where is None else selected(places, where, updates)


def tracks_of(places: Depth, by: By) -> dict[str, list[Track]]:
    """What is measured together, by name."""
    tensors = collections.Counter(track.tensor_name for track in places.tracks)
    together: dict[str, list[Track]] = {}
    for track in places.tracks:
        name = track.group
        if by == "tensor":
            several = tensors[track.tensor_name] > 1
            name = f"{track.group}/{track.tensor_name}" if several else track.tensor_name
        together.setdefault(name, []).append(track)
    return together


def of_all(values: jax.Array, layers: int) -> jax.Array:
    """Values of the first layers, and 0 for those after them."""
    return jnp.pad(values, (0, layers - len(values)))
