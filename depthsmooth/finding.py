"""Where depth is, from the tree alone: numbered siblings, axis names, stacks; or a refusal.

What is certain is placed: siblings that a number and a name tell to be layers
(``block_0``, ``layers/3``), and stacks in a container named after layers, along the one
axis that all of its leaves agree on or that their metadata names. Blocks that are
numbered in such a container (``layers/layers_0``) take turns, for Flax names it after the loop
that they are in. What can be read in two ways is never guessed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import jax
import optax

from depthsmooth.layers import Axes
from depthsmooth.layout import Depth, DepthNotFoundError, check_mixable, check_whole
from depthsmooth.places import (
    Place,
    is_mixable,
    leaves_of,
    named,
    numbered_key,
    shape_of,
    some,
    stacked,
)
from depthsmooth.siblings import (
    Family,
    Known,
    Node,
    are_beside,
    besides_layers,
    blocks_within,
    families_of,
    holds_layers,
    is_layer_name,
    nesting_of,
)
from depthsmooth.track import Leaf


class AmbiguousDepthError(ValueError):
    """The tree can be read in more than one way, and a guess could be wrong.

    Attributes:
      readings: from the pattern of doubtful leaves to the rules that could be theirs,
        in words.
    """

    def __init__(self, message: str, readings: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(message)
        self.readings = dict(readings)


@dataclasses.dataclass(frozen=True)
class _Doubt:
    """Leaves that can be read in more than one way.

    Attributes:
      pattern: the pattern of a rule for them.
      leaf: one of them.
      why: what speaks against a single reading.
      readings: the rules that they could be read by.
      grave: whether they look like layers so much that leaving them alone is a guess.
    """

    pattern: str
    leaf: Known
    why: str
    readings: tuple[str, ...]
    grave: bool = True

    def __str__(self) -> str:
        rules = [f"{{{self.pattern!r}: {rule}}}" for rule in (*self.readings[:2], "()")]
        *layers, none = rules
        said = f"{' or '.join(layers)} if it is layers, and " if layers else ""
        return f"{self.leaf.path} {self.leaf.shape}: {self.why}; the rule is {said}{none} if not."


def find_depth(params: optax.Params, *, metadata: bool = True, known: Depth | None = None) -> Depth:
    """Finds where depth is from a parameter tree alone, or refuses to guess.

    Prefer :func:`depthsmooth.trace_depth`, which sees what the model does with its
    parameters: names can be misread. Only paths, shapes and dtypes are read.

    Args:
      params: the tree that the optimizer will be given: arrays or
        ``jax.ShapeDtypeStruct``, in the boxes of Flax or plain.
      metadata: whether to read the axis names that boxes carry
        (``nn.Partitioned``, ``nn.LogicallyPartitioned``, ``nnx.Param``). They are
        believed where there is one for each axis.
      known: a Depth, like ``Depth.from_rules({pattern: rule})``, of leaves that need not
        be found: what settles a refusal. The rule ``()`` is for those that hold no layers.

    Returns:
      The Depth, with a group for each stack and for each family of numbered siblings,
      and those of ``known``.

    Raises:
      AmbiguousDepthError: if leaves can be read in two ways; it lists both, with the
        rules that say them.
      DepthNotFoundError: if nothing looks like layers.

    Example:
      >>> import jax.numpy as jnp
      >>> block = {"ln": {"scale": jnp.ones(4)}, "wi": jnp.ones((4, 8)), "wo": jnp.ones((8, 4))}
      >>> print(find_depth({f"block_{i}": block for i in range(12)} | {"head": jnp.ones((4, 2))}))
      group       layers  axis  leaves  parameters  found by
      block_*         12  –         36         816  names
      left alone                     1           8
      left alone: head (4, 2)
    """
    if not isinstance(known, Depth | None):
        raise ValueError(
            f"known is a {type(known).__name__}, but has to be a Depth, like "
            "Depth.from_rules({pattern: rule})."
        )
    check_whole(leaves_of(params)[0])
    arrays = _leaves_with_names(params, metadata)
    leaves = [Known(path, shape_of(array), names) for path, array, names in arrays]
    said = Depth() if known is None else known.resolve(params)
    search = _Search()
    mixable = [
        leaf
        for leaf, (path, array, _) in zip(leaves, arrays, strict=True)
        if path not in said and is_mixable(array)
    ]
    root = Node("", tuple(mixable))
    search.walk(root)
    search.doubt_the_left(root)
    doubts = [doubt for doubt in search.doubts if doubt.grave or not search.places]
    if doubts:
        raise AmbiguousDepthError(
            f"Depth is not certain. {' '.join(map(str, doubts[:4]))} Say which with "
            "find_depth(params, known=Depth.from_rules({pattern: rule})), or let "
            "trace_depth(fn, params, batch) follow the parameters through the forward pass.",
            {doubt.pattern: doubt.readings for doubt in doubts},
        )
    if leaves and not search.places and not said:
        shapes = {leaf.path: leaf.shape for leaf in leaves}
        raise DepthNotFoundError(
            f"Nothing in the tree is certain to be layers; it has {some(named(shapes))}. Let "
            "trace_depth(fn, params, batch) follow the parameters through the forward pass, or "
            "say where depth is with Depth.from_rules({'.*layers/.*': axis})."
        )
    copies = collections.Counter(leaf.path for leaf in leaves)
    for path, array, _ in arrays:
        if path in search.places:
            check_mixable(path, array, copies[path])
    alone = "it is neither numbered like a layer nor in a stack named after layers"
    found = [
        Leaf(leaf.path, leaf.shape, search.places[leaf.path].on_devices_of(array))
        if leaf.path in search.places
        else Leaf(leaf.path, leaf.shape, None, search.reasons.get(leaf.path, alone))
        for leaf, (_, array, _) in zip(leaves, arrays, strict=True)
    ]
    return Depth(tuple(found)) | said


def depth_of(tree: optax.Params, depth: Depth | None) -> Depth:
    """The Depth of a tree that an optimizer was given: ``depth``, or else what can be found."""
    return find_depth(tree, metadata=False) if depth is None else depth.resolve(tree)


class _Search:
    """One walk down the tree, from the outermost containers to the leaves.

    Attributes:
      places: the leaves that certainly hold layers.
      reasons: for others, why they are not taken for layers.
      doubts: what can be read in two ways.
      left: leaves that are in no layers, though they look stacked.
    """

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.reasons: dict[str, str] = {}
        self.doubts: list[_Doubt] = []
        self.left: list[Known] = []

    def walk(self, node: Node) -> None:
        """Places the layers below a node. Within layers nothing else is layers."""
        if self._is_stack(node):
            return
        for child in besides_layers(node, self._are_layers):
            leaf = child.leaves[0]
            if not child.is_leaf:
                self.walk(child)
            elif leaf.layer_axes or (leaf.is_norm and len(leaf.shape) > 1):
                self.left.append(leaf)

    def _are_layers(self, family: Family, parts: bool) -> bool:
        """Whether a family is layers, or may be: there is nothing more to look for in it."""
        members = list(family.members.values())
        leaves = [leaf for node in members for leaf in node.leaves]
        is_named = is_layer_name(family.name) and not are_beside(family.container)
        if len(members) == 1:
            if not (is_named and members[0].is_block) or holds_layers(members[0]):
                return False
            if not self._is_stack(members[0], is_layers=True):
                why = f"{members[0].path} is the only layer of its kind"
                self.reasons |= {leaf.path: why for leaf in leaves}
            return True
        fits = not family.misfit and not family.uneven
        if not is_named and not (parts and fits):
            if fits and members[0].is_block and not _has_layers(members[0]):
                why = "its siblings may be layers, or copies side by side"
                self._doubt(family, why, grave=False)
            return False
        if not (family.repeats or parts):
            return False
        are_blocks = any(node.is_block for node in members)
        why, grave = _doubt_of(family)
        if why:
            self._doubt(family, why, grave and are_blocks)
            return is_named
        if not (are_blocks or parts):
            self._doubt(family, "its siblings may be layers, or steps within one", grave=False)
            return True
        first = next(iter(family.members))
        for number, node in family.members.items():
            for leaf in node.leaves:
                self.places[leaf.path] = Place(
                    family.group, node.inside(leaf), (), (number - first,), "names"
                )
        return True

    def _is_stack(self, node: Node, is_layers: bool = False) -> bool:
        """Whether the leaves below are one stack, or may be."""
        name, number = numbered_key(node.key)
        marked = [leaf for leaf in node.leaves if leaf.layer_axes]
        whole = len(marked) == len(node.leaves) and node.is_block and not _has_stacks(node)
        if not is_layers and (number is not None or not (is_layer_name(name) or whole)):
            return False
        found = _named_axes(node, marked) if marked else _common_axes(node)
        if found is None:
            if is_layer_name(name) and _lacks_norms(node):
                # The bias of a projection onto several heads has two axes, too, without a stack.
                self._doubt_stack(node, "it may be stacked, but no norm tells", grave=False)
            return False
        dealt = _dealt(node)
        if isinstance(found, str) or isinstance(dealt, str):
            why = found if isinstance(found, str) else str(dealt)
            self._doubt_stack(node, why)
            return True
        by = "metadata" if marked else "names"
        period = max((number for number, _ in dealt.values()), default=0) + 1
        for leaf in node.leaves:
            number, tensor = dealt.get(leaf.path, (0, leaf.path))
            count = stacked(leaf.shape, found[leaf.path])
            layers = tuple(i * period + number for i in range(count))
            if layers:
                self.places[leaf.path] = Place(node.path, tensor, found[leaf.path], layers, by)
        return True

    def _doubt(self, family: Family, why: str, grave: bool) -> None:
        leaves = [leaf for node in family.members.values() for leaf in node.leaves]
        self.reasons |= {leaf.path: why for leaf in leaves}
        # Of the others a number alone would not make layers.
        can_be = not (family.misfit or family.uneven or family.strangers)
        readings = ("numbered()",) if can_be else ()
        self.doubts.append(_Doubt(family.pattern, leaves[0], why, readings, grave))

    def _doubt_stack(self, node: Node, why: str, grave: bool = True) -> None:
        norms = {len(leaf.shape) for leaf in node.leaves if leaf.is_norm}
        agreed = [
            axis
            for axis in range(min(len(leaf.shape) for leaf in node.leaves))
            if len({leaf.shape[axis] for leaf in node.leaves}) == 1
        ]
        orders = itertools.permutations(agreed, max(min(norms, default=2) - 1, 1))
        rules = [str(axes if len(axes) > 1 else axes[0]) for axes in orders if len(norms) < 2]
        if _dealt(node):
            rules = [f"interleaved({rule})" for rule in rules]
        pattern = f"{re.escape(node.path)}/.*" if node.path else ".*"
        leaf = min(node.leaves, key=lambda leaf: not leaf.is_norm)
        self.doubts.append(_Doubt(pattern, leaf, why, tuple(rules), grave))

    def doubt_the_left(self, root: Node) -> None:
        """Norms with more than one axis, and axes named layers, that nothing accounts for."""
        for leaf in self.left:
            node = root
            for key in leaf.keys[: -2 if leaf.is_norm else -1]:
                node = node.children[key]
            if not any(re.fullmatch(doubt.pattern, leaf.path) for doubt in self.doubts):
                why = "it looks stacked, but its container is not named after layers"
                self._doubt_stack(node, why)


def _doubt_of(family: Family) -> tuple[str, bool]:
    """Why a family may not be the layers of one stack, if so; and whether that is grave."""
    if family.misfit:
        return family.misfit, True
    for inner in blocks_within(family):
        return f"its siblings hold what may be layers, {inner.group}, themselves", True
    if family.uneven:
        return f"{family.uneven} has not the same shape in all of its siblings", False
    if family.strangers:
        return f"{family.strangers[0].path} has nothing in common with its siblings", True
    return "", False


def _has_stacks(node: Node) -> bool:
    """Whether parts of a node are stacks themselves, by name or as several whole blocks."""
    while len(node.children) == 1 and not node.is_leaf:
        [node] = node.children.values()
    parts = [child for child in node.children.values() if not child.is_leaf]
    blocks = [part for part in parts if part.is_block and any(leaf.is_norm for leaf in part.leaves)]
    return len(blocks) > 1 or any(is_layer_name(numbered_key(part.key)[0]) for part in parts)


def _has_layers(node: Node) -> bool:
    """Whether layers are below, so that the node's siblings are copies of a whole model."""
    return any(
        is_layer_name(numbered_key(key)[0])
        for leaf in node.leaves
        for key in leaf.keys[node.level :]
    )


