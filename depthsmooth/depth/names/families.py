"""Siblings that differ in a number: families, and the kinds of layers among them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from depthsmooth.depth.leaves import Place, Shape
from depthsmooth.depth.names.nodes import (
    Known,
    Node,
    are_of_one_kind,
    common_axes,
    differ_in_experts,
    share_half,
)
from depthsmooth.depth.names.words import BESIDE, FLAT, has_word, is_layer_name, words_of
from depthsmooth.depth.paths import numbered_key


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
        return numbered_key(self.first.key)[0] or self.parent.key

    @property
    def first(self) -> Node:
        """The first of the siblings."""
        return next(iter(self.members.values()))

    @property
    def leaves(self) -> list[Known]:
        """The leaves of all the siblings."""
        return [leaf for node in self.members.values() for leaf in node.leaves]

    @property
    def patterns(self) -> tuple[str, str]:
        """The pattern of a rule for the family, and one for these siblings alone, by number."""
        key = self.first.key
        stem = numbered_key(key)[0]
        above = re.escape(self.first.path.removesuffix(key) + stem)
        ends = [node.key.removeprefix(stem) for node in self.members.values()]
        signs = {end.rstrip("0123456789") for end in ends}
        sign = signs.pop() if len(signs) == 1 else "[-_]?"
        numbers = "|".join(end.lstrip("-_") for end in ends)
        number = r"[-_]?(\d*)" if key != "0" else r"(\d+)"
        return f"{above}{number}{self._rest}", f"{above}{sign}({numbers}){self._rest}"

    @property
    def _rest(self) -> str:
        """The pattern of what is behind the number in the paths of their leaves."""
        pairs = [(node.path, leaf.path) for node in self.members.values() for leaf in node.leaves]
        ends = {re.escape(leaf[len(node) : len(node) + 1]) for node, leaf in pairs}
        signs = sorted(ends - {""})
        sign = f"(?:{'|'.join(signs)})" if len(signs) > 1 else "".join(signs)
        return f"(?:{sign}.*)?" if sign and "" in ends else f"{sign}.*" if sign else ""

    @functools.cached_property
    def kinds(self) -> list[Family]:
        """The siblings of each kind, as families, in the order of the first of each."""
        found: list[dict[int, Node]] = []
        for number, node in self.members.items():
            for members in found:
                if are_of_one_kind(next(iter(members.values())), node):
                    members[number] = node
                    break
            else:
                found.append({number: node})
        names = name_kinds(self.group, [len(members) for members in found])
        return [
            dataclasses.replace(self, group=name, members=members)
            for name, members in zip(names, found, strict=True)
        ]

    @property
    def halves(self) -> tuple[Node, Node] | None:
        """Two siblings that have half of their matrices in common, if that leaves their kind open.

        Half of a layer may be its attention, beside other MLPs, or its MLP, beside a recurrence.
        """
        distinct: dict[frozenset[tuple[str, Shape]], Node] = {}
        for node in self.members.values():
            distinct.setdefault(node.matrices, node)
        for one, two in itertools.combinations(distinct.values(), 2):
            if share_half(one, two) and not differ_in_experts(one, two):
                return one, two
        return None

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
        # The items of a list share the list's key: what holds experts/layers/0 is named experts.
        keys = self.first.leaves[0].keys[: self.parent.level]
        return keys[:-1][-1:] if self.is_list else keys[-1:]

    @property
    def is_list(self) -> bool:
        """Whether the siblings have numbers alone for keys."""
        return self.first.key.isdigit()

    @property
    def repeats(self) -> bool:
        """Whether two siblings have a matrix alike: vectors are of one size in all of them."""
        # LayerNorm_0 and LayerNorm_1 of a perceptron are of one size, and so are the statistics of
        # a BatchNorm.
        matrices = collections.Counter(
            (node.inside(leaf), leaf.shape)
            for node in self.members.values()
            for leaf in node.leaves
            if not (leaf.is_vector or leaf.multiplies)
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
    def is_regular(self) -> bool:
        """Whether its kinds follow one another, or take turns that repeat.

        What is alone of its kind may come before and after the layers.

        Example:
          >>> def family(*sizes):
          ...     nodes = [Node(str(i), (Known(f"{i}/w", (n, n)),), 1) for i, n in enumerate(sizes)]
          ...     return Family(Node("", ()), "*", dict(enumerate(nodes)))
          >>> [family(*sizes).is_regular for sizes in ((1, 1, 2), (1, 2, 1, 2), (1, 2, 2, 1))]
          [True, True, False]
        """
        # A U-Net has blocks of each width on its way down, and again on its way up. Those of one
        # kind are no neighbours. Nor are they in Nemotron-H, whose kinds follow no pattern.
        kind_of = {n: k for k, kind in enumerate(self.kinds) for n in kind.members}
        return _are_regular([kind_of[number] for number in self.members])

    @property
    def alike(self) -> list[Family]:
        """The siblings whose tensors are of the same shapes, in the order of the first of each."""
        uneven = {name for name, shapes in self.tensors.items() if len(set(shapes.values())) > 1}
        found: dict[frozenset[tuple[str, Shape]], dict[int, Node]] = {}
        for number, node in self.members.items():
            shapes = [(node.inside(leaf), leaf.shape) for leaf in node.leaves]
            key = frozenset((name, shape) for name, shape in shapes if name in uneven)
            found.setdefault(key, {})[number] = node
        return [dataclasses.replace(self, members=members) for members in found.values()]

    @property
    def is_even(self) -> bool:
        """Whether tensors have one shape in all siblings, or other shapes in turn."""
        sizes = [len(family.members) for family in self.alike]
        set_of = {n: k for k, family in enumerate(self.alike) for n in family.members}
        # The first unit of a stage of a ResNet takes in fewer channels than all others.
        is_odd = len(sizes) == 2 and min(sizes) == 1 < max(sizes)
        return not is_odd and _are_regular([set_of[number] for number in self.members])

    @property
    def is_pyramid(self) -> bool:
        """Whether some siblings have the tensors of others, but all of their matrices in sizes."""
        # The stages of a convolutional network have other widths, from blocks_0 to the last.
        for one, two in itertools.combinations([kind.first for kind in self.kinds], 2):
            ours, theirs = ({name for name, _ in node.matrices} for node in (one, two))
            if 2 * len(ours & theirs) > min(len(ours), len(theirs)) and not (
                one.matrices & two.matrices
            ):
                return True
        return False

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

    def places(self, ordered: Iterable[Node], found_by: str) -> dict[str, Place]:
        """The place of each leaf if these siblings, in this order, are one layer each."""
        return {
            leaf.path: Place(self.group, self.tensor(node, leaf), (), (layer,), found_by)
            for layer, node in enumerate(ordered)
            for leaf in node.leaves
        }

    @property
    def has_holes(self) -> bool:
        """Whether a number is missing among theirs, or before them."""
        # An adapter may be in the upper layers alone. Layers may begin with 1.
        first, *_, last = [*self.members, *self.members]
        return first > 1 or len(self.members) != last - first + 1

    @property
    def why_stacks(self) -> str:
        """Why each of them may be a stack of layers itself, if so."""
        if any(leaf.layer_axes or (leaf.is_norm and leaf.is_wide) for leaf in self.leaves):
            return "each of them is a stack: they may alternate, or follow one another"
        # The convolutions of wav2vec 2.0 have more axes than a matrix, but their norms have one.
        ranks = {len(leaf.shape) for leaf in self.leaves}
        nodes = self.members.values()
        # Adapters of rank r, of shapes (width, r) and (r, heads, size), have no axis in common.
        if min(ranks) > 1 and max(ranks) > 2 and any(common_axes(node.leaves) for node in nodes):
            return "each of them may be a stack: no tensor of theirs has one axis"
        return ""

    @property
    def misfit(self) -> str:
        """Why their numbers are not those of layers, if they are not."""
        # The first block of Haiku has no number, and may have an input projection as well.
        unnumbered, number = numbered_key(self.first.key)
        is_like = number is not None or self.first.tensors == self.members[1].tensors
        if self.has_holes:
            return "their numbers have holes"
        if not is_like or (number == 1 and unnumbered in self.parent.children):
            return f"{unnumbered} may be the first of them, but is not like them"
        return ""


def _are_regular(kinds: Sequence[int]) -> bool:
    """Whether each kind is one run of siblings, or the kinds take turns that repeat."""
    # Griffin has two recurrences and an attention in turn. Others have one kind after the other.
    counts = collections.Counter(kinds)
    repeated = [at for at, kind in enumerate(kinds) if counts[kind] > 1]
    if not repeated:
        return True
    inner = kinds[repeated[0] : repeated[-1] + 1]
    runs = [kind for kind, _ in itertools.groupby(inner)]
    turns = range(1, len(inner) // 2 + 1)
    return len(runs) == len(set(runs)) or any(
        all(one == two for one, two in zip(inner, inner[turn:], strict=False)) for turn in turns
    )


def name_kinds(group: str, sizes: Sequence[int]) -> list[str]:
    """The names of the kinds of a group, from how many layers each has: its own if it has one.

    Example:
      >>> name_kinds("layers/*", [3, 1, 2])
      ['layers/* (kind 1)', 'layers/*', 'layers/* (kind 2)']
    """
    repeated = [size > 1 for size in sizes]
    if sum(repeated) < 2:
        return [group] * len(sizes)
    counts = itertools.accumulate(map(int, repeated))
    return [
        f"{group} (kind {k})" if is_repeated else group
        for k, is_repeated in zip(counts, repeated, strict=True)
    ]


def starred(paths: Sequence[str]) -> tuple[str, str]:
    """What paths have in common up to a number that they differ in, and what is behind it.

    Example:
      >>> starred(["net/block_0/a/kernel", "net/block_1/a/kernel"])
      ('net/block_*', 'a/kernel')
    """
    keys = [path.split("/") for path in paths]
    levels = zip(*keys, strict=False)
    same = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    key = max((own[same] for own in keys if len(own) > same), key=len, default="")
    above = [*keys[0][:same], *([re.sub(r"\d+$", "*", key)] if key else [])]
    return "/".join(above), "/".join(keys[0][same + 1 :])


def families_of(node: Node) -> list[Family]:
    """The children that differ in a number; a child without one may come before number 1."""
    numbers: dict[str, dict[int, list[Node]]] = {}
    for key, child in node.children.items():
        stem, number = numbered_key(key)
        if number is not None:
            numbers.setdefault(stem, {}).setdefault(number, []).append(child)
    families = []
    for stem, found in numbers.items():
        # block_1 and block_01 are no siblings in an order.
        if any(len(twins) > 1 for twins in found.values()):
            continue
        members = {number: twins[0] for number, twins in sorted(found.items())}
        group = re.sub(r"\d+$", "*", next(iter(members.values())).path)
        # Haiku and Keras give the first of one name no number.
        if min(members) == 1 and stem in node.children:
            first = node.children[stem]
            if are_of_one_kind(first, members[1]):
                members = {0: first} | members
        families.append(Family(node, group, members))
    return families


def besides_layers(
    node: Node, layers_among: Callable[[Family, bool], Iterable[Node]]
) -> list[Node]:
    """The children of a node that are no layers.

    ``layers_among`` gives the siblings of a family that are layers, or named so and nothing else.
    It is also told whether the families are the parts of blocks.
    """
    families = families_of(node)
    parts = are_block_parts(families)
    layers = {member.path for family in families for member in layers_among(family, parts)}
    return [child for child in node.children.values() if child.path not in layers]


def blocks_within(nodes: Iterable[Node]) -> list[Family]:
    """Families within nodes that look like layers themselves: blocks that are copies."""
    # Stages of one width hold blocks. The experts, heads, adapters and branches of a layer are side
    # by side. The layers of a perceptron are no blocks, those of T5's blocks are not alike, and the
    # two attentions of a decoder's block in Flax are not named after layers.
    found, nodes = [], [*nodes]
    while nodes:
        node = nodes.pop()
        found += [
            inner
            for inner in families_of(node)
            if (inner.is_list or is_layer_name(inner.name))
            and not has_word(BESIDE, inner.name)
            and len(inner.members) > 1
            and inner.is_uniform
            and not inner.uneven
            and inner.first.is_block
        ]
        nodes += [child for child in node.children.values() if not child.is_leaf]
    return found


def holds_layers(node: Node) -> bool:
    """Whether a node, though named like a layer, holds more than two copies of a block."""
    # Two copies may be the two attentions of a decoder's layer.
    return any(len(inner.members) > 2 for inner in blocks_within([node]))


def are_block_parts(families: Sequence[Family]) -> bool:
    """Whether all the families of a node are the parts of its blocks, each numbered alike."""
    # In Haiku a loop over attention and MLP names them attn, attn_1, mlp, mlp_1, without containers
    # for the blocks. Two of each may be two streams.
    blocks = [family for family in families if family.first.is_block]
    words = {word for family in blocks for word in words_of(family.name)}
    counts = {tuple(family.members) for family in families}
    return (
        len(counts) == 1
        and len(counts.pop()) > 2
        and not words.isdisjoint({"attn", "attention"})
        and "mlp" in words
    )


def are_flat(family: Family) -> bool:
    """Whether siblings are no layers, though named like them: for where, or for what, they are."""
    # layers/0/_codebook of EnCodec's quantizer, fpn/layer_blocks/0 of Torchvision's detectors.
    matrices = [leaf for leaf in family.first.leaves if leaf.is_matrix]
    inside = [leaf.keys[family.first.level :] for leaf in matrices]
    flat = [has_word(FLAT, *keys) for keys in (family.container, *inside)]
    return flat[0] or (len(flat) > 1 and all(flat[1:]))
