"""python -m depthsmooth inspect: every target, every refusal, and no weight that is loaded."""

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
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rich.console
import safetensors.numpy
from flax.training.train_state import TrainState

import depthsmooth as ds
from depthsmooth.__main__ import main
from depthsmooth.printer import pretty, show
from depthsmooth.rules_file import read_rules
from depthsmooth.targets import read_target
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
}


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
        ("model", "There is no model. Give a directory that Orbax wrote, a .npz file"),
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
    "twice.npz": (
        lambda path: npz(path, **{"a/b_npy": npy(()) + b"0000", "a_npy": npy(()) + b"0000"}),
        "a is there twice, or above another",
    ),
    "below.npz": (
        lambda path: npz(path, **{"a_npy": npy(()) + b"0000", "a/b_npy": npy(()) + b"0000"}),
        "a/b is below another",
    ),
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
    "pickle.pt": (lambda path: path.write_bytes(pickle.dumps(3)), "a file of an unknown kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_damaged_is_one_line(name, tmp_path, wrong):
    make, says = BROKEN[name]
    make(tmp_path / name)
    err = wrong(tmp_path / name)
    assert says in err
    assert str(tmp_path / name) in err


@pytest.mark.parametrize("kind", ["x.npz", "dots.npz", "x.safetensors"])
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


@pytest.mark.parametrize("missing", ["orbax", "safetensors"])
def test_a_library_that_is_not_installed_is_named_with_the_extra(
    missing, tmp_path, monkeypatch, wrong
):
    kind = "standard" if missing == "orbax" else "x.safetensors"
    SAVE[kind](tmp_path / kind, MODELS["stacked"])
    name = "orbax.checkpoint" if missing == "orbax" else "safetensors"
    monkeypatch.setitem(sys.modules, name, None)
    err = wrong(tmp_path / kind)
    assert missing in err
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
        monkeypatch.setattr("depthsmooth.__main__.read_target", lambda _, tree=tree: tree)
        status, out, err = run("model")
        if error is None:
            assert (status, out) == (0, f"{depth}\n")
            continue
        assert (status, out) == (1, "")
        assert err.removeprefix(NOTE).startswith(f"{error}\n\n")
        if isinstance(error, ds.AmbiguousDepthError):
            rules.write_text(err.split("\n\n")[-1])
            assert list(tomllib.loads(rules.read_text())) == list(error.readings)
            assert run("model", "--rules", rules)[0] == 0, name
            refused.append(name)
    assert len(refused) > 10


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
    "0": 0,
    "[0, 1]": (0, 1),
    "[]": (),
    '"numbered()"': ds.numbered(),
    '"interleaved(axis=1)"': ds.interleaved(1),
    '"interleaved((0, 1))"': ds.interleaved((0, 1)),
    "\"sequence(('in', 0), 'mid', ('out', interleaved(1)))\"": ds.sequence(
        ("in", 0), "mid", ("out", ds.interleaved(1))
    ),
}


@pytest.mark.parametrize("written", RULES)
def test_rules_in_toml_are_those_of_python(written, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(f"'a/(\\d+)/.*' = {written}\n")
    assert read_rules(path) == ds.Depth.from_rules({r"a/(\d+)/.*": RULES[written]})


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
        ("layers.x = 0", "a pattern with dots has to be in quotes"),
        ("'layers/.*' = 1.5", "has the axis 1.5"),
        ("'layers/.*' = true", "has the axis True"),
        ("'layers/(' = 0", "is no regular expression"),
        ("'layers/.*' = 'numbred()'", "'numbred()' is no rule. Write an axis"),
        ("'layers/.*' = 'interleaved()'", "'interleaved()' is no rule"),
        ("'layers/.*' = 'numbered('", "'numbered(' is no rule"),
        ("'layers/.*' = '__import__(\"os\")'", "is no rule"),
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


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_terminal_is_filled_and_not_exceeded(width):
    tree = {f"a_rather_long_name_of_a_model/block_{i}": block() for i in range(123)}
    tree |= {f"[b]{i}[/b]": jnp.ones((3, 4)) for i in range(30)}
    depth = ds.find_depth(tree) | ds.Depth.from_rules({r"\[b\]1\[/b\]": 0})
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=width)
    console.print(pretty(depth))
    printed = console.file.getvalue()
    assert "\x1b[" in printed
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
    assert max(map(len, lines)) <= width
    columns = lines[0].index("layers") if width > 40 else 6
    group = "".join(line[:columns].strip() for line in lines)
    for name, layers in depth.groups.items():
        assert name in group
        assert any(str(layers) in line.split() for line in lines)
    assert "and 17 more" in " ".join(" ".join(lines).split())


def test_a_terminal_gets_colour_unless_it_is_not_wanted(monkeypatch, capsys):
    depth = ds.find_depth(MODELS["stacked"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    show(depth)
    assert "\x1b[36m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    show(depth)
    assert "\x1b[36m" not in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show(depth)
    assert capsys.readouterr().out == f"{depth}\n"


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
    ("name", "make"), [("x.npz", huge_npz), ("x.safetensors", huge_safetensors), ("x", huge_orbax)]
)
def test_ten_gigabytes_are_not_loaded(name, make, tmp_path):
    make(tmp_path / name)
    (tmp_path / "rules.toml").write_text("'layers/.*' = 0")
    code = f"""
import re, time, orbax.checkpoint, safetensors
from depthsmooth.__main__ import main
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
