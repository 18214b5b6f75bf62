"""The rows of a picture of a layout: which tensors share one, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

from matplotlib.ticker import EngFormatter

from depthsmooth.depth.layout import Depth
from depthsmooth.depth.leaves import Leaf, Place, Track
from depthsmooth.depth.paths import common_path


class Row(NamedTuple):
    """A row: a group's name, tensors that are laid out alike, or leaves that are left alone.

    Attributes:
      label: what it is called.
      note: what is said of it.
      kind: what it is.
      group: the number of the group that it belongs to.
      places: where the layers of a tensor are.
    """

    label: str
    note: str
    kind: Literal["group", "tensor", "left alone"]
    group: int = 0
    places: tuple[Place, ...] = ()


def rows_of(depth: Depth, most: int) -> list[Row]:
    """The rows of a layout: at most so many, if containers can stand for their tensors."""
    besides = len(_rows(depth, []))
    return _rows(depth, _together(depth.tracks, most - besides))


def _rows(depth: Depth, tensors: Sequence[Sequence[Track]]) -> list[Row]:
    rows = []
    for number, (group, layers) in enumerate(depth.groups.items()):
        rows.append(Row(group, f"{layers} layers", "group"))
        for tracks in tensors:
            if tracks[0].group == group:
                places = tracks[0].places
                leaves = [leaf for track in tracks for leaf in track.leaves]
                note = f"{_axes_of(places)}, {_parameters(leaves)}"
                rows.append(Row(_name(tracks), note, "tensor", number, places))
    alone = [leaf for leaf in depth.leaves if leaf.place is None]
    most = 3 if len(alone) > 4 else 4
    shown = [(leaf.path, [leaf]) for leaf in alone[:most]]
    rest = [(f"and {len(alone) - most} more", alone[most:])] if alone[most:] else []
    for label, leaves in shown + rest:
        rows.append(Row(label, f"left alone, {_parameters(leaves)}", "left alone"))
    return rows


def _together(tracks: Sequence[Track], most: int) -> list[list[Track]]:
    """Tracks by row: those in the smallest containers that leave at most so many rows."""
    tensors = [track.places[0].tensor.split("/") for track in tracks]
    for length in range(max(map(len, tensors)), -1, -1):
        rows: dict[Hashable, list[Track]] = {}
        for track, keys in zip(tracks, tensors, strict=True):
            layout = tuple((place.axes, place.layers) for place in track.places)
            rows.setdefault((track.group, layout, *keys[:length]), []).append(track)
        if len(rows) <= most:
            break
    return list(rows.values())


def _name(tracks: Sequence[Track]) -> str:
    """The path of a tensor, or of a container with the number of its tensors, in the group."""
    tensors = [track.places[0].tensor for track in tracks]
    many = f"{common_path(tensors)}/* ({len(tensors)})".removeprefix("/")
    name = tensors[0] if len(tensors) == 1 else many
    return name.removeprefix(f"{tracks[0].group}/")


def _axes_of(places: Sequence[Place]) -> str:
    names = dict.fromkeys(
        f"{'axes' if len(place.axes) > 1 else 'axis'} {'×'.join(map(str, place.axes))}"
        if place.axes
        else "own leaf"
        for place in places
    )
    stacks = sum(bool(place.axes) for place in places)
    return ", ".join([*names, *([f"{stacks} stacks"] if stacks > 1 else [])])


def _parameters(leaves: Sequence[Leaf]) -> str:
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    return EngFormatter(places=1)(count) if count >= 1000 else str(count)
