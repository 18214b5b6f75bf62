"""Where depth is, from the tree alone: numbered siblings, axis names, stacks; or a refusal.

What is certain is placed: siblings that a number and a name tell to be layers
(``block_0``, ``layers/3``), those of each kind by themselves, and stacks in a container named
after layers, along the one axis that all of its leaves agree on or that their metadata names.
Blocks that are numbered in such a container (``layers/layers_0``) take turns, for Flax names it
after the loop that they are in. What can be read in two ways is never guessed, and what looks
like layers is not left alone in silence: a refusal lists all of it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence, Set

import jax
import optax

from depthsmooth.depth.fitting import check_mixable, check_whole
from depthsmooth.depth.layout import Depth, DepthNotFoundError, Layout, joined
from depthsmooth.depth.leaves import Axes, Leaf, Place, Shape, shape_of, stacked
from depthsmooth.depth.names.doubts import (
    Doubt,
    alike_among,
    doubt_siblings,
    doubt_stack,
    doubt_stacks,
    doubts_among,
    halves_of,
    rules_of_parts,
    rules_of_stack,
    rules_of_turns,
    unevenness_of,
)
from depthsmooth.depth.names.families import (
    Family,
    are_flat,
    besides_layers,
    families_of,
    holds_layers,
    name_kinds,
)
from depthsmooth.depth.names.nodes import Known, Node, common_axes, factor_pairs, spare_axes
from depthsmooth.depth.names.words import (
    are_beside,
    are_copies,
    have_copies,
    is_layer_name,
    is_network_name,
    is_norm_word,
    is_part_name,
    is_stack_name,
    nesting_of,
)
from depthsmooth.depth.paths import is_mixable, leaves_of, named, numbered_key, shown, some


class AmbiguousDepthError(ValueError):
    """The tree can be read in more than one way, and a guess could be wrong.

    Attributes:
      readings: from the pattern of doubtful leaves to the rules that could be theirs,
        in words. No leaf is matched by two patterns, and a rule for each settles it.
    """

    def __init__(self, message: str, readings: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(message)
        self.readings = dict(readings)


def find_depth(
    params: optax.Params, *, metadata: bool = True, known: Layout | None = None
) -> Depth:
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
      The Depth, with a group for each stack and for each kind of numbered siblings,
      or for each kind of these, and those of ``known``.

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
    if not isinstance(known, Layout | None):
        raise ValueError(
            f"known is a {type(known).__name__}, but has to be a Depth, like "
            "Depth.from_rules({pattern: rule})."
        )
    check_whole(leaves_of(params)[0])
    arrays = _leaves_with_names(params, metadata)
    leaves = [Known(path, shape_of(array), names) for path, array, names in arrays]
    said = Depth() if known is None else known.resolve(params)
    mixable = [
        leaf
        for leaf, (_, array, _) in zip(leaves, arrays, strict=True)
        if leaf.path not in said and is_mixable(array)
    ]
    search = _Search(mixable)
    doubts = _doubts_of(search, mixable, any(len(track.present) > 1 for track in said.tracks))
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    if doubts:
        raise _refusal(doubts, shapes)
    if leaves and not search.places and not said:
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
    if search.places:
        return joined(Depth(tuple(found)), said)
    return Depth(tuple(dataclasses.replace(leaf, place=said.get(leaf.path)) for leaf in found))


def _doubts_of(search: _Search, mixable: Sequence[Known], is_said: bool) -> list[Doubt]:
    """All that is to be said of a tree before depth is certain: of leaves and of what is left.

    What is beside certain layers, and looks less like them, needs no answer.
    """
    found: list[Doubt] = []
    while True:
        is_certain = bool(search.places) or is_said
        new = [doubt for doubt in search.doubts if doubt.grave or not is_certain]
        if not new:
            return found
        found += new
        said = {path for doubt in found for path in doubt.paths}
        search = _Search([leaf for leaf in mixable if leaf.path not in said])


def _refusal(doubts: Sequence[Doubt], shapes: Mapping[str, Shape]) -> AmbiguousDepthError:
    """The error that lists all doubts, with the rules that settle them."""
    patterns = [doubt.pattern(shapes) for doubt in doubts]
    readings = [doubt.readings(shapes) for doubt in doubts]
    sentences = map(Doubt.sentence, doubts, patterns, readings)
    return AmbiguousDepthError(
        f"Depth is not certain. {' '.join(sentences)} Say which with "
        "find_depth(params, known=Depth.from_rules({pattern: rule})), or let "
        "trace_depth(fn, params, batch) follow the parameters through the forward pass.",
        dict(zip(patterns, readings, strict=True)),
    )


class _Search:
    """One walk down a tree, from the outermost containers to the leaves.

    Attributes:
      places: the leaves that certainly hold layers.
      reasons: for others, why they are not taken for layers.
      doubts: what can be read in two ways.
    """

    def __init__(self, leaves: Sequence[Known]) -> None:
        self.places: dict[str, Place] = {}
        self.reasons: dict[str, str] = {}
        self.doubts: list[Doubt] = []
        self._unclear: list[tuple[Doubt, str | None]] = []
        self._left: list[Known] = []
        if leaves:
            root = Node("", tuple(leaves))
            self._walk(root)
            self._doubt_the_left(root)
            self._doubt_the_unclear()

    def _walk(self, node: Node) -> None:
        """Places the layers below a node. Within layers nothing else is layers."""
        if self._is_stack(node):
            return
        for child in besides_layers(node, self._layers_among):
            leaf = child.leaves[0]
            if not child.is_leaf:
                self._walk(child)
            elif leaf.layer_axes or (leaf.is_wide and (leaf.is_norm or leaf.is_factor)):
                self._left.append(leaf)

    def _layers_among(self, family: Family, parts: bool) -> Iterable[Node]:
        """The siblings that are layers, or may be: there is nothing more to look for in them."""
        is_named = is_layer_name(family.name) and not are_flat(family)
        kinds = [kind for kind in family.kinds if len(kind.members) > 1]
        if not (is_named or parts):
            self._suspect(family, kinds)
            return []
        alone = [kind.first for kind in family.kinds if len(kind.members) == 1]
        uneven = unevenness_of(family, kinds)
        for node in alone:
            self._leave(node, uneven or f"{node.path} is the only layer of its kind")
        if len(family.members) == 1:
            is_layer = self._is_stack(family.first, is_layer=True) or _is_one_layer(family.first)
            return alone if is_layer else []
        if not (kinds and (family.repeats or parts)):
            return []
        doubts = doubts_among(family, kinds, parts)
        for doubt in doubts:
            self._doubt(doubt)
        for kind in [] if doubts else kinds:
            self._place(kind)
        said = {path for doubt in doubts for path in doubt.paths}
        layers = [node for kind in kinds for node in kind.members.values()]
        return layers + [
            node for node in alone if node.leaves[0].path in said or _is_one_layer(node)
        ]

    def _place(self, kind: Family) -> None:
        """Places siblings of one kind, each as a layer."""
        for layer, node in enumerate(kind.members.values()):
            for leaf in node.leaves:
                tensor = kind.tensor(node, leaf)
                self.places[leaf.path] = Place(kind.group, tensor, (), (layer,), "names")

    def _suspect(self, family: Family, kinds: Sequence[Family]) -> None:
        """Keeps in mind siblings that are not named after layers, though they look like them.

        Three or more blocks that are alike may be layers, unless their name says that they are
        side by side, or parts of a block. Two may be an encoder and a decoder, or two players.
        """
        numbered = [key for key in family.container if numbered_key(key)[1] is not None]
        is_network = family.is_list and is_network_name(family.name)
        is_said = are_copies(numbered) or are_flat(family)
        is_said = is_said or (are_copies([family.name]) and not is_network)
        why = "its siblings may be layers, or copies side by side"
        for alike in alike_among(kinds):
            # Stacks that norms tell are doubted each by itself.
            if not alike.first.is_block or any(spare_axes(alike.first.leaves).values()):
                continue
            grave = len(alike.members) > 2 and not (is_said or is_part_name(family.name))
            doubt = (
                doubt_stacks(alike, why, grave)
                if alike.stacked
                else doubt_siblings(alike, why, grave, family.has_holes)
            )
            self._unclear.append((doubt, None if is_said else _above(family.first)))

    def _is_stack(self, node: Node, is_layer: bool = False) -> bool:
        """Whether the leaves below are one stack, or may be."""
        name, number = numbered_key(node.key)
        marked = [leaf for leaf in node.leaves if leaf.layer_axes]
        whole = len(marked) == len(node.leaves) and node.is_block and not _has_stacks(node)
        is_named = is_layer_name(name) or is_stack_name(name)
        if is_layer and (not node.is_block or _may_hold_layers(node)):
            return False
        if not is_layer and (number is not None or not (is_named or whole)):
            return False
        found = _named_axes(node, marked) if marked else _common_axes(node)
        if found is None:
            if is_layer_name(name) and _lacks_norms(node):
                # The bias of a projection onto several heads has two axes, too, without a stack.
                why, rules = "it may be stacked, but no norm tells", rules_of_stack(node.leaves)
                doubt = doubt_stack(node, [node], why, rules, grave=False)
                self._unclear.append((doubt, _above(node)))
            return False
        family = _blocks_in_turn(node)
        why = found if isinstance(found, str) else _doubt_of_stack(node, family, bool(marked))
        if isinstance(found, str) or why:
            for doubt in _doubts_of_stack(node, family, why):
                self._doubt(doubt)
            return True
        turns = _turns_of(node, family)
        for leaf in node.leaves:
            group, tensor, first, period = turns.get(leaf.path, (node.path, leaf.path, 0, 1))
            axes = found[leaf.path]
            layers = tuple(i * period + first for i in range(stacked(leaf.shape, axes)))
            if layers:
                by = "metadata" if marked else "names"
                self.places[leaf.path] = Place(group, tensor, axes, layers, by)
        return True

    def _doubt(self, doubt: Doubt) -> None:
        self.reasons |= dict.fromkeys(doubt.paths, doubt.why)
        self.doubts.append(doubt)

    def _leave(self, node: Node, why: str) -> None:
        self.reasons |= {leaf.path: why for leaf in node.leaves}

    @property
    def _settled(self) -> set[str]:
        """The paths of leaves that are placed, or doubted."""
        return {*self.places}.union(*(doubt.paths for doubt in self.doubts))

    def _doubt_the_unclear(self) -> None:
        """Doubts what is not certain to be layers, and holds none.

        What looks less like layers is left alone beside certain ones, but not where there are
        none near it: it may be all the layers of another tower.
        """
        for doubt, near in self._unclear:
            if not doubt.paths & self._settled:
                is_alone = near is not None and not any(
                    path.startswith(near) for path in self.places
                )
                self._doubt(dataclasses.replace(doubt, grave=doubt.grave or is_alone))

    def _doubt_the_left(self, root: Node) -> None:
        """What may be stacked by its axes, and that nothing accounts for.

        That are norms with more than one axis, axes named after layers, and adapters: theirs may
        be heads. What is within a container that is stacked itself is a part of that stack.
        """
        slight = [doubt for doubt in self.doubts if not doubt.grave]
        self.doubts = [doubt for doubt in self.doubts if doubt.grave]
        containers = [(_container_of(leaf, root), leaf) for leaf in self._left]
        for node, leaf in sorted(containers, key=lambda found: found[0].level):
            nodes = [] if leaf.path in self._settled else _stacked_with(leaf, node, self._settled)
            rank = min((len(each.shape) for at in nodes for each in at.leaves), default=0)
            if nodes and (leaf.is_norm or leaf.layer_axes or rank > 2):
                rules = rules_of_stack([leaf for each in nodes for leaf in each.leaves])
                why = "it looks stacked, but its container is not named after layers"
                grave = leaf.is_norm or bool(leaf.layer_axes)
                self._doubt(doubt_stack(node, nodes, why, rules, grave))
        self.doubts += [doubt for doubt in slight if not doubt.paths & self._settled]


def _may_hold_layers(node: Node) -> bool:
    """Whether a node, though named like a layer, holds more than two parts that may be layers.

    A stage of a ResNet, block1, has unit1, unit2 and unit3, the first of which is not like them.
    """
    if holds_layers(node):
        return True
    inner = [node]
    while inner:
        node = inner.pop()
        inner += [child for child in node.children.values() if not child.is_leaf]
        for family in families_of(node):
            is_said = are_beside([family.name]) or is_part_name(family.name)
            if len(family.members) > 2 and not is_said:
                alike = alike_among(family.kinds)
                if any(siblings.first.is_block for siblings in alike):
                    return True
    return False


def _is_one_layer(node: Node) -> bool:
    """Whether a node that is named like a layer is one, in which nothing else is layers."""
    return node.is_block and not _may_hold_layers(node)


def _container_of(leaf: Known, root: Node) -> Node:
    """The container of a leaf, or that of its module if it is a part of a norm or an adapter."""
    node, keys = root, leaf.keys[:-1]
    if (leaf.is_norm or leaf.is_factor) and not is_norm_word(numbered_key(leaf.keys[-1])[0]):
        keys = keys[:-1]
    for key in keys:
        node = node.children[key]
    return node


def _above(node: Node) -> str:
    """What the paths of a node and of all that is beside it begin with."""
    return node.path.removesuffix(node.key)


def _stacked_with(leaf: Known, node: Node, settled: Set[str]) -> list[Node]:
    """The parts of a container, or the container, that can be stacked as a leaf in it is."""
    if not any(each.path in settled for each in node.leaves) and common_axes(node.leaves):
        return [node]
    for axis, size in enumerate(leaf.shape):
        parts = [
            child
            for child in node.children.values()
            if all(
                each.path not in settled and each.shape[axis : axis + 1] == (size,)
                for each in child.leaves
            )
        ]
        if len(parts) > 1 and any(leaf in part.leaves for part in parts):
            return parts
    return [Node(leaf.path, (leaf,), len(leaf.keys))]


def _blocks_in_turn(node: Node) -> Family | None:
    """The numbered blocks that a stack consists of, or those in a list in it, if it has any."""
    while len(node.children) == 1 and not node.is_leaf:
        [node] = node.children.values()
    for family in families_of(node):
        is_whole = len(family.members) == len(node.children) and is_layer_name(family.name)
        if (
            len(family.members) > 1
            and family.repeats
            and family.first.is_block
            and (family.is_list or is_whole)
            and not are_beside([family.name])
        ):
            return family
    return None


def _doubt_of_stack(node: Node, family: Family | None, is_marked: bool) -> str:
    """Why what is stacked along one axis may not be one stack of layers, if so."""
    keys = node.leaves[0].keys[: node.level]
    over = [
        key
        for key, below in itertools.pairwise(keys)
        if have_copies([key]) and not below.isdigit() and not is_marked
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
    if len({*spare_axes(_vectors(node)).values()}) > 1 and _has_stacks(node):
        # Gemma 4 has a stack of stacks beside a stack: no rule says how these take turns.
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


def _turns_of(node: Node, family: Family | None) -> dict[str, tuple[str, str, int, int]]:
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


def _has_stacks(node: Node) -> bool:
    """Whether parts of a node are stacks themselves, by name or as several whole blocks."""
    while len(node.children) == 1 and not node.is_leaf:
        [node] = node.children.values()
    parts = [child for child in node.children.values() if not child.is_leaf]
    blocks = [part for part in parts if part.is_block and any(leaf.is_norm for leaf in part.leaves)]
    return len(blocks) > 1 or any(is_layer_name(numbered_key(part.key)[0]) for part in parts)


def _vectors(node: Node) -> list[Known]:
    """The vectors of a stack, but for those of what is side by side: experts have an axis, too."""
    return [
        leaf for leaf in node.leaves if leaf.is_vector and not have_copies(leaf.keys[node.level :])
    ]


def _common_axes(node: Node) -> dict[str, Axes] | str | None:
    """The one axis that all leaves agree on, why that is not certain, or None if unstacked."""
    vectors = _vectors(node)
    spare = {*spare_axes(vectors).values()}
    least = min([*spare, *(len(leaf.shape) - 1 for leaf in vectors)], default=0)
    if not spare and all(leaf.is_factor for leaf in node.leaves):
        return _axes_of_adapters(node.leaves)
    if not spare or least < 1:
        return None
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
    """The one axis that adapters, without a norm beside them, have in common; None if not certain.

    Those of openpi have an axis for heads, (heads, width, r) and (heads, r, size). It is none
    where one of them takes in and gives out as much, for a head is narrower than the network.
    """
    axes = common_axes(leaves)
    for one, two in factor_pairs(leaves) if len(axes) == 1 else ():
        inner, outer = ([*leaf.shape] for leaf in (one, two))
        del inner[axes[0]], outer[axes[0]]
        if len(inner) == len(outer) == 2 and inner == outer[::-1] and inner[0] != inner[1]:
            return {leaf.path: (axes[0] % len(leaf.shape),) for leaf in leaves}
    return None


def _lacks_norms(node: Node) -> bool:
    """Whether all leaves have an axis of one size in common, and none tells if it is layers."""
    rank = min(len(leaf.shape) for leaf in node.leaves)
    if rank < 2 or not any(axis >= 0 for axis in common_axes(node.leaves)):
        return False
    if any(leaf.is_norm for leaf in node.leaves):
        return False
    if _vectors(node):
        return True
    # All of its leaves may be matrices, with one axis more.
    has_copies = any(have_copies(leaf.keys[node.level :]) for leaf in node.leaves)
    return rank > 2 and node.is_block and not has_copies and not families_of(node)


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


def depth_in(tree: optax.Params, depth: Layout | None) -> Depth:
    """The Depth of a tree that an optimizer was given, or may have been given without one.

    Raises:
      AmbiguousDepthError: if none was given, and names leave it open.
      DepthNotFoundError: if none was given, and no layers have such names.
    """
    if depth is not None:
        return depth.resolve(tree)
    without = "No depth= was given, so layers were looked for by name."
    try:
        return find_depth(tree, metadata=False)
    except DepthNotFoundError as error:
        raise DepthNotFoundError(f"{without} {error}") from None
    except AmbiguousDepthError as error:
        doubts = [
            f"{_first_of(pattern, tree)} may be "
            + " or ".join(f"{{{pattern!r}: {rule}}}" for rule in (*rules[:2], "()"))
            for pattern, rules in error.readings.items()
        ]
        raise AmbiguousDepthError(
            f"{without} Names leave open where they are: {some(doubts, 4)}; () says that they are "
            "none. Give depth=trace_depth(fn, params, batch), which follows the parameters "
            "through the forward pass, or depth=find_depth(params, "
            "known=Depth.from_rules({pattern: rule})) with one of these for each.",
            error.readings,
        ) from None


def _first_of(pattern: str, tree: optax.Params) -> str:
    """The first leaf that a pattern matches, as messages name it."""
    leaves = leaves_of(tree)[0]
    alike = (leaf for leaf in leaves if re.fullmatch(pattern, leaf[0]))
    return next((shown(path, shape_of(leaf)) for path, leaf in alike), repr(pattern))
