"""The tree as its keys tell it: nodes, siblings that differ in a number, and names of layers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence

from depthsmooth.places import Shape, numbered_key


@dataclasses.dataclass(frozen=True)
class Known:
    """What the tree says of one leaf.

    Attributes:
      path: its path.
      shape: its shape.
      names: the name of each axis; empty where they are not known.
      multiplies: whether it is known to multiply data element by element, and no more: taps
        of a short convolution have the shape of a matrix, and are none.
      in_pieces: whether it is known that data meets pieces of it, like each expert's, one by
        one.
    """

    path: str
    shape: Shape
    names: tuple[str, ...] = ()
    multiplies: bool = False
    in_pieces: bool = False

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys of its path, where a number in a key ends one: see :func:`ends_of_keys`."""
        starts = [0, *(end + 1 for end in self.ends)]
        return [self.path[start:end] for start, end in zip(starts, self.ends, strict=False)]

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Where in its path each of its keys ends."""
        return ends_of_keys(self.path)

    @functools.cached_property
    def layer_axes(self) -> list[int]:
        """The axes that are named after layers."""
        return [axis for axis, name in enumerate(self.names) if nesting_of(name) is not None]

    @functools.cached_property
    def is_norm(self) -> bool:
        """Whether it is a vector of a normalisation: it has one axis in each layer."""
        *_, above, last = ["", *self.keys]
        of_norm = any(map(is_norm_word, words_of(above)))
        # Of two in a block: ln1 and ln2.
        is_named = is_norm_word(numbered_key(last)[0])
        return last == "scale" or is_named or (of_norm and last in VECTORS)

    @property
    def is_wide(self) -> bool:
        """Whether it has more than one axis: BiT's scales are of shape (1, 1, 1, width)."""
        return sum(size != 1 for size in self.shape) > 1

    @property
    def is_factor(self) -> bool:
        """Whether it is one of the two factors of LoRA: Gemma's lora_a, PEFT's lora_A/default."""
        return _FACTOR.search(self.path) is not None

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector in each layer, unless a bias of several heads."""
        return self.is_norm or self.keys[-1] in ("b", "bias")

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of matrices, as far as is known."""
        return len(self.shape) > 1 and not self.is_vector and not self.multiplies


def spare_axes(leaves: Iterable[Known]) -> dict[str, int]:
    """How many axes norms have more than they need in one layer, by path.

    Example:
      >>> shapes = {"ln": (6, 8), "norm/scale": (8,), "gn/scale": (1, 1, 1, 8), "w": (6, 8, 8)}
      >>> spare_axes(Known(path, shape) for path, shape in shapes.items())
      {'ln': 1, 'norm/scale': 0, 'gn/scale': 0}
    """
    # BiT's scales have axes of size 1 for the dimensions of an image; a stack may have one layer.
    return {
        leaf.path: len(leaf.shape) - 1 if leaf.is_wide or len(leaf.shape) == 2 else 0
        for leaf in leaves
        if leaf.is_norm
    }


_FACTOR = re.compile(r"(?i)lora[_/]?[ab](?=[_/.]|$)")


def factor_pairs(leaves: Iterable[Known]) -> list[list[Known]]:
    """The two factors of each adapter, as far as both are there.

    Example:
      >>> shapes = {"q/lora_a": (8, 2), "q/lora_b": (2, 8), "v/lora_a": (8, 2)}
      >>> pairs = factor_pairs(Known(path, shape) for path, shape in shapes.items())
      >>> [[leaf.path for leaf in pair] for pair in pairs]
      [['q/lora_a', 'q/lora_b']]
    """
    pairs: dict[str, list[Known]] = {}
    for leaf in leaves:
        if leaf.is_factor:
            pairs.setdefault(_FACTOR.sub("*", leaf.path), []).append(leaf)
    return [pair for pair in pairs.values() if len(pair) == 2]


VECTORS = frozenset({"b", "beta", "bias", "g", "gamma", "offset", "w", "weight"})


_IN_THE_MIDDLE = re.compile(r"(?<=[A-Za-z])[-_]?\d+(?=[-_][A-Za-z~])")
"""A number in a key, and more words behind it."""


