"""Pictures of layouts, operators and runs, drawn with Matplotlib: the extra ``plot``.

Each function draws into the ``ax`` that it is given, or into a new figure, and returns the Axes.
What a colour says is also said by lightness, a line style or a sign, so that pictures can be read
with every kind of colour vision and in grey.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from numpy.typing import ArrayLike

from depthsmooth.depth.layout import Depth
from depthsmooth.operators.general import operator_matrix
from depthsmooth.operators.stencil import Operator

try:
    import scipy.fft
    import scipy.stats
    from matplotlib import pyplot as plt
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import to_rgb
    from matplotlib.image import AxesImage

    from depthsmooth.plot.rows import Row, rows_of
except ModuleNotFoundError as missing:
    raise ImportError(
        f"depthsmooth.plot needs {missing.name}, of the extra: python -m pip install -e '.[plot]'"
    ) from missing

__all__ = [
    "depth",
    "gain",
    "losses",
    "operator",
    "similarity",
    "similarity_over_time",
    "spectrum",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Those of Okabe and Ito."""
STYLES = ("-", "--", "-.", ":", (0, (9, 3)))
"""One fewer than the colours, so that 30 arms differ."""
GREY = "#595959"
SMALL = 8
"""Size in points of labels of which there are many; any smaller is not legible in print."""
SQUARE = (7.6, 6)
"""Size in inches of a figure for a matrix and its colour bar."""
WRITTEN = {"group": {"fontweight": "bold"}, "tensor": {}, "left alone": {"color": GREY}}
LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue add to the lightness of a colour."""

Shape = tuple[int | str, ...]


def depth(depth: Depth, *, ax: Axes | None = None) -> Axes:
    """The layout: which leaves hold which layers, along which axes.

    A row is a tensor, a column is a layer. Layers in one array are one bar, and layers with leaves
    of their own are boxes. Stacks that take turns are boxes on a string, with a shade for each
    stack. Where rows are too many to be read, one stands for a container of tensors laid out alike.

    Args:
      depth: one that has met a tree.
      ax: where to draw; None makes a figure of the height that the rows need.

    Returns:
      The Axes.

    Raises:
      ValueError: if ``depth`` has not met a tree, or no layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from matplotlib.figure import Figure
      >>> from depthsmooth import plot
      >>> params = {"layers": jnp.ones((12, 4)), "head": jnp.ones(4)}
      >>> layout = Depth.from_rules({"layers": 0}).resolve(params)
      >>> ax = plot.depth(layout, ax=Figure().subplots())
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['layers', 'layers', 'head']
    """
    if not isinstance(depth, Depth) or not depth.tracks:
        raise ValueError(
            f"{depth!r} has no layers that can be drawn. Give the Depth of a tree: "
            "trace_depth(fn, params, batch), find_depth(params) or rules.resolve(params)."
        )
    most = 60 if ax is None else int(_size(ax)[1] / (1.3 * SMALL))
    rows = rows_of(depth, most)
    ax = _axes(ax, (8, 0.19 * max(len(rows), 4) + 0.8))
    letters = int(_size(ax)[0] / (1.25 * SMALL))
    labels = [_shortened(row.label, letters) for row in rows]
    notes = ax.secondary_yaxis("right")
    notes.set_ylabel("axis, parameters", fontsize=SMALL, labelpad=8)
    for side, texts in ((ax, labels), (notes, [row.note for row in rows])):
        side.set_yticks(range(len(rows)), texts, fontsize=SMALL)
        side.tick_params("y", length=0)
        side.spines[:].set_visible(False)
        for label, row in zip(side.get_yticklabels(), rows, strict=True):
            label.set(parse_math=False, **WRITTEN[row.kind])  # patterns hold $
    for y, row in enumerate(rows):
        _draw_layers(ax, y, row)
    ax.spines["bottom"].set_visible(True)
    ax.set(xlabel="layer", xlim=(-0.7, max(depth.groups.values()) - 0.3))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    _count_on(ax.xaxis)
    return ax


def operator(operator: Operator, layers: int, *, ax: Axes | None = None) -> Axes:
    """The matrix of an operator: what each layer is written takes from each that is read.

    Entries are written in the cells where they fit, up to 12 layers; beyond, a minus marks those
    below 0.

    Args:
      operator: the operator, at step 0.
      layers: the number of layers L.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if the operator is none, or there is no layer.

    Example:
      >>> from depthsmooth import plot, window
      >>> from matplotlib.figure import Figure
      >>> ax = plot.operator(window(0.2), 3, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.texts]
      ['0.90', '0.10', '0', '0.10', '0.80', '0.10', '0', '0.10', '0.90']
    """
    matrix = _matrix(operator, layers)
    ax = _axes(ax, SQUARE)
    image = _heat_map(ax, matrix, "PuOr", float(np.abs(matrix).max()) or 1, "weight")
    _write_entries(ax, image, matrix)
    ax.set(xlabel="layer read", ylabel="layer written")
    return ax


def gain(operators: Mapping[str, Operator], layers: int, *, ax: Axes | None = None) -> Axes:
    r"""What operators make of each frequency over depth.

    .. math::
        \text{gain}_k = \|S c_k\|

    with :math:`S` the matrix of an operator and :math:`c_k` the orthonormal vectors of the DCT-II.

    Args:
      operators: from the name of each to the operator, at step 0.
      layers: the number of layers L.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is no operator, or no layer.

    Example:
      >>> from depthsmooth import plot, window
      >>> from matplotlib.figure import Figure
      >>> ax = plot.gain({"window": window(0.2)}, 3, ax=Figure().subplots())
      >>> ax.lines[0].get_ydata().round(2)
      array([1. , 0.9, 0.7])
    """
    _check_names("operators", operators)
    matrices = {name: _matrix(operator, layers) for name, operator in operators.items()}
    modes = scipy.fft.dct(np.eye(layers), norm="ortho", axis=0)
    gains = {name: np.linalg.norm(matrix @ modes.T, axis=0) for name, matrix in matrices.items()}
    ax = _over_frequency(_axes(ax), gains, "gain")
    ax.axhline(1, color=GREY, linewidth=0.8, zorder=0)
    ax.set_ylim(bottom=0)
    return ax


def similarity(cosines: ArrayLike, *, limit: float = 1.0, ax: Axes | None = None) -> Axes:
    """Cosines between the updates of all layers. What is NaN stays white.

    Args:
      cosines: of shape (L, L).
      limit: the cosine from which on, up and down, colours stay the same: a low one shows small
        differences.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if the shape is another, or the values or the limit are no cosines.

    Example:
      >>> from depthsmooth import plot
      >>> from matplotlib.figure import Figure
      >>> ax = plot.similarity([[1, 0.2], [0.2, 1]], ax=Figure().subplots())
      >>> ax.images[0].get_clim()
      (-1.0, 1.0)
    """
    values = _cosines(cosines, ("L", "L"), "of every layer with every layer")
    ax = _axes(ax, SQUARE)
    _heat_map(ax, values, "cividis", _limit(limit), "cosine")
    ax.set(xlabel="layer", ylabel="layer")
    return ax


def similarity_over_time(
    steps: ArrayLike, cosines: ArrayLike, *, limit: float = 1.0, ax: Axes | None = None
) -> Axes:
    """Cosines between the updates of neighbouring layers in training. What is NaN stays white.

    Args:
      steps: of shape (times,), increasing; uneven ones as wide as they are apart.
      cosines: of shape (times, L-1).
      limit: the cosine from which on, up and down, colours stay the same.
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if the shapes are others, or the values or the limit are no cosines.

    Example:
      >>> from depthsmooth import plot
      >>> from matplotlib.figure import Figure
      >>> ax = plot.similarity_over_time([0, 10, 100], [[0], [0.1], [0.3]], ax=Figure().subplots())
      >>> [float(edge) for edge in ax.collections[0].get_coordinates()[0, :, 0]]
      [-5.0, 5.0, 55.0, 145.0]
    """
    times = _steps(steps)
    shape = (len(times), "L-1")
    values = _cosines(cosines, shape, "a row for each step, a column for each two neighbours")
    ax = _axes(ax)
    edges = np.arange(values.shape[1] + 1) - 0.5
    mesh = ax.pcolormesh(
        _edges(times), edges, values.T, cmap="cividis", vmin=-_limit(limit), vmax=limit
    )
    _colour_bar(ax, mesh, values, "cosine")
    ax.set(xlabel="step", ylabel="ℓ, of layers ℓ and ℓ + 1")
    _count_on(ax.yaxis)
    return ax


def spectrum(powers: Mapping[str, ArrayLike], *, ax: Axes | None = None) -> Axes:
    """Power at each frequency over depth, on a logarithmic scale. A zero is a gap.

    Args:
      powers: from a name to the squares of a DCT-II over depth, of shape (L,).
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is none, or the shapes differ.

    Example:
      >>> from depthsmooth import plot
      >>> from matplotlib.figure import Figure
      >>> ax = plot.spectrum({"before": [4, 1, 1], "after": [4, 0.5, 0]}, ax=Figure().subplots())
      >>> ax.lines[1].get_ydata()
      array([4. , 0.5, nan])
    """
    arrays = _arrays("powers", powers, ("L",), "one power for each frequency over depth")
    if len({power.shape for power in arrays.values()}) > 1:
        raise ValueError("powers are of different depths: draw a picture for each depth.")
    positive = {name: np.where(power > 0, power, np.nan) for name, power in arrays.items()}
    ax = _axes(ax)
    ax.set_yscale("log")
    together = np.concatenate(list(positive.values()))
    if np.nanmax(together, initial=0) < 100 * np.nanmin(together, initial=np.inf):
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))  # powers of ten are too few
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    ax.yaxis.set_major_formatter("{x:g}")
    return _over_frequency(ax, positive, "power")


def losses(steps: ArrayLike, losses: Mapping[str, ArrayLike], *, ax: Axes | None = None) -> Axes:
    """Losses of several arms: the mean over seeds, with its 95 % t-interval as a band.

    One seed has no band. Where a seed is not finite there is no mean, and the legend says how many
    have diverged.

    Args:
      steps: of shape (steps,), increasing.
      losses: from the name of an arm to its losses, of shape (seeds, steps).
      ax: where to draw; None makes a figure.

    Returns:
      The Axes.

    Raises:
      ValueError: if there is none, or the shapes are others.

    Example:
      >>> from depthsmooth import plot
      >>> from matplotlib.figure import Figure
      >>> ax = plot.losses([0, 9], {"AdamW": [[3, 2.2], [3, 2.4]]}, ax=Figure().subplots())
      >>> ax.lines[0].get_ydata(), ax.lines[0].get_label()
      (array([3. , 2.3]), 'AdamW (2 seeds)')
    """
    times = _steps(steps)
    remedy = "a row for each seed, with NaN where a run has broken off"
    arms = _arrays("losses", losses, ("seeds", len(times)), remedy)
    ax = _axes(ax)
    for (name, values), colour, style in zip(arms.items(), cycle(COLOURS), cycle(STYLES)):
        finite = np.isfinite(values)
        diverged = len(values) - int(finite.all(axis=1).sum())
        seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
        label = f"{name} ({seeds}{f', {diverged} diverged' if diverged else ''})"
        mean = np.where(finite, values, np.nan).mean(axis=0)
        ax.plot(times, mean, color=colour, linestyle=style, label=label)
        if len(values) > 1:
            ax.fill_between(times, *interval(values), color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="step", ylabel="loss (mean, 95 % interval)")
    ax.legend()
    return ax


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % t-interval of the mean over the first axis, of two seeds or more."""
    finite = np.where(np.isfinite(values), values, np.nan)
    mean = finite.mean(axis=0)
    half = scipy.stats.t.ppf(0.975, len(finite) - 1) * scipy.stats.sem(finite)
    return mean - half, mean + half