def _common_axes(node: Node) -> dict[str, Axes] | str | None:
    """The one axis that all leaves agree on, why that is not certain, or None if unstacked."""
    leaves = node.leaves
    # What is side by side, like experts, has an axis for that, in vectors too.
    telling = [leaf for leaf in leaves if not are_beside(leaf.keys)]
    norms = {len(leaf.shape) for leaf in telling if leaf.is_norm}
    vectors = {len(leaf.shape) for leaf in telling if leaf.is_vector}
    if not norms or min(vectors) == 1:
        return None
    if len(norms) > 1 or min(vectors) > 2:
        return "it is stacked along several axes, whose order the tree does not tell"
    candidates: list[dict[str, Axes]] = []
    for axis in (*range(min(len(leaf.shape) for leaf in leaves)), -1):
        sizes = {leaf.shape[axis] for leaf in leaves}
        axes: dict[str, Axes] = {leaf.path: (axis % len(leaf.shape),) for leaf in leaves}
        if len(sizes) == 1 and axes not in candidates:
            candidates.append(axes)
    if len(candidates) != 1:
        return "it is stacked, but more than one axis could be the layers"
    return candidates[0]


def _lacks_norms(node: Node) -> bool:
    """Whether all leaves have an axis of one size in common, vectors too, and none is a norm's."""
    axes = range(min(len(leaf.shape) for leaf in node.leaves))
    return (
        any(leaf.is_vector and not are_beside(leaf.keys) for leaf in node.leaves)
        and not any(leaf.is_norm for leaf in node.leaves)
        and any(len({leaf.shape[axis] for leaf in node.leaves}) == 1 for axis in axes)
        and all(len(leaf.shape) > 1 for leaf in node.leaves)
    )


