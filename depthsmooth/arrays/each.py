"""One transformation for all the layers of a stack: ``jax.vmap`` takes them one by one.

Of the state, a leaf that mirrors a parameter, by its path and its shape in one layer, has depth on
the axis where that has it. What does not differ between layers is there once; all else has a first
axis for layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from depthsmooth.arrays.differing import after_steps, filled
from depthsmooth.depth.leaves import Axes
from depthsmooth.depth.paths import leaves_of, shown


def over_axes(
    tx: optax.GradientTransformation, axes: Mapping[str, Axes]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of each layer of leaves that are stacked along as many axes each."""
    tx = optax.with_extra_args_support(tx)
    if not all(axes.values()):
        return tx
    inner = {path: tuple(axis - (axis > of[0]) for axis in of[1:]) for path, of in axes.items()}
    return _over_axis(over_axes(tx, inner), {path: of[0] for path, of in axes.items()})


def _over_axis(
    tx: optax.GradientTransformationExtraArgs, axes: Mapping[str, int]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of each layer of leaves that are stacked along one axis each."""

    def axes_of(tree: Any) -> Any:
        return filled(tree, [axes[path] for path, _ in leaves_of(tree)[0]])

    def init_fn(params: optax.Params) -> optax.OptState:
        if not jax.tree.leaves(params):
            return tx.init(params)
        layer = _one_layer(params, axes_of(params))
        state = jax.eval_shape(tx.init, layer)
        _check_no_keys(state)
        mirrors = mirrored(state, layer)
        own = [path is not None for path in mirrors]
        _, differ = after_steps(tx, layer, state, filled(layer, True), own)
        at = [
            axes[path] if path is not None else 0 if own else None
            for path, own in zip(mirrors, differ, strict=True)
        ]
        init = jax.vmap(tx.init, in_axes=(axes_of(params),), out_axes=filled(state, at))
        return _on_devices_of(params, init, axes, mirrors, at)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not jax.tree.leaves(updates):
            return updates, state
        tree = updates if params is None else params
        layer = _one_layer(tree, axes_of(tree))
        one = jax.eval_shape(tx.init, layer)
        at = [
            axes[path] if path is not None else 0 if leaf.ndim > single.ndim else None
            for path, leaf, single in zip(
                mirrored(one, layer), jax.tree.leaves(state), jax.tree.leaves(one), strict=True
            )
        ]
        trees = {k: of for k, of in extra_args.items() if _shapes(of) == _shapes(updates)}
        whole = {k: value for k, value in extra_args.items() if k not in trees}
        step: Callable[..., tuple[optax.Updates, optax.OptState]] = jax.vmap(
            lambda updates, state, params, trees: tx.update(
                updates, state, params, **trees, **whole
            ),
            in_axes=(
                axes_of(updates),
                filled(state, at),
                axes_of(params),
                {k: axes_of(tree) for k, tree in trees.items()},
            ),
            out_axes=(axes_of(updates), filled(state, at)),
        )
        return step(updates, state, params, trees)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _one_layer(tree: Any, axes: Any) -> Any:
    """The shapes and dtypes of one layer."""
    return jax.tree.map(
        lambda leaf, axis: jax.ShapeDtypeStruct(
            leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype
        ),
        tree,
        axes,
    )


def mirrored(state: Any, layer: Any) -> list[str | None]:
    """For each leaf of a state the parameter that it mirrors: of the same path and shape."""
    shapes = {path: leaf.shape for path, leaf in leaves_of(layer)[0]}
    mirrors: list[str | None] = []
    for path, leaf in leaves_of(state)[0]:
        keys = path.split("/")
        ends = ("/".join(keys[k:]) for k in range(len(keys) + 1))
        of = next((end for end in ends if end in shapes), None)
        mirrors.append(of if of is not None and shapes[of] == leaf.shape else None)
    return mirrors


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _on_devices_of(
    params: optax.Params,
    init: Callable[[Any], Any],
    axes: Mapping[str, int],
    mirrors: Sequence[str | None],
    at: Sequence[int | None],
) -> optax.OptState:
    """The state where the parameters are: what is made under ``jax.vmap`` does not know it.

    A leaf that mirrors a parameter is split as that is, what has a first axis for layers as the
    layers are, as far as either is known.
    """
    arrays = dict(leaves_of(params)[0])
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in arrays.values())
    known = {
        path: jax.typeof(leaf).sharding if is_traced else getattr(leaf, "sharding", None)
        for path, leaf in arrays.items()
    }
    first, sharding = next(iter(known.items()))
    # Of what is traced, only explicit meshes tell it.
    if not isinstance(sharding, jax.NamedSharding) or (
        is_traced and AxisType.Explicit not in sharding.mesh.axis_types
    ):
        return init(params)
    of_depth = (*sharding.spec, *[None] * arrays[first].ndim)[axes[first]]
    of_layers = jax.NamedSharding(sharding.mesh, jax.P(of_depth))
    out = [
        known[path] if path is not None else of_layers if axis == 0 else None
        for path, axis in zip(mirrors, at, strict=True)
    ]
    if not is_traced:
        return jax.jit(init, out_shardings=filled(jax.eval_shape(init, params), out))(params)
    state = init(params)
    leaves = [
        leaf if to is None else jax.reshard(leaf, to)
        for leaf, to in zip(jax.tree.leaves(state), out, strict=True)
    ]
    return filled(state, leaves)


def _check_no_keys(state: Any) -> None:
    """Raises if the state has a random key, of which each layer would draw the same numbers."""
    for path, leaf in leaves_of(state)[0]:
        name = path.rpartition("/")[2]
        legacy = leaf.shape == (2,) and leaf.dtype == np.uint32 and ("key" in name or "rng" in name)
        if legacy or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{shown(path, leaf.shape)} of the state of the transformation in per_layer is a "
                "random key, of which each layer would draw the same numbers. Take what draws "
                "them out of per_layer, into a chain with it."
            )
