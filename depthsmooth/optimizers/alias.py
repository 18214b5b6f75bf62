"""Complete optimizers with smoothing in its place: after preconditioning, before weight decay."""

# No postponed annotations: Optax reads from them which arguments may be schedules.

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

import jax
import optax

from depthsmooth.depth.cuts import Cuts
from depthsmooth.depth.layout import Layout, Where, refuse_depths
from depthsmooth.mesh import AxisName
from depthsmooth.optimizers.muon import (
    Coefficients,
    DimensionNumbers,
    Mask,
    Preconditioning,
    function_of,
    muon_over_depth,
    scale_by_neuron,
)
from depthsmooth.transform import NormOver, Variant, smooth_over_depth

Arguments = ParamSpec("Arguments")


def _with_depth_by_name(
    optimizer: Callable[Arguments, optax.GradientTransformationExtraArgs],
) -> Callable[Arguments, optax.GradientTransformationExtraArgs]:
    """An optimizer that takes a Depth by its name alone: nearly anything may be a number of it."""
    names = list(inspect.signature(optimizer).parameters)

    @functools.wraps(optimizer)
    def checked(
        *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        refuse_depths(optimizer.__name__, dict(zip(names, args, strict=False)) | kwargs)
        return optimizer(*args, **kwargs)

    return checked


def _smoothing(
    alpha: optax.ScalarOrSchedule,
    where: Where | None,
    variant: Variant,
    norm_over: NormOver,
    cuts: Cuts,
    axis_name: AxisName | None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """The smoothing of an optimizer, as a function of depth."""
    smooth = functools.partial(smooth_over_depth, alpha, variant=variant, norm_over=norm_over)
    return functools.partial(smooth, where=where, cuts=cuts, axis_name=axis_name)


@_with_depth_by_name
def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    alpha: optax.ScalarOrSchedule = 0.1,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.sgd`` with its steps smoothed over depth.

    .. math::
        \theta \leftarrow \theta - \eta\, S u

    with u the gradient, or its momentum.

    Args:
      learning_rate: as the next three in ``optax.sgd``.
      momentum: decay of the momentum; None for none.
      nesterov: whether the momentum is Nesterov's.
      accumulator_dtype: of the momentum.
      alpha: as the rest in :func:`depthsmooth.smooth_over_depth`.
      depth: where the layers are.
      where: which leaves are smoothed.
      variant: what becomes of norms.
      norm_over: what has a norm.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`depthsmooth.smooth_over_depth`.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([0.0, 4.0, 0.0])}
      >>> tx = sgd(1.0, alpha=0.5, depth=ds.Depth.from_rules({"layers": 0}))
      >>> tx.update(params, tx.init(params))[0]["layers"].tolist()
      [-1.0, -2.0, -1.0]

    References:
      Sutskever, Martens, Dahl, Hinton, `On the importance of initialization and momentum
      in deep learning <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    return optax.chain(
        optax.identity()
        if momentum is None
        else optax.trace(momentum, nesterov, accumulator_dtype),
        _smoothing(alpha, where, variant, norm_over, cuts, axis_name)(depth=depth),
        optax.scale_by_learning_rate(learning_rate),
    )


@_with_depth_by_name
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    alpha: optax.ScalarOrSchedule = 0.1,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.adamw`` with Adam's steps smoothed over depth, and decay outside.

    .. math::
        \theta \leftarrow \theta - \eta\, (S\, \hat m / (\sqrt{\hat v} + \epsilon)
            + \lambda \theta)

    Args:
      learning_rate: as those up to ``nesterov`` in ``optax.adamw``.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root.
      eps_root: added inside.
      mu_dtype: of the first moment.
      weight_decay: :math:`\lambda`, which is multiplied by the learning rate.
      mask: of what is decayed, such as :meth:`Depth.decay_mask`; all, unless said.
      nesterov: whether the momentum is Nesterov's.
      alpha: as the rest in :func:`depthsmooth.smooth_over_depth`.
      depth: where the layers are.
      where: which leaves are smoothed.
      variant: what becomes of norms.
      norm_over: what has a norm.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`depthsmooth.smooth_over_depth`.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([0.0, 4.0, 0.0])}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = adamw(1.0, weight_decay=0.5, alpha=0.5, depth=depth)
      >>> tx.update(params, tx.init(params), params)[0]["layers"].round(3).tolist()
      [-0.25, -2.5, -0.25]

    References:
      Meng, Sugolov, Papyan, `Gradient Smoothing
      <https://arxiv.org/abs/2606.30813>`_, 2026 (Algorithm 1).
    """
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        _smoothing(alpha, where, variant, norm_over, cuts, axis_name)(depth=depth),
        optax.add_decayed_weights(weight_decay, function_of(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )


@_with_depth_by_name
def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask | None = None,
    *,
    alpha: optax.ScalarOrSchedule = 0.1,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.lion`` with its signs smoothed over depth, and decay outside.

    .. math::
        \theta \leftarrow \theta - \eta\, (S\, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g)
            + \lambda \theta)

    Args:
      learning_rate: as those up to ``mask`` in ``optax.lion``.
      b1: rate at which the momentum and the gradient are combined.
      b2: decay of the momentum.
      mu_dtype: of the momentum.
      weight_decay: :math:`\lambda`, which is multiplied by the learning rate.
      mask: of what is decayed, such as :meth:`Depth.decay_mask`; all, unless said.
      alpha: as the rest in :func:`depthsmooth.smooth_over_depth`.
      depth: where the layers are.
      where: which leaves are smoothed.
      variant: what becomes of norms.
      norm_over: what has a norm.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`depthsmooth.smooth_over_depth`.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"layers": jnp.array([0.0, 4.0, 0.0])}
      >>> depth = ds.Depth.from_rules({"layers": 0})
      >>> tx = lion(1.0, weight_decay=0.5, alpha=0.5, depth=depth)
      >>> tx.update(params, tx.init(params), params)[0]["layers"].tolist()
      [-0.25, -2.5, -0.25]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023.
    """
    return optax.chain(
        optax.scale_by_lion(b1, b2, mu_dtype),
        _smoothing(alpha, where, variant, norm_over, cuts, axis_name)(depth=depth),
        optax.add_decayed_weights(weight_decay, function_of(mask)),
        optax.scale_by_learning_rate(learning_rate),
    )


@_with_depth_by_name
def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.7750, 2.0315),
    ns_steps: jax.typing.ArrayLike = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: Mask | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: jax.typing.ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.contrib.muon``, layer by layer, with its steps smoothed over depth.

    .. math::
        \theta \leftarrow \theta - \eta\, (S\, \mathrm{orthogonal}(m) + \lambda \theta)

    Each matrix of a stack is orthogonalised by itself, whatever axis it is stacked along, and
    stacked vectors (biases, scales) go to Adam, as they would if each layer had leaves of its
    own: ``optax.contrib.muon`` takes a stack of vectors for a matrix, and gives a stack of
    matrices to Adam.

    Args:
      learning_rate: as those up to ``consistent_rms`` in ``optax.contrib.muon``.
      ns_coeffs: of the Newton-Schulz iterations.
      ns_steps: how many of these.
      beta: decay of the momentum.
      eps: added to denominators.
      weight_decay: :math:`\lambda` of what is orthogonalised.
      weight_decay_mask: of what is decayed among these.
      mu_dtype: of the momentum.
      nesterov: whether the momentum is Nesterov's.
      adaptive: whether to scale by the dual norm; not with stacked layers.
      preconditioning: before the iterations.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps_root: added inside Adam's square root.
      adam_weight_decay: :math:`\lambda` of what goes to Adam.
      adam_learning_rate: of what goes to Adam; ``learning_rate``, unless said.
      muon_weight_dimension_numbers: what is orthogonalised, over which axes, instead of the
        matrices that ``depth`` finds in layers and those outside of them: as in
        ``optax.contrib.muon``, for the leaves as they are, stacked.
      consistent_rms: the root mean square of the steps, whatever the shape.
      alpha: as the rest in :func:`depthsmooth.smooth_over_depth`.
      depth: where the layers are.
      where: which leaves are smoothed.
      variant: what becomes of norms.
      norm_over: what has a norm.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`depthsmooth.smooth_over_depth`, and for ``adaptive`` with stacked
        layers, which ``optax.contrib.muon`` would scale by one number.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"kernel": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), "scale": jnp.ones((2, 3))}
      >>> tx = muon(1.0, alpha=0.5, depth=ds.Depth.from_rules({".*": 0}))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> bool(jnp.allclose(updates["kernel"][0], updates["kernel"][1], atol=1e-3))
      True

    References:
      Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    return muon_over_depth(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        dimension_numbers=muon_weight_dimension_numbers,
        depth=depth,
        smooth=_smoothing(alpha, where, variant, norm_over, cuts, axis_name),
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        consistent_rms=consistent_rms,
    )


