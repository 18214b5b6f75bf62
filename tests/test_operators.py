"""Operators: what each docstring promises, and every kind of number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import depthsmooth as ds
from tests.laid_out import mixed as mixed_by

SHARES = st.floats(0, 0.999)
SYMMETRIC = {
    "window": ds.window,
    "diffusion": lambda share: ds.diffusion(9 * share),
    "mean": ds.mean,
    "shuffled": lambda share: ds.shuffled(ds.window(share), seed=3),
    "two windows": lambda share: ds.compose(ds.window(share), ds.window(share)),
    "binomial": lambda share: ds.from_kernel([share / 4, share / 4, 1 - share] + [share / 4] * 2),
}


@given(name=st.sampled_from(sorted(SYMMETRIC)), share=SHARES, layers=st.integers(1, 12))
def test_symmetric_operators_are_doubly_stochastic(name, share, layers):
    matrix = ds.operator_matrix(SYMMETRIC[name](share), layers)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
    if name != "binomial" or share <= 0.8:
        assert matrix.min() >= -1e-12


def roughness(updates):
    return (np.diff(updates, axis=0) ** 2).sum()


@given(
    share=SHARES,
    layers=st.integers(2, 12),
    seed=st.integers(0, 99),
    name=st.sampled_from(["window", "diffusion"]),
)
def test_smoothing_never_makes_rougher(share, layers, seed, name):
    updates = np.random.default_rng(seed).normal(size=(layers, 3))
    smoothed = ds.operator_matrix(SYMMETRIC[name](share), layers) @ updates
    assert roughness(smoothed) <= roughness(updates) * (1 + 1e-12)


GAINS = {
    "window": (ds.window(0.3), lambda w: 1 - 0.3 * (1 - np.cos(w))),
    "sharpen": (ds.sharpen(0.3), lambda w: 1 - 0.3 * (1 + np.cos(w))),
    "diffusion": (ds.diffusion(0.4), lambda w: np.exp(-0.8 * (1 - np.cos(w)))),
    "exponential": (
        ds.exponential(0.6, 2, 0.5),
        lambda w: (
            0.6
            + 0.4
            * (np.exp(-0.5) * np.cos(w) + np.exp(-1.0) * np.cos(2 * w))
            / (np.exp(-0.5) + np.exp(-1.0))
        ),
    ),
    "ema": (ds.ema(0.4), lambda w: 0.6 / abs(1 - 0.4 * np.exp(-1j * w))),
    "kernel": (
        ds.from_kernel([0.1, 0.2, 0.7]),
        lambda w: abs(0.1 * np.exp(-1j * w) + 0.2 + 0.7 * np.exp(1j * w)),
    ),
}


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("frequency", [0.1, 1.0, 3.0])
def test_gains_are_as_documented(name, frequency):
    operator, gain = GAINS[name]
    layers = 81
    wave = np.exp(1j * frequency * np.arange(layers))
    mixed = ds.operator_matrix(operator, layers) @ wave
    assert abs(mixed[layers // 2]) == pytest.approx(abs(gain(frequency)), abs=1e-10)


@pytest.mark.parametrize("layers", [2, 3, 8])
def test_the_window_and_diffusion_have_the_cosines_for_eigenvectors(layers):
    for name in ("window", "diffusion"):
        operator, gain = GAINS[name]
        matrix = ds.operator_matrix(operator, layers)
        for j in range(layers):
            wave = np.cos(np.pi * j / layers * (np.arange(layers) + 0.5))
            np.testing.assert_allclose(matrix @ wave, gain(np.pi * j / layers) * wave, atol=1e-12)


def test_diffusion_is_the_limit_of_windows():
    many = np.linalg.matrix_power(ds.operator_matrix(ds.window(2 * 0.7 / 10_000), 6), 10_000)
    np.testing.assert_allclose(ds.operator_matrix(ds.diffusion(0.7), 6), many, atol=1e-4)


def test_compose_is_the_product():
    one, two = ds.ema(0.3), ds.exponential(0.5, 2, direction="left")
    matrices = [ds.operator_matrix(operator, 6) for operator in (one, two)]
    np.testing.assert_allclose(
        ds.operator_matrix(ds.compose(one, two), 6), matrices[0] @ matrices[1], atol=1e-15
    )


@pytest.mark.parametrize("boundary", ["reflect", "renormalize", "zero"])
@pytest.mark.parametrize("layers", [1, 2, 3, 9])
def test_kernels_at_the_boundary(boundary, layers):
    """Against the stack continued by hand, also where it is shorter than the kernel."""
    taps = np.array([0.1, 0.2, 0.4, 0.25, 0.05])
    updates = np.random.default_rng(0).normal(size=layers)
    mode = {"mode": "symmetric"} if boundary == "reflect" else {"mode": "constant"}
    expected = np.convolve(np.pad(updates, 2, **mode), taps[::-1], "valid")
    if boundary == "renormalize":
        expected /= np.convolve(np.pad(np.ones(layers), 2), taps[::-1], "valid")
    matrix = ds.operator_matrix(ds.from_kernel(taps, boundary), layers)
    np.testing.assert_allclose(matrix @ updates, expected, atol=1e-14)


def test_shuffled_is_the_same_mixing_in_another_order():
    matrix = ds.operator_matrix(ds.window(0.4), 8)
    again = ds.operator_matrix(ds.shuffled(ds.window(0.4), 0), 8)
    assert not np.allclose(matrix, again)
    assert sorted(np.diag(again)) == sorted(np.diag(matrix))
    np.testing.assert_allclose(np.linalg.eigvalsh(again), np.linalg.eigvalsh(matrix), atol=1e-12)
    np.testing.assert_array_equal(again, ds.operator_matrix(ds.shuffled(ds.window(0.4), 0), 8))
    assert not np.allclose(again, ds.operator_matrix(ds.shuffled(ds.window(0.4), 1), 8))


NUMBERS = {
    "window": ds.window,
    "sharpen": ds.sharpen,
    "exponential": lambda number: ds.exponential(number, 2, number),
    "ema": ds.ema,
    "kernel": lambda number: ds.from_kernel([number, 0.5, number]),
    "renormalized": lambda number: ds.from_kernel([number, 0.5, number], "renormalize"),
    "diffusion": ds.diffusion,
    "mean": ds.mean,
    "shuffled": lambda number: ds.shuffled(ds.window(number), 1),
    "composed": lambda number: ds.compose(ds.window(number), ds.ema(number)),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_every_kind_of_number_gives_the_same_matrix(name, layers):
    expected = ds.operator_matrix(NUMBERS[name](0.25), layers)
    assert isinstance(expected, np.ndarray)
    schedule = optax.linear_schedule(0.0, 0.5, 10)

    def traced(number):
        return ds.operator_matrix(NUMBERS[name](number), layers)

    def scheduled(count):
        return ds.operator_matrix(NUMBERS[name](schedule), layers, count)

    for matrix in (
        traced(np.float32(0.25)),
        traced(jnp.float32(0.25)),
        jax.jit(traced)(0.25),
        scheduled(5),
        jax.jit(scheduled)(5),
    ):
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_traced_operator_mixes_as_its_matrix_says(jit):
    updates = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), "float32")

    def mix(number):
        return [
            mixed_by(NUMBERS[name](number)(7, 0), [updates], [(0,)], [range(7)])[0]
            for name in NUMBERS
        ]

    for mixed, name in zip((jax.jit(mix) if jit else mix)(0.25), NUMBERS, strict=True):
        expected = ds.operator_matrix(NUMBERS[name](0.25), 7) @ np.asarray(updates, float)
        np.testing.assert_allclose(mixed, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ds.sharpen(1.0), r"alpha is 1\.0, but has to be in 0 <= alpha < 1"),
        (lambda: ds.exponential(1.5), r"self_weight is 1\.5, .* 0 <= self_weight <= 1"),
        (lambda: ds.exponential(0.5, rate=-1), r"rate is -1, .* 0 <= rate < inf\."),
        (lambda: ds.exponential(0.5, radius=0), r"radius is 0, .* at least 1"),
        (lambda: ds.exponential(0.5, radius=1.5), r"radius is 1\.5"),
        (lambda: ds.exponential(0.5, direction="up"), r"direction is 'up', .* 'left'"),
        (lambda: ds.exponential(0.5, rate=np.inf), r"rate is inf, .* 0 <= rate < inf\."),
        (lambda: ds.diffusion(np.inf), r"time is inf, .* 0 <= time < inf\."),
        (lambda: ds.from_kernel([-np.inf]), r"tap 0 is -inf, .* -inf < tap 0 < inf\."),
        (lambda: ds.ema(1.0), r"rho is 1\.0"),
        (lambda: ds.ema("0.5"), r"rho is '0\.5', .* number, a schedule"),
        (lambda: ds.from_kernel([0.5, 0.5]), r"There are 2 taps, but an odd number"),
        (lambda: ds.from_kernel([1.0], "wrap"), r"boundary is 'wrap'"),
        (lambda: ds.from_kernel(["a"]), r"tap 0 is 'a'"),
        (lambda: ds.window(ds.window(0.1)), r"alpha is .* no schedule: .* augment_over_depth"),
        (lambda: ds.from_matrix(1j * np.eye(3)), r"The matrix is complex"),
        (lambda: ds.window(np.array(1.5)), r"alpha is 1\.5"),
        (lambda: ds.window(jnp.complex64(0.1)), r"alpha is .* has to be a number"),
        (lambda: ds.exponential(0.5, direction=["left"]), r"direction is \['left'\]"),
        (lambda: ds.from_kernel([-1, 0, 1], "renormalize")(4, 0), r"layer 1 of 4 have the sum 0"),
        (lambda: ds.from_matrix(np.ones((2, 3))), r"of shape \(2, 3\), .* square"),
        (lambda: ds.from_matrix(np.eye(3))(4, 0), r"shape \(3, 3\), .* 4 layers"),
        (
            lambda: ds.augment_over_depth(
                ds.from_matrix(np.eye(3)), depth=ds.Depth.from_rules({"a": 0, "b": 0})
            ).init({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}),
            r"In b: .* shape \(3, 3\), .* 4 layers",
        ),
        (lambda: ds.diffusion(-1.0), r"time is -1\.0, .* 0 <= time < inf\."),
        (lambda: ds.mean(-0.1), r"weight is -0\.1"),
        (lambda: ds.ema(lambda count: 2.0)(3, 0), r"rho is 2\.0"),
        (lambda: ds.window(ds.ema), r"alpha is ema, which is no schedule"),
        (
            lambda: ds.compose(ds.window(0.1), ds.ema),
            r"^ema is no operator: .* when they are called",
        ),
        (lambda: ds.shuffled(ds.from_kernel, 1), r"^from_kernel is no operator"),
        (lambda: ds.compose(ds.window(0.1), 0.5), r"0\.5 is no operator"),
        (lambda: ds.shuffled(0.5, 1), r"0\.5 is no operator"),
        (lambda: ds.shuffled(ds.window(0.1), -1), r"seed is -1, .* whole number"),
        (lambda: ds.operator_matrix(0.5, 3), r"0\.5 is no operator"),
    ],
)
def test_refuses_what_is_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["diffusion", "composed", "kernel"])
def test_traced_matrices_are_made_in_full_precision(name):
    """Whatever the default of a device is."""
    text = (
        jax.jit(lambda number: ds.operator_matrix(NUMBERS[name](number), 12)).lower(0.3).as_text()
    )
    assert "DEFAULT" not in text


@pytest.mark.parametrize("layers", [4, 5, 12])
def test_shuffled_layers_have_no_true_neighbours(layers):
    for seed in range(20):
        matrix = ds.operator_matrix(ds.shuffled(ds.window(0.4), seed), layers)
        assert not np.diag(matrix, 1).any()
        assert not np.diag(matrix, -1).any()


@pytest.mark.parametrize("rate", [200.0, 1000.0])
def test_neighbours_share_their_weight_at_any_rate(rate):
    for number in (rate, jnp.float32(rate)):
        matrix = ds.operator_matrix(ds.exponential(0.5, 2, number), 4)
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)


def test_the_gain_of_a_renormalized_kernel():
    layers, frequency = 64, 2 * np.pi * 5 / 64
    matrix = ds.operator_matrix(ds.from_kernel([1, 2, 1], "renormalize"), layers)
    wave = np.cos(frequency * np.arange(layers))
    gain = abs(np.exp(-1j * frequency) + 2 + np.exp(1j * frequency)) / 4
    np.testing.assert_allclose((matrix @ wave)[1:-1], gain * wave[1:-1], atol=1e-12)
