"""Where depth is, from the tree alone: numbered siblings, axis names, stacks; or a refusal.

What is certain is placed: siblings that a number and a name tell to be layers
(``block_0``, ``layers/3``), those of each kind by themselves, and stacks in a container named
after layers, along the one axis that all of its leaves agree on or that their metadata names.
Blocks that are numbered in such a container (``layers/layers_0``) take turns, for Flax names it
after the loop that they are in. What can be read in two ways is never guessed, and what looks
like layers is not left alone in silence: a refusal lists all of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import jax
import optax

from depthsmooth.depth.fitting import check_whole
from depthsmooth.depth.layout import Depth, DepthNotFoundError, Layout, depth_of, joined
from depthsmooth.depth.leaves import Place, Shape, shape_of
from depthsmooth.depth.names import words
from depthsmooth.depth.names.doubts import (
    Doubt,
    alike_among,
    doubt_siblings,
    doubt_stack,
    doubt_stacks,
    doubts_among,
    rules_of_stack,
    unevenness_of,
)
from depthsmooth.depth.names.families import (
    Family,
    are_flat,
    besides_layers,
    families_of,
    holds_layers,
)
from depthsmooth.depth.names.nodes import Known, Node, common_axes, spare_axes
from depthsmooth.depth.names.stacks import has_stacks, lacks_norms, read_stack
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


def find_depth(params: optax.Params, *, known: Layout | None = None) -> Depth:
    """Finds where depth is from a parameter tree alone, or refuses to guess.

    Prefer :func:`depthsmooth.trace_depth`, which sees what the model does with its
    parameters: names can be misread. Only paths, shapes, dtypes and the axis names that boxes
    carry (``nn.Partitioned``, ``nn.LogicallyPartitioned``, ``nnx.Param``) are read. Axis names are
    believed where there is one for each axis.

    Args:
      params: the tree that the optimizer will be given: arrays or
        ``jax.ShapeDtypeStruct``, in the boxes of Flax or plain.
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
    arrays = leaves_of(params)[0]
    said = Depth() if known is None else known.resolve(params)
    return _found(arrays, _axis_names_in(params), said)


