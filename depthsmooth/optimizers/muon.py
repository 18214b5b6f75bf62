"""Muon over stacked layers: what it orthogonalises, and where decay and learning rate come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from depthsmooth.arrays.layers import cast_like, upcast
from depthsmooth.arrays.norms import ratio
from depthsmooth.depth.layout import Depth, Layout
from depthsmooth.depth.leaves import Place
from depthsmooth.depth.names.find import depth_in
from depthsmooth.depth.paths import shown

Mask: TypeAlias = optax.Params | Callable[[optax.Params], optax.Params]
DimensionNumbers: TypeAlias = optax.Params | Callable[[optax.Params], optax.Params]
Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]
Coefficients: TypeAlias = tuple[float, float, float] | tuple[tuple[float, float, float], ...] | str


class OfMuon(TypedDict, total=False):
    """What is handed on to ``optax.contrib.muon`` as it is."""

    ns_coeffs: Coefficients
    ns_steps: jax.typing.ArrayLike
    beta: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    mu_dtype: jax.typing.DTypeLike | None
    nesterov: bool
    adaptive: bool
    preconditioning: Preconditioning
    adam_b1: jax.typing.ArrayLike
    adam_b2: jax.typing.ArrayLike
    adam_eps_root: jax.typing.ArrayLike
    consistent_rms: jax.typing.ArrayLike | None


def muon_dimension_numbers(depth: Layout, params: optax.Params) -> optax.Params:
    """What Muon orthogonalises: the leaves of two axes in one layer, each layer by itself.

    Args:
      depth: where the layers are.
      params: parameters or updates.

    Returns:
      A tree of the same structure, of ``optax.contrib.MuonDimensionNumbers`` and, where a leaf
      is no matrix, None.

    Raises:
      ValueError: if a leaf does not fit its place.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}
      >>> depth = Depth.from_rules({".*": 0})
      >>> muon_dimension_numbers(depth, params)
      {'kernel': MuonDimensionNumbers(reduction_axis=1, output_axis=2), 'scale': None}

      Kernels are taken to be (inputs, outputs). Of other ones, like those of Equinox, or with an
      axis for heads, the function that is given to ``muon`` says what their axes are:

      >>> def numbers(params):
      ...     def of_leaf(path, leaf, place):
      ...         is_kernel = path == "kernel"
      ...         return optax.contrib.MuonDimensionNumbers(2, 1) if is_kernel else None
      ...
      ...     return depth.map(of_leaf, params)
      >>> numbers(params)
      {'kernel': MuonDimensionNumbers(reduction_axis=2, output_axis=1), 'scale': None}
    """

    def numbers(
        path: str, leaf: jax.Array, place: Place | None
    ) -> optax.contrib.MuonDimensionNumbers | None:
        axes = [axis for axis in range(leaf.ndim) if place is None or axis not in place.axes]
        return optax.contrib.MuonDimensionNumbers(*axes) if len(axes) == 2 else None

    return depth.map(numbers, params)


def muon_over_depth(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: jax.typing.ArrayLike,
    weight_decay_mask: Mask | None,
    adam_weight_decay: jax.typing.ArrayLike,
    adam_learning_rate: optax.ScalarOrSchedule | None,
    dimension_numbers: DimensionNumbers | None,
    depth: Layout | None,
    smooth: Callable[..., optax.GradientTransformationExtraArgs],
    rescale: Callable[[optax.Params], optax.GradientTransformation] | None = None,
    **of_muon: Unpack[OfMuon],
) -> optax.GradientTransformationExtraArgs:
    """Optax's Muon without its decay and learning rate, which come after the smoothing."""
    smooth(depth=depth)
    given = function_of(dimension_numbers)
    adam_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    steps = {
        "muon": optax.chain(
            optax.add_decayed_weights(weight_decay, function_of(weight_decay_mask)),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adam": optax.chain(
            optax.add_decayed_weights(adam_weight_decay), optax.scale_by_learning_rate(adam_rate)
        ),
    }

    def for_tree(tree: optax.Params) -> optax.GradientTransformationExtraArgs:
        """The optimizer of one tree, whose paths and shapes tell everything."""
        found = depth_in(tree, depth)
        numbers = muon_dimension_numbers(found, tree) if given is None else given(tree)
        _check_whole(found, tree, _of_leaves(numbers, tree), bool(of_muon.get("adaptive")))
        # A learning rate of -1 leaves the steps as they are: positive. Trees may be callable.
        orthogonal = optax.contrib.muon(
            -1.0, muon_weight_dimension_numbers=lambda _: numbers, **of_muon
        )
        rescaled = optax.identity() if rescale is None else rescale(_of_leaves(numbers, tree))
        labels = jax.tree.map(
            lambda _, one: "adam" if one is None else "muon", tree, _of_leaves(numbers, tree)
        )
        return optax.chain(
            orthogonal, rescaled, smooth(depth=found), optax.partition(steps, lambda _: labels)
        )

    def init_fn(params: optax.Params) -> optax.OptState:
        return for_tree(params).init(params)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        tx = for_tree(updates)
        after: tuple[optax.Updates, optax.OptState] = tx.update(
            updates, state, params, **extra_args
        )
        return after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def function_of(
    given: optax.Params | Callable[[optax.Params], optax.Params] | None,
) -> Callable[[optax.Params], optax.Params] | None:
    """A mask, or dimension numbers, as a function of the tree, if they are not one yet.

    Optax calls all that can be called. That can a model of Equinox, too, and so can a mask of its
    structure; but this is a tree of bools or of dimension numbers, and no function holds these
    alone. A ``jax.tree_util.Partial`` is a function, whatever it holds.

    Example:
      >>> function_of({"w": True})(None), function_of(lambda tree: tree)({"w": False})
      ({'w': True}, {'w': False})
    """
    if given is None:
        return None
    is_function = callable(given) and (
        isinstance(given, jax.tree_util.Partial) or not _is_answer(given)
    )
    # Optax takes a Partial for a tree: a function of Python is one to all of it.
    return (lambda tree: given(tree)) if is_function else (lambda _: given)


