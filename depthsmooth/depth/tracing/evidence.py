"""Evidence that both strategies share: which parameter meets data that another one has made.

This is proof of an order. A layer is applied to what the layer before it has made, so data meets
parameters of one layer that parameters of the other are already in. Of what stands side by side,
like experts, neither meets the other. That one meets what another has made is not yet proof that
both are layers, for the two matrices of a block compose as well: :mod:`stacks` and :mod:`siblings`
say what else has to be true.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from depthsmooth.depth.leaves import Place, Shape
from depthsmooth.depth.names.nodes import Known, Node
from depthsmooth.depth.paths import common_path
from depthsmooth.depth.tracing.walk import Piece, Walk, union


class Composition:
    """Which parameters data meets after which others.

    Attributes:
      index: the number of each parameter, by path.
      pieces: for each parameter that meets data its pieces, in the order in which they do.
    """

    def __init__(self, walk: Walk, index: Mapping[str, int]) -> None:
        self.index = index
        self.pieces: dict[int, list[Piece]] = {}
        for piece in walk.first_met:
            self.pieces.setdefault(piece[0], []).append(piece)
        for leaf, pieces in self.pieces.items():
            # Weights are standardised as a whole, and the gradient of that comes back to the whole
            # stack after its layers.
            made = sum(walk.bits[piece] for piece in pieces if piece[1])
            if walk.first_met.get((leaf, ()), 0) & made:
                pieces.remove((leaf, ()))
        self._when = {piece: k for k, piece in enumerate(walk.first_met)}
        self._walk = walk
        # Without their numbers, paths are the same in each round of a network.
        names = {leaf: re.sub(r"[-_]?\d+", "", path) for path, leaf in index.items()}
        self._used = [names[leaf] for leaf in self.pieces]
        self._turn = {leaf: turn for turn, leaf in enumerate(self.pieces)}
        self._made, self._met = (
            {leaf: union(of[piece] for piece in pieces) for leaf, pieces in self.pieces.items()}
            for of in (walk.bits, walk.first_met)
        )

    def leaves_in(self, node: Node) -> list[int]:
        """The numbers of a node's parameters."""
        return [self.index[leaf.path] for leaf in node.leaves]

    def met_at(self, leaf: int) -> int:
        """When data first meets a parameter; after all others if it never does."""
        return min((self._when[piece] for piece in self.pieces.get(leaf, [])), default=1 << 60)

    def is_chain(self, pieces: Sequence[Piece]) -> bool:
        """Whether each of some pieces meets what the one before it has made."""
        return all(
            self._walk.first_met[late] & self._walk.bits[early]
            for early, late in itertools.pairwise(pieces)
        )

    def is_periodic(self, nodes: Sequence[Node]) -> bool:
        """Whether what data meets between a node and the next is the same, but for numbers.

        An output projection and an MLP of a block without a name compose, and can be all of one
        shape; but there is a norm before the MLP, and none within it.
        """
        starts = [min(self._turn[leaf] for leaf in self.leaves_in(node)) for node in nodes]
        rounds = {tuple(sorted(self._used[a:b])) for a, b in itertools.pairwise(starts)}
        return len(rounds) == 1

    def is_plain(self, nodes: Sequence[Node]) -> bool:
        """Whether each node's matrix is applied to the same kind of data.

        In a perceptron that is what the one before has made, and in a residual network the sum
        of what all before have. In blocks of two matrices the first takes the sum, and the
        second what the first has made: they have different roles, whatever their shapes.
        """
        summed = self._walk.summed
        matrices = [[leaf for leaf in self.leaves_in(node) if leaf in summed] for node in nodes]
        made = [union(self._made[leaf] for leaf in own) for own in matrices]
        taken = [union(summed[leaf] for leaf in own) for own in matrices]
        *before, every = itertools.accumulate(made, int.__or__)
        # In a residual network each takes the sum of all before.
        if all(took & every == done for took, done in zip(taken[1:], before, strict=True)):
            return True
        # In a perceptron each takes what the one before has made. So do value, output, up and down
        # of a block, but up also takes the block's input, by the residual connection.
        others = {(took & ~every).bit_count() for took in taken[1:]}
        is_chain = all(took & every == one for took, one in zip(taken[1:], made, strict=False))
        return is_chain and len(others) == 1

    def orders_along_axes(self, leaf: int, shape: Shape) -> dict[int, list[int]]:
        """For each axis that a leaf is indexed on, place by place, the order if that composes."""
        pieces = self.pieces[leaf]
        orders = {}
        for axis, size in enumerate(shape):
            at: dict[int, list[Piece]] = {}
            for piece in pieces:
                for along, start, stop in piece[1]:
                    if along == axis and stop == start + 1:
                        at.setdefault(start, []).append(piece)
            # What is also used as a whole is more than its slices.
            is_all = size > 1 and sorted(at) == list(range(size))
            if is_all and sum(map(len, at.values())) == len(pieces) and self._are_chained(at):
                orders[axis] = list(at)
        return orders

    def _are_chained(self, groups: Mapping[int, Sequence[Piece]]) -> bool:
        """Whether each piece of a group meets what the group before has made, and none back."""
        bits, met = self._walk.bits, self._walk.first_met
        made = {at: union(bits[piece] for piece in group) for at, group in groups.items()}
        return all(
            all(met[piece] & made[early] for piece in groups[late])
            and not any(met[piece] & made[late] for piece in groups[early])
            for early, late in itertools.pairwise(groups)
        )

    def in_order(self, nodes: Sequence[Node]) -> list[Node] | None:
        """Some nodes in the order in which data goes through one after another.

        Told by the tensors that they have in common: of these one has to meet what the node
        before has made of its own, and none the other way round. Parameters that are
        brought together before data meets them, like those of experts, have no order. None if data
        does not go through them like that.
        """
        tensors = {
            node.path: {
                node.inside(known): leaf
                for known, leaf in zip(node.leaves, self.leaves_in(node), strict=True)
                if leaf in self.pieces
            }
            for node in nodes
        }
        # A bit for each leaf: of those that are taken in pieces some have more than others.
        made: dict[str, int] = {}
        for leaves in tensors.values():
            for tensor, leaf in leaves.items():
                made[tensor] = made.get(tensor, 0) | 1 << (self._made[leaf].bit_length() - 1)

        def behind(node: Node) -> tuple[int, int]:
            leaves = tensors[node.path]
            counts = [(self._met[leaf] & made[t]).bit_count() for t, leaf in leaves.items()]
            return max(counts, default=0), min(map(self.met_at, leaves.values()), default=0)

        ordered = sorted(nodes, key=behind)
        pairs = itertools.pairwise([tensors[node.path] for node in ordered])
        return ordered if all(self._follows(early, late) for early, late in pairs) else None

    def _follows(self, early: Mapping[str, int], late: Mapping[str, int]) -> bool:
        pairs = [(early[tensor], late[tensor]) for tensor in early.keys() & late.keys()]
        # Blocks that are passed down and up again meet what they have made themselves.
        forth = any(self._made[a] & self._met[b] for a, b in pairs)
        back = any(self._made[b] & self._met[a] for a, b in pairs)
        return forth and not back


