"""A model as users have it: its parameters, and the same model with others in their place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.depth.paths import is_mixable, leaves_of, path_string


class Parts(NamedTuple):
    """A model, taken apart.

    Attributes:
      paths: of the parameters, in the tree that the optimizer gets.
      params: the parameters.
      rest: further arrays of the model.
      join: ``join(params, rest)`` is the model with these. The user's own stays as it is.
    """

    paths: list[str]
    params: list[jax.Array]
    rest: list[jax.Array]
    join: Callable[[Sequence[jax.Array], Sequence[jax.Array]], object]


def parts_of(model: object) -> Parts:
    """Takes a model apart into what an optimizer trains, and what else there is.

    The parameters are

    - of what holds Flax NNX modules: the leaves of ``nnx.state(model, nnx.Param)``;
    - of what holds Equinox modules, or leaves that are no arrays, such as functions, strings
      and flags: the leaves of ``eqx.filter(model, eqx.is_inexact_array)``;
    - of any other tree: all leaves.

    Example:
      >>> parts = parts_of({"act": jnp.tanh, "w": jax.ShapeDtypeStruct((2,), "float32")})
      >>> parts.paths
      ['w']
      >>> parts.join([jnp.ones(2)], [])["act"] is jnp.tanh
      True
    """
    nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
    if nnx is not None and _has(model, lambda node: isinstance(node, nnx.Pytree)):
        return _parts_of_nnx(model, nnx)
    leaves = leaves_of(model)[0]
    is_filtered = not all(is_array(leaf) or isinstance(leaf, float | complex) for _, leaf in leaves)
    if equinox is not None and _has(model, lambda node: isinstance(node, equinox.Module)):
        is_filtered = True
    is_param = [not is_filtered or (is_array(leaf) and is_mixable(leaf)) for _, leaf in leaves]
    paths = [path for (path, _), here in zip(leaves, is_param, strict=True) if here]
    return _parts(paths, is_param, model, lambda model: model)


def ends_of_perceptrons(model: object) -> set[str]:
    """The paths of the first and the last layer of each ``eqx.nn.MLP`` in a model.

    By its definition these lead from the inputs to the hidden units, and from these to the
    outputs, and are no hidden layers; also where the sizes happen to be the same.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return set()
    nodes = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda node: isinstance(node, equinox.nn.MLP)
    )
    return {
        "/".join(filter(None, [path_string(keys), "layers", str(end)]))
        for keys, node in nodes
        if isinstance(node, equinox.nn.MLP)
        for end in (0, len(node.layers) - 1)
    }


