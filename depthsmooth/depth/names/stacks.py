"""Stacks by names: along which axis the leaves of one container hold layers, if that is certain.

A norm has one axis in each layer. A second axis of it runs over layers, and so does the same axis
of all leaves beside it. So do the axes that metadata names after layers. Where sizes or metadata
leave several axes open, the doubts list the rules for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from depthsmooth.depth.leaves import Axes, Place, stacked
from depthsmooth.depth.names.doubts import (
    Doubt,
    doubt_stack,
    halves_of,
    rules_of_parts,
    rules_of_stack,
    rules_of_turns,
)
from depthsmooth.depth.names.families import Family, families_of, name_kinds
from depthsmooth.depth.names.nodes import Known, Node, common_axes, lora_pairs, spare_axes
from depthsmooth.depth.names.words import ARRAYS, BESIDE, has_word, is_layer_name, nesting_of


def read_stack(node: Node) -> dict[str, Place] | list[Doubt] | None:
    """The places of a node's leaves in one stack, what is doubtful of it, or None if it is none."""
    marked = [leaf for leaf in node.leaves if leaf.layer_axes]
    axes = _axes_by_metadata(node, marked) if marked else _axes_by_size(node)
    if axes is None:
        return None
    family = _blocks_in_turn(node)
    why = axes if isinstance(axes, str) else _doubt_of_stack(node, family, bool(marked))
    if isinstance(axes, str) or why:
        return _doubts_of_stack(node, family, why)
    turns, places = _turns_of_parts(node, family), {}
    for leaf in node.leaves:
        group, tensor, first, period = turns.get(leaf.path, (node.path, leaf.path, 0, 1))
        count = stacked(leaf.shape, axes[leaf.path])
        layers = tuple(i * period + first for i in range(count))
        if layers:
            by = "metadata" if marked else "names"
            places[leaf.path] = Place(group, tensor, axes[leaf.path], layers, by)
    return places


def _axes_by_metadata(node: Node, marked: Sequence[Known]) -> dict[str, Axes] | str | None:
    """The axes that metadata names after layers, outer to inner, or why they are not certain."""
    kinds = {tuple(leaf.names[axis] for axis in leaf.layer_axes) for leaf in marked}
    # Gemma 4 in MaxText has a stack along two axes beside one along one.
    if len(kinds) > 1:
        return "its leaves name different axes after layers, so that the order is not certain"
    nesting = [nesting_of(name) for name in next(iter(kinds))]
    # A scan within a scan may give both axes one name.
    if len(set(nesting)) < len(nesting):
        return "two of its axes are named after layers, and their order is not certain"
    axes = {leaf.path: leaf.nested_axes for leaf in marked}
    # Metadata may be wrong, where a transformation has added an axis and no name for it.
    if any(leaf.is_norm and len(leaf.shape) != 1 + len(nesting) for leaf in marked):
        return "it is stacked along more axes than its metadata names"
    if len({tuple(leaf.shape[a] for a in axes[leaf.path]) for leaf in marked}) > 1:
        return "its metadata says different numbers of layers"
    # A_log of Qwen3-Next in MaxText has no axis names, and many norms and biases have none.
    rest = [leaf for leaf in node.leaves if not leaf.layer_axes]
    if not rest:
        return axes
    said = {axis for leaf in marked for axis in axes[leaf.path]}
    common = _axes_by_size(node)
    if isinstance(common, dict) and all(common[leaf.path] == axes[leaf.path] for leaf in marked):
        return common
    return (
        f"some of its leaves name axis {min(said)} after layers, but not all, and sizes do not tell"
    )


def _axes_by_size(node: Node) -> dict[str, Axes] | str | None:
    """The one axis that all leaves agree on, why that is not certain, or None if unstacked."""
    vectors = _vectors(node)
    spare = {*spare_axes(vectors).values()}
    least = min([*spare, *(len(leaf.shape) - 1 for leaf in vectors)], default=0)
    # A tree of adapters alone has no norms.
    if not spare and all(leaf.is_lora for leaf in node.leaves):
        return _axes_of_adapters(node.leaves)
    # The bias of a projection onto several heads has two axes in one layer. So only norms tell a
    # stack, but any vector with a single axis tells that there is none.
    if not spare or least < 1:
        return None
    # nn.remat_scan, and the stages and repeats of a pipeline in MaxText.
    if len(spare) > 1 or least > 1:
        return "it is stacked along several axes, whose order the tree does not tell"
    candidates: list[dict[str, Axes]] = []
    for axis in common_axes(node.leaves):
        axes: dict[str, Axes] = {leaf.path: (axis % len(leaf.shape),) for leaf in node.leaves}
        if axes not in candidates:
            candidates.append(axes)
    if len(candidates) != 1:
        return "it is stacked, but more than one axis could be the layers"
    return candidates[0]


