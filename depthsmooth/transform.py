"""The Optax transformations that apply an operator over depth, wherever the layers are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from depthsmooth.arrays.binding import tensor_of
from depthsmooth.arrays.layers import Halo, narrowed
from depthsmooth.arrays.norms import Block, Tensor, everywhere, factors_of, norms, ratio, scaled
from depthsmooth.arrays.shifts import apply, exchange, scaled_stencil
from depthsmooth.depth.layout import Cuts, Depth, Where, check_cuts, cuts_of_groups, refuse_depths
from depthsmooth.depth.leaves import Track
from depthsmooth.depth.names.find import depth_in
from depthsmooth.depth.paths import is_masked, leaves_of, nodes_of
from depthsmooth.mesh import AxisName, manual_axes
from depthsmooth.operators.general import check_operator
from depthsmooth.operators.smoothing import window
from depthsmooth.operators.stencil import Operator, Stencil, identity, join

Variant = Literal["standard", "norm_preserving", "directional"]


NormOver = Literal["tensor", "block"]


class Mix(Protocol):
    """An operator on the updates at hand."""

    def __call__(self, factors: jax.Array | None = None) -> Block:
        """What it makes of them, in float32 at least, after multiplying each layer by a factor."""


class Read(Protocol):
    """Reads the updates from memory, each time anew."""

    def __call__(self, after: jax.Array | None = None) -> tuple[Block, Mix]:
        """The updates, and the operator on them, once a value is known."""


class SmoothOverDepthState(NamedTuple):
    """State of the transformations over depth.

    Attributes:
      count: number of updates made, an int32 scalar, which schedules read.
    """

    count: jax.Array  # type: ignore[assignment] # every tuple has a count()


def smooth_over_depth(
    alpha: optax.ScalarOrSchedule = 0.1,
    *,
    depth: Depth | None = None,
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
    depth: Depth | None = None,
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
    depth: Depth | None = None,
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


def _standard(read: Read) -> Block:
    _, mix = read()
    return mix()


def _norm_preserving(read: Read) -> Block:
    updates, mix = read()
    factors = ratio(norms(updates), norms(mix()))
    _, mix = read(factors)
    return scaled(mix(), factors)


def _directional(read: Read) -> Block:
    updates, _ = read()
    before = norms(updates)
    to_directions = ratio(1, before)
    _, mix = read(to_directions)
    factors = ratio(before, norms(mix(to_directions)))
    _, mix = read(factors)
    return scaled(mix(to_directions), factors)


def _shrunk(read: Read) -> Block:
    updates, mix = read()
    factors = ratio(norms(mix()), norms(updates))
    updates, _ = read(factors)
    return scaled(updates, factors)


_VARIANTS = {
    "standard": _standard,
    "norm_preserving": _norm_preserving,
    "directional": _directional,
}


def _over_depth(
    variant: Callable[[Read], Block],
    operator: Operator,
    depth: Depth | None,
    where: Where | None,
    norm_over: NormOver,
    cuts: Cuts,
    axis_name: AxisName | None,
) -> optax.GradientTransformationExtraArgs:
    check_operator(operator)
    if not isinstance(depth, Depth | None):
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

    def stencils_of(tree: optax.Params, count: jax.Array) -> dict[Track, Stencil]:
        found = depth_in(tree, depth)
        at = cuts_of_groups(cuts, found, depth or found, leaves_of(tree)[1])
        selected = found if where is None else found.select(where, tree)
        return _stencils(operator, count, selected, at)

    def init_fn(params: optax.Params) -> SmoothOverDepthState:
        count = jnp.zeros([], jnp.int32)
        stencils_of(params, count)
        return SmoothOverDepthState(count=count)

    def update_fn(
        updates: optax.Updates,
        state: SmoothOverDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, SmoothOverDepthState]:
        del params, extra_args
        count = state.count
        nodes = nodes_of(updates)
        leaves = {path: leaf for path, leaf in nodes if leaf is not None}
        after: dict[str, jax.Array] = {}
        zero = jnp.minimum(count, 0)
        for bundle in _bundles(stencils_of(updates, count), norm_over):
            results, zero = _augmented(variant, bundle, leaves, zero, axis_name)
            after |= results
        treedef = jax.tree_util.tree_structure(updates, is_leaf=is_masked)
        mixed = [after.get(path, leaf) for path, leaf in nodes]
        updates = jax.tree_util.tree_unflatten(treedef, mixed)
        return updates, SmoothOverDepthState(count=optax.safe_increment(count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stencils(
    operator: Operator, count: jax.Array, depth: Depth, cuts: Mapping[str, Sequence[int]]
) -> dict[Track, Stencil]:
    """The stencil of each track: the operator's for each of its runs of layers."""
    made: dict[tuple[int, ...], Stencil] = {}
    stencils = {}
    for track in depth.tracks:
        runs = track.runs_between(cuts.get(track.group, ()))
        if runs not in made:
            try:
                made[runs] = join([_stencil(operator, count, n) for n in runs])
            except ValueError as error:
                raise ValueError(f"In {track.group}: {error}") from error
        stencils[track] = made[runs]
    return stencils


