"""A rate for each layer: decayed with the distance from the head, or 0."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.arrays.binding import layers_of
from depthsmooth.arrays.layers import cast_like, some_of, upcast
from depthsmooth.depth.layout import Depth, Layout, refuse_depths, whole_groups
from depthsmooth.depth.leaves import Track
from depthsmooth.depth.names.find import depth_in
from depthsmooth.depth.paths import leaves_of, some, with_leaves
from depthsmooth.mesh import AxisName
from depthsmooth.operators.numbers import Number
from depthsmooth.transform import SmoothOverDepthState

Which = Sequence[int] | Callable[[int, jax.Array], jax.typing.ArrayLike]
"""Layers by number; or a function of the number of layers L and of the step, to L bools."""

Numbers = Mapping[str, jax.typing.ArrayLike]
"""By path one number, or, of a leaf in layers, one for each layer of its group."""


def layer_decay(
    rate: optax.ScalarOrSchedule,
    *,
    depth: Layout | None = None,
    first: str | None = ".*embed.*",
    last: str | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Layer-wise learning-rate decay: the farther from the head, the smaller the step.

    .. math::
        \tilde u_\ell = r^{L - \ell}\, u_\ell \quad \text{for } \ell = 0, \dots, L - 1

    What comes before the layers, such as embeddings, is multiplied by :math:`r^{L + 1}`, and what
    comes behind them, such as the head, is not changed. In fine-tuning, layers near the input keep
    more of what they have learnt before.

    Put it where a learning rate would be: after the optimizer, and after weight decay that the
    rate is to be multiplied with, too, as AdamW's is.

    Args:
      rate: r, in [0, 1]: a number, a schedule or a traced scalar. 0.65 to 0.9 are usual.
      depth: where the layers are, as in :func:`smooth_over_depth`. Each group counts its own
        layers; what is before them counts those of the largest.
      first: a pattern for the whole paths of the leaves before the layers; None for none.
      last: a pattern for those behind them. Unless said, all that is in no layer, and not first.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`.

    Raises:
      ValueError: if ``rate`` is a number outside [0, 1]; on ``init`` and ``update``, if no leaf
        outside of the layers is ``first``, or one is neither, or is both.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"embed": jnp.ones(1), "layers": jnp.ones((2, 1)), "head": jnp.ones(1)}
      >>> tx = ds.layer_decay(0.5, depth=ds.Depth.from_rules({"layers": 0}))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> {name: leaf.ravel().tolist() for name, leaf in updates.items()}
      {'embed': [0.125], 'head': [1.0], 'layers': [0.25, 0.5]}

    References:
      Bao, Dong, Piao, Wei, `BEiT <https://arxiv.org/abs/2106.08254>`_, 2021, and timm have these
      exponents (``get_num_layer_for_vit``, ``param_groups_layer_decay``). Clark, Luong, Le,
      Manning, `ELECTRA <https://arxiv.org/abs/2003.10555>`_, 2020 has one more below the head
      (``_get_layer_lrs``).
    """
    refuse_depths("layer_decay", {"rate": rate})
    number = Number("rate", rate, 0, 1)

    def factors(found: Depth, sizes: Mapping[str, int], count: jax.Array) -> Numbers:
        share = number(count)
        outside = [leaf.path for leaf in found.leaves if leaf.place is None]
        before = share ** (1 + max(sizes.values(), default=0))
        rows = {group: share ** np.arange(layers, 0, -1) for group, layers in sizes.items()}
        placed = {path: rows[place.group] for path, place in found.items()}
        return placed | dict.fromkeys(_first_of(outside, first, last), before)

    return _by_layer(factors, jnp.multiply, depth, axis_name)


