"""From what a user names to a tree of shapes: a checkpoint, a file or a function; no weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import numbers
import operator
import pathlib
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.layout import Depth
from depthsmooth.places import leaves_of, numbered_key, path_string, some

KINDS = "a directory that Orbax wrote, a .npz file, a .safetensors file, or module:function"
NPY_HEADER = 1 << 14
"""The bytes of a .npy that hold its header: NumPy takes one of up to 10,000."""
NPY_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
SAFETENSORS_KINDS = {"F": "float", "I": "int", "U": "uint", "C": "complex"}
SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F4": "float4_e2m1fn",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
}
"""The dtypes that are not called after their kind, like F32."""


def read_target(target: str) -> optax.Params | Depth:
    """The tree of shapes that a target holds, or what a function returns.

    Raises:
      ValueError: if the target is none that is known, or cannot be read.
    """
    path = pathlib.Path(target)
    if path.exists():
        tree = _read(path)
    elif ":" in target:
        tree = _called(target)
    else:
        raise ValueError(f"There is no {target}. Give {KINDS}.")
    if not isinstance(tree, Depth) and not leaves_of(tree)[0]:
        raise ValueError(f"{target} holds no arrays.")
    return tree


def children(tree: optax.Params) -> dict[str, optax.Params]:
    """What a tree holds, by key; nothing if it is an array."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return {path_string(keys): node for keys, node in nodes if keys}


def subtree(tree: optax.Params, path: str) -> optax.Params:
    """The part of a tree below a path.

    Raises:
      ValueError: if nothing is there.

    Example:
      >>> subtree({"params": {"layers": [1, 2]}, "step": 3}, "params/layers")
      [1, 2]
    """
    rest = path.strip("/")
    while rest:
        below = children(tree)
        key = next((key for key in below if f"{rest}/".startswith(f"{key}/")), None)
        if key is None:
            above = path.strip("/").removesuffix(rest).strip("/") or "the tree"
            raise ValueError(f"There is no {rest!r} in {above}, which holds {some(below)}.")
        tree, rest = below[key], rest[len(key) + 1 :]
    if not children(tree):
        raise ValueError(f"Nothing is below {path!r}: it is an array itself, or empty.")
    return tree


def _called(target: str) -> optax.Params | Depth:
    """What a function returns; what it prints goes to standard error."""
    module, _, name = target.partition(":")
    if module.endswith(".py"):
        written = module.removesuffix(".py").replace("/", ".")
        raise ValueError(f"{module} is a file. Give the module, as for import: {written}:{name}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tree = operator.attrgetter(name)(importlib.import_module(module))()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{target} fails with {type(error).__name__}: {error} (--debug shows where)"
        ) from error
    for path, leaf in [] if isinstance(tree, Depth) else leaves_of(tree)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise ValueError(
                f"{target} returns no tree of arrays, but {f'{path}, ' if path else ''}a "
                f"{type(leaf).__name__}. Return parameters, their shapes by jax.eval_shape, or "
                "the Depth of trace_depth."
            )
    return tree


def _read(path: pathlib.Path) -> optax.Params:
    readers = {".npz": _npz, ".safetensors": _safetensors}
    reader = _orbax if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is a file of an unknown kind. Give {KINDS}.")
    try:
        return reader(path)
    except ModuleNotFoundError as missing:
        raise ValueError(
            f"To read {path} takes {missing.name}, of the extra: "
            "python -m pip install -e '.[inspect]'"
        ) from missing
    except Exception as error:
        said = str(error).partition(" [tensorstore_spec=")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read: {said}") from error