def _is_answer(tree: optax.Params) -> bool:
    """Whether a tree is of bools or dimension numbers."""
    leaves = jax.tree_util.tree_leaves(tree, is_leaf=_is_one)
    types = [getattr(leaf, "dtype", type(leaf)) for leaf in leaves if not _is_one(leaf)]
    return leaves != [] and all(jnp.issubdtype(kind, jnp.bool_) for kind in types)


def _is_one(node: object) -> bool:
    return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def _of_leaves(numbers: optax.Params, tree: optax.Params) -> optax.Params:
    """The dimension numbers of each leaf: they may be given for whole subtrees."""
    return jax.tree.map(
        lambda one, subtree: jax.tree.map(lambda _: one, subtree), numbers, tree, is_leaf=_is_one
    )


def scale_by_neuron(
    b2: jax.typing.ArrayLike, numbers: optax.Params
) -> optax.GradientTransformation:
    """What NorMuon does to orthogonal steps; the rest stays as it is."""

    def mean_over_inputs(leaf: jax.Array, one: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        return jnp.square(jnp.abs(upcast(leaf))).mean(_axes(one.reduction_axis), keepdims=True)

    def init_fn(params: optax.Params) -> optax.Params:
        return jax.tree.map(
            lambda leaf, one: (
                optax.MaskedNode() if one is None else mean_over_inputs(jnp.zeros_like(leaf), one)
            ),
            params,
            numbers,
        )

    def moment(
        step: jax.Array, before: jax.Array, one: optax.contrib.MuonDimensionNumbers | None
    ) -> jax.Array:
        decay = jnp.asarray(b2)
        return before if one is None else decay * before + (1 - decay) * mean_over_inputs(step, one)

    def rescaled(
        step: jax.Array, moment: jax.Array, one: optax.contrib.MuonDimensionNumbers | None
    ) -> jax.Array:
        if one is None:
            return step
        axes = _axes(one.reduction_axis) + _axes(one.output_axis)
        even = upcast(step) / (jnp.sqrt(moment) + 1e-8)
        rms = jnp.sqrt(jnp.square(jnp.abs(even)).mean(axes, keepdims=True))
        return cast_like(even * ratio(0.2, rms), step)

    def update_fn(
        steps: optax.Updates, state: optax.Params, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.Params]:
        del params
        moments = jax.tree.map(moment, steps, state, numbers)
        return jax.tree.map(rescaled, steps, moments, numbers), moments

    return optax.GradientTransformation(init_fn, update_fn)


def _axes(axes: int | Sequence[int]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _check_whole(
    depth: Depth, tree: optax.Params, numbers: optax.Params, is_adaptive: bool
) -> None:
    """Raises unless matrices are whole ones of one layer, each in a leaf that is scaled alone."""
    whole = {leaf.path: leaf.shape for leaf in depth.leaves}
    leaves = depth.map(lambda path, leaf, place: (path, leaf, place), tree)

    def check(
        one: optax.contrib.MuonDimensionNumbers | None, at: tuple[str, jax.Array, Place | None]
    ) -> None:
        if one is None:
            return
        path, leaf, place = at
        axes = _axes(one.reduction_axis) + _axes(one.output_axis)
        if place is not None and {axis % leaf.ndim for axis in axes} & set(place.axes):
            raise ValueError(
                f"{shown(path, whole[path])} has its layers along axis "
                f"{', '.join(map(str, place.axes))}, which {one} would make a part of each "
                "matrix. Name other axes, or leave muon_weight_dimension_numbers out."
            )
        if is_adaptive and place is not None and place.axes:
            raise ValueError(
                f"{shown(path, whole[path])} holds {len(place.layers)} layers, but adaptive=True "
                "scales each leaf by one number: leave it out, or give each layer leaves of its "
                "own."
            )
        spec = jax.typeof(leaf).sharding.spec if hasattr(leaf, "dtype") else ()
        by_type = [axis for axis in axes if spec and spec[axis] is not None]
        in_parts = [axis for axis in axes if leaf.shape[axis] != whole[path][axis]]
        if by_type or in_parts:
            how = "an explicit mesh" if by_type else "shard_map"
            raise ValueError(
                f"{shown(path, whole[path])} is a matrix in each layer, which {how} splits along "
                f"axis {(by_type or in_parts)[0]}, but Muon needs whole matrices. Split layers "
                "alone there, or use jax.jit with shardings and AxisType.Auto."
            )

    jax.tree.map(check, numbers, leaves, is_leaf=_is_one)