def _draw_layers(ax: Axes, y: int, row: Row) -> None:
    """A bar for each run of layers that a leaf holds; a string where other layers are between."""
    bars, shades, colour = [], [], COLOURS[row.group % len(COLOURS)]
    stacks = [place for place in row.places if place.axes]
    for place in row.places:
        dark = 1 - 0.65 * stacks.index(place) / max(len(stacks) - 1, 1) if place.axes else 1
        layers = np.sort(place.layers)
        runs = np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1)
        bars += [(run[0] - 0.4, len(run) - 0.2) for run in runs]
        shades += [1 - dark * (1 - np.array(to_rgb(colour)))] * len(runs)
        if len(runs) > 1:
            ax.hlines(y, layers[0], layers[-1], colour, linewidth=1, zorder=0.5)
    ax.broken_barh(bars, (y - 0.4, 0.8), facecolors=shades, snap=False)


def _shortened(text: str, letters: int) -> str:
    """The text without its middle, if it is too long; ends tell paths apart."""
    start = letters // 3
    return text if len(text) <= letters else f"{text[:start]}…{text[start + 1 - letters :]}"


def _heat_map(ax: Axes, values: np.ndarray, cmap: str, limit: float, label: str) -> AxesImage:
    image = ax.imshow(values, cmap, vmin=-limit, vmax=limit, interpolation="nearest")
    _colour_bar(ax, image, values, label)
    _count_on(ax.xaxis)
    _count_on(ax.yaxis)
    return image


