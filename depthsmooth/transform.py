"""The Optax transformations that apply an operator over depth, wherever the layers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthsmooth.arrays.binding import layers_of
from depthsmooth.arrays.halos import exchange
from depthsmooth.arrays.layers import Block, cast_like
from depthsmooth.arrays.norms import norms, ratio, scaled
from depthsmooth.arrays.shifts import apply, scaled_stencil
from depthsmooth.depth.cuts import Cuts, check_cuts, cuts_of_groups
from depthsmooth.depth.layout import Depth, Layout, Where, refuse_depths, selected, whole_groups
from depthsmooth.depth.leaves import Track
from depthsmooth.depth.names.find import depth_in
from depthsmooth.depth.paths import leaves_of, nodes_of, with_leaves
from depthsmooth.mesh import AxisName, manual_axes
from depthsmooth.operators.general import Diagonal, check_operator, stencil_for
from depthsmooth.operators.smoothing import window
from depthsmooth.operators.stencil import Operator, Stencil, join

Variant = Literal["standard", "norm_preserving", "directional"]


NormOver = Literal["tensor", "block"]


Mix = Callable[..., Block]
"""``mix(updates, factors=None)`` applies the operator to updates, scaled by factors before."""


class SmoothOverDepthState(NamedTuple):
    """State of the transformations over depth.

    Attributes:
      count: number of updates made, an int32 scalar, which schedules read.
    """

    count: jax.Array  # type: ignore[assignment] # every tuple has a count()


def smooth_over_depth(
    alpha: optax.ScalarOrSchedule = 0.1,
    *,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the update of every layer with those of its two neighbours.

    .. math::
        \tilde u_\ell = (1 - \alpha)\, u_\ell
            + \tfrac{\alpha}{2} (u_{\ell-1} + u_{\ell+1})

    with :math:`\tilde u_1 = (1 - \tfrac{\alpha}{2})\, u_1 + \tfrac{\alpha}{2} u_2`
    and likewise for the last layer: :func:`augment_over_depth` with
    :func:`~depthsmooth.window`. The mean over depth is kept. Leaves that ``depth``
    does not place pass through untouched.

    Put it after the base optimizer's preconditioning, before weight decay and the
    learning rate, as the paper does.

    Args:
      alpha: the share taken from the neighbours, in [0, 1): a number, an Optax
        schedule, or a traced scalar (``optax.inject_hyperparams``). A plain 0
        changes nothing, bit for bit.
      depth: where the layers are, from :func:`depthsmooth.trace_depth` or
        :meth:`depthsmooth.Depth.from_rules`. None stands for
        :func:`depthsmooth.find_depth` on the parameters, and on the updates while
        an update is traced, by paths and shapes alone.
      where: which of the leaves that ``depth`` places are mixed, as
        ``where(path, leaf)``; :func:`depthsmooth.projections` is the paper's Proj.
      variant: what becomes of the norms, as in :func:`augment_over_depth`.
      norm_over: what has a norm: each ``"tensor"`` of a layer, or the ``"block"``.
      cuts: positions across which nothing is mixed: ``(4,)`` parts layers 0 to 3 from
        those from 4 on.
      axis_name: in ``jax.shard_map``, the mesh axis, or axes, that layers are split over.

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`. Updates keep
      their structure, shapes, dtypes, weak types and shardings.

    Raises:
      ValueError: if ``alpha`` is a number outside [0, 1) or no scalar, or another
        argument is none of these; on ``init`` and ``update``, if a leaf does not fit
        its place, or its place cannot be found with certainty.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([0.0, 4.0, 0.0]), "head": jnp.array([4.0])}
      >>> smooth = ds.smooth_over_depth(0.5, depth=ds.Depth.from_rules({"layers": 0}))
      >>> tx = optax.chain(optax.scale_by_sign(), smooth, optax.scale_by_learning_rate(1.0))
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["layers"].tolist(), updates["head"].tolist()
      ([-0.25, -0.5, -0.25], [-1.0])

    References:
      Meng, Sugolov, Papyan, `Gradient Smoothing
      <https://arxiv.org/abs/2606.30813>`_, 2026 (Algorithm 1).
    """
    refuse_depths("smooth_over_depth", {"alpha": alpha})
    return augment_over_depth(
        window(alpha),
        depth=depth,
        where=where,
        variant=variant,
        norm_over=norm_over,
        cuts=cuts,
        axis_name=axis_name,
    )


