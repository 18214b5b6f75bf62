"""Siblings: leaves of their own are layers where each sibling is applied to what another has made.

Proof is that data meets siblings of one kind one after another: of a tensor that they share each
meets what the sibling before has made of its own, and none the other way round. Those side by side,
like experts, meet the same data. But the two matrices of a block compose as well, and so do an
encoder and a decoder: that siblings are layers takes more, a name that says so, or three or more
in numeric order with the same part in each round. A stack that a Python loop indexes place by place
(``w[0]``, ``w[1]``) has siblings in one array, and the same proof.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence, Set

from depthsmooth.depth.leaves import Place
from depthsmooth.depth.names.families import Family, besides_layers, blocks_within, holds_layers
from depthsmooth.depth.names.nodes import Node
from depthsmooth.depth.names.words import BESIDE, has_word, is_layer_name
from depthsmooth.depth.tracing.evidence import Findings


def place_siblings(findings: Findings, node: Node, ends: Set[str]) -> None:
    """Places the siblings below a node that are layers; within layers nothing else is.

    ``ends`` are the paths of those that are known to be the first and the last of a perceptron.
    """
    for child in besides_layers(node, functools.partial(_layers_among, findings, ends)):
        if not child.is_leaf:
            place_siblings(findings, child, ends)


def _layers_among(
    findings: Findings, ends: Set[str], family: Family, parts: bool
) -> Iterable[Node]:
    """The siblings that are layers, or named like it: there is nothing more to find in them."""
    is_named = is_layer_name(family.name)
    for node in family.members.values():
        if node.path in ends:
            why = "it is the first or the last matrix of a perceptron, and no hidden layer"
            findings.leave_alone(findings.composition.leaves_in(node), why)
    members = {k: node for k, node in family.members.items() if node.path not in ends}
    if len(members) < 2:
        # A BlockTransformer_0 of Octo is named like a layer and holds all of them.
        return [node for node in members.values() if is_named and not holds_layers(node)]
    family = dataclasses.replace(family, members=members)
    # The norms of a perceptron are no layers by themselves. Those beside the attentions and MLPs of
    # Haiku are parts of layers.
    if not (family.repeats or parts):
        return []
    # A Sequential may hold a stem before its blocks and a norm behind them.
    kinds = [kind for kind in family.kinds if len(kind.members) > 1]
    settled = [_place_kind(findings, kind, family, is_named, parts) for kind in kinds]
    return [node for nodes in settled for node in nodes]


def _place_kind(
    findings: Findings, kind: Family, family: Family, is_named: bool, parts: bool
) -> Iterable[Node]:
    """Places siblings of one kind if they are layers; those in which nothing else is."""
    in_order, members = findings.composition.in_order, [*kind.members.values()]
    ordered = in_order(members)
    inner = [each for each in blocks_within(members) if in_order([*each.members.values()])]
    why = ""
    if ordered is None:
        why = "its siblings do not compose"
    elif inner:
        why = f"its siblings hold what may be layers, {inner[0].group}, themselves"
    elif not (is_named or parts):
        why = _doubt_of_names(findings, kind, ordered, family)
    if why or ordered is None:
        for member in members:
            findings.leave_alone(findings.composition.leaves_in(member), why)
        # Two stages of one width may be the layers, and so may the blocks in them.
        return members if is_named and inner else []
    for path, place in kind.places(ordered, "trace").items():
        findings.places[findings.composition.index[path]] = place
    return members


def _doubt_of_names(
    findings: Findings, kind: Family, ordered: Sequence[Node], family: Family
) -> str:
    """Why siblings that compose, and are not named after layers, may be none, if so.

    A generator and a discriminator compose, a block's matrices do, and so do the towers of
    a model. What is certain are three or more, in the order of their numbers.
    """
    members = list(kind.members.values())
    # The first and the last matrix of a perceptron have other shapes. An encoder and a decoder
    # around a block have other tensors.
    count = len(family.members) if family.is_uniform else len(members)
    # Experts that write into one array one after another compose, as far as the walk can see.
    if has_word(BESIDE, kind.name):
        return "its siblings are named after what is side by side"
    # The weights of one block may be a flat list. Two siblings may be a generator and a
    # discriminator.
    if any(member.is_leaf for member in members) or count < 3:
        return "its siblings, which are not named after layers, may be parts of a network"
    # Data may go through step_2 before step_1: numbers alone are no order of layers.
    if list(ordered) != members:
        return "its siblings, which are not named after layers, are not in numeric order"
    # Flax numbers the matrices of blocks that are no modules, Dense_0 to Dense_5. Siblings of two
    # tensors or more are modules.
    is_bias = [len(of.shape) < 2 and of.keys[-1] in ("b", "bias") for of in kind.first.leaves]
    is_regular = findings.composition.is_periodic(ordered) and findings.composition.is_plain(
        ordered
    )
    if is_bias.count(False) < 2 and not is_regular:
        return "its siblings, which are not named after layers, may be parts of a block"
    return ""


def place_indexed(findings: Findings, stacked: Set[int]) -> None:
    """Places the stacks whose slices are taken one by one, as by ``w[0]`` and ``w[1]``.

    ``stacked`` are the leaves that loops over layers take slices of.
    """
    found: dict[tuple[int, str], dict[int, tuple[int, list[int]]]] = {}
    for leaf in findings.composition.pieces:
        if leaf in findings.places or leaf in stacked:
            continue
        orders = findings.composition.orders_along_axes(leaf, findings.shapes[leaf])
        if len(orders) == 1:
            [(axis, order)] = orders.items()
            container = findings.paths[leaf].rpartition("/")[0]
            found.setdefault((len(order), container), {})[leaf] = (axis, order)
    pairs = {leaf for (size, _), leaves in found.items() if size == 2 for leaf in leaves}
    for (size, _), leaves in found.items():
        # A table of vectors may scale and shift data row by row.
        matrices = any(len(findings.shapes[leaf]) > 2 for leaf in leaves)
        if not matrices or (size == 2 and not _are_pairs_of_layers(findings.paths, leaves, pairs)):
            findings.leave_alone(leaves, "its slices compose, but they may be parts of a layer")
            continue
        group = findings.name_group(leaves)
        for leaf, (axis, order) in leaves.items():
            layers = tuple(map(order.index, range(len(order))))
            findings.places[leaf] = Place(group, findings.paths[leaf], (axis,), layers, "trace")


def _are_pairs_of_layers(paths: Sequence[str], leaves: Iterable[int], pairs: Set[int]) -> bool:
    """Whether leaves with two slices hold two layers, and not two matrices of one.

    Then there are two of all tensors: of those below a key that names layers, or else of
    several side by side. Below a key that names a single layer, nothing else is layers.
    """
    # A layer may hold its two matrices as ffn[0] and ffn[1], beside one norm.
    keys = paths[next(iter(leaves))].split("/")
    named = [at for at, key in enumerate(keys, 1) if is_layer_name(key)]
    container = keys[: named[-1]] if named else keys[:-1]
    # layers/w and h/w name several layers, layers_0/ffn names one.
    if named and not (container[-1] == "h" or container[-1].endswith("s")):
        return False
    beside = {k for k, path in enumerate(paths) if path.split("/")[: len(container)] == container}
    return beside <= pairs and (bool(named) or len(beside) > 1)
