"""Pictures: what they say is what they were given, and all of it can be read."""

import itertools
import subprocess
import sys

import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import depthsmooth as ds
from depthsmooth import plot
from depthsmooth.plot import pictures
from tests.test_finding import tree_of

STEPS = [0, 10, 20, 40, 400]
PAIRS = np.linspace(-1, 1, 20).reshape(5, 4)
OPERATORS = {"window": ds.window(0.2), "sharpen": ds.sharpen(0.5), "ema": ds.ema(0.7)}
LOSSES = {
    "AdamW": [[3, 2.5, 2.2, 2.0, 1.9], [3.1, 2.4, 2.3, 2.1, 1.8]],
    "one": [[3, 2, 1, 1, 1]],
    "diverged": [[3, 2, 2, 2, 2], [3, 2, np.inf, np.nan, 9], [3, 3, np.nan, 3, 3]],
}


@pytest.fixture(autouse=True)
def screenless():
    mpl.use("Agg")
    yield
    plt.close("all")


def ax_of(size=(6.4, 4.8)):
    return Figure(size, layout="constrained").subplots()


def resolved(rules, tree):
    return ds.Depth.from_rules(rules).resolve(tree)


def unrolled(layers, tensors):
    block = {f"tensor_{name}": jnp.ones(2) for name in "abcdefghijklmnop"[:tensors]}
    blocks = {f"block_{k}": block for k in range(layers)}
    return resolved({r"block_(\d+)/.*": ds.numbered()}, blocks)


def real(name):
    return ds.find_depth(tree_of(name, boxed=True))


def labels_of(ax):
    """Labels of the rows, and the notes to their right."""
    [notes] = ax.child_axes
    return [
        [label.get_text() for label in side.get_yticklabels() if label.get_text()]
        for side in (ax, notes)
    ]


def bars_of(ax):
    """For each row its bars, as the layers from and to, and the lightness of their colours."""
    rows = {}
    for collection in ax.collections:
        for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=False):
            (left, bottom), (right, _) = path.get_extents().get_points()
            bar = round(left + 0.4), round(right - 0.4)
            rows.setdefault(round(bottom + 0.4), {})[bar] = round(float(colour[:3].mean()), 3)
    return rows


def test_depth_draws_stacks_as_bars():
    params = {"layers": {"kernel": jnp.ones((6, 40, 50)), "bias": jnp.ones((6, 4))}}
    ax = plot.depth(resolved({"layers/.*": 0}, params), ax=ax_of())
    assert {y: list(bars) for y, bars in bars_of(ax).items()} == {1: [(0, 5)], 2: [(0, 5)]}
    assert labels_of(ax) == [
        ["layers/.*", "layers/bias", "layers/kernel"],
        ["6 layers", "axis 0, 24", "axis 0, 12.0 k"],
    ]
    assert ax.get_xlabel() == "layer"


def test_depth_draws_layers_of_their_own_as_boxes():
    ax = plot.depth(unrolled(3, 2), ax=ax_of())
    boxes = [(0, 0), (1, 1), (2, 2)]
    assert {y: list(bars) for y, bars in bars_of(ax).items()} == {1: boxes, 2: boxes}
    assert len({shade for bars in bars_of(ax).values() for shade in bars.values()}) == 1
    assert labels_of(ax)[0][1:] == ["block*/tensor_a", "block*/tensor_b"]
    assert labels_of(ax)[1] == ["3 layers", "own leaf, 6", "own leaf, 6"]


def test_depth_tells_alternating_stacks_apart():
    stacks = {f"layers_{j}": jnp.ones((4, 2)) for j in range(3)}
    ax = plot.depth(resolved({"layers_.*": ds.interleaved(0)}, stacks), ax=ax_of())
    [bars] = bars_of(ax).values()
    shades = [bars[k, k] for k in range(12)]
    assert shades[:3] == sorted(set(shades))
    assert shades == shades[:3] * 4
    assert labels_of(ax)[1] == ["12 layers", "axis 0, 3 stacks, 24"]


def test_depth_draws_a_string_through_layers_that_others_have():
    layout = real("maxtext_nnx_llama4_scan")
    ax = plot.depth(layout, ax=ax_of((8, 6)))
    row = labels_of(ax)[0].index("mlp/wi_0/kernel")
    assert list(bars_of(ax)[row]) == [(0, 0), (4, 4), (2, 2), (6, 6)]
    strings = [c.get_segments()[0] for c in ax.collections if isinstance(c, LineCollection)]
    assert [[0, row], [4, row]] in [line.tolist() for line in strings]