def ends_of_keys(path: str) -> tuple[int, ...]:
    """Where in a path each of its keys ends.

    A number ends a key also where more comes behind it: GraphCast has a module
    ``processor_0_mlp`` beside ``processor_0_norm``. So do the dots of a flat dict of a
    checkpoint of PyTorch, ``model.layers.0.mlp.weight``.

    Example:
      >>> ends_of_keys("net/processor_0_mlp/w"), ends_of_keys("layers.0.w")
      ((3, 15, 19, 21), (6, 8, 10))
    """
    ends, start = [], 0
    for key in path.split("/"):
        parts = key.split(".") if re.search(r"(^|\.)\d+(\.|$)", key) else [key]
        for part in parts:
            ends += [start + match.end() for match in _IN_THE_MIDDLE.finditer(part)]
            start += len(part) + 1
            ends.append(start - 1)
    return tuple(ends)


@dataclasses.dataclass(frozen=True)
class Node:
    """A place in the tree, with all leaves below it.

    Attributes:
      path: the beginning of its leaves' paths.
      leaves: the leaves.
      level: the number of keys in its path.
    """

    path: str
    leaves: tuple[Known, ...]
    level: int = 0

    @property
    def key(self) -> str:
        """The last key of its path."""
        return self.leaves[0].keys[self.level - 1] if self.level else ""

    def inside(self, leaf: Known) -> str:
        """The path of a leaf from here on."""
        return leaf.path[len(self.path) + 1 :] if self.level else leaf.path

    @functools.cached_property
    def children(self) -> dict[str, Node]:
        """The nodes one key below, by key."""
        below: dict[str, list[Known]] = {}
        for leaf in self.leaves:
            if len(leaf.keys) > self.level:
                below.setdefault(leaf.keys[self.level], []).append(leaf)
        return {
            key: Node(leaves[0].path[: leaves[0].ends[self.level]], tuple(leaves), self.level + 1)
            for key, leaves in below.items()
        }

    @property
    def is_leaf(self) -> bool:
        """Whether it is a leaf, and no container."""
        return all(leaf.path == self.path for leaf in self.leaves)

    @functools.cached_property
    def tensors(self) -> frozenset[tuple[str, Shape]]:
        """Name and shape of each of its tensors; those of a list in it, like experts, are one."""
        return frozenset((self._name(leaf), leaf.shape) for leaf in self.leaves)

    @functools.cached_property
    def matrices(self) -> frozenset[tuple[str, Shape]]:
        """The matrices among its tensors that tell its kind: whole ones, if there are any."""
        matrices = [leaf for leaf in self.leaves if leaf.is_matrix]
        whole = [leaf for leaf in matrices if not leaf.in_pieces]
        return frozenset((self._name(leaf), leaf.shape) for leaf in whole or matrices)

    def _name(self, leaf: Known) -> str:
        """The path of a leaf from here on, with ``*`` for the number of an item of a list."""
        keys = leaf.keys[self.level :]
        return "/".join("*" if key.isdecimal() else key for key in keys)

    @property
    def is_block(self) -> bool:
        """Whether it has what a block has: two matrices, or two modules, or more."""
        matrices = sum(leaf.is_matrix for leaf in self.leaves)
        modules = sum(not child.is_leaf for child in self.children.values())
        return matrices > 1 or modules > 1


def are_of_one_kind(one: Node, two: Node) -> bool:
    """Whether two siblings can be layers of one kind: they share most of their tensors.

    By name and shape, and the matrices above all: whatever lies in a network's stream of data
    has norms and biases of one size. They share more than half of the tensors, and of the
    matrices, of the one that has fewer, and more than a quarter of the other's matrices. Half
    is enough where that are two matrices or more: attention, beside which one has an MLP and
    the other experts. An attention and an MLP whose output projections are alike share one.

    Example:
      >>> def node(**shapes):
      ...     return Node("", tuple(Known(path, shape) for path, shape in shapes.items()))
      >>> are_of_one_kind(node(kernel=(4, 4), bias=(4,)), node(scale=(4,), bias=(4,)))
      False
      >>> are_of_one_kind(node(q=(4, 4), o=(4, 4), up=(4, 9)), node(q=(4, 4), o=(4, 4), e=(3, 4)))
      True
    """
    if bool(one.matrices) != bool(two.matrices):
        return False
    if differ_in_experts(one, two):
        return True
    shared = len(one.matrices & two.matrices)
    fewer, more = sorted((len(one.matrices), len(two.matrices)))
    are_most = 2 * len(one.tensors & two.tensors) > min(len(one.tensors), len(two.tensors))
    is_enough = are_most if 2 * shared > fewer or not more else shared > 1
    return 2 * shared >= fewer and is_enough and (4 * shared > more or not more)


def share_half(one: Node, two: Node) -> bool:
    """Whether two siblings have exactly half of their matrices in common: of which kind is open.

    Example:
      >>> nodes = [Node("", (Known(name, (4, 4)), Known("out", (4, 4)))) for name in ("qkv", "up")]
      >>> share_half(*nodes)
      True
    """
    fewer = min(len(one.matrices), len(two.matrices))
    return fewer > 0 and 2 * len(one.matrices & two.matrices) == fewer


