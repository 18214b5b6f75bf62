"""From what a user names to a tree of shapes: a checkpoint, a file or a function; no weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import numbers
import operator
import pathlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth.cli.flax_file import is_box, read_flax
from depthsmooth.depth.layout import Layout
from depthsmooth.depth.paths import leaves_of, numbered_key, path_string, some

KINDS = (
    "a directory that Orbax wrote, a .npz, .msgpack or .safetensors file, a directory of "
    ".safetensors files or their index, or module:function"
)
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
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
}
"""The dtypes that are not called after their kind, like F32."""
INDEX = re.compile(r"[^.].*\.safetensors\.index(?:\..*)?\.json")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*\.safetensors)")
"""The names of an index of .safetensors files, and of one of several files of a checkpoint."""


def read_target(target: str) -> optax.Params | Layout:
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
    if not isinstance(tree, Layout) and not leaves_of(tree)[0]:
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


def _called(target: str) -> optax.Params | Layout:
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
    for path, leaf in [] if isinstance(tree, Layout) else leaves_of(tree)[0]:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise ValueError(
                f"{target} returns no tree of arrays, but {f'{path}, ' if path else ''}a "
                f"{type(leaf).__name__}. Return parameters, their shapes by jax.eval_shape, or "
                "the Depth of trace_depth."
            )
    return tree


def _read(path: pathlib.Path) -> optax.Params:
    reader = _reader(path)
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


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], optax.Params]:
    """The function that reads a directory, or files of this kind."""
    readers = {".msgpack": read_flax, ".npz": _npz, ".safetensors": _safetensors}
    if path.is_dir():
        return _directory
    if INDEX.fullmatch(path.name):
        return _indexed
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is a file of an unknown kind. Give {KINDS}.")
    return readers[path.suffix.lower()]


def _directory(directory: pathlib.Path) -> optax.Params:
    """The tree of a checkpoint of Orbax, or of the only checkpoint that a directory holds."""
    if (directory / "_METADATA").is_file():
        return _orbax(directory)
    found = _orbax_in(directory) | _safetensors_in(directory)
    if not found:
        files = sorted([*directory.glob("[!.]*.msgpack"), *directory.glob("[!.]*.npz")])
        raise ValueError(
            "it holds no checkpoint of Orbax, which has a file _METADATA, and no .safetensors "
            f"file.{f' Give a file in it, like {files[0]}' if files else ''}"
        )
    if _are_shards(found):
        return _nested(_together(_parts(found.values())).items())
    newest, *others = sorted(found, key=lambda name: (-_step(name), name))
    if others:
        raise ValueError(
            f"it holds {len(found)} checkpoints: {some([newest, *others])}. "
            f"Give one of them, like {found[newest]}"
        )
    return _reader(found[newest])(found[newest])


def _orbax(directory: pathlib.Path) -> optax.Params:
    """The tree of a checkpoint of Orbax."""
    import orbax.checkpoint as ocp

    # Orbax asks JAX for its devices, and a training may hold the accelerator.
    jax.config.update("jax_platforms", "cpu")
    tree = ocp.PyTreeCheckpointHandler().metadata(directory.absolute()).tree
    return jax.tree.map(_shape_of_metadata, tree, is_leaf=is_box)


def _orbax_in(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The checkpoints of Orbax below a directory, as of a manager; none that is unfinished."""
    files = [file for level in ("*", "*/*") for file in directory.glob(f"{level}/_METADATA")]
    if not files:
        return {}
    import orbax.checkpoint as ocp

    return {
        file.parent.relative_to(directory).as_posix(): file.parent
        for file in files
        if ocp.path.atomicity.TMP_DIR_SUFFIX not in str(file)
    }


def _step(name: str) -> int:
    return numbered_key(name.partition("/")[0])[1] or 0


def _shape_of_metadata(leaf: Any) -> jax.ShapeDtypeStruct | None:
    array = leaf["value"] if isinstance(leaf, dict) else leaf
    if getattr(array, "shape", None) is None:  # a string
        return None
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _npz(path: pathlib.Path) -> optax.Params:
    with zipfile.ZipFile(path) as archive:
        return _nested([_npy(archive, member) for member in archive.infolist()])


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
    return _nested(_tensors(path).items())


def _tensors(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a .safetensors file by name."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: jax.ShapeDtypeStruct(tuple(tensor.get_shape()), _dtype(tensor.get_dtype()))
            for name, tensor in tensors.items()
        }


def _dtype(code: str) -> str:
    """The name of a dtype of safetensors, like F32 or F8_E5M2."""
    plain = f"{SAFETENSORS_KINDS.get(code[0], code[0])}{code[1:].lower()}"
    return SAFETENSORS_DTYPES.get(code, plain)