def test_depth_draws_containers_that_follow_one_another():
    rule = ds.sequence(("in_blocks", 0), "mid_block", ("out_blocks", (0, 1)))
    shapes = {"in_blocks": (2, 3), "mid_block": (3,), "out_blocks": (2, 2, 3)}
    params = {name: {"w": jnp.ones(shape)} for name, shape in shapes.items()}
    ax = plot.depth(resolved({".*": rule}, params), ax=ax_of())
    assert list(bars_of(ax)[1]) == [(0, 1), (2, 2), (3, 6)]
    assert labels_of(ax)[1][1] == "axis 0, own leaf, axes 0×1, 2 stacks, 21"


def test_depth_gives_each_group_its_colour_and_title():
    params = {"encoder": jnp.ones((6, 4)), "decoder": jnp.ones((2, 4))}
    ax = plot.depth(resolved({"encoder": 0, "decoder": 0}, params), ax=ax_of())
    bars, titles = bars_of(ax), [text.get_fontweight() for text in ax.get_yticklabels()]
    assert titles == ["bold", "normal", "bold", "normal"]
    assert [bars[1], bars[3]] == [
        {(0, last): round(float(np.mean(to_rgb(colour))), 3)}
        for last, colour in zip((1, 5), pictures.COLOURS, strict=False)
    ]


@pytest.mark.parametrize(("alone", "shown"), [(0, []), (4, "abcd"), (7, "abc")])
def test_depth_shows_some_of_what_is_left_alone(alone, shown):
    params = {"layers": jnp.ones((2, 2)), **{name: jnp.ones(3) for name in "abcdefg"[:alone]}}
    ax = plot.depth(resolved({"layers": 0}, params), ax=ax_of())
    labels, notes = labels_of(ax)
    assert labels[2:] == [*shown] + (["and 4 more"] if alone == 7 else [])
    assert notes[2:] == ["left alone, 3"] * len(shown) + (["left alone, 12"] if alone == 7 else [])
    assert {text.get_color() for text in ax.get_yticklabels()[2:]} <= {pictures.GREY}


def test_depth_joins_rows_only_where_there_are_too_many():
    layout = real("maxtext_linen_deepseek_scan")
    whole, joined = plot.depth(layout), plot.depth(layout, ax=ax_of((4, 3)))
    assert len(labels_of(whole)[0]) == len(layout.tracks) + 2 + 3
    labels, notes = labels_of(joined)
    assert len(labels) < 16
    assert notes[labels.index("self_attention/* (7)")] == "axis 1, 5.7 k"
    attention = {path: leaf for leaf in layout.leaves if "self_attention/" in (path := leaf.path)}
    ours = [np.prod(leaf.shape) for path, leaf in attention.items() if "dense_layers" in path]
    assert (len(ours), sum(ours)) == (7, 5664)


def test_depth_shortens_the_middle_of_long_paths():
    path = "decoder/" + "a_very_long_name/" * 6 + "kernel"
    labels, _ = labels_of(plot.depth(resolved({".*": 0}, {path: jnp.ones((2, 3))}), ax=ax_of()))
    assert labels[1].startswith("decoder/")
    assert "…" in labels[1]
    assert labels[1].endswith("long_name/kernel")
    assert len(labels[1]) < 40


def test_depth_takes_no_pattern_for_mathematics():
    ax = plot.depth(resolved({"layers$|_$": 0}, {"layers": jnp.ones((2, 3))}), ax=ax_of())
    assert not any(text.get_parse_math() for text in ax.get_yticklabels())
    ax.figure.draw_without_rendering()


def test_depth_makes_a_figure_as_high_as_it_needs():
    few, many = (plot.depth(unrolled(4, tensors)).figure.get_figheight() for tensors in (2, 16))
    assert 1 < few < many < 8


@pytest.mark.parametrize(
    "given",
    [ds.Depth(), ds.Depth.from_rules({"layers": 0}), {"layers": 0}],
    ids=["empty", "rules", "dict"],
)
def test_depth_needs_layers(given):
    with pytest.raises(ValueError, match=r"no layers .*find_depth\(params\) or rules.resolve"):
        plot.depth(given)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layers", [1, 2, 24])
def test_operator_shows_its_matrix(name, layers):
    ax = plot.operator(OPERATORS[name], layers, ax=ax_of())
    [image] = ax.images
    matrix = np.asarray(ds.operator_matrix(OPERATORS[name], layers))
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-np.abs(matrix).max(), np.abs(matrix).max())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer read", "layer written")
    ticks = np.concatenate([ax.get_xticks(), ax.get_yticks()])
    assert all(float(tick).is_integer() for tick in ticks)


