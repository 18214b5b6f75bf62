"""The tree as its keys tell it: nodes, siblings that differ in a number, and names of layers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

from depthsmooth.places import Shape, numbered_key


@dataclasses.dataclass(frozen=True)
class Known:
    """What the tree says of one leaf.

    Attributes:
      path: its path.
      shape: its shape.
      names: the name of each axis; empty where they are not known.
    """

    path: str
    shape: Shape
    names: tuple[str, ...] = ()

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys of its path."""
        return self.path.split("/")

    @functools.cached_property
    def layer_axes(self) -> list[int]:
        """The axes that are named after layers."""
        return [axis for axis, name in enumerate(self.names) if nesting_of(name) is not None]

    @functools.cached_property
    def is_norm(self) -> bool:
        """Whether it is a vector of a normalisation: it has one axis in each layer."""
        *_, above, last = ["", *self.keys]
        of_norm = any(map(is_norm_word, words_of(above)))
        return last == "scale" or is_norm_word(last) or (of_norm and last in VECTORS)

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector in each layer, unless a bias of several heads."""
        return self.is_norm or self.keys[-1] in ("b", "bias")


VECTORS = frozenset({"b", "beta", "bias", "g", "gamma", "offset", "w", "weight"})


@dataclasses.dataclass(frozen=True)
class Node:
    """A place in the tree, with all leaves below it."""

    path: str
    leaves: tuple[Known, ...]

    @property
    def key(self) -> str:
        """The last key of its path."""
        return self.path.rpartition("/")[2]

    @property
    def level(self) -> int:
        """The number of keys in its path."""
        return len(self.path.split("/")) if self.path else 0

    def inside(self, leaf: Known) -> str:
        """The path of a leaf from here on."""
        return "/".join(leaf.keys[self.level :])

    @functools.cached_property
    def children(self) -> dict[str, Node]:
        """The nodes one key below, by key."""
        below: dict[str, list[Known]] = {}
        for leaf in self.leaves:
            if len(leaf.keys) > self.level:
                below.setdefault(leaf.keys[self.level], []).append(leaf)
        start = f"{self.path}/" if self.path else ""
        return {key: Node(start + key, tuple(leaves)) for key, leaves in below.items()}

    @property
    def is_leaf(self) -> bool:
        """Whether it is a leaf, and no container."""
        return self.leaves[0].path == self.path

    @property
    def is_block(self) -> bool:
        """Whether it has what a block has: two matrices, or two modules, or more."""
        matrices = sum(len(leaf.shape) > 1 and not leaf.is_vector for leaf in self.leaves)
        modules = sum(not child.is_leaf for child in self.children.values())
        return matrices > 1 or modules > 1


@dataclasses.dataclass(frozen=True)
class Family:
    """Siblings that differ in the number at the end of their keys.

    Attributes:
      parent: the node that has them as children.
      group: their path, with ``*`` for the number.
      members: from number to sibling, in numeric order.
    """

    parent: Node
    group: str
    members: dict[int, Node]

    @property
    def name(self) -> str:
        """The name they share; for bare numbers, as in a list, that of the parent."""
        return self.group.rpartition("/")[2].rstrip("*").rstrip("-_") or self.parent.key

    @property
    def pattern(self) -> str:
        """The pattern of a rule for the family."""
        first = next(iter(self.members.values()))
        stem = re.escape(
            first.path[: len(first.path) - len(first.key)] + numbered_key(first.key)[0]
        )
        number = r"[-_]?(\d*)" if first.key != "0" else r"(\d+)"
        rest = "(?:/.*)?" if any(node.is_leaf for node in self.members.values()) else "/.*"
        return stem + number + rest

    @functools.cached_property
    def tensors(self) -> dict[str, dict[int, Shape]]:
        """For each tensor its shape in each of the siblings that have it."""
        shapes: dict[str, dict[int, Shape]] = {}
        for number, node in self.members.items():
            for leaf in node.leaves:
                shapes.setdefault(node.inside(leaf), {})[number] = leaf.shape
        return shapes

    @property
    def container(self) -> list[str]:
        """The key of what holds them, as a list; empty at the root."""
        keys = self.parent.path.split("/")
        return keys[:-1][-1:] if self.is_list else keys[-1:]

    @property
    def is_list(self) -> bool:
        """Whether the siblings have numbers alone for keys."""
        return next(iter(self.members.values())).key.isdigit()

    @property
    def repeats(self) -> bool:
        """Whether two siblings have a matrix alike: vectors are of one size in all of them."""
        matrices = collections.Counter(
            (node.inside(leaf), leaf.shape)
            for node in self.members.values()
            for leaf in node.leaves
            if not leaf.is_vector
        )
        return max(matrices.values(), default=0) > 1

    @functools.cached_property
    def strangers(self) -> list[Node]:
        """Siblings that share no tensor with another, like a stem or a head among blocks."""
        copies = {
            (name, shape)
            for name, shapes in self.tensors.items()
            for shape, count in collections.Counter(shapes.values()).items()
            if count > 1
        }
        return [
            node
            for node in self.members.values()
            if not any((node.inside(leaf), leaf.shape) in copies for leaf in node.leaves)
        ]

    @property
    def is_uniform(self) -> bool:
        """Whether all the siblings have the same tensors, if not of the same shapes."""
        return all(len(shapes) == len(self.members) for shapes in self.tensors.values())

    @property
    def uneven(self) -> str:
        """A tensor that has not the same shape in all siblings that have it, if there is one."""
        for name, shapes in self.tensors.items():
            if len(set(shapes.values())) > 1:
                return "/".join(filter(None, [self.group, name]))
        return ""

    def tensor(self, member: Node, leaf: Known) -> str:
        """Which of a sibling's tensors a leaf is; tensors of other shapes are others."""
        name = member.inside(leaf)
        return name if len(set(self.tensors[name].values())) == 1 else f"{name} {leaf.shape}"

    @property
    def misfit(self) -> str:
        """Why they are not the layers of one stack, if they are not."""
        first, *_, last = [*self.members, *self.members]
        if first > 1 or len(self.members) != last - first + 1:
            return "their numbers have holes"
        unnumbered = numbered_key(self.members[first].key)[0]
        if first == 1 and unnumbered in self.parent.children:
            return f"{unnumbered} may be the first of them, but is not like them"
        if any(
            len(leaf.shape) > 1 and leaf.is_norm
            for node in self.members.values()
            for leaf in node.leaves
        ) or any(leaf.layer_axes for node in self.members.values() for leaf in node.leaves):
            return "each of them is a stack: they may alternate, or follow one another"
        ranks = {len(leaf.shape) for node in self.members.values() for leaf in node.leaves}
        if min(ranks) > 1 and max(ranks) > 2:
            return "each of them may be a stack: no tensor of theirs has one axis"
        return ""