def _axes_of_adapters(leaves: Sequence[Known]) -> dict[str, Axes] | None:
    """The one axis that adapters without a norm have in common; None if that is not certain."""
    # Those of openpi have an axis for heads: (heads, width, r) and (heads, r, size). A head is
    # narrower than the network, so that an adapter with as many inputs as outputs has none.
    axes = common_axes(leaves)
    for one, two in lora_pairs(leaves) if len(axes) == 1 else ():
        inner, outer = ([*leaf.shape] for leaf in (one, two))
        del inner[axes[0]], outer[axes[0]]
        if inner == outer[::-1]:
            return {leaf.path: (axes[0] % len(leaf.shape),) for leaf in leaves}
    return None


def _vectors(node: Node) -> list[Known]:
    """The vectors of a stack, but for those of what is side by side."""
    # The biases of stacked experts have an axis for experts.
    return [
        leaf
        for leaf in node.leaves
        if leaf.is_vector and not has_word(ARRAYS, *leaf.keys[node.level :])
    ]


def lacks_norms(node: Node) -> bool:
    """Whether all leaves have an axis of one size in common, and none tells if it is layers."""
    # A projection onto several heads, (width, heads, size), has no axis in common with its bias.
    rank = min(len(leaf.shape) for leaf in node.leaves)
    if rank < 2 or not any(axis >= 0 for axis in common_axes(node.leaves)):
        return False
    # The norms of BiT have several axes in one layer.
    if any(leaf.is_norm for leaf in node.leaves):
        return False
    if _vectors(node):
        return True
    # All of its leaves may be matrices, with one axis more. Experts have one more, too.
    has_copies = any(has_word(ARRAYS, *leaf.keys[node.level :]) for leaf in node.leaves)
    return rank > 2 and node.is_block and not has_copies and not families_of(node)


def has_stacks(node: Node) -> bool:
    """Whether parts of a node are stacks themselves: several whole blocks."""
    # An encoder and a decoder, the dense_layers and moe_layers of DeepSeek. An attention and an MLP
    # are blocks without a norm of their own.
    parts = [child for child in node.fork.children.values() if not child.is_leaf]
    blocks = [part for part in parts if part.is_block and any(leaf.is_norm for leaf in part.leaves)]
    return len(blocks) > 1


def _blocks_in_turn(node: Node) -> Family | None:
    """The numbered blocks that a stack consists of, or those in a list in it, if it has any."""
    # The stack of Gemma 3 in MaxText consists of layers_0 to layers_5, which take turns. layer_0
    # and layer_1 of T5's blocks, attention and MLP, do not repeat. Experts are side by side.
    node = node.fork
    for family in families_of(node):
        is_whole = len(family.members) == len(node.children) and is_layer_name(family.name)
        if (
            len(family.members) > 1
            and family.repeats
            and family.first.is_block
            and (family.is_list or is_whole)
            and not has_word(BESIDE, family.name)
        ):
            return family
    return None


def _doubt_of_stack(node: Node, family: Family | None, is_marked: bool) -> str:
    """Why what is stacked along one axis may not be one stack of layers, if so."""
    # critic/layers may be the layers of one critic, or critics. In critics/0/layers there is one.
    keys = node.leaves[0].keys[: node.level]
    over = [
        key
        for key, below in itertools.pairwise(keys)
        if has_word(ARRAYS, key) and not below.isdigit() and not is_marked
    ]
    if over:
        return f"it may be stacked over copies side by side, which {over[0]} may name"
    if family is None:
        return ""
    if family.is_list:
        return "each of its numbered parts is a stack: they may alternate, or follow one another"
    if family.has_holes:
        return "the numbers of its parts have holes"
    if family.halves:
        return halves_of(family)
    return ""


def _doubts_of_stack(node: Node, family: Family | None, why: str) -> list[Doubt]:
    """The doubts of what may be one stack, or stacks in turn."""
    leaves = node.leaves
    if len({*spare_axes(_vectors(node)).values()}) > 1:
        # Gemma 4 has a stack of stacks beside a stack. No rule says how these take turns.
        return [doubt_stack(node, [node], why, [])]
    if family is None or len(family.kinds) == len(family.members):
        return [doubt_stack(node, [node], why, rules_of_stack(leaves))]
    if family.is_list:
        parts = [*family.members.values()]
        return [doubt_stack(node, [node], why, rules_of_parts(leaves, parts))]
    if len(family.kinds) == 1:
        return [doubt_stack(node, [node], why, rules_of_turns(leaves))]
    turns = [rules_of_turns if len(kind.members) > 1 else rules_of_stack for kind in family.kinds]
    return [
        doubt_stack(family.parent, [*kind.members.values()], why, rules(leaves))
        for kind, rules in zip(family.kinds, turns, strict=True)
    ]


def _turns_of_parts(node: Node, family: Family | None) -> dict[str, tuple[str, str, int, int]]:
    """In a stack of blocks in turn, each leaf's group, tensor, turn, and the turns of a round."""
    if family is None or len(family.kinds) == len(family.members):
        return {}
    names = name_kinds(node.path, [2] * len(family.kinds))
    return {
        leaf.path: (name, kind.tensor(member, leaf), turn, len(kind.members))
        for name, kind in zip(names, family.kinds, strict=True)
        for turn, member in enumerate(kind.members.values())
        for leaf in member.leaves
    }