def _named_axes(node: Node, marked: Sequence[Known]) -> dict[str, Axes] | str | None:
    """The axes that metadata names after layers, outer to inner, or why they are not certain."""
    kinds = {tuple(leaf.names[axis] for axis in leaf.layer_axes) for leaf in marked}
    if len(kinds) > 1:
        return "its leaves name different axes after layers, so that the order is not certain"
    nesting = [nesting_of(name) for name in next(iter(kinds))]
    if len(set(nesting)) < len(nesting):
        return "two of its axes are named after layers, and their order is not certain"
    axes = {
        leaf.path: tuple(
            sorted(leaf.layer_axes, key=lambda axis: nesting_of(leaf.names[axis]) or 0)
        )
        for leaf in marked
    }
    if any(leaf.is_norm and len(leaf.shape) != 1 + len(nesting) for leaf in marked):
        return "it is stacked along more axes than its metadata names"
    if len({tuple(leaf.shape[a] for a in axes[leaf.path]) for leaf in marked}) > 1:
        return "its metadata says different numbers of layers"
    rest = [leaf for leaf in node.leaves if not leaf.layer_axes]
    if not rest:
        return axes
    said = {axis for leaf in marked for axis in axes[leaf.path]}
    common = _common_axes(node)
    if isinstance(common, dict) and all(common[leaf.path] == axes[leaf.path] for leaf in marked):
        return common
    return (
        f"some of its leaves name axis {min(said)} after layers, but not all, and sizes do not tell"
    )