def families_of(node: Node) -> list[Family]:
    """The children that differ in a number; a child without one may come before number 1."""
    numbers: dict[str, dict[int, list[Node]]] = {}
    for key, child in node.children.items():
        stem, number = numbered_key(key)
        if number is not None:
            numbers.setdefault(stem, {}).setdefault(number, []).append(child)
    families = []
    for stem, found in numbers.items():
        if any(len(twins) > 1 for twins in found.values()):
            continue
        members = {number: twins[0] for number, twins in sorted(found.items())}
        starred = re.sub(r"\d+$", "*", next(iter(members.values())).path)
        if min(members) == 1 and stem in node.children:
            first, second = node.children[stem], members[1]
            ours, theirs = (
                {n.inside(leaf): leaf.shape for leaf in n.leaves} for n in (first, second)
            )
            if ours == theirs:
                members = {0: first} | members
        families.append(Family(node, starred, members))
    return families


def besides_layers(node: Node, are_layers: Callable[[Family, bool], bool]) -> list[Node]:
    """The children of a node that are no layers.

    Args:
      node: the node.
      are_layers: tells whether a family is layers, or named so and nothing else; it is
        also told whether the families are the parts of blocks.
    """
    families = families_of(node)
    parts = are_block_parts(families)
    layers = {
        member.path
        for family in families
        if are_layers(family, parts)
        for member in family.members.values()
    }
    return [child for child in node.children.values() if child.path not in layers]


