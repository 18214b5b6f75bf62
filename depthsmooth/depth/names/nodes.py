"""The tree as its keys tell it: leaves, nodes, and whether two nodes are layers of one kind."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

from depthsmooth.depth.leaves import Axes, Shape
from depthsmooth.depth.names import words
from depthsmooth.depth.paths import numbered_key, shown


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

    def __str__(self) -> str:
        return shown(self.path, self.shape)

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
        return [axis for axis, name in enumerate(self.names) if words.nesting_of(name) is not None]

    @property
    def nested_axes(self) -> Axes:
        """The same, outer to inner."""
        return tuple(sorted(self.layer_axes, key=lambda k: words.nesting_of(self.names[k]) or 0))

    @functools.cached_property
    def is_norm(self) -> bool:
        """Whether it is a vector of a normalisation: it has one axis in each layer."""
        *_, above, last = ["", *self.keys]
        # LayerNorm_0/bias of Flax, input_layernorm/w of tunix.
        of_norm = any(map(words.is_norm_word, words.words_of(above)))
        # ln of the Scaling Book is an array, and so may ln1 and ln2 be.
        is_named = words.is_norm_word(numbered_key(last)[0])
        return last == "scale" or is_named or (of_norm and last in words.NORM_VECTORS)

    @property
    def is_wide(self) -> bool:
        """Whether it has more than one axis, but for those of size 1."""
        # The scales of BiT are of shape (1, 1, 1, width).
        return sum(size != 1 for size in self.shape) > 1

    @property
    def is_lora(self) -> bool:
        """Whether it is one of the two factors of LoRA."""
        return _LORA.search(self.path) is not None

    @property
    def is_vector(self) -> bool:
        """Whether it is a vector in each layer, unless a bias of several heads."""
        # Flax and Equinox have a bias, Haiku has b.
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
    # A scale of shape (1, width) is a stack of one layer, as in big_vision's ViT of depth 1. One of
    # shape (1, 1, 1, width) is a single one of BiT.
    return {
        leaf.path: len(leaf.shape) - 1 if leaf.is_wide or len(leaf.shape) == 2 else 0
        for leaf in leaves
        if leaf.is_norm
    }


# lora_a of nnx.LoRA and openpi, lora_A.default and lora_A/default of PEFT.
_LORA = re.compile(r"(?i)lora_[ab](?=[_/.]|$)")


def lora_pairs(leaves: Iterable[Known]) -> list[list[Known]]:
    """The two factors of each adapter, as far as both are there.

    Example:
      >>> shapes = {"q/lora_a": (8, 2), "q/lora_b": (2, 8), "v/lora_a": (8, 2)}
      >>> pairs = lora_pairs(Known(path, shape) for path, shape in shapes.items())
      >>> [[leaf.path for leaf in pair] for pair in pairs]
      [['q/lora_a', 'q/lora_b']]
    """
    pairs: dict[str, list[Known]] = {}
    for leaf in leaves:
        if leaf.is_lora:
            pairs.setdefault(_LORA.sub("*", leaf.path), []).append(leaf)
    return [pair for pair in pairs.values() if len(pair) == 2]


# processor_0_mlp of GraphCast, transformer_layer_0_attention.
_IN_THE_MIDDLE = re.compile(r"(?<=[A-Za-z])[-_]?\d+(?=_[A-Za-z])")
"""A number in a key, between its words."""


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
        # Only a number tells such a key: embeddings.word_embeddings.weight of BERT stays whole.
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

    @property
    def fork(self) -> Node:
        """The first node from here on that has more than one child, or none."""
        node = self
        while len(node.children) == 1 and not node.is_leaf:
            [node] = node.children.values()
        return node

    @functools.cached_property
    def tensors(self) -> frozenset[tuple[str, Shape]]:
        """Name and shape of each of its tensors. Those of a list in it, like experts, are one."""
        return frozenset((self._starred_path(leaf), leaf.shape) for leaf in self.leaves)

    @functools.cached_property
    def matrices(self) -> frozenset[tuple[str, Shape]]:
        """The matrices among its tensors that tell its kind: whole ones, if there are any."""
        matrices = [leaf for leaf in self.leaves if leaf.is_matrix]
        # One layer may take its heads from an array, piece by piece, where another has a matrix.
        whole = [leaf for leaf in matrices if not leaf.in_pieces]
        return frozenset((self._starred_path(leaf), leaf.shape) for leaf in whole or matrices)

    def _starred_path(self, leaf: Known) -> str:
        """The path of a leaf from here on, with ``*`` for the number of an item of a list."""
        # DeepSeek has hundreds of experts in a list, beside an attention of a few matrices.
        keys = leaf.keys[self.level :]
        return "/".join("*" if key.isdecimal() else key for key in keys)

    @property
    def is_block(self) -> bool:
        """Whether it has what a block has: two matrices, or two modules, or more."""
        # Dense_0 of a perceptron has one matrix and no module. A block may be a Dense and a norm.
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
    # A norm and a Dense in one list share a bias.
    if bool(one.matrices) != bool(two.matrices):
        return False
    if differ_in_experts(one, two):
        return True
    shared = len(one.matrices & two.matrices)
    fewer, more = sorted((len(one.matrices), len(two.matrices)))
    # The norms and biases of a network's stream of data are alike in all of its modules.
    are_most = 2 * len(one.tensors & two.tensors) > min(len(one.tensors), len(two.tensors))
    # Half of the matrices is enough if that are two. An attention and an MLP may share one, their
    # output projection. Recurrence and attention of Griffin share an MLP, but less than half.
    is_enough = are_most if 2 * shared > fewer or not more else shared > 1
    # A head behind the blocks in one list may be a matrix that each of them has, too.
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
    # DeepSeek's first layers have an MLP, the others experts; Llama 4 has experts in every other.
    beside = [
        frozenset(of for of in node.matrices if not words.has_word(words.EXPERTS, of[0]))
        for node in (one, two)
    ]
    has_experts = [len(own) < len(of.matrices) for own, of in zip(beside, (one, two), strict=True)]
    shared = len(beside[0] & beside[1])
    return sum(has_experts) == 1 and 2 * shared > len(beside[has_experts.index(True)])


def common_axes(leaves: Iterable[Known]) -> list[int]:
    """The axes along which all of the leaves have one size; -1 for the last of different ranks.

    Example:
      >>> common_axes([Known("q", (3, 8)), Known("o", (3, 2, 8))])
      [0, -1]
    """
    shapes = [leaf.shape for leaf in leaves]
    # nn.scan may put layers on the axis -1: (width, layers) beside (in, out, layers).
    ranks = {len(shape) for shape in shapes}
    last = [-1] if len(ranks) > 1 and min(ranks) > 0 else []
    axes = [*range(min(ranks)), *last]
    return [axis for axis in axes if len({shape[axis] for shape in shapes}) == 1]