def augment_over_depth(
    operator: Operator,
    *,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Applies any operator over depth: Depth-wise Gradient Augmentation.

    With :math:`S` the matrix of the operator, :math:`u_\ell` the update of layer
    :math:`\ell` and :math:`n_\ell = \|u_\ell\|`, the variants are

    .. math::
        \text{standard} \quad & \tilde u_\ell = (S u)_\ell \\
        \text{norm-preserving} \quad & \tilde u_\ell = n_\ell\, (S u)_\ell
            / \|(S u)_\ell\| \\
        \text{directional} \quad & \tilde u_\ell = n_\ell\, d_\ell / \|d_\ell\|,
            \quad d = S (u / n)

    In the last two every layer keeps the norm of its update, and a layer whose update
    is 0 keeps that: a frozen layer stays frozen. Where mixing cancels nearly all of an
    update, what it is scaled up from is rounding.

    Args:
      operator: such as :func:`~depthsmooth.window` or :func:`~depthsmooth.ema` gives. A
        single layer, alone in its group or between cuts, is left as it is; to rounding, if
        norms are taken of it.
      depth: where the layers are, as in :func:`smooth_over_depth`.
      where: which of the leaves that ``depth`` places are mixed: ``where(path, leaf)``
        gives True or False from the path, the shape and the dtype. What is left out
        passes through untouched.
      variant: ``"standard"``, ``"norm_preserving"`` or ``"directional"``. The last two
        take norms, and so read the update once and twice more.
      norm_over: ``"tensor"``: each tensor of a layer has a norm, as in the authors' code;
        ``"block"``: all selected tensors of a layer together have one, as in the paper.
        Norms are in float32, or float64 for such updates. In the former, updates of less
        than about 1e-17 are lost, and norms of more than 1e19 are not finite.
      cuts: positions across which nothing is mixed, as where dense layers end and sparse
        ones begin: ``(4,)`` parts layers 0 to 3 from those from 4 on. For every group, or a
        mapping from the name of a group to its cuts. They need a ``depth``.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over, or several,
        outer to inner. There ``depth`` has to be that of the whole arrays, and norms are
        summed over the axes that layers are spread over.

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`. Updates keep
      their structure, shapes, dtypes, weak types and shardings.

    Raises:
      ValueError: if an argument is none of these; on ``init`` and ``update``, if a leaf
        does not fit its place, its place cannot be found with certainty, ``where`` selects
        none, or a cut is not between two layers.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([3.0, 4.0, 0.0])}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = augment_over_depth(ds.ema(0.5), depth=depth)
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [3.0, 3.5, 1.75]
      >>> tx = augment_over_depth(ds.ema(0.5), depth=depth, variant="norm_preserving")
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [3.0, 4.0, 0.0]

    References:
      Meng, Sugolov, Papyan, `Gradient Smoothing
      <https://arxiv.org/abs/2606.30813>`_, 2026 (section 3.4, variants).
    """
    refuse_depths("augment_over_depth", {"operator": operator})
    if variant not in list(_VARIANTS):
        raise ValueError(f"variant is {variant!r}, but has to be one of {', '.join(_VARIANTS)}.")
    return _over_depth(_VARIANTS[variant], operator, depth, where, norm_over, cuts, axis_name)


def shrink_over_depth(
    operator: Operator,
    *,
    depth: Layout | None = None,
    where: Where | None = None,
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A control: every layer gets the norm that mixing would have left it, and is not mixed.

    .. math::
        \tilde u_\ell = u_\ell\, \|(S u)_\ell\| / \|u_\ell\|

    Smoothing makes the step smaller, and that alone can look like a gain. What smoothing
    gains over this is due to the direction of the update.

    Args:
      operator: :math:`S`, of the transformation that this is the control of.
      depth: as in :func:`augment_over_depth`, like the others.
      where: which of the leaves that ``depth`` places are shrunk.
      norm_over: what has a norm: each ``"tensor"`` of a layer, or the ``"block"``.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`.

    Raises:
      ValueError: as :func:`augment_over_depth`.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([4.0, -4.0, 0.0])}
      >>> tx = shrink_over_depth(ds.window(0.5), depth=ds.Depth.from_rules({"layers": 0}))
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [2.0, -1.0, 0.0]
    """
    refuse_depths("shrink_over_depth", {"operator": operator})
    return _over_depth(_shrunk, operator, depth, where, norm_over, cuts, axis_name)


def _standard(updates: Block, mix: Mix) -> Block:
    return mix(updates)


def _norm_preserving(updates: Block, mix: Mix) -> Block:
    factors = ratio(norms(updates), norms(mix(updates)))
    updates, factors = _read_again(updates, factors)
    return scaled(mix(updates), factors)


def _directional(updates: Block, mix: Mix) -> Block:
    before = norms(updates)
    to_directions = ratio(1, before)
    factors = ratio(before, norms(mix(updates, to_directions)))
    updates, factors = _read_again(updates, factors)
    return scaled(mix(updates, to_directions), factors)


def _shrunk(updates: Block, mix: Mix) -> Block:
    return scaled(updates, ratio(norms(mix(updates)), norms(updates)))


_VARIANTS = {
    "standard": _standard,
    "norm_preserving": _norm_preserving,
    "directional": _directional,
}


def _over_depth(
    variant: Callable[[Block, Mix], Block],
    operator: Operator,
    depth: Layout | None,
    where: Where | None,
    norm_over: NormOver,
    cuts: Cuts,
    axis_name: AxisName | None,
) -> optax.GradientTransformationExtraArgs:
    check_operator(operator)
    if not isinstance(depth, Layout | None):
        raise ValueError(
            f"depth is a {type(depth).__name__}, but has to be a Depth: from "
            "trace_depth(loss_fn, params, batch), or from Depth.from_rules({'.*layers/.*': 0})."
        )
    if norm_over not in ("tensor", "block"):
        raise ValueError(f"norm_over is {norm_over!r}, but has to be 'tensor' or 'block'.")
    if where is not None and not callable(where):
        raise ValueError(f"where is {where!r}, but has to be a function of a path and a leaf.")
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"axis_name is {axis_name!r}, but has to be the name of a mesh axis, or a tuple of "
            "names."
        )
    check_cuts(cuts)
    if cuts and depth is None:
        raise ValueError(
            f"cuts are {cuts!r}, which count the layers of a depth: give it, by depth=..., such as "
            "find_depth(params) or trace_depth(loss_fn, params, batch). Then it also counts layers "
            "that are masked."
        )

    def bundles_of(tree: optax.Params, count: jax.Array) -> list[dict[Track, Stencil]]:
        found = depth_in(tree, depth)
        at = cuts_of_groups(cuts, found, depth or found, leaves_of(tree)[1])
        places = found if where is None else selected(found, where, tree)
        masked = leaves_of(tree)[1]
        sizes = whole_groups(found, depth, masked) if isinstance(operator, Diagonal) else {}
        return _bundles(_stencils(operator, count, places, at, sizes), norm_over)

    def init_fn(params: optax.Params) -> SmoothOverDepthState:
        count = jnp.zeros([], jnp.int32)
        bundles_of(params, count)
        return SmoothOverDepthState(count=count)

    def update_fn(
        updates: optax.Updates,
        state: SmoothOverDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, SmoothOverDepthState]:
        del params, extra_args
        leaves = {path: leaf for path, leaf in nodes_of(updates) if leaf is not None}
        after: dict[str, jax.Array] = {}
        for bundle in bundles_of(updates, state.count):
            block = [
                layers_of(track, leaves, axis_name, with_sums=variant is not _standard)
                for track in bundle
            ]
            mixed = variant(block, _mixing(block, list(bundle.values())))
            for track, tensor, originals in zip(bundle, mixed, block, strict=True):
                for path, piece, original in zip(track.paths, tensor, originals, strict=True):
                    after[path] = cast_like(piece.array, original.array)
        return with_leaves(updates, after), SmoothOverDepthState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stencils(
    operator: Operator,
    count: jax.Array,
    depth: Depth,
    cuts: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
) -> dict[Track, Stencil]:
    """The stencil of each track: the operator's for each of its runs of layers.

    Of a group whose size is given that for all its layers, of which a track may lack the last ones.
    """
    made: dict[tuple[int, ...], Stencil] = {}
    stencils = {}
    for track in depth.tracks:
        whole = track.group in sizes
        runs = (sizes[track.group],) if whole else track.spans(cuts.get(track.group, ()))
        if runs not in made:
            try:
                made[runs] = join([stencil_for(operator, n, count) for n in runs])
            except ValueError as error:
                raise ValueError(f"In {track.group}: {error}") from error
        ours = made[runs]
        held = track.present[-1] + 1
        stencils[track] = Stencil((0,), [row[:held] for row in ours.weights]) if whole else ours
    return stencils