def _safetensors_in(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The indexes of .safetensors files in a directory, and the files that are in none."""
    indexes = [path for path in directory.iterdir() if INDEX.fullmatch(path.name)]
    in_one = {file for index in indexes for file in _files_of(index).values()}
    files = set(directory.glob("[!.]*.safetensors")) - in_one
    return {path.name: path for path in sorted([*indexes, *files])}


def _are_shards(names: Iterable[str]) -> bool:
    """Whether files are called after one checkpoint and their numbers: x-00001-of-00002.

    Raises:
      ValueError: if they are, and some are missing.

    Example:
      >>> _are_shards(["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"])
      True
      >>> _are_shards(["x-00001-of-00002.safetensors", "y-00002-of-00002.safetensors"])
      False
    """
    matches = [SHARD.fullmatch(name) for name in names]
    shards = [match for match in matches if match]
    if len({(match[1], match[3], match[4]) for match in shards}) != 1 or None in matches:
        return False
    stem, _, count, rest = shards[0].groups()
    there = {int(match[2]) for match in shards}
    first = min(*there, 1)
    missing = sorted(set(range(first, first + int(count))) - there)
    _refuse_missing([f"{stem}-{number:05}-of-{count}{rest}" for number in missing])
    return True


def _refuse_missing(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{some(names, 4)} {'are' if len(names) > 1 else 'is'} missing. Put what is missing "
            "beside the other files, or give one of these, to see its part alone."
        )


def _indexed(index: pathlib.Path) -> optax.Params:
    """The tree of the .safetensors files that an index names, as on the Hugging Face Hub."""
    files = _files_of(index)
    _refuse_missing(sorted({file.name for file in files.values() if not file.is_file()}))
    parts = _parts(sorted(set(files.values())))
    for name, file in files.items():
        if name not in parts[file]:
            raise ValueError(
                f"{file.name} lacks {name}, which {index.name} says it holds. Download both again."
            )
    return _nested(_together(parts).items())


def _files_of(index: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each array by name, as an index says."""
    remedy = "Download it again, or give one .safetensors file, to see its part alone."
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index.name} is no JSON: {error}. {remedy}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            f'{index.name} has no "weight_map" that names the file of each array. {remedy}'
        )
    for file in sorted(set(files.values())):
        if pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
            raise ValueError(
                f"{index.name} names {file}, which is outside of its directory. Put the file "
                "beside the index, and write its name alone into it."
            )
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {file}, which is no .safetensors file. {remedy}")
    return {name: index.parent / file for name, file in files.items()}


def _parts(files: Iterable[pathlib.Path]) -> dict[pathlib.Path, dict[str, jax.ShapeDtypeStruct]]:
    """The arrays of each of several .safetensors files."""
    parts = {}
    for file in files:
        try:
            parts[file] = _tensors(file)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            said = str(error).rstrip(".")
            raise ValueError(f"{file.name}: {said}. Download it again.") from error
    return parts


def _together(
    parts: Mapping[pathlib.Path, Mapping[str, jax.ShapeDtypeStruct]],
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of all the files, by name. No name may be in two of them."""
    file_of: dict[str, pathlib.Path] = {}
    for file, arrays in parts.items():
        for name in arrays:
            if name in file_of:
                raise ValueError(
                    f"{name} is in {file_of[name].name} and in {file.name}. Give one of them, "
                    f"like {file}"
                )
            file_of[name] = file
    return {name: parts[file][name] for name, file in file_of.items()}


def _nested(arrays: Iterable[tuple[str, jax.ShapeDtypeStruct]]) -> optax.Params:
    """Dicts of dicts, from names with slashes, or with dots where none has a slash.

    A name can be that of an array and the beginning of others, as in quantised weights.
    The others are then beside the array, each with one key for the rest of its name.

    Example:
      >>> _nested([("mlp.w", 1), ("mlp.w.absmax", 2), ("mlp.b", 3)])
      {'mlp': {'w': 1, 'w.absmax': 2, 'b': 3}}
    """
    arrays = list(arrays)
    names = {name for name, _ in arrays}
    separator = "/" if any("/" in name for name in names) else "."
    tree: dict[str, Any] = {}
    for name, array in arrays:
        *above, last = _keys(name, separator, names)
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{name} is there twice, or has the path of another of its arrays.")
        node[last] = array
    return tree


def _keys(name: str, separator: str, names: Set[str]) -> list[str]:
    """The keys of an array; where the first of them name an array, too, one key for the rest."""
    keys = name.split(separator)
    for end in range(1, len(keys)):
        if separator.join(keys[:end]) in names:
            return [*keys[: end - 1], ".".join(keys[end - 1 :])]
    return keys