def blocks_within(family: Family) -> list[Family]:
    """Families within the siblings that look like layers themselves: blocks that are copies."""
    found, nodes = [], list(family.members.values())
    while nodes:
        node = nodes.pop()
        found += [
            inner
            for inner in families_of(node)
            if (inner.is_list or is_layer_name(inner.name) or "transformer" in words_of(inner.name))
            and len(inner.members) > 1
            and inner.is_uniform
            and not inner.uneven
            and next(iter(inner.members.values())).is_block
        ]
        nodes += [child for child in node.children.values() if not child.is_leaf]
    return found


def holds_layers(node: Node) -> bool:
    """Whether a node, though named like a layer, holds more than two copies of a block."""
    alone = Family(node, node.path, {0: node})
    return any(len(inner.members) > 2 for inner in blocks_within(alone))


def are_block_parts(families: Sequence[Family]) -> bool:
    """Whether all the families of a node are the parts of its blocks, each numbered alike.

    As with Haiku, where a loop over attention and MLP names them attn, attn_1, … and mlp,
    mlp_1, …: without containers for the blocks.
    """
    blocks = [family for family in families if next(iter(family.members.values())).is_block]
    words = {word for family in blocks for word in words_of(family.name)}
    counts = {tuple(family.members) for family in families}
    return (
        len(counts) == 1
        and len(counts.pop()) > 2
        and any(word.startswith(("attn", "attention")) for word in words)
        and any(word.startswith(("mlp", "ff", "feed")) for word in words)
    )


def nesting_of(name: str) -> int | None:
    """How deep an axis of that name nests among those that run over layers; None if it does not."""
    words = words_of(name)
    if "repeats" in words or "repeat" in words:
        return 0
    if "layers" in words or words == ["layer"]:
        return 2 if "per" in words else 1
    return None


def is_layer_name(key: str) -> bool:
    """Whether a key names a block that a network repeats, or the stack of them."""
    words = words_of(key)
    ends = {words[0], words[-1]} if words else set()
    is_layer = any(re.fullmatch(r".*blocks?|(.*coder|.*former)?layers?", word) for word in ends)
    is_part = len(words) == 2 and words[0] in _PARTS
    is_other = is_part or any(is_norm_word(word) or word in _BESIDE for word in words)
    return key == "h" or (is_layer and not is_other)


_PARTS = frozenset({"attention", "attn", "ffn", "mlp"})
"""Words for the parts of a block: AttnBlock_0, MlpBlock_0."""


_BESIDE = frozenset(
    word + ending
    for word in (
        *("adapter", "agent", "branch", "codebook", "critic", "ensemble", "exit", "expert"),
        *("head", "language", "lateral", "member", "output", "projection", "quantizer", "task"),
        "tower",
    )
    for ending in ("", "s")
) | {"aux", "down", "fpn", "modality", "pyramid", "side", "skip", "up"}
"""Words for what is side by side rather than one after another, or the stages of a U-Net."""


def are_beside(keys: Sequence[str]) -> bool:
    """Whether one of the containers with these keys holds what is side by side."""
    return any(word in _BESIDE for key in keys for word in words_of(key))


def is_norm_word(word: str) -> bool:
    """Whether a word names a normalisation."""
    return word.endswith("norm") or word == "ln"


def words_of(key: str) -> list[str]:
    """The words of a key, in lower case: split at underscores, capitals and digits."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
