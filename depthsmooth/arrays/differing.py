"""What differs between layers: which results of a transformation, if some of its arguments do.

``jax.vmap`` knows it, and tells it a function with a rule of its own. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax


def after_steps(
    tx: optax.GradientTransformationExtraArgs,
    layer: Any,
    state: Any,
    of_layer: Any,
    of_state: list[bool],
) -> tuple[list[bool], list[bool]]:
    """Which updates and leaves of the state differ, after any number of steps, if some do.

    All of them, if that cannot be told without what only a training loop has.
    """
    count = len(jax.tree.leaves(layer))
    made = _differing(tx.init, [layer], [of_layer])
    start = [one or other for one, other in zip(made, of_state, strict=True)]
    for extra in ({}, {"value": 0.0}):
        try:
            return _spread(tx, layer, state, of_layer, start, extra)
        except Exception:
            continue
    return [True] * count, [True] * len(of_state)


def _spread(
    tx: optax.GradientTransformationExtraArgs,
    layer: Any,
    state: Any,
    of_layer: Any,
    of_state: list[bool],
    extra: Mapping[str, Any],
) -> tuple[list[bool], list[bool]]:
    """The same, of a transformation that takes those further arguments."""
    count = len(jax.tree.leaves(layer))
    while True:
        after = _differing(
            lambda tree, state: tx.update(tree, state, tree, **extra),
            [layer, state],
            [of_layer, filled(state, of_state)],
        )
        spread = [one or other for one, other in zip(after[count:], of_state, strict=True)]
        if spread == of_state:
            return after[:count], spread
        of_state = spread


def _differing(fn: Callable[..., Any], args: Sequence[Any], differ: Sequence[Any]) -> list[bool]:
    """Which results of a function differ if those leaves of its arguments do."""
    told: list[bool] = []

    @jax.custom_batching.custom_vmap
    def look(leaves: list[jax.Array]) -> list[jax.Array]:
        return leaves

    @look.def_vmap
    def tell(size: int, batched: list[list[bool]], leaves: list[jax.Array]) -> Any:
        told[:] = batched[0]
        return leaves, batched[0]

    two = jax.tree.map(
        lambda one, leaf: jax.ShapeDtypeStruct((2,) * one + leaf.shape, leaf.dtype),
        list(differ),
        list(args),
    )
    axes = jax.tree.map(lambda one: 0 if one else None, tuple(differ))
    results = jax.eval_shape(
        jax.vmap(lambda *args: look(jax.tree.leaves(fn(*args))), in_axes=axes), *two
    )
    return told or [False] * len(results)


def filled(tree: Any, values: Any) -> Any:
    """A tree of that structure with other leaves, or with one for all."""
    every = values if isinstance(values, list) else [values] * len(jax.tree.leaves(tree))
    return jax.tree.unflatten(jax.tree.structure(tree), every)