def test_operator_writes_numbers_up_to_twelve_layers():
    ax = plot.operator(ds.sharpen(0.5), 12)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(texts) == 144
    assert [texts[x, 1] for x in range(4)] == ["−0.25", "0.50", "−0.25", "0"]
    assert not plot.operator(ds.sharpen(0.5), 13).texts


def test_operator_marks_what_is_below_zero_where_there_are_no_numbers():
    ax = plot.operator(ds.sharpen(0.5), 24, ax=ax_of())
    [marks] = ax.collections
    columns, rows = np.nonzero(np.asarray(ds.operator_matrix(ds.sharpen(0.5), 24)).T < 0)
    assert set(map(tuple, marks.get_offsets())) == set(zip(columns, rows, strict=True))
    assert not len(plot.operator(ds.window(0.5), 24, ax=ax_of()).collections[0].get_offsets())


def test_numbers_and_marks_stand_out_from_their_cells():
    ax = plot.operator(ds.sharpen(0.5), 4, ax=ax_of())
    [image] = ax.images
    matrix = image.get_array()
    for text in ax.texts:
        x, y = text.get_position()
        cell = image.to_rgba(matrix[y, x])
        assert contrast(to_rgb(text.get_color()), cell[:3]) > 4


def luminance(colour):
    """Relative luminance of WCAG 2."""
    colour = np.asarray(colour)
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, two):
    low, high = sorted([luminance(one), luminance(two)])
    return (high + 0.05) / (low + 0.05)


def test_gain_of_the_window_is_that_of_the_dct():
    layers, alpha = 9, 0.3
    operators = {"window": ds.window(alpha), "traced": ds.window(jnp.asarray(0.5))}
    ax = plot.gain(operators, layers, ax=ax_of())
    k = np.arange(layers)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), k)
    np.testing.assert_allclose(
        ax.lines[0].get_ydata(), np.abs(1 - alpha + alpha * np.cos(np.pi * k / layers)), rtol=1e-12
    )
    assert [line.get_label() for line in ax.lines[:2]] == list(operators)
    assert "0: the same in all layers\n8: alternates" in ax.get_xlabel()


def test_gain_is_of_what_is_read():
    """An average of all that lies before: its columns and rows differ."""
    [line, _] = plot.gain({"ema": ds.ema(0.7)}, 2, ax=ax_of()).lines
    matrix = np.asarray(ds.operator_matrix(ds.ema(0.7), 2))
    by_hand = [np.linalg.norm(matrix @ np.array([1, sign]) / 2**0.5) for sign in (1, -1)]
    np.testing.assert_allclose(line.get_ydata(), by_hand, rtol=1e-12)


def test_similarity_shows_cosines():
    cosines = jnp.array([[1, 0.2, jnp.nan], [0.2, 1, -0.5], [jnp.nan, -0.5, 1]], jnp.bfloat16)
    ax = plot.similarity(cosines, ax=ax_of())
    [image] = ax.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), cosines.astype(float))
    assert image.get_clim() == (-1, 1)
    assert image.colorbar.ax.get_ylabel() == "cosine"


def test_similarity_over_time_respects_uneven_steps():
    ax = plot.similarity_over_time(STEPS, PAIRS, ax=ax_of())
    [mesh] = ax.collections
    np.testing.assert_array_equal(mesh.get_array(), PAIRS.T)
    corners = np.asarray(mesh.get_coordinates())
    np.testing.assert_array_equal(corners[0, :, 0], [-5, 5, 15, 30, 220, 580])
    np.testing.assert_array_equal(corners[:, 0, 1], np.arange(5) - 0.5)
    assert mesh.get_clim() == (-1, 1)
    assert mesh.colorbar.ax.get_ylabel() == "cosine"


def test_similarity_over_time_of_one_time_is_a_column():
    [mesh] = plot.similarity_over_time([7], PAIRS[:1], ax=ax_of()).collections
    assert np.asarray(mesh.get_coordinates())[0, :, 0].tolist() == [6.5, 7.5]


def test_lightness_grows_with_a_cosine():
    """So no two cosines look alike in grey."""
    image = plot.similarity(np.eye(2), ax=ax_of()).images[0]
    mesh = plot.similarity_over_time([0], [[0.0]], ax=ax_of()).collections[0]
    for mappable in (image, mesh):
        colours = mappable.to_rgba(np.linspace(-1, 1, 200))[:, :3]
        lightness = [luminance(colour) for colour in colours]
        assert min(b - a for a, b in itertools.pairwise(lightness)) >= 0
        assert lightness[-1] - lightness[0] > 0.5


