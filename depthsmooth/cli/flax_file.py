"""A file of MessagePack that Flax wrote, as a tree of shapes: one array at a time is in memory."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""The types by which Flax extends MessagePack."""
CHUNKED = "__msgpack_chunked_array__"
"""The key by which Flax marks an array in several parts, as it writes those of more than 1 GiB."""


def read_flax(path: pathlib.Path) -> optax.Params:
    """The shapes of what ``flax.serialization.to_bytes`` wrote.

    The file is read from its beginning to its end, and each array becomes its shape before the
    next one is read. (Where msgpack runs without its compiled part, it keeps what it has read.)

    Raises:
      ModuleNotFoundError: if msgpack is not installed.
      ValueError: if the file is cut off or damaged, or holds what Flax does not write.
    """
    import msgpack  # type: ignore[import-untyped] # it ships no types

    size = path.stat().st_size
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(
            file,
            ext_hook=_extension,
            object_pairs_hook=_map,
            strict_map_key=False,
            max_buffer_size=size,  # nothing in a file is longer than the file
        )
        try:
            tree = unpacker.unpack()
        except msgpack.UnpackException as error:
            raise ValueError(f"it is cut off or damaged ({type(error).__name__}).") from error
    if unpacker.tell() < size:
        raise ValueError("more follows where its tree ends: the file is damaged.")
    shapes = jax.tree.map(_shape, tree)
    return jax.tree.map(
        lambda node: node["value"] if is_box(node) else node, shapes, is_leaf=is_box
    )


def is_box(node: object) -> bool:
    """Whether it is what a file has of a box of Flax, which is not in the paths of updates."""
    return isinstance(node, dict) and list(node) == ["value"] and hasattr(node["value"], "shape")


def _shape(leaf: Any) -> jax.ShapeDtypeStruct | None:
    """A number has the shape (), and a text has none."""
    if isinstance(leaf, int | float):
        return jax.ShapeDtypeStruct((), np.asarray(leaf).dtype)
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else None


def _extension(code: int, data: bytes) -> jax.ShapeDtypeStruct:
    """The shape of what Flax adds to MessagePack: arrays, scalars of NumPy, complex numbers."""
    import msgpack

    if code == COMPLEX:
        return jax.ShapeDtypeStruct((), "complex128")
    match msgpack.unpackb(data):
        case [[*shape], str(name), bytes(content)] if code in (ARRAY, SCALAR):
            dtype = np.dtype(name)
        case _:
            raise ValueError("it holds something else than Flax writes.")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array {tuple(shape)} of {dtype} has not the size it is said to have.")
    return jax.ShapeDtypeStruct(shape, dtype)


def _map(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any] | jax.ShapeDtypeStruct:
    """A dict with texts as keys, or the array that Flax wrote as a dict of parts."""
    items: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError(f"a key is a {type(key).__name__}: the file is damaged.")
        if str(key) in items:
            raise ValueError(f"the key {key} is there twice.")
        items[str(key)] = value
    return _joined(items) if CHUNKED in items else items


def _joined(items: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """The shape of an array in several parts."""
    sizes, chunks = items["shape"], items["chunks"].values()
    shape = tuple(sizes[str(axis)] for axis in range(len(sizes)))
    if sum(chunk.size for chunk in chunks) != math.prod(shape):
        raise ValueError(f"an array {shape} lacks some of its parts.")
    return jax.ShapeDtypeStruct(shape, next(iter(chunks)).dtype)