def differ_in_experts(one: Node, two: Node) -> bool:
    """Whether one of two siblings has experts in the place of an MLP, and the rest is alike.

    Then they are layers of one kind, however many matrices their experts and their MLP have.

    Example:
      >>> attention, mlp = Known("attn/out", (4, 4)), [Known(f"w{i}", (4, 4)) for i in range(3)]
      >>> experts = [Known("experts/up", (2, 4, 4)), Known("experts/down", (2, 4, 4))]
      >>> differ_in_experts(Node("", (attention, *mlp)), Node("", (attention, *experts)))
      True
    """
    beside = [
        frozenset(of for of in node.matrices if not _EXPERTS & {*words_of(of[0])})
        for node in (one, two)
    ]
    has_experts = [len(own) < len(of.matrices) for own, of in zip(beside, (one, two), strict=True)]
    shared = len(beside[0] & beside[1])
    return sum(has_experts) == 1 and 2 * shared > len(beside[has_experts.index(True)])


_EXPERTS = frozenset({"expert", "experts", "moe"})
"""Words for what is in the place of an MLP: experts/0, local_experts, MoeBlock_0."""


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
    def pattern(self) -> str:
        """The pattern of a rule for the family."""
        key = self.first.key
        stem = re.escape(self.first.path.removesuffix(key) + numbered_key(key)[0])
        return stem + (r"[-_]?(\d*)" if key != "0" else r"(\d+)") + self._rest

    @property
    def narrow_pattern(self) -> str:
        """The pattern of a rule for these siblings alone: it lists their numbers."""
        stem = numbered_key(self.first.key)[0]
        ends = [node.key.removeprefix(stem) for node in self.members.values()]
        signs = {end.rstrip("0123456789") for end in ends}
        sign = signs.pop() if len(signs) == 1 else "[-_]?"
        numbers = "|".join(end.lstrip("-_") for end in ends)
        above = re.escape(self.first.path.removesuffix(self.first.key) + stem)
        return f"{above}{sign}({numbers}){self._rest}"

    @property
    def _rest(self) -> str:
        """The pattern of what is behind the number in the paths of their leaves."""
        pairs = [(node.path, leaf.path) for node in self.members.values() for leaf in node.leaves]
        ends = {re.escape(leaf[len(node) : len(node) + 1]) for node, leaf in pairs}
        signs = sorted(ends - {""})
        sign = f"(?:{'|'.join(signs)})" if len(signs) > 1 else "".join(signs)
        are_bare = "" in ends
        return f"(?:{sign}.*)?" if sign and are_bare else f"{sign}.*" if sign else ""

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
        keys = self.first.leaves[0].keys[: self.parent.level]
        return keys[:-1][-1:] if self.is_list else keys[-1:]

    @property
    def is_list(self) -> bool:
        """Whether the siblings have numbers alone for keys."""
        return self.first.key.isdigit()

    @property
    def repeats(self) -> bool:
        """Whether two siblings have a matrix alike: vectors are of one size in all of them."""
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

        A U-Net has blocks of each width on its way down, and on its way up again: those of one
        kind are no neighbours. What is alone of its kind may come before and after the layers.

        Example:
          >>> def family(*sizes):
          ...     nodes = [Node(str(i), (Known(f"{i}/w", (n, n)),), 1) for i, n in enumerate(sizes)]
          ...     return Family(Node("", ()), "*", dict(enumerate(nodes)))
          >>> [family(*sizes).is_regular for sizes in ((1, 1, 2), (1, 2, 1, 2), (1, 2, 2, 1))]
          [True, True, False]
        """
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
        """Whether tensors have one shape in all siblings, or other shapes in turn.

        One sibling that is unlike all others is another part of a network: the first unit of a
        stage of a ResNet takes in fewer channels.
        """
        sizes = [len(family.members) for family in self.alike]
        set_of = {n: k for k, family in enumerate(self.alike) for n in family.members}
        is_odd = len(sizes) == 2 and min(sizes) == 1 < max(sizes)
        return not is_odd and _are_regular([set_of[number] for number in self.members])

    @property
    def is_pyramid(self) -> bool:
        """Whether some siblings have the tensors of others, but all of their matrices in sizes.

        As the stages of a convolutional network do, each of another width, or a feature encoder.
        """
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

    @property
    def has_holes(self) -> bool:
        """Whether a number is missing among theirs, or before them."""
        first, *_, last = [*self.members, *self.members]
        return first > 1 or len(self.members) != last - first + 1

    @property
    def stacked(self) -> str:
        """Why each of them may be a stack of layers itself, if so."""
        nodes = self.members.values()
        leaves = [leaf for node in nodes for leaf in node.leaves]
        if any(leaf.layer_axes or (leaf.is_norm and leaf.is_wide) for leaf in leaves):
            return "each of them is a stack: they may alternate, or follow one another"
        ranks = {len(leaf.shape) for leaf in leaves}
        # Adapters of rank r, of shapes (width, r) and (r, heads, size), have no axis in common.
        if min(ranks) > 1 and max(ranks) > 2 and any(common_axes(node.leaves) for node in nodes):
            return "each of them may be a stack: no tensor of theirs has one axis"
        return ""

    @property
    def misfit(self) -> str:
        """Why their numbers are not those of layers, if they are not."""
        unnumbered, number = numbered_key(self.first.key)
        is_like = number is not None or self.first.tensors == self.members[1].tensors
        if self.has_holes:
            return "their numbers have holes"
        if not is_like or (number == 1 and unnumbered in self.parent.children):
            return f"{unnumbered} may be the first of them, but is not like them"
        return ""


def _are_regular(kinds: Sequence[int]) -> bool:
    """Whether each kind is one run of siblings, or the kinds take turns that repeat."""
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


def common_axes(leaves: Iterable[Known]) -> list[int]:
    """The axes along which all of the leaves have one size; -1 for the last of different ranks.

    Example:
      >>> common_axes([Known("q", (3, 8)), Known("o", (3, 2, 8))])
      [0, -1]
    """
    shapes = [leaf.shape for leaf in leaves]
    ranks = {len(shape) for shape in shapes}
    last = [-1] if len(ranks) > 1 and min(ranks) > 0 else []
    axes = [*range(min(ranks)), *last]
    return [axis for axis in axes if len({shape[axis] for shape in shapes}) == 1]


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
        if any(len(twins) > 1 for twins in found.values()):
            continue
        members = {number: twins[0] for number, twins in sorted(found.items())}
        starred = re.sub(r"\d+$", "*", next(iter(members.values())).path)
        if min(members) == 1 and stem in node.children:
            first = node.children[stem]
            if are_of_one_kind(first, members[1]):
                members = {0: first} | members
        families.append(Family(node, starred, members))
    return families


def besides_layers(
    node: Node, layers_among: Callable[[Family, bool], Iterable[Node]]
) -> list[Node]:
    """The children of a node that are no layers.

    Args:
      node: the node.
      layers_among: the siblings of a family that are layers, or named so and nothing else;
        it is also told whether the families are the parts of blocks.
    """
    families = families_of(node)
    parts = are_block_parts(families)
    layers = {member.path for family in families for member in layers_among(family, parts)}
    return [child for child in node.children.values() if child.path not in layers]


def blocks_within(family: Family) -> list[Family]:
    """Families within the siblings that look like layers themselves: blocks that are copies.

    The experts of a layer, its heads, its adapters and its branches are side by side.
    """
    found, nodes = [], list(family.members.values())
    while nodes:
        node = nodes.pop()
        found += [
            inner
            for inner in families_of(node)
            if (inner.is_list or is_layer_name(inner.name) or "transformer" in words_of(inner.name))
            and not are_beside([inner.name])
            and len(inner.members) > 1
            and inner.is_uniform
            and not inner.uneven
            and inner.first.is_block
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


def is_stack_name(key: str) -> bool:
    """Whether a key names what holds one block many times over, whatever the block is.

    Example:
      >>> [is_stack_name(key) for key in ("repeat", "stacked", "stacked_critics", "encoder")]
      [True, True, False, False]
    """
    words = words_of(key)
    return bool(_STACKS & {*words[:1], *words[-1:]}) and not are_beside([key])


_STACKS = frozenset({"repeat", "repeated", "stacked"})
"""Words for one block many times over: `repeat` of Praxis, `stacked` of Haliax."""


_PARTS = frozenset({"attention", "attn", "ffn", "mlp"})
"""Words for the parts of a block: AttnBlock_0, MlpBlock_0."""


def is_part_name(key: str) -> bool:
    """Whether a key names a part of a block, or what belongs to one.

    Diffusion models have an AttnBlock here and there, Gemma 3n a per_layer_input_gate.
    """
    words = words_of(key)
    return words[:1] == ["per"] or any(word in _PARTS for word in words)


def _plurals(*words: str) -> frozenset[str]:
    return frozenset(word + ending for word in words for ending in ("s", "es"))


_COPIES = (
    "adapter",  # one for each language or task, beside frozen layers
    "agent",  # of several that learn together
    "branch",  # of HRNet, of one resolution each
    "codebook",  # of a residual quantiser: EnCodec's quantizer/layers/0/codebook
    "critic",  # the two of SAC and TD3, the ten of REDQ
    "discriminator",  # of HiFi-GAN, one for each period or scale
    "ensemble",  # of whole networks
    "exit",  # one after each of some layers, to stop early
    "expert",  # of a mixture: experts/0, expert_layer_0
    "head",  # one for each task, box or future token
    "lateral",  # of a pyramid of features, one for each resolution
    "member",  # of an ensemble
    "output",  # DimeNet's output_blocks, one beside each of its interaction blocks
    "projection",  # one for each of several inputs
    "quantizer",  # the stages of SoundStream's
    "task",  # what each of several tasks has
)
"""Words for what there are several of, side by side."""


_MATRICES = frozenset({"exit", "lateral", "output", "projection"})
"""Those of them that name a matrix in a layer, too: the `output` of BERT's attention."""


