"""python -m depthsmooth inspect: every target, every refusal, and how little is in memory."""

import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import tomllib
import tracemalloc
import zipfile

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax.training.train_state import TrainState

import depthsmooth as ds
from depthsmooth.cli.inspect import EXAMPLES, main
from depthsmooth.cli.rules_file import as_toml, in_toml, read_rules, write_rules
from depthsmooth.cli.targets import read_target
from tests.test_finding import TREES, found, tree_of

NOTE = "note: --subtree params shows the tree that most optimizers get, with its paths.\n"
ROOT = pathlib.Path(__file__).parents[1]


def block(*lead, dtype="float32"):
    return {
        "norm": {"scale": jnp.ones((*lead, 8), dtype)},
        "mlp": {"wi": jnp.ones((*lead, 8, 16), dtype), "wo": jnp.ones((*lead, 16, 8), dtype)},
    }


def doubtful(layers):
    """Two axes of its leaves have sizes that are alike."""
    return {"norm": {"scale": jnp.ones((layers, 8))}, "mlp": {"wi": jnp.ones((layers, 8, 16))}}


def boxed(tree):
    return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree)


MODELS = {
    "stacked": {"layers": block(12), "head": jnp.ones((8, 2))},
    "unrolled": {**{f"block_{i}": block() for i in range(11)}, "head": jnp.ones((8, 2))},
    "bfloat16": {"layers": block(5, dtype="bfloat16"), "ids": jnp.arange(3)},
    "list": {"layers": [block() for _ in range(11)], "head": jnp.ones((8, 2))},
    "boxed": boxed({f"block_{i}": block() for i in range(3)}),
}


def named(tree, separator):
    """The arrays of a tree by name, as files of arrays have them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=separator): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def save_orbax(path, tree, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)


def save_standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_step(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(10, args=ocp.args.StandardSave(tree))


SAVE = {
    "standard": save_standard,
    "no OCDBT": lambda path, tree: save_orbax(path, tree, use_ocdbt=False),
    "zarr3": lambda path, tree: save_orbax(path, tree, use_zarr3=True),
    "step of a manager": save_step,
    "x.npz": lambda path, tree: np.savez(path, **named(nn.unbox(tree), "/")),
    "dots.npz": lambda path, tree: np.savez_compressed(path, **named(nn.unbox(tree), ".")),
    "x.safetensors": lambda path, tree: safetensors.numpy.save_file(
        named(nn.unbox(tree), "."), path
    ),
    "slashes.safetensors": lambda path, tree: safetensors.numpy.save_file(
        named(nn.unbox(tree), "/"), path
    ),
    "shards": lambda path, tree: save_shards(path, named(nn.unbox(tree), ".")),
    "x.msgpack": lambda path, tree: path.write_bytes(flax.serialization.to_bytes(tree)),
}


def shard(number, count):
    return f"model-{number:05}-of-{count:05}.safetensors"


def save_shards(folder, arrays, count=3, index="model.safetensors.index.json"):
    """Files of a model as on the Hugging Face Hub, with an index if it has a name."""
    folder.mkdir(exist_ok=True)
    weight_map = {name: shard(1 + i % count, count) for i, name in enumerate(arrays)}
    for file in {shard(i + 1, count) for i in range(count)}:
        part = {name: arrays[name] for name in arrays if weight_map[name] == file}
        safetensors.numpy.save_file(part, folder / file)
    if index:
        content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(content))
    return weight_map


@pytest.fixture
def run(capsys):
    """Runs the command in this process: its status, output and errors."""

    def run(*arguments):
        capsys.readouterr()
        status = main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def wrong(run):
    """The one line on standard error of a command that does not end well."""

    def wrong(*arguments):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        return err

    return wrong


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported, like one of the current directory."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def module(name, source):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))

    return module


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", SAVE)
def test_a_file_gives_the_depth_of_the_tree_itself(kind, model, tmp_path, run):
    tree = MODELS[model]
    SAVE[kind](tmp_path / kind, tree)
    before = fingerprint(tmp_path)
    status, out, err = run(tmp_path / kind, "--json")
    assert (status, err) == (0, "")
    assert fingerprint(tmp_path) == before
    found, expected = ds.Depth.from_json(out), ds.find_depth(tree)
    assert set(found.leaves) == set(expected.leaves)
    assert found.resolve(tree) == expected


def fingerprint(folder):
    """All that is in a folder, with its time of change."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


QUANTISED = {
    "att": {
        "w": np.ones((8, 8), "float32"),
        "w.absmax": np.ones(5, "float32"),
        "w.absmax.code.map": np.ones(7, "float32"),
        "w.quant_state.bitsandbytes__nf4": np.ones(9, "uint8"),
    },
    "norm": {"scale": np.ones(8, "float32"), "scale.0": np.ones(3, "float32")},
}


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_an_array_whose_name_begins_others_has_them_beside_it(kind, separator, tmp_path, run):
    """As in quantised weights, in every order of names."""
    tree = {"model": {"blocks": [QUANTISED] * 3}}
    save = (
        np.savez
        if kind == "npz"
        else lambda path, **arrays: safetensors.numpy.save_file(arrays, path)
    )
    arrays = {name.replace(".", separator): leaf for name, leaf in named(tree, ".").items()}
    path = tmp_path / f"x.{kind}"
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(list(arrays))
        save(path, **{name: arrays[name] for name in order})
        assert run(path) == (0, f"{ds.find_depth(tree)}\n", "")
    status, out, _ = run(path, "--json", "--subtree", "model")
    assert status == 0
    assert set(ds.Depth.from_json(out)) == {
        f"blocks/{i}/{name}"
        for i in range(3)
        for name in named(QUANTISED, "/")
        if "nf4" not in name
    }
    leaf = "blocks/1/att/w.absmax"
    says = f"{leaf} (5,) is layer 1 of 3 of the group 'blocks/*', found by names."
    assert run(path, "--subtree", "model", "--explain", leaf)[1].startswith(says)
    (tmp_path / "rules.toml").write_text("'.*/(\\d+)/att/w\\.absmax' = {numbered = true}")
    rules = ("--rules", tmp_path / "rules.toml")
    assert "found by rule." in run(path, *rules, "--explain", f"model/{leaf}")[1]