def freeze_layers(
    which: Which | Mapping[str, Which],
    *,
    depth: Layout | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets the updates of some layers to exactly 0, whatever they were.

    Behind an optimizer it undoes its weight decay, too. Before it, the moments of these layers stay
    0 as well: put one on either side where there is weight decay.

    Args:
      which: the layers, counted from 0, or from the end if negative, like ``range(6)``; or a
        function of the number of layers and of the step that gives a bool for each, which may be
        traced, to unfreeze layers one by one. In every group, or a mapping from the name of a
        group to its layers; other groups are not changed.
      depth: where the layers are, as in :func:`smooth_over_depth`.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`.

    Raises:
      ValueError: on ``init`` and ``update``, if there is no such layer or group.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.ones(4), "head": jnp.ones(1)}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = ds.freeze_layers(range(2), depth=depth)
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [0.0, 0.0, 1.0, 1.0]
      >>> def lower(layers, count):  # from the top down, one more layer in every 100 steps
      ...     return jnp.arange(layers) < layers - 1 - count // 100
      >>> tx = ds.freeze_layers(lower, depth=depth)
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [0.0, 0.0, 0.0, 1.0]
    """
    refuse_depths("freeze_layers", {"which": which})

    def kept(found: Depth, sizes: Mapping[str, int], count: jax.Array) -> Numbers:
        each = which if isinstance(which, Mapping) else dict.fromkeys(sizes, which)
        for group in each:
            if group not in sizes:
                raise ValueError(
                    f"which has a group {group!r}, but the groups are "
                    f"{', '.join(map(repr, sizes))}. Name one of these, or leave it out."
                )
        rows = {group: ~_frozen(chosen, sizes[group], count) for group, chosen in each.items()}
        return {path: rows[place.group] for path, place in found.items() if place.group in rows}

    return _by_layer(kept, lambda array, keep: jnp.where(keep, array, 0), depth, axis_name)


def _by_layer(
    numbers: Callable[[Depth, Mapping[str, int], jax.Array], Numbers],
    change: Callable[[jax.Array, jax.Array], jax.Array],
    depth: Layout | None,
    axis_name: AxisName | None,
) -> optax.GradientTransformationExtraArgs:
    """Changes each layer by a number of its own. The numbers depend on paths and the step alone."""

    def changed(tree: optax.Updates, count: jax.Array) -> optax.Updates:
        found = depth_in(tree, depth)
        present, masked = leaves_of(tree)
        leaves = dict(present)
        given = numbers(found, whole_groups(found, depth, masked), count)
        after = {}
        for leaf in found.leaves:
            if leaf.path in given:
                array = upcast(jnp.asarray(leaves[leaf.path]))
                number = jnp.asarray(given[leaf.path])
                if leaf.place is not None:
                    [piece] = layers_of(Track((leaf,)), leaves, axis_name, with_sums=False)
                    number = piece.over_layers(some_of(number, piece.layers), number.dtype)
                is_bool = number.dtype == bool
                after[leaf.path] = cast_like(
                    change(array, number if is_bool else number.astype(array.dtype)),
                    jnp.asarray(leaves[leaf.path]),
                )
        return with_leaves(tree, after)

    def init_fn(params: optax.Params) -> SmoothOverDepthState:
        state = SmoothOverDepthState(count=jnp.zeros([], jnp.int32))
        jax.eval_shape(changed, params, state.count)
        return state

    def update_fn(
        updates: optax.Updates,
        state: SmoothOverDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, SmoothOverDepthState]:
        del params, extra_args
        after = SmoothOverDepthState(optax.safe_increment(state.count))
        return changed(updates, state.count), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _first_of(paths: Sequence[str], first: str | None, last: str | None) -> list[str]:
    """The leaves before the layers, of those in none; raises unless each is before or behind."""
    before = [path for path in paths if first is not None and re.fullmatch(first, path)]
    behind = [path for path in paths if last is None or re.fullmatch(last, path)]
    if first is not None and paths and not before:
        raise ValueError(
            f"first is {first!r}, which matches no leaf outside of the layers. These are "
            f"{some(paths)}. Give a pattern for the whole path of what comes before the layers, or "
            "first=None if all comes behind them."
        )
    for path in paths:
        if path not in before and path not in behind:
            raise ValueError(
                f"{path} is in no layer, and neither first, {first!r}, nor last, {last!r}, "
                "matches it. Widen one of them, or leave last out."
            )
        if last is not None and path in before and path in behind:
            raise ValueError(
                f"{path} is matched by first, {first!r}, and by last, {last!r}. Narrow one of them."
            )
    return before


def _frozen(which: Which, layers: int, count: jax.Array) -> np.ndarray | jax.Array:
    """A bool for each layer: whether it is frozen."""
    if callable(which):
        mask = jnp.asarray(which(layers, count))
        if mask.shape != (layers,) or mask.dtype != bool:
            raise ValueError(
                f"which gives an array of shape {mask.shape} and type {mask.dtype}, but there are "
                f"{layers} layers: it has to give a bool for each."
            )
        return mask
    numbers = list(which)
    for number in numbers:
        if not isinstance(number, int | np.integer) or not -layers <= number < layers:
            raise ValueError(
                f"which has the layer {number!r}, but the {layers} layers have the numbers 0 to "
                f"{layers - 1}. Correct it, or name the group that it is for: {{group: which}}."
            )
    return np.isin(np.arange(layers), [number % layers for number in numbers])