def _orbax(directory: pathlib.Path) -> optax.Params:
    """The tree of a checkpoint of Orbax, or of the only one that a directory holds."""
    import orbax.checkpoint as ocp

    # Orbax asks JAX for its devices, and a training may hold the accelerator.
    jax.config.update("jax_platforms", "cpu")
    checkpoint = _checkpoint_in(directory, ocp.path.atomicity.TMP_DIR_SUFFIX)
    tree = ocp.PyTreeCheckpointHandler().metadata(checkpoint.absolute()).tree
    return jax.tree.map(_shape_of_metadata, tree, is_leaf=_is_box)


def _checkpoint_in(directory: pathlib.Path, unfinished: str) -> pathlib.Path:
    if (directory / "_METADATA").is_file():
        return directory
    found = {
        file.parent.relative_to(directory).as_posix(): file.parent
        for level in ("*", "*/*")
        for file in directory.glob(f"{level}/_METADATA")
        if unfinished not in str(file)
    }
    if not found:
        raise ValueError("it holds no checkpoint of Orbax, which has a file _METADATA.")
    newest, *others = sorted(found, key=lambda name: (-_step(name), name))
    if others:
        raise ValueError(
            f"it holds {len(found)} checkpoints: {some([newest, *others])}. "
            f"Give one of them, like {found[newest]}"
        )
    return found[newest]


def _step(name: str) -> int:
    return numbered_key(name.partition("/")[0])[1] or 0


def _is_box(node: object) -> bool:
    """Whether it is what Orbax makes of a box of Flax, which is not in the paths of updates."""
    return isinstance(node, dict) and list(node) == ["value"] and hasattr(node["value"], "shape")


def _shape_of_metadata(leaf: Any) -> jax.ShapeDtypeStruct | None:
    array = leaf["value"] if isinstance(leaf, dict) else leaf
    if getattr(array, "shape", None) is None:  # a string
        return None
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _npz(path: pathlib.Path) -> optax.Params:
    with zipfile.ZipFile(path) as archive:
        return _nested(dict(_npy(archive, member) for member in archive.infolist()))


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, jax.ShapeDtypeStruct]:
    """The name and the shape of one array, from its header."""
    name = member.filename.removesuffix(".npy")
    if name == member.filename:
        raise ValueError(f"it holds {name!r}, which is no .npy.")
    with archive.open(member) as stream:
        header = io.BytesIO(stream.read(NPY_HEADER))
    version = np.lib.format.read_magic(header)
    if version not in NPY_VERSIONS:
        raise ValueError(f"{name} is a .npy of the unknown version {version}.")
    shape, _, dtype = NPY_VERSIONS[version](header)
    if dtype.hasobject:
        raise ValueError(f"{name} {shape} holds pickled Python objects, no numbers.")
    if header.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{name} {shape} of {dtype} has not the size that its header says.")
    # NumPy writes bfloat16 as two bytes without a type.
    return name, jax.ShapeDtypeStruct(shape, jnp.bfloat16 if dtype == np.dtype("V2") else dtype)


def _safetensors(path: pathlib.Path) -> optax.Params:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return _nested(
            {
                name: jax.ShapeDtypeStruct(tuple(tensor.get_shape()), _dtype(tensor.get_dtype()))
                for name, tensor in tensors.items()
            }
        )


def _dtype(code: str) -> str:
    """The name of a dtype of safetensors, like F32 or F8_E5M2."""
    plain = f"{SAFETENSORS_KINDS.get(code[0], code[0])}{code[1:].lower()}"
    return SAFETENSORS_DTYPES.get(code, plain)


def _nested(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> optax.Params:
    """Dicts of dicts, from names with slashes, or with dots where none has a slash."""
    separator = "/" if any("/" in name for name in leaves) else "."
    tree: dict[str, object] = {}
    for name, leaf in leaves.items():
        *above, last = name.split(separator)
        node = tree
        for key in above:
            below = node.setdefault(key, {})
            if not isinstance(below, dict):
                raise ValueError(f"{name} is below another of its arrays.")
            node = below
        if last in node:
            raise ValueError(f"{name} is there twice, or above another of its arrays.")
        node[last] = leaf
    return tree