def test_the_rules_of_a_remedy_fit_an_array_whose_name_begins_others(tmp_path, run):
    arrays = {name: np.ones((4, 8), "float32") for name in ("norm.scale", "norm.scale.absmax")}
    arrays |= {"mlp.w.0": np.ones((4, 8), "float32"), "mlp.w": np.ones((4, 8, 8), "float32")}
    stacks = {f"{stack}.{name}": leaf for name, leaf in arrays.items() for stack in ("layers", "h")}
    np.savez(tmp_path / "x.npz", **stacks)
    status, _, err = run(tmp_path / "x.npz")
    assert status == 1
    (tmp_path / "rules.toml").write_text(err.split("\n\n")[-1])
    status, out, _ = run(tmp_path / "x.npz", "--json", "--rules", tmp_path / "rules.toml")
    assert status == 0
    assert ds.Depth.from_json(out).get("layers/norm/scale.absmax").axes == (0,)


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_the_files_of_an_index_and_what_it_names_are_one_tree(given, tmp_path, run):
    """Other files are not of the index; a link, as in a cache, may lead elsewhere."""
    arrays = named(MODELS["unrolled"], ".")
    save_shards(tmp_path / "model", arrays)
    (tmp_path / "model" / shard(1, 3)).rename(tmp_path / "blob")
    (tmp_path / "model" / shard(1, 3)).symlink_to(tmp_path / "blob")
    (tmp_path / "model" / "._x.safetensors").write_text("as some systems write")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert run(tmp_path / "model" / given) == (0, f"{ds.find_depth(MODELS['unrolled'])}\n", "")


@pytest.mark.parametrize("files", ["one", "shards", "shards from 0"])
def test_files_without_an_index_that_are_one_model_are_one_tree(files, tmp_path, run):
    arrays = named(MODELS["unrolled"], ".")
    if files == "one":
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    else:
        save_shards(tmp_path, arrays, index=None)
    if files == "shards from 0":
        for number in range(3):
            (tmp_path / shard(number + 1, 3)).rename(tmp_path / shard(number, 3))
    assert run(tmp_path) == (0, f"{ds.find_depth(MODELS['unrolled'])}\n", "")


def test_a_directory_of_several_models_names_them(tmp_path, run, wrong):
    arrays = named(MODELS["unrolled"], ".")
    save_shards(tmp_path, arrays)
    save_standard(tmp_path / "10" / "params", MODELS["stacked"])
    safetensors.numpy.save_file(arrays, tmp_path / "consolidated.safetensors")
    held = "10/params, consolidated.safetensors, model.safetensors.index.json"
    said = wrong(tmp_path)
    assert f"it holds 3 checkpoints: {held}. Give one of them, like " in said
    assert run(said.split()[-1])[0] == 0
    for name in held.split(", "):
        assert run(tmp_path / name)[0] == 0


def test_a_directory_that_orbax_wrote_may_hold_other_files(tmp_path, run):
    save_standard(tmp_path / "x", MODELS["stacked"])
    safetensors.numpy.save_file(named(MODELS["unrolled"], "."), tmp_path / "x" / "x.safetensors")
    assert run(tmp_path / "x") == (0, f"{ds.find_depth(MODELS['stacked'])}\n", "")


def test_a_relative_path_of_a_checkpoint(tmp_path, monkeypatch, run):
    save_standard(tmp_path / "model", MODELS["stacked"])
    monkeypatch.chdir(tmp_path)
    assert run("model")[0] == 0


def test_the_table_is_that_of_print_where_there_is_no_terminal(tmp_path, run):
    SAVE["x.npz"](tmp_path / "x.npz", MODELS["stacked"])
    assert run(tmp_path / "x.npz") == (0, f"{ds.find_depth(MODELS['stacked'])}\n", "")


def test_the_subtree_of_a_train_state(tmp_path, run, wrong):
    params = MODELS["stacked"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    save_standard(tmp_path / "state", state)
    status, out, _ = run(tmp_path / "state", "--subtree", "params", "--json")
    assert status == 0
    assert ds.Depth.from_json(out) == ds.find_depth(params)
    status, out, err = run(tmp_path / "state")
    assert status == 0
    assert "params/layers" in out
    assert err.startswith("note: --subtree params")
    assert "There is no 'parms' in the tree, which holds opt_state, params, step." in wrong(
        tmp_path / "state", "--subtree", "parms"
    )
    assert "There is no 'heat' in params, which holds head, layers." in wrong(
        tmp_path / "state", "--subtree", "params/heat"
    )
    assert "Nothing is below 'params/head'" in wrong(tmp_path / "state", "--subtree", "params/head")


def test_a_train_state_that_flax_packed(tmp_path, run):
    params = nn.unbox(MODELS["bfloat16"])
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3))
    SAVE["x.msgpack"](tmp_path / "x.msgpack", state)
    status, out, _ = run(tmp_path / "x.msgpack", "--subtree", "params", "--json")
    assert status == 0
    assert ds.Depth.from_json(out) == ds.find_depth(params)
    tree = read_target(str(tmp_path / "x.msgpack"))
    shapes = jax.eval_shape(lambda: flax.serialization.to_state_dict(state))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(jnp.shape, shapes)
    assert tree["params"]["layers"]["mlp"]["wi"].dtype == jnp.bfloat16


