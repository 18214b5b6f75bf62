"""The Optax transformations that apply an operator over depth, wherever the layers are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthsmooth import stencil
from depthsmooth.finding import find_depth
from depthsmooth.layout import Depth
from depthsmooth.operators import Operator, window
from depthsmooth.places import is_masked, nodes_of


class SmoothOverDepthState(NamedTuple):
    """State of :func:`smooth_over_depth`.

    Attributes:
      count: number of updates made, an int32 scalar, which schedules read.
    """

    count: jax.Array  # type: ignore[assignment] # every tuple has a count()


def smooth_over_depth(
    alpha: optax.ScalarOrSchedule = 0.1, *, depth: Depth | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Mixes the update of every layer with those of its two neighbours.

    .. math::
        \tilde u_\ell = (1 - \alpha)\, u_\ell
            + \tfrac{\alpha}{2} (u_{\ell-1} + u_{\ell+1})

    with :math:`\tilde u_1 = (1 - \tfrac{\alpha}{2})\, u_1 + \tfrac{\alpha}{2} u_2`
    and likewise for the last layer. The mean over depth is kept. Leaves that
    ``depth`` does not place pass through untouched.

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

    Returns:
      A transformation with the state :class:`SmoothOverDepthState`. Updates keep
      their structure, shapes, dtypes, weak types and shardings.

    Raises:
      ValueError: if ``alpha`` is a number outside [0, 1) or no scalar, or ``depth``
        is no Depth; on ``init`` and ``update``, if a leaf does not fit its place, or
        its place cannot be found with certainty.

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
    operator = window(alpha)
    if not isinstance(depth, Depth | None):
        raise ValueError(
            f"depth is a {type(depth).__name__}, but has to be a Depth: from "
            "trace_depth(loss_fn, params, batch), or from Depth.from_rules({'.*/layers/.*': 0})."
        )

    def depth_of(tree: optax.Params) -> Depth:
        return find_depth(tree, metadata=False) if depth is None else depth.resolve(tree)

    def init_fn(params: optax.Params) -> SmoothOverDepthState:
        depth_of(params)
        return SmoothOverDepthState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: SmoothOverDepthState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, SmoothOverDepthState]:
        del params, extra_args
        updates = _apply(operator, state.count, depth_of(updates), updates)
        return updates, SmoothOverDepthState(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _apply(
    operator: Operator, count: jax.Array, depth: Depth, updates: optax.Updates
) -> optax.Updates:
    """The updates, mixed along each track of the layout."""
    leaves, treedef = jax.tree_util.tree_flatten(updates, is_leaf=is_masked)
    index = {path: k for k, (path, leaf) in enumerate(nodes_of(updates)) if not is_masked(leaf)}
    zero = jnp.minimum(count, 0)
    stencils: dict[tuple[int, ...], stencil.Stencil] = {}
    for track in depth.tracks:
        if track.runs not in stencils:
            stencils[track.runs] = stencil.join([operator(run, count) for run in track.runs])
        ours = [index[path] for path in track.paths]
        mixed = stencil.apply(
            stencils[track.runs],
            [leaves[k] for k in ours],
            [place.axes for place in track.places],
            track.layers,
            zero,
        )
        for k, leaf in zip(ours, mixed, strict=True):
            leaves[k] = leaf
    return jax.tree_util.tree_unflatten(treedef, leaves)