def _stencil(operator: Operator, count: jax.Array, layers: int) -> Stencil:
    """The operator for one run of layers: a single layer is left as it is."""
    if layers == 1:
        return identity(1)
    made = operator(layers, count)
    if not isinstance(made, Stencil) or made.layers != layers:
        raise ValueError(
            f"{operator!r} is no operator: for {layers} layers it gives a {type(made).__name__}, "
            "but has to give a Stencil of as many, as window(0.1) and from_matrix(matrix) do."
        )
    return made


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


def _augmented(
    variant: Callable[[Read], Block],
    bundle: Mapping[Track, Stencil],
    updates: Mapping[str, jax.Array],
    zero: jax.Array,
    axis_name: AxisName | None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The updates of some tracks, by their paths, and the 0 that orders them.

    It is handed from one reading to the next, so that compilers do not begin with all the tensors
    at once, and keep all of their updates until the last is done.
    """
    mixings = [
        _Mixing.of(track, operator, tensor_of(track, updates, axis_name))
        for track, operator in bundle.items()
    ]
    block = [mixing.tensor for mixing in mixings]

    def read(after: jax.Array | None = None) -> tuple[Block, Mix]:
        nonlocal zero
        for k, mixing in enumerate(mixings):
            mixings[k], zero = mixing.read(zero, after)
        at_hand, nil = tuple(mixings), zero

        def mix(factors: jax.Array | None = None) -> Block:
            return [mixing.mixed(nil, factors) for mixing in at_hand]

        return [mixing.tensor for mixing in at_hand], mix

    results = {
        path: narrowed(array, original)
        for track, before, after in zip(bundle, block, variant(read), strict=True)
        for path, array, original in zip(track.paths, after.arrays, before.arrays, strict=True)
    }
    return results, zero


@dataclasses.dataclass(frozen=True)
class _Mixing:
    """One tensor, and all that it is mixed by."""

    track: Track
    operator: Stencil
    tensor: Tensor
    halos: Sequence[Halo]

    @classmethod
    def of(cls, track: Track, operator: Stencil, tensor: Tensor) -> _Mixing:
        """With what other shards have of it."""
        halos = exchange(
            operator,
            tensor.arrays,
            tensor.axes,
            track.layers,
            shards=tensor.shards,
            axis_name=tensor.axis_name,
        )
        return cls(track, operator, tensor, halos)

    def read(self, zero: jax.Array, after: jax.Array | None) -> tuple[_Mixing, jax.Array]:
        """The same, as a compiler reads it from memory once more, when ``after`` is known.

        It would keep what has been mixed for the norms, rather than mix again; and would mix
        several tensors at a time, as they have weights in common, and keep the updates of all of
        them until then. Dense operators take longer than to keep what they give.
        """
        if self.operator.is_identity or self.operator.is_dense:
            return self, zero
        weights = [jnp.asarray(row) for row in self.operator.weights]
        if manual_axes():
            # All that passes together is taken, by JAX 0.10, to differ along the same mesh axes.
            pairs = [jax.lax.optimization_barrier((a, weights)) for a in self.tensor.arrays]
            arrays, (weights, *_) = map(list, zip(*pairs, strict=True))
            zero = jax.lax.optimization_barrier(zero)
        else:
            values = self.tensor.arrays, weights, zero, after
            arrays, weights, zero, _ = jax.lax.optimization_barrier(values)
        operator = dataclasses.replace(self.operator, weights=weights)
        return _Mixing(self.track, operator, self.tensor.of(arrays), self.halos), zero

    def mixed(self, zero: jax.Array, factors: jax.Array | None) -> Tensor:
        """What the operator makes of the tensor, each layer of which is first multiplied."""
        operator = self.operator
        if factors is not None:
            operator = scaled_stencil(operator, everywhere(factors_of(factors, self.track.present)))
        arrays = apply(
            operator,
            self.tensor.arrays,
            self.tensor.axes,
            self.track.layers,
            zero,
            shards=self.tensor.shards,
            axis_name=self.tensor.axis_name,
            halos=self.halos,
            wide=True,
        )
        return self.tensor.of(arrays)