def test_spectrum_leaves_zeros_out():
    powers = {"before": [4, 1, 0.5, 0.25], "after": [4, 0.0, 0.1, 0.0]}
    ax = plot.spectrum(powers, ax=ax_of())
    before, after = ax.lines
    np.testing.assert_array_equal(before.get_ydata(), powers["before"])
    np.testing.assert_array_equal(after.get_ydata(), [4, np.nan, 0.1, np.nan])
    assert after.get_marker() not in ("", "None")  # without, a point between zeros is not seen
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] > 0


def test_spectrum_of_zeros_alone_can_be_drawn():
    ax = plot.spectrum({"nothing": np.zeros(4)}, ax=ax_of())
    ax.figure.draw_without_rendering()
    assert np.isnan(ax.lines[0].get_ydata()).all()


def test_losses_are_means_with_intervals():
    ax = plot.losses(STEPS, LOSSES, ax=ax_of())
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.mean(LOSSES["AdamW"], axis=0))
    corners = ax.collections[0].get_paths()[0].vertices
    for step, column in zip(STEPS, np.transpose(LOSSES["AdamW"]), strict=True):
        expected = scipy.stats.ttest_1samp(column, 0).confidence_interval(0.95)
        at = corners[corners[:, 0] == step, 1]
        np.testing.assert_allclose([at.min(), at.max()], expected)


def test_losses_of_one_seed_have_no_band_and_say_so():
    ax = plot.losses(STEPS, LOSSES, ax=ax_of())
    assert len(ax.collections) == 2
    assert ax.lines[1].get_label() == "one (1 seed)"
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), LOSSES["one"][0])


def test_losses_do_not_hide_a_diverged_run():
    ax = plot.losses(STEPS, LOSSES, ax=ax_of())
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [3, 7 / 3, np.nan, np.nan, 14 / 3])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["AdamW (2 seeds)", "one (1 seed)", "diverged (3 seeds, 2 diverged)"]