@_with_depth_by_name
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.7750, 2.0315),
    ns_steps: jax.typing.ArrayLike = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: Mask | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    b2: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: jax.typing.ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbers | None = None,
    alpha: optax.ScalarOrSchedule = 0.1,
    depth: Layout | None = None,
    where: Where | None = None,
    variant: Variant = "standard",
    norm_over: NormOver = "tensor",
    cuts: Cuts = (),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon, layer by layer, with its steps smoothed over depth: as the paper trained nanochat.

    .. math::
        v \leftarrow \beta_2 v + (1 - \beta_2)\, \mathrm{mean}_\mathrm{in}(O^2), \qquad
        u = 0.2 \sqrt{m n}\, \frac{\hat O}{\|\hat O\|}, \quad \hat O = O / (\sqrt v + \epsilon)

    with O the orthogonalised momentum of one matrix of m × n: v has one number for every neuron,
    that is for every output, and steps have the root mean square 0.2. Kernels are taken to be
    (inputs, outputs), as in Flax and Haiku: for Equinox's, which are (outputs, inputs), give
    ``muon_weight_dimension_numbers``, as :func:`depthsmooth.muon_dimension_numbers` shows.

    Args:
      learning_rate: as in :func:`muon`, like all that follow but for ``b2``.
      ns_coeffs: of the Newton-Schulz iterations.
      ns_steps: how many of these.
      beta: decay of the momentum.
      eps: added to denominators.
      weight_decay: of what is orthogonalised.
      weight_decay_mask: of what is decayed among these.
      mu_dtype: of the momentum.
      b2: :math:`\beta_2`, decay of the neurons' second moments.
      nesterov: whether the momentum is Nesterov's.
      preconditioning: before the iterations.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps_root: added inside Adam's square root.
      adam_weight_decay: of what goes to Adam.
      adam_learning_rate: of what goes to Adam.
      muon_weight_dimension_numbers: what is orthogonalised, over which axes.
      alpha: as the rest in :func:`depthsmooth.smooth_over_depth`.
      depth: where the layers are.
      where: which leaves are smoothed.
      variant: what becomes of norms.
      norm_over: what has a norm.
      cuts: positions across which nothing is mixed.
      axis_name: in ``jax.shard_map``, the mesh axis that layers are split over.

    Returns:
      The optimizer.

    Raises:
      ValueError: as :func:`muon`.

    Example:
      >>> import jax.numpy as jnp
      >>> import depthsmooth as ds
      >>> params = {"kernel": jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), "scale": jnp.ones((2, 3))}
      >>> tx = normuon(1.0, alpha=0.5, depth=ds.Depth.from_rules({".*": 0}))
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jnp.sqrt((updates["kernel"] ** 2).mean((1, 2))).round(3).tolist()
      [0.20000000298023224, 0.20000000298023224]

    References:
      Li, Liu, Liang, Chen, Zhao, `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025.
    """
    return muon_over_depth(
        learning_rate,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        dimension_numbers=muon_weight_dimension_numbers,
        depth=depth,
        smooth=_smoothing(alpha, where, variant, norm_over, cuts, axis_name),
        rescale=functools.partial(scale_by_neuron, b2),
        ns_coeffs=ns_coeffs,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        preconditioning=preconditioning,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
    )
