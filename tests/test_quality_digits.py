"""The tasks on images: what is read, what is held out, where the layers are, that models learn."""

import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.quality import images
from benchmarks.quality.arms import Arm
from benchmarks.quality.diffusion import Diffusion
from benchmarks.quality.digits import Digits
from benchmarks.quality.training import train

SIZES = {"train": 12, "test": 5}


def python2(value):
    """The opcodes by which Python 2 pickles a value, with strings that are bytes."""
    match value:
        case bytes():
            return b"T" + struct.pack("<I", len(value)) + value
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case None:
            return b"N"
        case tuple():
            return b"(" + b"".join(map(python2, value)) + b"t"
        case list():
            return b"](" + b"".join(map(python2, value)) + b"e"
        case dict():
            return b"}(" + b"".join(python2(key) + python2(value[key]) for key in value) + b"u"
    kind = b"cnumpy\ndtype\n" + python2((value.dtype.str[1:].encode(), 0, 1)) + b"R"
    kind += python2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,))
    empty += python2(b"b") + b"tR"
    state = python2(1) + python2(value.shape) + kind + python2(False) + python2(value.tobytes())
    return empty + b"(" + state + b"tb"


def write(directory, seed=0, **changed):
    """Writes both files as they are distributed; gives what is in them."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {}
    for name, size in SIZES.items():
        content = {
            b"filenames": [b"a.png"] * size,
            b"fine_labels": rng.integers(0, 100, size).tolist(),
            b"data": rng.integers(0, 256, (size, 3072), dtype=np.uint8),
        }
        contents[name] = changed.get(name, content)
        (directory / name).write_bytes(b"\x80\x02" + python2(contents[name]) + b".")
    return contents


@pytest.fixture(scope="module")
def digits():
    return Digits(layers=2, steps=10)


@pytest.fixture(scope="module")
def diffusion():
    return Diffusion(layers=13, steps=10)


@pytest.mark.parametrize("inner", ["", "cifar-100-python"])
def test_reads_cifar100(tmp_path, inner):
    contents = write(tmp_path / inner)
    loaded = images.load_cifar100(tmp_path)
    assert loaded.train.shape == (12, 32, 32, 3)
    assert loaded.test.shape == (5, 32, 32, 3)
    assert loaded.test_labels.tolist() == contents["test"][b"fine_labels"]
    green = contents["train"][b"data"][3, 1024:2048].reshape(32, 32)
    np.testing.assert_array_equal(loaded.train[3, :, :, 1], green)
    assert loaded.normalised(np.array([0, 255])).tolist() == [-1.0, 1.0]


def test_data_are_told_from_other_data(tmp_path, digits):
    write(tmp_path / "one")
    contents = write(tmp_path / "same")
    contents["test"][b"fine_labels"][0] ^= 1
    write(tmp_path / "other", **contents)
    one, same, other = (
        images.load_cifar100(tmp_path / name).digest for name in ("one", "same", "other")
    )
    assert one == same
    assert len({one, other, digits.data}) == 3


def test_a_pickle_that_calls_something_is_not_executed(tmp_path):
    write(tmp_path)
    executed = tmp_path / "executed"
    call = b"cos\nmkdir\n(" + python2(bytes(executed)) + b"tR."
    (tmp_path / "train").write_bytes(b"\x80\x02" + call)
    with pytest.raises(ValueError, match=r"train is no file of CIFAR-100.*os\.mkdir"):
        images.load_cifar100(tmp_path)
    assert not executed.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", b"\x80\x02" + python2([1]) + b".", b"\x80\x02}."]
)
def test_refuses_what_is_no_such_pickle(tmp_path, content):
    write(tmp_path)
    (tmp_path / "test").write_bytes(content)
    with pytest.raises(ValueError, match=r"test is no file of CIFAR-100.*Unpack"):
        images.load_cifar100(tmp_path)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (np.zeros((2, 3071), np.uint8), [0, 1]),
        (np.zeros((2, 3072), np.int8), [0, 1]),
        (np.zeros((3, 3072), np.uint8), [0, 1]),
        (np.zeros((2, 3072), np.uint8), [0, 100]),
        (np.zeros((0, 3072), np.uint8), []),
    ],
)
def test_refuses_other_shapes(tmp_path, data, labels):
    write(tmp_path, test={b"data": data, b"fine_labels": labels})
    with pytest.raises(ValueError, match=r"test has data of shape .* Unpack"):
        images.load_cifar100(tmp_path)


def test_refuses_a_missing_directory_or_file(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=rf"{missing}.*No such file.*Name the directory"):
        Digits(cifar100=missing)
    write(tmp_path)
    (tmp_path / "test").unlink()
    with pytest.raises(ValueError, match=r"test can't be read: No such file"):
        images.load_cifar100(tmp_path)


def test_digits_are_either_learnt_from_or_held_out():
    loaded = images.load_digits()
    train, test = ({image.tobytes() for image in part} for part in (loaded.train, loaded.test))
    assert len(train) == 1197
    assert len(test) == 600
    assert not train & test
    assert np.bincount(loaded.test_labels).min() >= 58


def test_what_is_held_out_is_never_trained_on(tmp_path):
    contents = write(tmp_path / "one")
    contents["test"][b"data"] ^= 255
    write(tmp_path / "other", **contents)

    def losses(task):
        def both(key):
            params = task.init(key)
            return task.loss(params, key), task.evaluate(params, key, 0)["loss"]

        return jax.jit(both)(jax.random.key(0))

    one, other = (losses(Digits(1, 10, tmp_path / name)) for name in ("one", "other"))
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_begins_with_no_idea_of_the_digit(digits):
    examined = jax.jit(lambda key: digits.evaluate(digits.init(key), key, 0))(jax.random.key(0))
    assert list(examined) == ["accuracy", "loss"]
    assert abs(examined["loss"] - math.log(10)) < 0.3
    assert examined["accuracy"] < 0.3


def test_the_layers_of_digits_are_its_blocks(digits):
    assert set(digits.depth.groups.values()) == {2}
    assert all("/blocks/" in path for path in digits.depth)
    assert len(digits.depth) == 12


def test_three_containers_are_one_sequence(diffusion):
    depth = diffusion.depth
    assert list(depth.groups.values()) == [13]
    tensors = {}
    for path, place in depth.items():
        tensors.setdefault(place.tensor, {})[path.split("/")[1]] = place.layers
    inner, outer = tuple(range(6)), tuple(range(7, 13))
    whole = {"in_blocks": inner, "mid_block": (6,), "out_blocks": outer}
    assert len(tensors) == 12
    assert all(containers == whole for containers in tensors.values())
    alone = {leaf.path.removeprefix("params/") for leaf in depth.leaves if leaf.place is None}
    assert {path for path in alone if "block" in path} == {
        "out_blocks/skip/bias",
        "out_blocks/skip/kernel",
    }


@pytest.mark.parametrize("layers", [1, 4])
def test_refuses_halves_that_differ(layers):
    with pytest.raises(ValueError, match=rf"--layers {layers}: .*odd number"):
        Diffusion(layers)


def test_the_last_in_is_the_first_out():
    """A block that is given nothing but its skip puts out what the opposite block has."""
    task = Diffusion(layers=5, steps=10)

    @jax.jit
    def states(key):
        params = task.init(key)
        blocks = jax.tree.map(jnp.zeros_like, params["params"]["out_blocks"])
        kernel = blocks["skip"]["kernel"]
        blocks["skip"]["kernel"] = kernel.at[:].set(jnp.eye(*kernel.shape[1:], k=-kernel.shape[-1]))
        return task.states({"params": {**params["params"], "out_blocks": blocks}}, key)

    _, first, second, _, third, fourth = states(jax.random.key(0))
    np.testing.assert_allclose(third, second, atol=1e-6)
    np.testing.assert_allclose(fourth, first, atol=1e-6)


@pytest.mark.parametrize(("kind", "layers"), [(Digits, 2), (Diffusion, 3)])
def test_learns(kind, layers):
    curves, _ = train(kind(layers, steps=100), Arm("adamw"), 1.0, 50)
    assert curves["loss"][-1] < 0.9 * curves["loss"][0]