def _colour_bar(ax: Axes, image: ScalarMappable, values: np.ndarray, label: str) -> None:
    """With points at its ends where values are beyond them."""
    low, high = image.get_clim()
    beyond = bool((values < low).any()), bool((values > high).any())
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[beyond]
    ax.figure.colorbar(image, ax=ax, label=label, extend=extend)


def _write_entries(ax: Axes, image: AxesImage, matrix: np.ndarray) -> None:
    """Numbers where they fit; else a minus below 0, which in grey looks like above 0."""
    cell = min(_size(ax)) / len(matrix)
    texts = [f"{entry:.2f}".replace("-", "−") if entry else "0" for entry in matrix.flat]
    inks = np.where(image.to_rgba(matrix)[..., :3] @ LUMA < 0.5, "white", "black")
    if len(matrix) <= 12 and 0.62 * SMALL * max(map(len, texts)) <= cell:
        for (y, x), text in zip(np.ndindex(matrix.shape), texts, strict=True):
            ax.text(x, y, text, color=inks[y, x], size=SMALL, ha="center", va="center")
    else:
        y, x = np.nonzero(matrix < 0)
        ax.scatter(x, y, (cell / 2) ** 2, inks[y, x], marker="_", linewidths=cell / 10)


def _over_frequency(ax: Axes, curves: Mapping[str, np.ndarray], ylabel: str) -> Axes:
    for (name, values), colour, marker in zip(curves.items(), cycle(COLOURS), cycle("osD^v")):
        ax.plot(values, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
    last = len(values) - 1
    ends = f"0: the same in all layers\n{last}: alternates from layer to layer"
    ax.set(xlabel=f"frequency over depth\n{ends}", ylabel=ylabel, xlim=(-0.5, last + 0.5))
    ax.legend()
    _count_on(ax.xaxis)
    return ax


def _count_on(axis: Axis) -> None:
    axis.set_major_locator(ticker.MaxNLocator("auto", integer=True, min_n_ticks=1))


def _edges(centres: np.ndarray) -> np.ndarray:
    """The middles between neighbours, and as far beyond the first and the last."""
    steps = np.diff(centres) if len(centres) > 1 else np.ones(1)
    middles = centres[:-1] + np.diff(centres) / 2
    return np.array([centres[0] - steps[0] / 2, *middles, centres[-1] + steps[-1] / 2])


def _axes(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _size(ax: Axes) -> tuple[float, float]:
    """Width and height in points, before labels are given room."""
    extent = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    return 72 * extent.width, 72 * extent.height


def _matrix(operator: Operator, layers: int) -> np.ndarray:
    if layers < 1:
        raise ValueError(f"layers is {layers}: give 1 or more.")
    return np.asarray(operator_matrix(operator, layers), np.float64)


def _steps(steps: ArrayLike) -> np.ndarray:
    times = _array("steps", steps, ("times",), "one number for each time")
    if not (np.diff(times) > 0).all():
        raise ValueError("steps have to increase: sort them, and what belongs to them.")
    return times


def _cosines(cosines: ArrayLike, shape: Shape, remedy: str) -> np.ndarray:
    values = _array("cosines", cosines, shape, remedy)
    if (np.abs(values) > 1.01).any():
        raise ValueError("cosines are beyond -1 and 1: divide by the norms of both updates.")
    return values


def _limit(limit: float) -> float:
    if not 0 < limit <= 1:
        raise ValueError(f"limit is {limit}, but has to be a cosine above 0, up to 1.")
    return limit


def _array(name: str, values: ArrayLike, shape: Shape, remedy: str) -> np.ndarray:
    """The values, if they have the shape, in which a word is any one size."""
    wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    try:
        array: np.ndarray = np.asarray(values, np.float64)
    except ValueError as error:
        raise ValueError(f"{name} has no shape, not {wanted}: give {remedy}.") from error
    sizes = dict(zip(shape, array.shape, strict=False))
    fits = tuple(size if isinstance(size, int) else sizes.get(size) for size in shape)
    if not array.size or array.shape != fits:
        raise ValueError(f"{name} has the shape {array.shape}, not {wanted}: give {remedy}.")
    return array


def _arrays(
    name: str, values: Mapping[str, ArrayLike], shape: Shape, remedy: str
) -> dict[str, np.ndarray]:
    _check_names(name, values)
    return {key: _array(f"{name}[{key!r}]", array, shape, remedy) for key, array in values.items()}


def _check_names(name: str, values: Mapping[str, object]) -> None:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{name} has to name what is drawn: give a dict, of one item or more.")
