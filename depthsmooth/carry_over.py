"""From the state of one chain to that of another, which differ in transformations over depth."""

from __future__ import annotations

from typing import Any

import jax
import optax

from depthsmooth.depth.leaves import shape_of
from depthsmooth.depth.paths import shown
from depthsmooth.metrics.monitor import MonitorDepthState
from depthsmooth.transform import SmoothOverDepthState

Node = tuple[str, Any]
"""An array of a state, or the whole state of a transformation over depth, with its path."""


def carry_over(old: optax.OptState, new: optax.OptState) -> optax.OptState:
    """Adds smoothing, rates of layers and monitors to a run that has begun, or removes them.

    Moments, counters and all else that the two chains have in common are taken from the old state,
    in their order. Transformations over depth begin anew.

    Args:
      old: the state that the run has. Restore it into the chain that made it.
      new: a fresh state of the chain that is to go on, ``tx.init(params)``.

    Returns:
      The new state, with what the old one has.

    Raises:
      ValueError: if the chains differ in more than transformations over depth: in the number of
        arrays, or in the name, the shape or the dtype of one.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.ones((3, 2))}
      >>> before = optax.adam(1e-3)
      >>> _, old = before.update(params, before.init(params))
      >>> smooth = ds.smooth_over_depth(0.1, depth=ds.Depth.from_rules({"layers": 0}))
      >>> after = optax.chain(optax.scale_by_adam(), smooth, optax.scale(-1e-3))
      >>> adam, smoothing, _ = ds.carry_over(old, after.init(params))
      >>> int(adam.count), int(smoothing.count)
      (1, 0)
    """
    theirs = [node for node in _nodes(old) if not _is_over_depth(node[1])]
    ours = _nodes(new)
    places = [k for k, (_, node) in enumerate(ours) if not _is_over_depth(node)]
    if len(theirs) != len(places):
        raise ValueError(
            f"Beside transformations over depth, the old state has {len(theirs)} arrays and the "
            f"new one {len(places)}: {_first_apart(theirs, [ours[k] for k in places])}. The chains "
            "have to be the same but for smoothing, rates of layers and monitors. Init the chain "
            "that made the old state, with such transformations added or removed."
        )
    nodes = [node for _, node in ours]
    for k, before in zip(places, theirs, strict=True):
        if not _alike(before, ours[k]):
            raise ValueError(
                f"{_named(before)} of the old state does not fit {_named(ours[k])} of the new one. "
                "The chains have to be the same but for smoothing, rates of layers and monitors, "
                "and the parameters, too."
            )
        nodes[k] = before[1]
    return jax.tree.unflatten(jax.tree.structure(new, is_leaf=_is_over_depth), nodes)


def _is_over_depth(node: Any) -> bool:
    return isinstance(node, SmoothOverDepthState | MonitorDepthState)


def _nodes(state: optax.OptState) -> list[Node]:
    """What a state holds, with paths that do not count what is before it in a chain."""

    def path_of(keys: tuple[Any, ...]) -> str:
        kept = [key for key in keys if not isinstance(key, jax.tree_util.SequenceKey)]
        return jax.tree_util.keystr(tuple(kept), simple=True, separator="/")

    flat, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_over_depth)
    return [(path_of(keys), node) for keys, node in flat]


def _alike(one: Node, other: Node) -> bool:
    def kind(node: Node) -> tuple[object, ...]:
        return node[0], shape_of(node[1]), getattr(node[1], "dtype", None)

    return kind(one) == kind(other)


def _first_apart(theirs: list[Node], ours: list[Node]) -> str:
    """Where two states begin to differ."""
    for one, other in zip(theirs, ours, strict=False):
        if not _alike(one, other):
            return f"{_named(one)} is where the new one has {_named(other)}"
    longer = max(theirs, ours, key=len)
    which = "old" if longer is theirs else "new"
    return f"the {which} one alone has {_named(longer[min(len(theirs), len(ours))])}"


def _named(node: Node) -> str:
    return f"{shown(node[0], shape_of(node[1]))} {getattr(node[1], 'dtype', '')}".rstrip()
