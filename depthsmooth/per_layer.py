"""Each layer as its own: any Optax transformation, applied to every layer as to a tree by itself.

Leaves that hold the same layers alike are one stack, and ``jax.vmap`` takes its layers one by one:
there is one program for all of them. Of the state a leaf that mirrors a parameter has depth where
the parameter has it. What does not differ between layers, such as a count, is there once; all else
has a first axis for layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from depthsmooth.arrays.differing import after_steps, filled
from depthsmooth.arrays.each import mirrored, over_axes
from depthsmooth.depth.layout import Depth, Layout, refuse_depths
from depthsmooth.depth.leaves import Axes, shape_of
from depthsmooth.depth.names.find import depth_in
from depthsmooth.depth.paths import leaves_of, nodes_of, shown

REST = "rest"
"""The name of the leaves that are in no layer, in the state."""


def per_layer(
    tx: optax.GradientTransformation,
    *,
    depth: Layout | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to each layer as if that were a tree of its own.

    Norms, trust ratios, factored moments and preconditioners are those of one layer, whether it is
    in a stack or has leaves of its own. What works element by element is not changed.

    Args:
      tx: what is applied to the tensors of each layer. They come without their depth axes, with
        ``optax.MaskedNode`` in the place of all other leaves.
      depth: where the layers are, as in :func:`smooth_over_depth`.
      rest: what is applied to the leaves that are in no layer, as to one more tree; ``tx``, unless
        said.

    Returns:
      A transformation with the state of ``optax.partition``: that of ``tx`` for each stack. What
      mirrors a parameter has its shape, with depth on the same axis; what layers have in common,
      such as counts, is there once; all else has a first axis for layers.

    Raises:
      ValueError: on ``init`` and ``update``, if a leaf does not fit its place, or ``tx`` cannot be
        applied to one layer by itself: the message says why, and what to do.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([[6.0, 8.0], [0.0, 2.0]]), "head": jnp.array([4.0])}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = ds.per_layer(optax.clip_by_global_norm(5.0), depth=depth)
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["layers"].tolist(), updates["head"].tolist()
      ([[3.0, 4.0], [0.0, 2.0]], [4.0])
    """
    refuse_depths("per_layer", {"tx": tx, "rest": rest})

    def for_tree(tree: optax.Params) -> optax.GradientTransformationExtraArgs:
        found = _depth_of(tree, depth)
        stacks = _stacks(found)
        transforms = {name: over_axes(tx, axes) for name, axes in stacks.items()}
        if len(found) < len(found.leaves) or not found:
            transforms[REST] = optax.with_extra_args_support(tx if rest is None else rest)
        names = {path: name for name, axes in stacks.items() for path in axes}
        labels = found.map(lambda path, leaf, place: names.get(path, REST), tree)
        return optax.partition(
            transforms,
            lambda _: _collapsed(labels, next(iter(transforms))),
            mask_compatible_extra_args=True,
        )

    def init_fn(params: optax.Params) -> optax.OptState:
        with _named_masks(params):
            _check_whole_layers(tx, params, _depth_of(params, depth))
            return for_tree(params).init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        extra_args = {name: _of_whole_tree(name, value) for name, value in extra_args.items()}
        with _named_masks(updates):
            after: tuple[optax.Updates, optax.OptState] = for_tree(updates).update(
                updates, state, params, **extra_args
            )
        return after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@contextlib.contextmanager
def _named_masks(tree: optax.Params) -> Iterator[None]:
    """Says what to do about a mask, or labels, of the whole tree, which do not fit one layer."""
    try:
        yield
    except ValueError as error:
        leaves = leaves_of(tree)[0]
        if "MaskedNode" not in str(error) or not leaves:
            if "per_layer" not in str(error):
                error.add_note("per_layer gives its transformation one layer, without depth axes.")
            raise
        path, leaf = leaves[0]
        raise ValueError(
            "The transformation in per_layer is given one layer at a time, without depth axes, "
            "and optax.MaskedNode for all other leaves of the tree, like "
            f"{shown(path, shape_of(leaf))}. A mask, labels or rates that are a tree do not fit "
            "that: give a function of the tree, like mask=lambda layer: jax.tree.map(lambda leaf: "
            "leaf.ndim > 1, layer), or take what they are for out of per_layer, into a chain with "
            "it."
        ) from error