def _dealt(node: Node) -> dict[str, tuple[int, str]] | str:
    """In a stack of blocks in turn, each leaf's place in the pattern, and its tensor."""
    while len(node.children) == 1 and not node.is_leaf:
        [node] = node.children.values()
    families = [
        family
        for family in families_of(node)
        if len(family.members) > 1
        and family.repeats
        and next(iter(family.members.values())).is_block
    ]
    for family in families:
        if len(family.members) == len(node.children) and (
            is_layer_name(family.name) and not next(iter(node.children)).isdigit()
        ):
            first = next(iter(family.members))
            return {
                leaf.path: (number - first, member.inside(leaf))
                for number, member in family.members.items()
                for leaf in member.leaves
            }
        if next(iter(family.members.values())).key.isdigit():
            return (
                "each of its numbered parts is a stack: they may alternate, or follow one another"
            )
    return {}


def _leaves_with_names(
    tree: optax.Params, metadata: bool
) -> list[tuple[str, jax.Array, tuple[str, ...]]]:
    """The leaves with their paths and the names that their boxes give to their axes."""
    boxes = jax.tree_util.tree_leaves(
        tree, is_leaf=lambda node: metadata and _axis_names(node) is not None
    )
    names = [
        tuple(map(str, _axis_names(box) or ())) if metadata else ()
        for box in boxes
        for _ in jax.tree_util.tree_leaves(box)
    ]
    return [
        (path, array, axes if len(axes) == len(shape_of(array)) else ())
        for (path, array), axes in zip(leaves_of(tree)[0], names, strict=True)
    ]


def _axis_names(box: object) -> tuple[object, ...] | None:
    """The axis names of a Flax box: ``names`` in linen, metadata of a variable in nnx."""
    names = getattr(box, "names", None) if hasattr(box, "unbox") else None
    if names is None and hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = metadata.get("out_sharding") or metadata.get("sharding_names")
    return tuple(names) if isinstance(names, tuple | list) else None
