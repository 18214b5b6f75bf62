"""A Depth as a table of plain text: its rows, columns in line, and what is said below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from depthsmooth.depth.leaves import Leaf
from depthsmooth.depth.paths import some
from depthsmooth.depth.rules import Rule


def rules_as_table(rules: Iterable[tuple[str, Rule]]) -> str:
    """The rules that have not met a tree, a row for each."""
    rows = [(pattern, str(rule)) for pattern, rule in rules]
    return (
        f"{_plain([('rule', 'axis'), *rows])}\n"
        "not matched with a tree yet: print(depth.resolve(params)) shows what they match"
    )


def leaves_as_table(of_all: Sequence[Leaf], layers: Mapping[str, int]) -> str:
    """The leaves of a tree, a row for each group, whose number of layers is given."""
    groups: dict[tuple[str, str], list[Leaf]] = {}
    for leaf in of_all:
        if leaf.place is not None:
            groups.setdefault((leaf.place.group, leaf.place.found_by), []).append(leaf)
    alone = [leaf for leaf in of_all if leaf.place is None]
    rows = [("group", "layers", "axis", "leaves", "parameters", "found by")]
    for (group, found_by), leaves in groups.items():
        axes = sorted({leaf.place.axes for leaf in leaves if leaf.place is not None})
        column = ", ".join(dict.fromkeys(map(_axes_column, axes)))
        shards = max(leaf.place.shards for leaf in leaves if leaf.place is not None)
        column += f", in {shards} shards" if shards > 1 else ""
        rows.append((group, str(layers[group]), column, *_size(leaves), found_by))
    if not alone:
        return _plain(rows)
    rows.append(("left alone", "", "", *_size(alone), ""))
    return f"{_plain(rows)}\nleft alone: {some([str(leaf) for leaf in alone])}"


def _axes_column(axes: Sequence[int]) -> str:
    return "×".join(map(str, axes)) if axes else "–"


def _size(leaves: Sequence[Leaf]) -> tuple[str, str]:
    return str(len(leaves)), f"{sum(math.prod(leaf.shape) for leaf in leaves):,}"


def _plain(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns in line, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [any(cell.replace(",", "").isdigit() for cell in column) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )
