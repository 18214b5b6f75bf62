"""The order in which data goes through parameters: which meet what others have made."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence

from depthsmooth.siblings import Node
from depthsmooth.walk import Piece, Walk


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
        self.when = {piece: k for k, piece in enumerate(walk.first_met)}
        self._walk, self._index = walk, index
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
        made: dict[str, int] = {}
        for leaves in tensors.values():
            for tensor, leaf in leaves.items():
                made[tensor] = made.get(tensor, 0) | self._made[leaf]

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