def test_arms_are_told_apart_without_colour():
    lines = plot.losses([0, 1], {name: [[1, 2]] for name in "abcd"}, ax=ax_of()).lines
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-.", ":"]
    powers = plot.spectrum({str(k): np.ones(3) for k in range(5)}, ax=ax_of()).lines
    assert len({line.get_marker() for line in powers}) == len(powers)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.operator(ds.window, 4), r"window"),
        (lambda: plot.operator(ds.window(0.2), 0), r"layers is 0: give 1 or more"),
        (lambda: plot.gain({"w": ds.window(0.2)}, 0), r"layers is 0: give 1 or more"),
        (lambda: plot.gain({}, 4), r"operators has to name .*: give a dict"),
        (lambda: plot.gain(ds.window(0.2), 4), r"operators has to name .*: give a dict"),
        (lambda: plot.similarity(np.ones((2, 3))), r"cosines .*\(2, 3\), not \(L, L\): give"),
        (lambda: plot.similarity(np.ones(4)), r"cosines .*\(4,\), not \(L, L\): give"),
        (lambda: plot.similarity([[1, 5], [5, 1]]), r"beyond -1 and 1: divide by the norms"),
        (
            lambda: plot.similarity_over_time(STEPS, PAIRS.T),
            r"cosines .*\(4, 5\), not \(5, L-1\): give a row for each step",
        ),
        (lambda: plot.similarity_over_time([0, 0], PAIRS[:2]), "steps have to increase: sort"),
        (lambda: plot.similarity_over_time(3, PAIRS), r"steps .*\(\), not \(times,\): give"),
        (lambda: plot.spectrum({}), "powers has to name .*: give a dict"),
        (lambda: plot.spectrum({"a": np.ones((2, 2))}), r"powers\['a'\] .*\(2, 2\), not \(L,\)"),
        (lambda: plot.spectrum({"a": [1], "b": [1, 2]}), "different depths: draw a picture"),
        (lambda: plot.losses([0, 1], {}), "losses has to name .*: give a dict"),
        (lambda: plot.losses([0, 1], {"a": [1, 2]}), r"losses\['a'\] .*\(2,\), not \(seeds, 2\)"),
        (lambda: plot.losses([0, 1], {"a": np.ones((3, 3))}), r"\(3, 3\), not \(seeds, 2\): give"),
        (lambda: plot.losses([0, 1], {"a": [[1, 2], [1]]}), "no shape.*NaN where a run has broken"),
    ],
)
def test_refuses_other_shapes_with_a_remedy(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
    assert not plt.get_fignums()


PICTURES = {
    "depth of gemma3": lambda ax: plot.depth(real("maxtext_nnx_gemma3_scan"), ax=ax),
    "depth of deepseek": lambda ax: plot.depth(real("maxtext_linen_deepseek_mtp_scan"), ax=ax),
    "depth of vit": lambda ax: plot.depth(real("bigvision_vit_unrolled_map"), ax=ax),
    "depth of three groups": lambda ax: plot.depth(real("haiku_unrolled"), ax=ax),
    "depth of 96 layers": lambda ax: plot.depth(unrolled(96, 12), ax=ax),
    "depth of 2 layers": lambda ax: plot.depth(unrolled(2, 1), ax=ax),
    "operator, 6": lambda ax: plot.operator(ds.sharpen(0.5), 6, ax=ax),
    "operator, 12": lambda ax: plot.operator(ds.sharpen(0.5), 12, ax=ax),
    "operator, 96": lambda ax: plot.operator(ds.ema(0.7), 96, ax=ax),
    "gain, 2": lambda ax: plot.gain(OPERATORS, 2, ax=ax),
    "gain, 96": lambda ax: plot.gain(OPERATORS, 96, ax=ax),
    "similarity": lambda ax: plot.similarity(np.eye(24), ax=ax),
    "similarity over time": lambda ax: plot.similarity_over_time(STEPS, PAIRS, ax=ax),
    "spectrum": lambda ax: plot.spectrum({"all": 10.0 ** -np.arange(24)}, ax=ax),
    "losses": lambda ax: plot.losses(STEPS, LOSSES, ax=ax),
}


@pytest.mark.parametrize("size", [(4, 3), (10, 8), None], ids=["small", "large", "own"])
@pytest.mark.parametrize("picture", PICTURES)
def test_all_text_can_be_read(picture, size, monkeypatch):
    """None is smaller than 8 points, none leaves the figure, and none overlaps another."""
    ax = PICTURES[picture](
        plt.figure(figsize=size, layout="constrained").subplots() if size else None
    )
    figure, drawn, draw = ax.figure, [], Text.draw
    figure.canvas.draw()  # a first time, since the layout settles in two
    monkeypatch.setattr(Text, "draw", lambda self, *a: drawn.append(self) or draw(self, *a))
    figure.canvas.draw()
    boxes = {
        text: text.get_window_extent() for text in drawn if text.get_visible() and text.get_text()
    }
    assert len(boxes) > 5
    for text, box in boxes.items():
        assert text.get_fontsize() >= 8, text
        assert (figure.bbox.min <= box.min).all(), text
        assert (box.max <= figure.bbox.max).all(), text
    for (one, a), (two, b) in itertools.combinations(boxes.items(), 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, two)


@pytest.mark.parametrize("picture", PICTURES)
def test_draws_into_the_axes_it_is_given_and_else_into_one_figure(picture):
    ax = ax_of()
    assert PICTURES[picture](ax) is ax
    assert not plt.get_fignums()
    assert [PICTURES[picture](None).figure.number] == plt.get_fignums()


@pytest.mark.parametrize("missing", ["matplotlib", "scipy"])
def test_names_the_extra_where_it_is_missing(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
import depthsmooth
try:
    from depthsmooth import plot
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.startswith(f"depthsmooth.plot needs {missing}")
    assert ran.stdout.endswith(", of the extra: python -m pip install -e '.[plot]'\n")


def test_a_limit_shows_small_cosines():
    """Colours end at it, and the bar says that values are beyond."""
    matrix = [[1, 0.1], [0.1, np.nan]]
    drawn = plot.similarity(matrix, limit=0.2, ax=ax_of())
    assert drawn.images[0].get_clim() == (-0.2, 0.2)
    assert drawn.images[0].colorbar.extend == "max"
    drawn = plot.similarity_over_time([0, 1], [[-0.5], [0.5]], limit=0.4, ax=ax_of())
    assert drawn.collections[0].get_clim() == (-0.4, 0.4)
    assert drawn.collections[0].colorbar.extend == "both"
    assert plot.similarity(matrix, ax=ax_of()).images[0].colorbar.extend == "neither"
    for limit in (0, -1, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"limit is .* but has to be a cosine above 0"):
            plot.similarity(matrix, limit=limit, ax=ax_of())


@pytest.mark.parametrize("low", [0.4, 1e-3, 1e-9])
def test_powers_have_labels_however_far_apart(low):
    drawn = plot.spectrum({"before": [1.0, 0.7, low]}, ax=ax_of())
    drawn.figure.canvas.draw()
    bottom, top = drawn.get_ylim()
    at = [
        label.get_text()
        for label in drawn.get_yticklabels()
        if bottom <= label.get_position()[1] <= top
    ]
    assert len(at) >= 2
    assert all(float(text.replace("−", "-")) > 0 for text in at)