def _found(
    arrays: Sequence[tuple[str, jax.Array]], axis_names: Iterable[tuple[str, ...]], said: Depth
) -> Depth:
    """The Depth of leaves, of which some places and the names of some axes are known."""
    check_whole(arrays)
    mixable = [
        Known(path, shape_of(array), names)
        for (path, array), names in zip(arrays, axis_names, strict=True)
        if path not in said and is_mixable(array)
    ]
    search = _Search(mixable)
    doubts = _doubts_of(search, mixable, any(len(track.present) > 1 for track in said.tracks))
    shapes = {path: shape_of(array) for path, array in arrays}
    if doubts:
        raise _refusal(doubts, shapes)
    if arrays and not search.places and not said:
        raise DepthNotFoundError(
            f"Nothing in the tree is certain to be layers; it has {some(named(shapes))}. Let "
            "trace_depth(fn, params, batch) follow the parameters through the forward pass, or "
            "say where depth is with Depth.from_rules({'.*layers/.*': axis})."
        )
    by_path = dict(arrays)
    places = {path: place.on_devices_of(by_path[path]) for path, place in search.places.items()}
    alone = "it is neither numbered like a layer nor in a stack named after layers"
    found = depth_of(arrays, shapes, places, search.reasons, alone)
    if places:
        return joined(found, said)
    leaves = (dataclasses.replace(leaf, place=said.get(leaf.path)) for leaf in found.leaves)
    return Depth(tuple(leaves))


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
            self._descend(root)
            self._doubt_the_left(root)
            self._doubt_the_unclear()

    def _descend(self, node: Node) -> None:
        """Places the layers below a node. Within layers nothing else is layers."""
        if self._is_stack(node):
            return
        for child in besides_layers(node, self._layers_among):
            leaf = child.leaves[0]
            if not child.is_leaf:
                self._descend(child)
            # Norms and adapters tell a stack that is not named after layers.
            elif leaf.layer_axes or (leaf.is_wide and (leaf.is_norm or leaf.is_lora)):
                self._left.append(leaf)

    def _layers_among(self, family: Family, parts: bool) -> Iterable[Node]:
        """The siblings that are layers, or may be: there is nothing more to look for in them."""
        is_named = words.is_layer_name(family.name) and not are_flat(family)
        kinds = [kind for kind in family.kinds if len(kind.members) > 1]
        if not (is_named or parts):
            self._suspect(family, kinds)
            return []
        alone = [kind.first for kind in family.kinds if len(kind.members) == 1]
        uneven = unevenness_of(family, kinds)
        for node in alone:
            why = uneven or f"{node.path} is the only layer of its kind"
            self.reasons |= dict.fromkeys((leaf.path for leaf in node.leaves), why)
        if len(family.members) == 1:
            is_layer = self._is_stack(family.first, is_layer=True) or _is_one_layer(family.first)
            return alone if is_layer else []
        if not (kinds and (family.repeats or parts)):
            return []
        doubts = doubts_among(family, kinds, parts)
        for doubt in doubts:
            self._add_doubt(doubt)
        for kind in [] if doubts else kinds:
            self.places |= kind.places(kind.members.values(), "names")
        said = {path for doubt in doubts for path in doubt.paths}
        layers = [node for kind in kinds for node in kind.members.values()]
        # The last of the siblings may hold further layers: it is no layer, and is searched.
        return layers + [
            node for node in alone if node.leaves[0].path in said or _is_one_layer(node)
        ]

    def _suspect(self, family: Family, kinds: Sequence[Family]) -> None:
        """Keeps in mind siblings that are not named after layers, though they look like them.

        Three or more blocks that are alike may be layers, unless their name says that they are
        side by side, or parts of a block.
        """
        # action_expert/0 may be a layer of one expert, expert_0 is one of several.
        is_network = family.is_list and words.has_word(words.NETWORKS, family.name)
        is_copy = words.has_word(words.COPIES, family.name) and not is_network
        is_said = is_copy or are_flat(family)
        why = "its siblings may be layers, or copies side by side"
        for alike in alike_among(kinds):
            # Stacks that norms tell are doubted each by itself.
            if not alike.first.is_block or any(spare_axes(alike.first.leaves).values()):
                continue
            # Two may be an encoder and a decoder, or two players.
            grave = len(alike.members) > 2 and not (is_said or words.is_part_name(family.name))
            doubt = (
                doubt_stacks(alike, why, grave)
                if alike.why_stacks
                else doubt_siblings(alike, why, grave, family.has_holes)
            )
            self._unclear.append((doubt, None if is_said else _above(family.first)))

    def _is_stack(self, node: Node, is_layer: bool = False) -> bool:
        """Whether the leaves below are one stack, or may be."""
        # A lone number may be that of a stack, as in __layer_stack_no_per_layer_1 of Haiku. encoder
        # and decoder are stacks if metadata says so of all their leaves.
        name, number = numbered_key(node.key)
        marked = [leaf for leaf in node.leaves if leaf.layer_axes]
        whole = len(marked) == len(node.leaves) and node.is_block and not has_stacks(node)
        is_named = words.is_layer_name(name) or name in words.STACK_NAMES
        if is_layer and not _is_one_layer(node):
            return False
        if not is_layer and (number is not None or not (is_named or whole)):
            return False
        found = read_stack(node)
        if found is None:
            if words.is_layer_name(name) and lacks_norms(node):
                # query_layer has a bias with an axis for heads, and is no stack.
                why, rules = "it may be stacked, but no norm tells", rules_of_stack(node.leaves)
                doubt = doubt_stack(node, [node], why, rules, grave=False)
                self._unclear.append((doubt, _above(node)))
            return False
        if isinstance(found, dict):
            self.places |= found
        else:
            for doubt in found:
                self._add_doubt(doubt)
        return True

    def _add_doubt(self, doubt: Doubt) -> None:
        self.reasons |= dict.fromkeys(doubt.paths, doubt.why)
        self.doubts.append(doubt)

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
                self._add_doubt(dataclasses.replace(doubt, grave=doubt.grave or is_alone))

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
            # LoRA may have an axis for heads in one layer.
            rank = min((len(each.shape) for at in nodes for each in at.leaves), default=0)
            if nodes and (leaf.is_norm or leaf.layer_axes or rank > 2):
                rules = rules_of_stack([leaf for each in nodes for leaf in each.leaves])
                why = "it looks stacked, but its container is not named after layers"
                grave = leaf.is_norm or bool(leaf.layer_axes)
                self._add_doubt(doubt_stack(node, nodes, why, rules, grave))
        self.doubts += [doubt for doubt in slight if not doubt.paths & self._settled]


def _may_hold_layers(node: Node) -> bool:
    """Whether a node, though named like a layer, holds more than two parts that may be layers."""
    # A stage of a ResNet, block1, has unit1, unit2 and unit3, the first of which is not like them.
    if holds_layers(node):
        return True
    inner = [node]
    while inner:
        node = inner.pop()
        inner += [child for child in node.children.values() if not child.is_leaf]
        for family in families_of(node):
            # The only layer may have experts, or parts like MlpBlock_0.
            is_said = words.has_word(words.BESIDE, family.name) or words.is_part_name(family.name)
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
    # norm/scale is two keys below what it is a norm of, ln1 is one.
    node, keys = root, leaf.keys[:-1]
    if (leaf.is_norm or leaf.is_lora) and not words.is_norm_word(numbered_key(leaf.keys[-1])[0]):
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


def _axis_names_in(tree: optax.Params) -> Iterator[tuple[str, ...]]:
    """For each leaf the names that its box gives to its axes, if there is one for each."""
    for box in jax.tree.leaves(tree, is_leaf=lambda node: _axis_names(node) is not None):
        names = tuple(map(str, _axis_names(box) or ()))
        for leaf in jax.tree.leaves(box):
            yield names if len(names) == len(shape_of(leaf)) else ()


def _axis_names(box: object) -> tuple[object, ...] | None:
    """The axis names of a Flax box: ``names`` in linen, metadata of a variable in nnx."""
    names = getattr(box, "names", None) if hasattr(box, "unbox") else None
    if names is None and hasattr(box, "get_metadata"):
        names = box.get_metadata().get("out_sharding")
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
    arrays = leaves_of(tree)[0]
    try:
        # Parameters may be in boxes whose axes have names, and updates in none.
        return _found(arrays, [()] * len(arrays), Depth())
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
