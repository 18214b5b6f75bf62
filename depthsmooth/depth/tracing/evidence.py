"""The order in which data goes through parameters: which meet what others have made."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Mapping, Sequence

from depthsmooth.depth.leaves import Shape
from depthsmooth.depth.names.nodes import Node
from depthsmooth.depth.tracing.walk import Piece, Walk


class Composition:
    """Which parameters data meets after which others.

    Attributes:
      pieces: for each parameter that meets data its pieces, in the order in which they do.
      when: for each piece its place in the order of all.
    """

    def __init__(self, walk: Walk, index: Mapping[str, int]) -> None:
        self.pieces: dict[int, list[Piece]] = {}
        for piece in walk.first_met:
            self.pieces.setdefault(piece[0], []).append(piece)
        for leaf, pieces in self.pieces.items():
            # The gradient of a norm of the whole stack comes back to it after its layers.
            made = sum(walk.bits[piece] for piece in pieces if piece[1])
            if walk.first_met.get((leaf, ()), 0) & made:
                pieces.remove((leaf, ()))
        self.when = {piece: k for k, piece in enumerate(walk.first_met)}
        self._walk, self._index = walk, index
        # Each parameter by the name that it shares with its siblings, in the order of use.
        names = {leaf: re.sub(r"[-_]?\d+", "", path) for path, leaf in index.items()}
        self._used = [names[leaf] for leaf in self.pieces]
        self._turn = {leaf: turn for turn, leaf in enumerate(self.pieces)}
        self._made = {
            leaf: functools.reduce(operator.or_, (walk.bits[piece] for piece in pieces))
            for leaf, pieces in self.pieces.items()
        }
        self._met = {
            leaf: functools.reduce(operator.or_, (walk.first_met[piece] for piece in pieces))
            for leaf, pieces in self.pieces.items()
        }

    def first(self, leaf: int) -> int:
        """When data first meets a parameter; after all others if it never does."""
        return min((self.when[piece] for piece in self.pieces.get(leaf, [])), default=1 << 60)

    def is_chain(self, pieces: Sequence[Piece]) -> bool:
        """Whether each of some pieces meets what the one before it has made."""
        return all(
            self._walk.first_met[late] & self._walk.bits[early]
            for early, late in itertools.pairwise(pieces)
        )

    def is_regular(self, nodes: Sequence[Node]) -> bool:
        """Whether what data meets between a node and the next is the same, but for numbers.

        An output projection and an MLP of a block without a name compose, and can be all of one
        shape; but there is a norm before the MLP, and none within it.
        """
        starts = [min(self._turn[self._index[leaf.path]] for leaf in node.leaves) for node in nodes]
        rounds = {tuple(sorted(self._used[a:b])) for a, b in itertools.pairwise(starts)}
        return len(rounds) == 1

    def is_plain(self, nodes: Sequence[Node]) -> bool:
        """Whether each node's matrix is applied to the same kind of data.

        In a perceptron that is what the one before has made, and in a residual network the sum
        of what all before have. In blocks of two matrices the first takes the sum, and the
        second what the first has made: they have different roles, whatever their shapes.
        """
        summed = self._walk.summed
        leaves = [[self._index[leaf.path] for leaf in node.leaves] for node in nodes]
        matrices = [[leaf for leaf in own if leaf in summed] for own in leaves]
        made = [functools.reduce(operator.or_, map(self._made.get, own), 0) for own in matrices]
        taken = [functools.reduce(operator.or_, map(summed.get, own), 0) for own in matrices]
        before = list(itertools.accumulate(made, operator.or_))
        every = before[-1]
        if all(took & every == done for took, done in zip(taken[1:], before, strict=False)):
            return True
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
            is_all = size > 1 and sorted(at) == list(range(size))
            if is_all and sum(map(len, at.values())) == len(pieces) and self._are_chained(at):
                orders[axis] = list(at)
        return orders

    def _are_chained(self, groups: Mapping[int, Sequence[Piece]]) -> bool:
        """Whether each piece of a group meets what the group before has made, and none back."""
        bits, met = self._walk.bits, self._walk.first_met
        made = {at: sum(bits[piece] for piece in group) for at, group in groups.items()}
        return all(
            all(met[piece] & made[early] for piece in groups[late])
            and not any(met[piece] & made[late] for piece in groups[early])
            for early, late in itertools.pairwise(groups)
        )

    def in_order(self, nodes: Sequence[Node]) -> list[Node] | None:
        """Some nodes in the order in which data goes through one after another.

        Told by the tensors that they have in common: of these one has to meet what the node
        before has made of its own, and none the other way round. Parameters that are
        brought together before data meets them, like those of experts, have no order.

        Returns:
          The nodes; None if data does not go through them like that.
        """
        tensors = {
            node.path: {
                node.inside(leaf): self._index[leaf.path]
                for leaf in node.leaves
                if self._index[leaf.path] in self.pieces
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
            return max(counts, default=0), min(map(self.first, leaves.values()), default=0)

        ordered = sorted(nodes, key=behind)
        pairs = itertools.pairwise([tensors[node.path] for node in ordered])
        return ordered if all(self._follows(early, late) for early, late in pairs) else None

    def _follows(self, early: Mapping[str, int], late: Mapping[str, int]) -> bool:
        shared = early.keys() & late.keys()
        pairs = (
            [(early[tensor], late[tensor]) for tensor in shared]
            if shared
            else list(itertools.product(early.values(), late.values()))
        )
        forth = any(self._made[a] & self._met[b] for a, b in pairs)
        back = any(self._made[b] & self._met[a] for a, b in pairs)
        return forth and not back
