"""Cuts: positions in depth across which nothing is mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from depthsmooth.depth.layout import Depth, Layout, Rules

Cuts = Sequence[int] | Mapping[str, Sequence[int]]
"""The layers before which a run of layers ends: in every group, or in those of these names."""


def check_cuts(cuts: Cuts) -> None:
    """Raises unless these are cuts of some depth."""
    each = cuts.values() if isinstance(cuts, Mapping) else [cuts]
    for positions in each:
        if not isinstance(positions, list | tuple | range):
            raise ValueError(
                f"cuts are {cuts!r}, but have to be layers, like (4, 12), or a mapping from the "
                "name of a group to its cuts."
            )
        for position in positions:
            if not isinstance(position, int | np.integer) or position < 1:
                raise ValueError(
                    f"A cut is at {position!r}, but has to be an integer of at least 1: the first "
                    "layer, counted from 0, of those behind it."
                )


def cuts_of_groups(
    cuts: Cuts, depth: Depth, within: Layout, masked: Sequence[str]
) -> dict[str, Sequence[int]]:
    """The cuts of each group of ``depth``, which has the leaves that are there.

    ``within`` is the layout as it was given: of all the leaves, also those that are masked.

    Raises:
      ValueError: if there is no such group, or it does not have that many layers, or rules
        cannot tell how many there are.
    """
    if cuts and isinstance(within, Rules) and masked:
        raise ValueError(
            f"cuts are {cuts!r}, but {masked[0]} is masked, and rules cannot tell how many layers "
            "it has: give the depth of the whole tree, by depth=rules.resolve(params)."
        )
    sizes = depth.groups | (within.groups if isinstance(within, Depth) else {})
    names = depth.group_names | within.group_names
    of_group = dict(cuts) if isinstance(cuts, Mapping) else dict.fromkeys(depth.groups, cuts)
    for name, positions in of_group.items():
        if name not in names:
            raise ValueError(
                f"cuts has a group {name!r}, but the groups are {', '.join(map(repr, names))}. "
                "Name one of these, or leave it out."
            )
        kinds = [group for group in depth.groups if group.startswith(f"{name} (kind ")]
        if kinds and name not in sizes:
            raise ValueError(
                f"cuts has a group {name!r}, but {name!r} has {len(kinds)} kinds of layers, each "
                f"in an order of its own. Give the cuts of {' or '.join(map(repr, kinds))}."
            )
        if name in sizes and max(positions, default=0) >= sizes[name]:
            raise ValueError(
                f"There is a cut at {max(positions)}, but the group {name!r} has the layers 0 to "
                f"{sizes[name] - 1}. Cuts of one group alone are given by its name: "
                f"cuts={{{name!r}: (...)}}."
            )
    return of_group