PACKED = {
    "arrays": [jnp.ones((3, 4), "float8_e4m3fn"), np.ones((0, 3)), np.ones((2, 2, 2), order="F")],
    "scalars": [np.float32(1), np.int64(2), np.ones(()), 1 + 2j, np.complex64(1j)],
    "numbers": [0, -1, -(2**7), 2**7, -(2**15), 2**16, -(2**31), 2**33, 2**63, 2.5, True],
    "no arrays": [None, "", "text" * 10, "text" * 100, "text" * 30000, b"bytes", {}, []],
    "maps": [{f"key {i}": i for i in range(count)} for count in (15, 16, 66000)],
    "long": [np.ones(size, "int8") for size in (1, 2, 10, 200, 300, 60000, 70000)],
    "lists": [list(range(15)), list(range(16)), list(range(66000))],
}


def test_all_that_flax_packs_has_the_shape_and_type_that_flax_restores(tmp_path):
    for name, content in PACKED.items():
        packed = flax.serialization.msgpack_serialize({"x": content})
        (tmp_path / "x.msgpack").write_bytes(packed)
        restored = jax.tree.map(
            lambda leaf: None if isinstance(leaf, str | bytes) else np.asarray(leaf),
            flax.serialization.msgpack_restore(packed),
        )
        if name == "no arrays":
            with pytest.raises(ValueError, match=r"x\.msgpack holds no arrays"):
                read_target(str(tmp_path / "x.msgpack"))
            continue
        tree = read_target(str(tmp_path / "x.msgpack"))
        assert jax.tree.structure(tree) == jax.tree.structure(restored)
        assert tree == jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), restored
        )


def test_an_array_that_flax_packed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    tree = {"layers": {"wi": np.ones((3, 5, 7), "float32"), "b": np.ones(3, "float32")}}
    SAVE["x.msgpack"](tmp_path / "x.msgpack", tree)
    found = read_target(str(tmp_path / "x.msgpack"))["layers"]
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in tree["layers"].items()
    }


def test_a_subtree_below_keys_that_hold_slashes(module, run):
    module(
        "slashes",
        """
        from tests.test_inspect import block
        def shapes(): return {"net/~/stack": {f"block_{i}": block() for i in range(3)}}
        """,
    )
    status, out, _ = run("slashes:shapes", "--subtree", "net/~/stack")
    assert status == 0
    assert "\nblock_*       3" in out


def test_a_directory_of_several_checkpoints_names_them(tmp_path, run, wrong):
    tree = MODELS["stacked"]
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10, 11):
            save = ocp.args.StandardSave(tree)
            manager.save(step, args=ocp.args.Composite(params=save, state=save))
    steps = "11/params, 11/state, 10/params, 10/state, 9/params, 9/state"
    assert f"it holds 6 checkpoints: {steps}. Give one of them, like " in wrong(tmp_path / "run")
    said = wrong(tmp_path / "run" / "10")
    assert "it holds 2 checkpoints: params, state." in said
    assert run(said.split()[-1])[0] == 0


def test_what_is_no_array_in_a_checkpoint_is_left_out(tmp_path, run):
    save_orbax(tmp_path / "x", MODELS["stacked"] | {"name": "mine", "none": None, "step": 3})
    status, out, _ = run(tmp_path / "x")
    assert status == 0
    assert "left alone: head (8, 2), step ()" in out


MODULE = """
    import jax, depthsmooth
    from tests.test_inspect import MODELS
    def arrays(): return MODELS["stacked"]
    def boxes(): return MODELS["boxed"]
    def shapes():
        print("as the function says")
        return jax.eval_shape(arrays)
    def depth():
        def apply(params, x):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]
        return depthsmooth.trace_depth(apply, {"w": jax.numpy.ones((3, 4, 4))}, jax.numpy.ones(4))
    def rules(): return depthsmooth.Depth.from_rules({"layers/.*": 0})
    def raises(): raise RuntimeError("on\\nseveral lines")
    def exits(): raise SystemExit(3)
    def interrupted(): raise KeyboardInterrupt
    def text(): return {"a": {"b": "text"}}
    def nothing(): return {}
    number = 3
    """


@pytest.mark.parametrize(
    ("function", "model"), [("arrays", "stacked"), ("shapes", "stacked"), ("boxes", "boxed")]
)
def test_a_function_gives_the_depth_of_the_tree_itself(function, model, module, run):
    module("model", MODULE)
    status, out, err = run(f"model:{function}", "--json")
    assert status == 0
    assert ds.Depth.from_json(out) == ds.find_depth(MODELS[model])
    assert err == ("as the function says\n" if function == "shapes" else "")


def test_a_depth_is_shown_as_it_is(module, run, wrong):
    module("model", MODULE)
    status, out, _ = run("model:depth")
    assert status == 0
    assert out.splitlines()[1].endswith("trace")
    assert "leave --subtree and --rules out" in wrong("model:depth", "--subtree", "x")
    rules = ds.Depth.from_rules({"layers/.*": 0})
    assert run("model:rules") == (0, f"{rules}\n", "")
    assert ds.Depth.from_json(run("model:rules", "--json")[1]) == rules
    assert "There is no leaf 'layers/0' in rules" in wrong("model:rules", "--explain", "layers/0")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("model:raises", "model:raises fails with RuntimeError: on several lines (--debug"),
        ("model:exits", "model:exits fails with SystemExit: 3"),
        ("model:text", "returns no tree of arrays, but a/b, a str."),
        ("model:nothing", "model:nothing holds no arrays."),
        ("model:number", "TypeError: 'int' object is not callable"),
        ("model:shape", "module 'model' has no attribute 'shape'"),
        ("model:", "fails with"),
        ("models:shapes", "No module named 'models'"),
        ("model.py:shapes", "Give the module, as for import: model:shapes"),
        ("broken:shapes", "fails with SyntaxError"),
        ("model", "There is no model. Give a directory that Orbax wrote, a .npz, .msgpack"),
        ("", "holds no checkpoint of Orbax"),
    ],
)
def test_a_function_that_gives_no_tree_is_one_line(
    target, says, module, wrong, tmp_path, monkeypatch
):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    module("model", MODULE)
    module("broken", "def shapes(:")
    assert says in wrong(target)