def _parts_of_nnx(model: object, nnx: ModuleType) -> Parts:
    """What an ``nnx.Optimizer`` gets is part of the model's state, which makes models anew."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    paths = [path for path, _ in leaves_of(params)[0]]
    is_param = [True] * len(paths) + [False] * len(jax.tree.leaves(rest))
    return _parts(paths, is_param, (params, rest), lambda states: nnx.merge(graph, *states))


def _parts(
    paths: list[str], is_param: Sequence[bool], tree: Any, build: Callable[[Any], object]
) -> Parts:
    """The parts of a tree with these parameters, out of which the model is built."""
    leaves, treedef = jax.tree.flatten(tree)
    params = [index for index, here in enumerate(is_param) if here]
    others = [index for index, here in enumerate(is_param) if not here]
    rest = [index for index in others if is_array(leaves[index]) and not _is_known(leaves[index])]

    def join(own: Sequence[jax.Array], further: Sequence[jax.Array]) -> object:
        new = dict(zip([*params, *rest], [*own, *further], strict=True))
        values = [new.get(index, leaf) for index, leaf in enumerate(leaves)]
        return build(jax.tree.unflatten(treedef, values))

    return Parts(paths, [leaves[i] for i in params], [leaves[i] for i in rest], join)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array, or has its shape and dtype."""
    return not isinstance(leaf, type) and hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_known(leaf: jax.Array) -> bool:
    """Whether Python may read an array's values, as it does of sizes, flags and an order."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    is_countable = any(jnp.issubdtype(leaf.dtype, kind) for kind in (jnp.integer, jnp.bool_))
    return is_countable and isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _has(tree: object, wanted: Callable[[object], bool]) -> bool:
    """Whether a node of the tree is one that is wanted."""
    return any(map(wanted, jax.tree.leaves(tree, is_leaf=wanted)))


def is_model(fn: object) -> bool:
    """Whether a function is itself a model with parameters, or a method of one."""
    return bool(parts_of(fn.__self__ if isinstance(fn, MethodType) else fn).params)


def check_no_optimizer(model: object) -> None:
    """Raises if an optimizer, or its state, is given for what it trains."""
    if _has(model, _is_of_optimizer):
        raise ValueError(
            "trace_depth takes the parameters or the model that the optimizer trains, but was "
            f"given a {type(model).__name__} that holds an optimizer or its state. Where that is "
            "a TrainState: trace_depth(lambda params, *args: loss(state.replace(params=params), "
            "*args), state.params, *args). Where it is an nnx.Optimizer: trace_depth(loss, model, "
            "*args)."
        )


def _is_of_optimizer(node: object) -> bool:
    if type(node).__module__.partition(".")[0] == "optax":
        return not isinstance(node, optax.MaskedNode)
    return hasattr(node, "opt_state")


def without_parameters(fn: object, model: object) -> str:
    """What to do about a model that has no parameters."""
    name = type(model).__name__
    if callable(model) and is_model(fn):
        return (
            f"There are no parameters in the {name} that was given second, but in the "
            f"{type(fn).__name__} that was given first. trace_depth takes the function first, "
            "then the model: trace_depth(loss, model, *args)."
        )
    if hasattr(model, "init") and hasattr(model, "apply"):
        return (
            f"There are no parameters in a {name}: its init makes them. Give trace_depth these, "
            "as the optimizer gets them: trace_depth(model.apply, params, *args)."
        )
    return (
        f"There are no parameters in the {name}, no arrays of floating point. Give trace_depth "
        "the parameters or the model that the optimizer trains."
    )


def remedy_of(error: Exception, model: object) -> str:
    """What to do about an error of a function that takes another kind of model; "" for others."""
    nnx = sys.modules.get("flax.nnx")
    is_state = nnx is not None and isinstance(model, nnx.State) and "State" in str(error)
    if is_state and isinstance(error, AttributeError | TypeError):
        return (
            "The function takes a model, but was given an nnx.State. Give it the model itself: "
            "trace_depth(loss, model, *args)."
        )
    keys = model if isinstance(model, Mapping) else {}
    if "params" in keys:
        if _is_flax(error, "ApplyScopeInvalidVariablesStructureError") or _misses(
            error, keys["params"]
        ):
            return (
                "The function takes the inner tree of a Flax model, but was given the whole one. "
                "Give it the inner one, params['params'], as the optimizer has to get, too."
            )
    elif (
        _misses(error, {"params"})
        or _is_flax(error, "ApplyScopeInvalidVariablesTypeError")
        or (_is_flax(error, "ScopeCollectionNotFound") and '"params"' in str(error))
    ):
        return (
            "The function takes the whole tree of a Flax model, {'params': …}, but was given the "
            "inner one. Where the optimizer gets the inner one, wrap it: trace_depth(lambda p, x: "
            "model.apply({'params': p}, x), params['params'], x), where params is what model.init "
            "returns. Other collections, such as batch_stats, go beside 'params'. Where the "
            "optimizer gets the whole tree, give trace_depth the whole tree."
        )
    return ""


def _misses(error: Exception, keys: object) -> bool:
    """Whether the function has looked for one of these keys, and it was not there."""
    is_there = isinstance(keys, Mapping | Set) and error.args[:1] and error.args[0] in keys
    return isinstance(error, KeyError) and bool(is_there)


def _is_flax(error: Exception, name: str) -> bool:
    return type(error).__module__ == "flax.errors" and type(error).__name__ == name