_ARRAYS = frozenset(_COPIES) - _MATRICES | _plurals(*{*_COPIES} - _MATRICES)
"""Words for copies that may be in one array, with an axis for them."""


_SEVERAL = _plurals(*_COPIES) | {"ensemble"}
"""Words for containers of several copies."""


_TOWERS = frozenset({"language", "languages", "modality", "tower", "towers"})
"""Words for models side by side, each of which has layers: `language_model`, `vision_tower`."""


_SIDES = frozenset({"aux", "down", "fpn", "pyramid", "side", "skip", "up"})
"""Words for outputs on the way, pyramids of features, and the stages of a U-Net."""


_BESIDE = _plurals(*_COPIES) | _TOWERS | _SIDES | {*_COPIES}
"""Words for what is side by side rather than one after another."""


_FLAT = frozenset({"codebook", "codebooks", "fpn", "lateral", "laterals", "pyramid"})
"""Words for what is no layer, whatever the list that it is in, or that is in it, is named.

The pyramid of features of a detector has layer_blocks, EnCodec's quantizer layers/0/codebook.
"""


def are_beside(keys: Sequence[str]) -> bool:
    """Whether one of the containers with these keys holds what is side by side."""
    return any(word in _BESIDE for key in keys for word in words_of(key))


def are_copies(keys: Sequence[str]) -> bool:
    """Whether one of these keys names copies side by side, or their outputs: no model of its own.

    Example:
      >>> [are_copies([key]) for key in ("critic_0", "down_blocks", "language_model", "stage")]
      [True, True, False, False]
    """
    return any(word in _BESIDE - _TOWERS for key in keys for word in words_of(key))