def _depth_of(tree: optax.Params, depth: Layout | None) -> Depth:
    """The Depth of a tree; of the placeholder of ``optax.tree.map_params``, that of parameters."""
    # What is masked is a node of its own: of a placeholder there is none.
    if nodes_of(tree) or isinstance(tree, dict | list | tuple):
        return depth_in(tree, depth)
    if isinstance(depth, Depth):
        return depth
    raise ValueError(
        f"The tree is a {type(tree).__name__} without leaves, as optax.tree.map_params gives. Then "
        "only a Depth tells where layers are: give per_layer depth=find_depth(params), "
        "trace_depth(...) or rules.resolve(params)."
    )


def _stacks(depth: Depth) -> dict[str, dict[str, Axes]]:
    """The leaves that hold the same layers alike, with their depth axes, by the stack's name."""
    shapes = {leaf.path: leaf.shape for leaf in depth.leaves}
    alike: dict[tuple[str, tuple[int, ...], tuple[int, ...]], dict[str, Axes]] = {}
    for path, place in depth.items():
        sizes = tuple(shapes[path][axis] for axis in place.axes)
        alike.setdefault((place.group, place.layers, sizes), {})[path] = place.axes
    named: dict[str, list[dict[str, Axes]]] = {}
    for (group, *_), leaves in sorted(alike.items(), key=lambda stack: stack[0]):
        named.setdefault(group, []).append(leaves)
    return {
        group if len(stacks) == 1 else f"{group}[{k}]": leaves
        for group, stacks in named.items()
        for k, leaves in enumerate(stacks)
    }


def _collapsed(labels: Any, otherwise: str) -> Any:
    """The labels, with one for each subtree whose leaves have the same."""
    if not jax.tree.leaves(labels):
        return otherwise
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0],
        labels,
        is_leaf=lambda node: len(set(jax.tree.leaves(node))) == 1,
    )


def _of_whole_tree(name: str, value: Any) -> Any:
    """An extra argument; of a function one that raises when a layer calls it."""
    if not callable(value) or not jax.tree_util.all_leaves([value]):
        return value

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{name} is a function of all the parameters, but a transformation in per_layer has "
            f"those of one layer. Take what calls {name} out of per_layer, into a chain with it."
        )

    return refuse


def _check_whole_layers(tx: optax.GradientTransformation, tree: optax.Params, depth: Depth) -> None:
    """Raises if layers are held in parts that are not alike, and a layer is taken as a whole."""
    stack_of = {path: name for name, leaves in _stacks(depth).items() for path in leaves}
    layers: dict[tuple[str, int], list[str]] = {}
    for path, place in depth.items():
        for layer in place.layers:
            layers.setdefault((place.group, layer), []).append(path)
    seen = set()
    for paths in layers.values():
        parts = frozenset(stack_of[path] for path in paths)
        if len(parts) == 1 or parts in seen:
            continue
        seen.add(parts)
        mixed = _mixed_with(tx, tree, depth, paths, stack_of)
        if mixed is not None:
            one, other = (shown(path, shape_of(dict(leaves_of(tree)[0])[path])) for path in mixed)
            raise ValueError(
                f"{one} and {other} are in the same layers, but hold them in different ways: "
                "per_layer takes them one after another, and the transformation takes them "
                "together, for a norm of all of a layer's leaves perhaps. Leave that out, stack "
                "the leaves alike, or keep one from it with optax.masked or optax.partition."
            )


def _mixed_with(
    tx: optax.GradientTransformation,
    tree: optax.Params,
    depth: Depth,
    paths: Sequence[str],
    stack_of: Mapping[str, str],
) -> tuple[str, str] | None:
    """Two leaves of one layer, in different stacks, of which one changes the other's update."""

    def in_layer(path: str, leaf: jax.Array, place: Any) -> Any:
        if path not in paths:
            return optax.MaskedNode()
        return jax.ShapeDtypeStruct(place.layer_shape(leaf.shape), leaf.dtype)

    layer = depth.map(in_layer, tree)
    tx = optax.with_extra_args_support(tx)
    state = jax.eval_shape(tx.init, layer)
    held = [path for path, _ in leaves_of(layer)[0]]
    mirrors = mirrored(state, layer)
    for part in dict.fromkeys(stack_of[path] for path in held):
        ours = {path: stack_of[path] == part for path in held}
        of_state = [path is not None and ours[path] for path in mirrors]
        differ = after_steps(tx, layer, state, filled(layer, list(ours.values())), of_state)[0]
        for path, one in zip(held, differ, strict=True):
            if one and not ours[path]:
                return next(own for own in held if ours[own]), path
    return None