@dataclasses.dataclass
class Findings:
    """What a walk has seen of the leaves of a tree, and what has been concluded from it.

    Attributes:
      walk: the walk.
      paths: of the leaves.
      shapes: of the leaves.
      composition: which of them data meets after which others.
      places: for each leaf that is depth its place.
      reasons: for others that could have been taken for it, why they are not.
    """

    walk: Walk
    paths: Sequence[str]
    shapes: Sequence[Shape]

    def __post_init__(self) -> None:
        index = {path: leaf for leaf, path in enumerate(self.paths)}
        self.composition = Composition(self.walk, index)
        self.places: dict[int, Place] = {}
        self.reasons: dict[int, str] = {}
        self._names = collections.Counter[str]()

    def leave_alone(self, leaves: Iterable[int], why: str) -> None:
        """Notes why leaves are not taken for layers."""
        self.reasons |= dict.fromkeys(leaves, why)

    def node(self, leaves: Iterable[int]) -> Node:
        """The tree of some leaves, with what the walk has seen of each."""
        met, contracted = self.composition.pieces, self.walk.summed
        return Node(
            "",
            tuple(
                Known(
                    self.paths[leaf],
                    self.shapes[leaf],
                    # Taps of a short convolution have the shape of a matrix.
                    multiplies=leaf in met and leaf not in contracted,
                    # Data meets the experts and the heads of a layer one by one.
                    in_pieces=len(met.get(leaf, ())) > 1,
                )
                for leaf in leaves
            ),
        )

    def name_group(self, leaves: Iterable[int], name: str = "") -> str:
        """A name of its own for a group: what the paths have in common, or a given one."""
        name = name or common_path([self.paths[leaf] for leaf in leaves]) or "layers"
        self._names[name] += 1
        return f"{name} ({self._names[name]})" if self._names[name] > 1 else name