def have_copies(keys: Sequence[str]) -> bool:
    """Whether what has one of these keys may be one array of copies, with an axis for them.

    Example:
      >>> [have_copies([key]) for key in ("experts", "critic", "output", "mlp/up")]
      [True, True, False, False]
    """
    return any(word in _ARRAYS for key in keys for word in words_of(key))


def are_flat(family: Family) -> bool:
    """Whether siblings are no layers, though named like them: for where, or for what, they are."""
    matrices = [leaf for leaf in family.first.leaves if leaf.is_matrix]
    inside = [leaf.keys[family.first.level :] for leaf in matrices]
    flat = [any(_FLAT & {*words_of(key)} for key in keys) for keys in (family.container, *inside)]
    return flat[0] or (len(flat) > 1 and all(flat[1:]))


def hold_copies(keys: Sequence[str]) -> bool:
    """Whether one of the containers with these keys holds several copies: of what, names tell not.

    Example:
      >>> [hold_copies([key]) for key in ("experts", "action_expert", "ensemble")]
      [True, False, True]
    """
    return any(word in _SEVERAL for key in keys for word in words_of(key))


def is_network_name(key: str) -> bool:
    """Whether a key names one network: the items of a list in it are its layers, or copies.

    Example:
      >>> [is_network_name(key) for key in ("action_expert", "experts", "medusa_head")]
      [True, False, False]
    """
    return bool(_NETWORKS & {*words_of(key)})


_NETWORKS = frozenset({"agent", "critic", "expert"})
"""Words for a whole network, where there is one: the action_expert of openpi."""


def is_norm_word(word: str) -> bool:
    """Whether a word names a normalisation."""
    return word.endswith("norm") or word == "ln"


def words_of(key: str) -> list[str]:
    """The words of a key, in lower case: split at underscores, capitals and digits."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
