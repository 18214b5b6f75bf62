"""The door: the depth of a model's parameters, read off the jaxpr of a function that takes it.

What counts as proof is said by the two strategies, :mod:`stacks` and :mod:`siblings`. Both judge by
what :mod:`walk` sees each parameter do. What neither proves is left alone, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax

from depthsmooth.depth import models
from depthsmooth.depth.layout import Depth, DepthNotFoundError
from depthsmooth.depth.leaves import Leaf, shape_of
from depthsmooth.depth.tracing.evidence import Findings
from depthsmooth.depth.tracing.siblings import place_indexed, place_siblings
from depthsmooth.depth.tracing.stacks import place_stacks
from depthsmooth.depth.tracing.walk import Walk
from depthsmooth.mesh import manual_axes

if TYPE_CHECKING:
    from jax.extend import core  # its import takes 50 ms


def trace_depth(
    fn: Callable[..., object], model: object, /, *args: object, **kwargs: object
) -> Depth:
    """Finds the depth axes of parameters by following them through a function.

    An axis is depth where the function scans over it in a loop that composes
    layers. Nothing is computed or allocated, and the model stays as it is.

    Args:
      fn: the forward pass or the loss, called as ``fn(model, *args, **kwargs)``.
        Prefer the forward pass to its gradient: it is quicker to follow.
      model: what ``fn`` takes: a tree of parameters, a Flax NNX or an Equinox module,
        or any tree that holds these. ``jax.ShapeDtypeStruct`` may stand for arrays.
      *args: further arguments of ``fn``. Arrays and ``jax.ShapeDtypeStruct`` are
        traced by shape and dtype; all else is passed on as it is.
      **kwargs: further keyword arguments, likewise.

    Returns:
      The Depth, with a group for each stack, or each kind of siblings. Its paths are those of the
      tree that the optimizer gets: the tree of parameters,
      ``nnx.state(model, nnx.Param)``, or ``eqx.filter(model, eqx.is_inexact_array)``.

    Raises:
      DepthNotFoundError: if no parameter is scanned over in a loop over layers.
      ValueError: if a parameter is scanned over along two axes, ``fn`` can't be
        called, or it takes another kind of model.

    Example:
      >>> def forward(params, x):
      ...     layer = lambda x, kernel: (jax.nn.relu(x @ kernel), None)
      ...     return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]
      >>> float32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
      >>> params = {"layers": float32(12, 4, 4), "head": float32(4, 2)}
      >>> print(trace_depth(forward, params, float32(8, 4)))
      group       layers  axis  leaves  parameters  found by
      layers          12     0       1         192  trace
      left alone                     1           8
      left alone: head (4, 2)
    """
    _check_call(fn)
    models.check_no_optimizer(model)
    parts = models.parts_of(model)
    if not parts.paths:
        raise DepthNotFoundError(models.without_parameters(fn, model))
    walk = _walk_over(fn, model, parts, args, kwargs)
    findings = Findings(walk, parts.paths, [shape_of(leaf) for leaf in parts.params])
    # A leaf that a loop over layers takes slices of holds many layers, or none: never one.
    stacked = place_stacks(findings)
    others = findings.node(sorted(findings.composition.pieces.keys() - stacked))
    place_siblings(findings, others, models.ends_of_perceptrons(model))
    # What is within layers that have leaves of their own is no stack of layers.
    place_indexed(findings, stacked)
    places, reasons = findings.places, findings.reasons
    if not places:
        nothing = _nothing_found(findings)
        raise DepthNotFoundError(
            f"{_function_first(fn)} {nothing}" if models.is_model(fn) else nothing
        )
    alone = "it is no layer of a loop, nor one of siblings of a kind that compose"
    return Depth(
        tuple(
            Leaf(path, shape_of(leaf), places[index].on_devices_of(leaf))
            if index in places
            else Leaf(path, shape_of(leaf), None, reasons.get(index, alone))
            for index, (path, leaf) in enumerate(zip(parts.paths, parts.params, strict=True))
        )
    )


def _check_call(fn: object) -> None:
    """Raises if there is no function first, or where arrays are not whole."""
    if not callable(fn):
        raise ValueError(
            "trace_depth takes the function first, then the parameters or the model, but "
            f"{type(fn).__name__} can't be called."
        )
    if manual_axes():
        raise ValueError(
            "trace_depth is called in shard_map, where arrays are parts of others. Call it "
            "outside, with the whole ones, or with jax.ShapeDtypeStruct."
        )


def _walk_over(
    fn: Callable[..., object],
    model: object,
    parts: models.Parts,
    args: Sequence[object],
    kwargs: dict[str, object],
) -> Walk:
    """The walk over a function of a model that is taken apart."""

    def of_parts(
        leaves: Sequence[jax.Array], rest: Sequence[jax.Array], /, *args: object, **kwargs: object
    ) -> object:
        return fn(parts.join(leaves, rest), *args, **kwargs)

    try:
        jaxpr = _jaxpr_of(of_parts, parts.params, (parts.rest, *args), kwargs)
    except Exception as error:
        remedy = models.remedy_of(error, model)
        if remedy:
            raise ValueError(remedy) from error
        if models.is_model(fn):
            error.add_note(_function_first(fn))
        raise
    walk = Walk()
    walk.function(jaxpr, len(parts.params))
    return walk


def _jaxpr_of(
    fn: Callable[..., object],
    leaves: Sequence[jax.Array],
    args: Sequence[object],
    kwargs: dict[str, object],
) -> core.Jaxpr:
    """The jaxpr of ``fn(leaves, *args, **kwargs)``; its first inputs are the leaves."""
    leaves, (args, kwargs) = jax.tree.map(_unsplit, (leaves, (args, kwargs)))
    values, treedef = jax.tree_util.tree_flatten((args, kwargs))
    traced = {i: value for i, value in enumerate(values) if models.is_array(value)}

    def of_arrays(leaves: Sequence[jax.Array], arrays: dict[int, jax.Array]) -> list[jax.Array]:
        merged = [arrays.get(i, value) for i, value in enumerate(values)]
        args, kwargs = jax.tree_util.tree_unflatten(treedef, merged)
        out = jax.tree.leaves(fn(leaves, *args, **kwargs))
        return [leaf for leaf in out if isinstance(leaf, jax.Array)]

    with jax.disable_jit(False):  # with it, a scan would be unrolled
        jaxpr: core.Jaxpr = jax.make_jaxpr(of_arrays)(leaves, traced).jaxpr
    return jaxpr


def _unsplit(leaf: object) -> object:
    """An array by its shape and dtype alone: how devices split it changes no depth.

    In an explicit mesh it could not even be scanned over.
    """
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak)


def _function_first(fn: Callable[..., object]) -> str:
    """What to do about a model that is given in the place of the function."""
    return (
        f"The function that was given is a {type(fn).__name__} with parameters of its own. If "
        "these are to be followed, give the function first, then the model: "
        "trace_depth(loss, model, *args)."
    )


def _nothing_found(findings: Findings) -> str:
    """What to do about a function that composes no layers: with what speaks against each."""
    leaves = zip(findings.paths, findings.shapes, strict=True)
    named = [f"{path or 'the array'} {shape}" for path, shape in leaves]
    if not findings.walk.first_met:
        return (
            f"In the function no data meets any parameter, like {named[0]}. Give it as "
            "fn(model, *args), with these in its first argument, and its data among args: what it "
            "makes itself are constants."
        )
    examples = {why: leaf for leaf, why in sorted(findings.reasons.items(), reverse=True)}
    reasons = [
        f"{named[leaf]} is left alone: {why}."
        for why, leaf in sorted(examples.items(), key=lambda example: example[1])
    ]
    return (
        f"No parameter, like {named[0]}, certainly holds layers that this "
        "function composes, in a loop or as numbered siblings one after another. "
        f"{' '.join([*reasons[:4], ''])}If there are layers, say where: "
        "Depth.from_rules({'.*layers/.*': axis}) if they are stacked, "
        "Depth.from_rules({'.*block_.*': numbered()}) if each has leaves of its own."
    )