def test_debug_shows_the_traceback(module, run, tmp_path):
    module("model", MODULE)
    status, _, err = run("model:raises", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert "in raises\n" in err
    assert run("model:interrupted")[0] == 130


def npz(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)


def npy(shape, dtype="<f4", data=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + data


def tensors(path, header, size):
    """A .safetensors file with any header, and data of zeros that take no room."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


def tensor(dtype, size):
    return {"dtype": dtype, "shape": [3], "data_offsets": [0, size]}


def orbax_with(path, name, content):
    save_orbax(path, MODELS["stacked"], use_ocdbt=False)
    (path / name).write_text(content)


def twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.npy", npy((), data=b"0000"))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/b.npy", npy((1,), data=b"0000"))


def index_with(path, content, **arrays):
    path.mkdir()
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    (path / "model.safetensors.index.json").write_text(text)
    safetensors.numpy.save_file(arrays or {"a": np.ones(3)}, path / shard(1, 2))


def shards_with(path, *files, **arrays):
    path.mkdir()
    for file in files:
        safetensors.numpy.save_file(arrays or {file: np.ones(3)}, path / file)


def short_shard(path):
    index_with(path, {"a": shard(1, 2)})
    (path / shard(1, 2)).write_bytes((path / shard(1, 2)).read_bytes()[:-1])


def packed(content, *, array=b""):
    """A writer of MessagePack, with anything in the place of the array if there is one."""
    held = {"a": msgpack.ExtType(1, array)} if array else content
    return lambda path: path.write_bytes(msgpack.packb(held))


def parts(count):
    chunks = {str(i): np.ones(2) for i in range(count)}
    tree = {"__msgpack_chunked_array__": True, "shape": {"0": 5}, "chunks": chunks}
    return lambda path: path.write_bytes(flax.serialization.msgpack_serialize({"a": tree}))


BROKEN = {
    "directory.npz": (lambda path: path.mkdir(), "holds no checkpoint of Orbax"),
    "others": (lambda path: (path / "x").mkdir(parents=True), "holds no checkpoint of Orbax"),
    "no metadata": (lambda path: orbax_with(path, "_METADATA", "{"), "cannot be read"),
    "no tree": (lambda path: orbax_with(path, "_METADATA", "{}"), "cannot be read"),
    "random.npz": (lambda path: path.write_bytes(bytes(range(256))), "File is not a zip file"),
    "empty.npz": (lambda path: path.write_bytes(b""), "File is not a zip file"),
    "nothing.npz": (lambda path: np.savez(path), "holds no arrays"),
    "pickle.npz": (lambda path: np.savez(path, a=np.array([None])), "a (1,) holds pickled Python"),
    "text.npz": (lambda path: npz(path, a="text"), "it holds 'a', which is no .npy"),
    "magic.npz": (lambda path: npz(path, a_npy="text"), "cannot be read: "),
    "version.npz": (lambda path: npz(path, a_npy=b"\x93NUMPY\x07\x00"), "version (7, 0)"),
    "lies.npz": (lambda path: npz(path, a_npy=npy((3,))), "a (3,) of float32 has not the size"),
    "twice.npz": (twice, "a/b is there twice"),
    **{
        f"path twice {i}.npz": (
            lambda path, order=order: npz(
                path, **{f"{name}_npy": npy((), data=b"0000") for name in order}
            ),
            "is there twice, or has the path of another",
        )
        for i, order in enumerate(itertools.permutations(("a", "a/b", "a.b/c/d")))
    },
    "random.safetensors": (lambda path: path.write_bytes(bytes(range(256))), "header"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "header"),
    "no.safetensors": (lambda path: tensors(path, {}, 0), "holds no arrays"),
    "lies.safetensors": (
        lambda path: tensors(path, {"a": tensor("F32", 8)}, 8),
        "invalid shape",
    ),
    "short.safetensors": (
        lambda path: tensors(path, {"a": tensor("F32", 12)}, 8),
        "file not fully covered",
    ),
    "others of Flax": (
        lambda path: shards_with(path, "flax_model.msgpack"),
        "and no .safetensors file. Give a file in it, like ",
    ),
    "an index that is cut": (lambda path: index_with(path, '{"weight_map": {'), "is no JSON: "),
    "an index that is a list": (lambda path: index_with(path, "[]"), 'has no "weight_map" that'),
    "an index of others": (lambda path: index_with(path, "{}"), 'has no "weight_map" that'),
    "an index of numbers": (lambda path: index_with(path, {"a": 1}), 'has no "weight_map" that'),
    "an index of nothing": (lambda path: index_with(path, {}), "2 checkpoints: model-00001"),
    "an index of one above": (
        lambda path: index_with(path, {"a": "../x.safetensors"}),
        "model.safetensors.index.json names ../x.safetensors, which is outside of its directory",
    ),
    "an index of one at the root": (
        lambda path: index_with(path, {"a": "/x.safetensors"}),
        "names /x.safetensors, which is outside of its directory",
    ),
    "an index of other kinds": (
        lambda path: index_with(path, {"a": "pytorch_model.bin"}),
        "names pytorch_model.bin, which is no .safetensors file",
    ),
    "an index of what is missing": (
        lambda path: index_with(path, {"a": shard(1, 2), "b": shard(2, 2)}),
        "model-00002-of-00002.safetensors is missing. Put what is missing",
    ),
    "an index of what a file lacks": (
        lambda path: index_with(path, {"a": shard(1, 2), "b.c": shard(1, 2)}),
        "model-00001-of-00002.safetensors lacks b.c, which model.safetensors.index.json says",
    ),
    "an index of a damaged file": (short_shard, "model-00001-of-00002.safetensors: Error while"),
    "shards of which one is missing": (
        lambda path: shards_with(path, shard(1, 3), shard(3, 3)),
        "model-00002-of-00003.safetensors is missing. Put what is missing",
    ),
    "shards with a name twice": (
        lambda path: shards_with(path, shard(1, 2), shard(2, 2), a=np.ones(3)),
        "a is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors. Give",
    ),
    "shards of two models": (
        lambda path: shards_with(path, shard(1, 1), shard(1, 2), shard(2, 2)),
        "it holds 3 checkpoints",
    ),
    "several files": (
        lambda path: shards_with(path, "model.safetensors", "adapter.safetensors"),
        "it holds 2 checkpoints: adapter.safetensors, model.safetensors. Give one of them, like",
    ),
    "empty.msgpack": (lambda path: path.write_bytes(b""), "is cut off or damaged"),
    "nothing.msgpack": (packed({}), "holds no arrays"),
    "text.msgpack": (lambda path: path.write_bytes(b"text"), "more follows where its tree ends"),
    "never.msgpack": (
        lambda path: path.write_bytes(b"\xc1"),
        "is cut off or damaged (FormatError)",
    ),
    "key.msgpack": (packed({None: 1}), "a key is a NoneType"),
    "twice.msgpack": (packed({"1": 1, 1: 1}), "the key 1 is there twice"),
    "deep.msgpack": (lambda path: path.write_bytes(b"\x91" * 9999 + b"\x01"), "(StackError)"),
    "cut.msgpack": (lambda path: path.write_bytes(msgpack.packb({"a": 1})[:-1]), "is cut off"),
    **{
        f"long {code:x}.msgpack": (
            lambda path, code=code: path.write_bytes(bytes([code]) + b"\xff\xff\xff\xff1"),
            "cannot be read: ",
        )
        for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
    },
    "other type.msgpack": (
        lambda path: path.write_bytes(msgpack.packb(msgpack.ExtType(5, b"0"))),
        "something else than Flax writes",
    ),
    "no array.msgpack": (packed({}, array=b"\x01"), "something else than Flax writes"),
    "lies.msgpack": (
        packed({}, array=msgpack.packb(((2, 3), "float32", b"0000"))),
        "an array (2, 3) of float32 has not the size",
    ),
    "longer.msgpack": (
        packed({}, array=msgpack.packb(((1,), "float32", b"0000")) + b"0"),
        "extra data",
    ),
    "negative.msgpack": (
        packed({}, array=msgpack.packb(((-1, -1), "float32", b"0000"))),
        "an array (-1, -1) of float32 has not the size",
    ),
    "type.msgpack": (packed({}, array=msgpack.packb(((1,), "flat32", b"0000"))), "'flat32'"),
    "parts.msgpack": (parts(2), "an array (5,) lacks some of its parts"),
    "no parts.msgpack": (parts(0), "an array (5,) lacks some of its parts"),
    "pickle.pt": (lambda path: path.write_bytes(pickle.dumps(3)), "a file of an unknown kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_damaged_is_one_line(name, tmp_path, wrong):
    make, says = BROKEN[name]
    make(tmp_path / name)
    err = wrong(tmp_path / name)
    assert says in err
    assert str(tmp_path / name) in err


@pytest.mark.parametrize("kind", ["x.npz", "dots.npz", "x.safetensors", "x.msgpack"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_no_damage_makes_a_traceback(kind, damage, tmp_path, run):
    path = tmp_path / kind
    SAVE[kind](path, {f"block_{i}": block() for i in range(2)})
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    statuses = set()
    for at in draw.integers(0, len(whole), 150):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.integers(8)]) + whole[at + 1 :]
        path.write_bytes(whole[:at] if damage == "cut" else flipped)
        status, _, err = run(path)
        assert "Traceback" not in err
        assert err.count("\n") == 1 or status != 2, err
        statuses.add(status)
    assert statuses == {2} if damage == "cut" else statuses <= {0, 1, 2}


@pytest.mark.parametrize("kind", ["standard", "x.safetensors", "shards", "x.msgpack"])
def test_a_library_that_is_not_installed_is_named_with_the_extra(
    kind, tmp_path, monkeypatch, wrong
):
    missing = {"standard": "orbax.checkpoint", "x.msgpack": "msgpack"}.get(kind, "safetensors")
    SAVE[kind](tmp_path / kind, MODELS["stacked"])
    monkeypatch.setitem(sys.modules, missing, None)
    err = wrong(tmp_path / kind)
    assert f"takes {missing}, of the extra" in err
    assert "python -m pip install -e '.[inspect]'" in err


def test_explain(tmp_path, run, wrong):
    SAVE["x.npz"](tmp_path / "x.npz", MODELS["unrolled"])
    depth = ds.find_depth(MODELS["unrolled"])
    path = "block_3/mlp/wi"
    assert run(tmp_path / "x.npz", "--explain", path) == (0, f"{depth.explain(path)}\n", "")
    assert "There is no leaf 'block_3/mlp'" in wrong(tmp_path / "x.npz", "--explain", "block_3/mlp")


def test_the_lines_of_a_remedy_are_rules_as_they_are(tmp_path, run, monkeypatch):
    """Also where it lists several doubts, and where no rule can say what the truth is."""
    rules, refused = tmp_path / "rules.toml", []
    for name, boxed in itertools.product(TREES, (True, False)):
        depth, error = found(name, boxed)
        tree = tree_of(name, boxed=boxed)
        monkeypatch.setattr("depthsmooth.cli.inspect.read_target", lambda _, tree=tree: tree)
        status, out, err = run("model")
        if error is None:
            assert (status, out) == (0, f"{depth}\n")
            continue
        assert (status, out) == (1, "")
        assert err.removeprefix(NOTE).startswith(f"{error}\n\n")
        if isinstance(error, ds.AmbiguousDepthError):
            rules.write_text(err.split("\n\n")[-1])
            assert list(tomllib.loads(rules.read_text())) == list(error.readings)
            for line in err.split("\n\n")[-1].splitlines():
                pattern, said = rules_in(line, tmp_path)
                assert said == [*map(of_python, error.readings[pattern]), of_python("()")]
            assert run("model", "--rules", rules)[0] == 0, name
            refused.append(name)
    assert len(refused) > 10


def rules_in(line, tmp_path):
    """The pattern of a line of a remedy, with its rule and those beside it."""
    key, said = re.fullmatch("(.*?) = (.*?)(?: if it holds no layers)?", line).groups()
    rules = []
    for rule in re.split("  # or |, or ", said):
        (tmp_path / "one.toml").write_text(f"{key} = {rule}")
        [(pattern, read)] = read_rules(tmp_path / "one.toml").rules
        rules.append(read)
    return pattern, rules


def of_python(written):
    """The rule that Python writes so."""
    return ds.Depth.from_rules({"": eval(written, {}, vars(ds))}).rules[0][1]


def test_a_remedy_is_added_to_the_rules_that_are_there(module, tmp_path, run):
    module(
        "model",
        """
        from tests.test_inspect import doubtful
        def stacks(): return {"layers": doubtful(5), "it's/blocks": doubtful(5)}
        """,
    )
    rules = tmp_path / "mine.toml"
    rules.write_text("'layers/.*' = 0\n")
    status, _, err = run("model:stacks", "--rules", rules)
    assert status == 1
    assert f"add to {rules} these lines" in err
    assert err.endswith('"it\'s/blocks/.*" = 0  # or 1, or [] if it holds no layers\n')
    with rules.open("a") as file:
        file.write(err.split("\n\n")[-1])
    assert run("model:stacks", "--rules", rules)[0] == 0


def test_absent_depth(module, run):
    module("model", "import jax\ndef head(): return {'head': jax.numpy.ones(3)}")
    status, out, err = run("model:head")
    assert (status, out) == (1, "")
    assert "Nothing in the tree is certain to be layers; it has head (3,)." in err
    assert "a line like '.*layers/.*' = 0" in err


RULES = {
    "0": "0",
    "-1": "-1",
    "[0, 1]": "(0, 1)",
    "[]": "()",
    "{numbered = true}": "numbered()",
    "{interleaved = 1}": "interleaved(axis=1)",
    "{interleaved = [0, 2]}": "interleaved((0, 2))",
    "{sequence = ['encoder', 'decoder']}": "sequence('encoder', 'decoder')",
    "{sequence = [{'in' = 0}, 'mid', {'out' = {interleaved = 1}}]}": (
        "sequence(('in', 0), 'mid', ('out', interleaved(1)))"
    ),
    r"{sequence = [{'a/(\d+)' = {numbered = true}}, {'b' = [0, 1]}]}": (
        r"sequence(('a/(\\d+)', numbered()), ('b', (0, 1)))"
    ),
}


@pytest.mark.parametrize("written", RULES)
def test_rules_in_toml_are_those_of_python(written, tmp_path):
    """And are written as they are read."""
    rule = of_python(RULES[written])
    (tmp_path / "rules.toml").write_text(f"'a/(\\d+)/.*' = {written}\n")
    assert read_rules(tmp_path / "rules.toml") == ds.Depth.from_rules({r"a/(\d+)/.*": rule})
    assert as_toml(rule) == written


def test_a_table_of_toml_may_have_lines_of_its_own(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("['a/.*']\nsequence = [\n  'first',\n  {'stack' = 0},  # the rest\n]\n")
    expected = ds.Depth.from_rules({"a/.*": ds.sequence("first", ("stack", 0))})
    assert read_rules(path) == expected


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "it's",
        '"',
        "'\"\\",
        "a\nb",
        "del\x7f'",
        "\0",
        "é😀",
        "it's é😀\u2028",
        "\U000e0001",
        "# =",
        "",
    ],
)
def test_a_pattern_is_read_as_it_was_written(name, tmp_path):
    """Whatever is in it, and as a container's."""
    pattern, path = re.escape(name), tmp_path / "rules.toml"
    rule = ds.sequence(pattern, (f"{pattern}.x", ds.interleaved(1)))
    said = f"sequence({pattern!r}, ({pattern + '.x'!r}, interleaved(1)))"
    [line] = write_rules({pattern: [said, said]})
    assert line.isprintable()
    path.write_text(line, encoding="utf-8")
    assert read_rules(path) == ds.Depth.from_rules({pattern: rule})


@pytest.mark.parametrize(
    "page", [EXAMPLES, (ROOT / "docs" / "depth.md").read_text()], ids=["help", "docs"]
)
def test_the_help_and_the_docs_show_rules_as_a_file_has_them(page, tmp_path):
    lines = re.findall(r"^ *'.* = .*", page, re.MULTILINE)
    (tmp_path / "rules.toml").write_text("\n".join(lines))
    assert read_rules(tmp_path / "rules.toml") == ds.Depth.from_rules(
        {
            "layers/.*": 0,
            "blocks/.*": (0, 1),
            "codebooks/.*": (),
            r"block_(\d+)/.*": ds.numbered(),
            "layers_.*": ds.interleaved(1),
            ".*_blocks?/.*": ds.sequence(("in_blocks", 0), "mid_block", ("out_blocks", 0)),
        }
    )


@pytest.mark.parametrize("written", RULES.values())
def test_a_rule_of_python_is_refused_with_what_to_write(written, tmp_path, wrong):
    SAVE["x.npz"](tmp_path / "x.npz", MODELS["stacked"])
    path = tmp_path / "rules.toml"
    path.write_text(f"'a/(\\d+)/.*' = {json.dumps(written)}")
    said = wrong(tmp_path / "x.npz", "--rules", path)
    assert r"The rule 'a/(\d+)/.*' is a string, but has to be an axis like 0" in said
    path.write_text(said.partition(" Write ")[2])
    assert read_rules(path) == ds.Depth.from_rules({r"a/(\d+)/.*": of_python(written)})


@pytest.mark.parametrize("written", RULES)
def test_a_message_says_rules_in_toml(written):
    """As a line of a pattern and its rule, and as a container of a sequence."""
    line = f"'a/(\\d+)' = {written}"
    said = f"The rule is {{'a/(\\\\d+)': {RULES[written]}}} for {{pattern: rule}} (3, 4)."
    assert in_toml(said) == f"The rule is {line} for {{pattern: rule}} (3, 4)."
    if "sequence" not in written:
        said = f"The container is ('a/(\\\\d+)', {RULES[written]})."
        assert in_toml(said) == f"The container is {{{line}}}."


PAIR = {f"h_{i}": {"norm": jnp.ones(8), "wi": jnp.ones((8, 16))} for i in range(2)}
STACKS = {f"h_{i}": {"norm": jnp.ones((4, 8)), "wi": jnp.ones((4, 8, 16))} for i in range(2)}
WIDER = {f"h_{i}": {"w": jnp.ones((8, size))} for i, size in enumerate((8, 8, 9))}
LISTS = {name: [block(), block()] for name in ("a", "b")}
REFUSED = {
    "vectors": (PAIR, "'.*' = 0", [r"'h[-_]?(\d*)/.*' = {numbered = true}"]),
    "stacks": (
        STACKS,
        "'h_.*' = {numbered = true}",
        [
            "'h_.*' = 0",
            r"'h_(\d+)/.*' = {interleaved = 0}",
            r"'h_(\d+)/.*' = {numbered = true}",
        ],
    ),
    "one layer": (PAIR, "'h_0/.*' = {numbered = true}", [r"'h_(\d+)/.*' = {numbered = true}"]),
    "shapes": (
        WIDER,
        "'h_.*' = {numbered = true}",
        ["'(?:h_0/w|h_1/w)(?:/.*)?' = {sequence = ['h_0/w', 'h_1/w']}"],
    ),
    "container": (
        {"a": PAIR, "b": jnp.ones((8, 8))},
        "'a/.*' = {sequence = [{'a' = 0}]}",
        [r"{'a/h[-_]?(\d*)' = {numbered = true}}"],
    ),
    "lists": (LISTS, "'.*' = {sequence = ['a', {'b/0' = []}, 'b/1']}", [r"'a/\d+'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_said_of_a_refused_rule_is_toml(case, tmp_path, run, monkeypatch, wrong):
    tree, rule, remedies = REFUSED[case]
    monkeypatch.setattr("depthsmooth.cli.inspect.read_target", lambda _: tree)
    path = tmp_path / "rules.toml"
    path.write_text(rule)
    said = wrong("model", "--rules", path)
    for remedy in remedies:
        assert f" {remedy}" in said
        container = re.search(r"(?<=\[)('a'|\{'a' = 0\})", rule)
        path.write_text(rule.replace(container[0], remedy) if container else remedy)
        assert run("model", "--rules", path)[0] == 0


def test_rules_settle_what_is_not_certain_and_the_rest_is_found(module, tmp_path, run):
    tree = {**{f"block_{i}": block() for i in range(3)}, "layers": doubtful(5)}
    module(
        "model",
        "from tests.test_inspect import block, doubtful\n"
        "def tree(): return {**{f'block_{i}': block() for i in range(3)}, 'layers': doubtful(5)}",
    )
    assert run("model:tree")[0] == 1
    known = ds.Depth.from_rules({"layers/.*": 0})
    (tmp_path / "toml").write_text("'layers/.*' = 0")
    (tmp_path / "rules.json").write_text(known.to_json())
    for name in ("toml", "rules.json"):
        status, out, _ = run("model:tree", "--json", "--rules", tmp_path / name)
        assert status == 0
        assert ds.Depth.from_json(out) == ds.find_depth(tree, known=known)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("layers/.* = 0", "rules.toml is no TOML: "),
        ("layers.x = 0", "'layers' is {x = 0}, but has to be an axis like 0"),
        (
            "layers.x = 0",
            "If dots are part of the pattern, put it in quotes, like 'layers/.*' = 0.",
        ),
        ("'layers/.*' = 1.5", "The rule 'layers/.*' is 1.5, but has to be an axis like 0"),
        ("'layers/.*' = true", "The rule 'layers/.*' is True, but has to be"),
        ("'layers/.*' = [0, true]", "The rule 'layers/.*' is [0, True], but has to be"),
        (
            "'layers/.*' = numbered()",
            "like 'layers/.*' = 0 or 'block_(\\d+)/.*' = {numbered = true}.",
        ),
        ("'layers/.*' = {numbered = false}", "'layers/.*' is {numbered = False}, but has to be"),
        ("'layers/.*' = {numbered = 1}", "is {numbered = 1}, but has to be"),
        ("'layers/.*' = {numbred = true}", "is {numbred = True}, but has to be"),
        ("'layers/.*' = {interleaved = '1'}", "is {interleaved = '1'}, but has to be"),
        ("'layers/.*' = {interleaved = true}", "is {interleaved = True}, but has to be"),
        ("'layers/.*' = {interleaved = 1, numbered = true}", "but has to be"),
        ("'layers/.*' = {sequence = []}", "is {sequence = []}, but has to be"),
        ("'layers/.*' = {sequence = 'a'}", "is {sequence = 'a'}, but has to be"),
        ("'layers/.*' = {sequence = [['a', 0]]}", "'layers/.*' has the container ['a', 0]."),
        ("'layers/.*' = {sequence = [{a = 0, b = 0}]}", "or a table of one pattern and its rule"),
        ("'layers/.*' = {sequence = [{a = 1.5}]}", "The rule 'a' is 1.5, but has to be an axis"),
        (
            "'layers/.*' = {sequence = [{a = {sequence = ['b']}}]}",
            "'layers/.*' has the container {",
        ),
        ("'layers/.*' = {sequence = ['(']}", "is no regular expression"),
        ("'layers/(' = 0", "is no regular expression"),
        ("'layers/.*' = 'numbred()'", "is 'numbred()', but has to be"),
        ("'layers/.*' = 'interleaved()'", "is 'interleaved()', but has to be"),
        ("'layers/.*' = 'numbered('", "is 'numbered(', but has to be"),
        ("'layers/.*' = '__import__(\"os\")'", "but has to be"),
        ("'layres/.*' = 0", "The rule 'layres/.*' matches no leaf"),
        ("'layers/.*' = 5", "has no axis 5"),
        ("\xff", "is no TOML"),
        (None, "No such file"),
    ],
)
def test_rules_that_are_wrong_are_one_line(rules, says, tmp_path, wrong):
    SAVE["x.npz"](tmp_path / "x.npz", MODELS["stacked"])
    if rules is not None:
        (tmp_path / "rules.toml").write_text(rules)
    assert says in wrong(tmp_path / "x.npz", "--rules", tmp_path / "rules.toml")


def test_rules_in_json_that_are_wrong_are_one_line(tmp_path, wrong):
    SAVE["x.npz"](tmp_path / "x.npz", MODELS["stacked"])
    (tmp_path / "rules.json").write_text("{}")
    assert "not a Depth in JSON" in wrong(tmp_path / "x.npz", "--rules", tmp_path / "rules.json")


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "depthsmooth", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def test_a_module_of_the_current_directory_and_a_reader_that_has_enough(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tests.test_inspect import block\n"
        "def tree(): return {f'block_{i}': block() for i in range(500)}"
    )
    process = command("inspect", "mine:tree", "--json", cwd=tmp_path)
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_damaged_array_of_many_is_one_line(tmp_path):
    tree = {f"block_{i}": block() for i in range(30)}
    save_orbax(tmp_path / "x", tree, use_ocdbt=False)
    (tmp_path / "x" / "block_0.mlp.wi" / ".zarray").write_text("x")
    _, err = (process := command("inspect", tmp_path / "x")).communicate()
    assert process.returncode == 2
    assert err.startswith(f"error: {tmp_path}/x cannot be read: ")
    assert err.endswith("Invalid JSON\n")
    assert err.count("\n") == 1, err


def test_a_checkpoint_takes_no_accelerator(tmp_path, monkeypatch):
    """A training may hold it. JAX fails where it is to use one that is not there."""
    save_standard(tmp_path / "x", MODELS["stacked"])
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    out, err = (process := command("inspect", tmp_path / "x")).communicate()
    assert (process.returncode, out, err) == (0, f"{ds.find_depth(MODELS['stacked'])}\n", "")


SHAPE, SCALE = (48, 5120, 10240), (48, 5120)
"""10 GB of float32."""


def huge_npz(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("layers/norm/scale", SCALE), ("layers/mlp/wi", SHAPE)):
            member = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(npy(shape))
            member.file_size += 4 * math.prod(shape)
            member.compress_size = member.file_size
            archive.start_dir += 4 * math.prod(shape)  # a hole


def huge_safetensors(path):
    ends = (4 * math.prod(SCALE), 4 * (math.prod(SCALE) + math.prod(SHAPE)))
    header = {
        "layers.norm.scale": {"dtype": "F32", "shape": SCALE, "data_offsets": [0, ends[0]]},
        "layers.mlp.wi": {"dtype": "F32", "shape": SHAPE, "data_offsets": ends},
    }
    tensors(path, header, ends[1])


def huge_orbax(path):
    small = {"layers": {"norm": {"scale": jnp.ones((1, 1))}, "mlp": {"wi": jnp.ones((1, 1, 1))}}}
    save_orbax(path, small, use_ocdbt=False)
    for name, shape in (("layers.norm.scale", SCALE), ("layers.mlp.wi", SHAPE)):
        file = path / name / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": shape}))


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "make"),
    [("x.npz", huge_npz), ("x.safetensors", huge_safetensors), ("x", huge_orbax)],
)
def test_ten_gigabytes_are_not_loaded(name, make, tmp_path):
    make(tmp_path / name)
    (tmp_path / "rules.toml").write_text("'layers/.*' = 0")
    code = f"""
import re, time, orbax.checkpoint, safetensors
from depthsmooth.cli.inspect import main
start = time.process_time()
status = main(["inspect", {str(tmp_path / name)!r}, "--rules", {str(tmp_path / "rules.toml")!r}])
seconds = time.process_time() - start
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(status, seconds, peak)
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "2,516,828,160" in printed
    status, seconds, kilobytes = printed.splitlines()[-1].split()
    assert status == "0"
    assert float(seconds) < 5
    assert int(kilobytes) < 500_000


def test_one_array_that_flax_packed_is_in_memory_at_a_time(tmp_path):
    """A few copies of it, but never all of them."""
    size, count = 2**22, 40
    layers = {f"layer_{i}": np.ones(size, "int8") for i in range(count)}
    SAVE["x.msgpack"](tmp_path / "x.msgpack", layers)
    del layers
    tracemalloc.start()
    tree = read_target(str(tmp_path / "x.msgpack"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tree) == count
    assert peak < 6 * size


DTYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}


def test_every_dtype_of_safetensors_is_known(tmp_path):
    for code, size in DTYPES.items():
        tensors(tmp_path / "x.safetensors", {"a": tensor(code, 3 * size)}, 3 * size)
        assert read_target(str(tmp_path / "x.safetensors"))["a"].dtype.itemsize == size