def _bundles(stencils: Mapping[Track, Stencil], norm_over: NormOver) -> list[dict[Track, Stencil]]:
    """The tracks whose layers have norms in common, without those that nothing happens to."""
    bundles: dict[object, dict[Track, Stencil]] = {}
    for track, mixing in stencils.items():
        name = track.group if norm_over == "block" else track
        bundles.setdefault(name, {})[track] = mixing
    return [
        bundle
        for bundle in bundles.values()
        if not all(mixing.is_identity for mixing in bundle.values())
    ]


def _mixing(block: Block, stencils: Sequence[Stencil]) -> Mix:
    """Applies a stencil to each tensor of a block. Devices exchange halos once."""
    halos = list(map(exchange, stencils, block))

    def mix(updates: Block, factors: jax.Array | None = None) -> Block:
        operators = stencils
        if factors is not None:
            operators = [scaled_stencil(stencil, factors) for stencil in stencils]
        return list(map(apply, operators, updates, halos))

    return mix


def _read_again(updates: Block, factors: jax.Array) -> tuple[Block, jax.Array]:
    """The same, as the compiler reads them from memory once more.

    Without it, a compiler keeps what it mixed for the norms, instead of mixing it again. For v5e,
    a training step with directional smoothing then moves 29.86 instead of 26.44 GB.
    """
    again: tuple[Block, jax.Array] = jax.lax.platform_dependent(
        updates, factors, cpu=_as_they_are, default=_behind_a_barrier
    )
    return again


def _as_they_are(updates: Block, factors: jax.Array) -> tuple[Block, jax.Array]:
    return updates, factors


def _behind_a_barrier(updates: Block, factors: jax.Array) -> tuple[Block, jax.Array]:
    if manual_axes():  # JAX 0.10 takes all that passes one barrier to vary along the same mesh axes
        return jax.tree.map(jax.lax.optimization_barrier, updates), factors
    behind: tuple[Block, jax.Array] = jax.lax.optimization_barrier((updates, factors))
    return behind
