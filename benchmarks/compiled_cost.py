"""What smoothing costs, read off programs compiled for devices that need not be there.

``python -m benchmarks.compiled_cost`` compiles for TPU v5e and v6e (``pip install libtpu``) and for
H100 (``pip install jax-cuda12-plugin jax-cuda12-pjrt``, with ``ptxas`` on the PATH), as far as
their compilers are installed, and prints for each step, on one of eight chips:

- moved: elements read and written, for each parameter. On TPU the compiler's own figure, on H100
  the operands and results of all kernels.
- temp: temporary memory, in parts of one chip's part of the largest leaf.
- kernels: how many that touch tensors, of 1 % of the largest part and more.
- sent: elements that other chips send it, for each parameter, and in how many exchanges.

Nothing is run, so there is no noise. The figures of targets that are not installed are kept.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from jax.sharding import AxisType, Mesh, NamedSharding

import depthsmooth as ds
from benchmarks import hlo, results, targets

LAYERS, STAGES, OUTPUTS, LEAVES = 24, 4, 4096, 3
INPUTS = 16384  # so that a layer's part on one chip is too large to be fetched ahead
INPUTS_OF_MUON = 2048  # which needs far more memory
RULES = ds.Depth.from_rules({"layers/.*": 0})
VARIANTS = ("standard", "norm_preserving", "directional")
ALONE = ("scale", *VARIANTS, "shrunk")
MEASURES = ("neighbours", "full")

Tree = Mapping[str, Any]
Row = dict[str, Any]

LAYOUTS = {
    "together": (1, AxisType.Auto),
    "split, auto": (STAGES, AxisType.Auto),
    "split, explicit": (STAGES, AxisType.Explicit),
    "split, manual": (STAGES, AxisType.Auto),
    "split, not told": (STAGES, AxisType.Auto),
}
"""Over how many chips the layers are split, and how; features are split over the rest."""


def parameters(dtype: str, inputs: int = INPUTS) -> Tree:
    """Kernels whose parts on one chip exceed its fast memory, and vectors."""
    kernel = jax.ShapeDtypeStruct((LAYERS, inputs, OUTPUTS), dtype)
    layers = {f"kernel_{k}": kernel for k in range(LEAVES)}
    return {
        "layers": layers | {"scale": jax.ShapeDtypeStruct((LAYERS, OUTPUTS), dtype)},
        "head": jax.ShapeDtypeStruct((OUTPUTS, 256), dtype),
    }


def specs_of(tree: Tree) -> Tree:
    """Features over one mesh axis, layers over the other."""

    def spec(path: str, leaf: jax.Array, place: ds.Place | None) -> jax.P:
        features = [None] * (leaf.ndim - 1) + ["model"]
        return jax.P("stage", *features[1:]) if place else jax.P(*features)

    return RULES.map(spec, tree)


def stencil(variant: str, **keywords: Any) -> optax.GradientTransformation:
    """The transformation alone."""
    if variant == "shrunk":
        return ds.shrink_over_depth(ds.window(0.1), **keywords)
    return ds.smooth_over_depth(0.1, variant=variant, **keywords)


OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sgd": (lambda: optax.sgd(0.1, 0.9), lambda **keywords: ds.sgd(0.1, 0.9, **keywords)),
    "adamw": (lambda: optax.adamw(0.1), lambda **keywords: ds.adamw(0.1, **keywords)),
    "muon": (
        lambda: ds.muon(0.1, alpha=0.0, depth=RULES),
        lambda **keywords: ds.muon(0.1, **keywords),
    ),
}


class Chips:
    """The devices of one target, and what is compiled for them."""

    def __init__(self, name: str, layout: str) -> None:
        self._name, self._layout = name, layout
        stages, kind = LAYOUTS[layout]
        chips = np.array(targets.devices(name)).reshape(stages, -1)
        self._mesh = Mesh(chips, ("stage", "model"), axis_types=(kind, kind))

    def shard(self, tree: Tree, specs: Tree) -> Tree:
        """The tree, with the shardings that its leaves have."""
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(self._mesh, spec)
            ),
            tree,
            specs,
        )

    def keywords(self, params: Tree) -> dict[str, Any]:
        """What an optimizer is told of depth."""
        if self._layout == "split, not told":
            return {"depth": RULES}
        name = {"axis_name": "stage"} if self._layout == "split, manual" else {}
        return {"depth": RULES.resolve(params), **name}

    def cost(
        self,
        step: Callable[..., Any],
        trees: tuple[Tree, ...],
        specs: tuple[Tree, ...],
        out: Any,
        donated: tuple[int, ...] = (),
    ) -> Row:
        """Compiles a step whose arguments and results are laid out by these specs."""
        if self._layout == "split, manual":
            step = jax.shard_map(step, mesh=self._mesh, in_specs=specs, out_specs=out)
        arguments = tuple(map(self.shard, trees, specs))
        shardings = jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), out)
        with jax.set_mesh(self._mesh):
            jitted = jax.jit(step, donate_argnums=donated, out_shardings=shardings)
            program = jitted.lower(*arguments).compile(targets.options(self._name))
        return self._read(program, trees[0])

    def _read(self, program: jax.stages.Compiled, params: Tree) -> Row:
        leaves = jax.tree.leaves(params)
        size = leaves[0].dtype.itemsize
        of_chip = size * sum(leaf.size for leaf in leaves) / targets.CHIPS
        largest = size * max(leaf.size for leaf in leaves) / targets.CHIPS
        text = program.as_text()
        kernels = hlo.kernels(text)
        moved = (program.cost_analysis() or {}).get("bytes accessed")
        if self._name == "h100" or moved is None:
            moved = sum(kernel.moved for kernel in kernels)
        sent: dict[str, list[int]] = collections.defaultdict(list)
        for collective in hlo.collectives(text):
            sent[collective.kind].append(collective.size)
        return {
            "moved": round(moved / of_chip, 2),
            "temp": round(program.memory_analysis().temp_size_in_bytes / largest, 2),
            "kernels": sum(kernel.moved >= largest / 100 for kernel in kernels),
            "sent": {
                kind: {"exchanges": len(sizes), "elements": round(sum(sizes) / of_chip, 4)}
                for kind, sizes in sorted(sent.items())
            },
        }


def stencil_cost(target: str, layout: str, dtype: str, variant: str) -> Row:
    """Of the transformation alone; of a product with a number, which moves as much, for "scale"."""
    chips, tree = Chips(target, layout), parameters(dtype)
    specs = specs_of(tree)
    if variant == "scale":
        tx = optax.scale(0.5)
    else:
        tx = stencil(variant, **chips.keywords(chips.shard(tree, specs)))
    count = jax.tree.map(lambda _: jax.P(), jax.eval_shape(tx.init, tree))

    def step(updates: Tree, state: Any) -> Tree:
        updated: Tree = tx.update(updates, state)[0]
        return updated

    return chips.cost(step, (tree, jax.eval_shape(tx.init, tree)), (specs, count), specs)


def optimizer_cost(target: str, layout: str, dtype: str, name: str, variant: str) -> Row:
    """Of a step of a complete optimizer, with new parameters; unsmoothed for "plain"."""
    chips = Chips(target, layout)
    tree = parameters(dtype, INPUTS_OF_MUON if name == "muon" else INPUTS)
    specs = specs_of(tree)
    plain, smoothed = OPTIMIZERS[name]
    keywords = chips.keywords(chips.shard(tree, specs))
    tx = plain() if variant == "plain" else smoothed(variant=variant, **keywords)
    state = jax.eval_shape(tx.init, tree)
    of_shape = {
        leaf.shape: spec
        for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
    }
    of_state = jax.tree.map(lambda leaf: of_shape.get(leaf.shape, jax.P()), state)

    def step(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trees, out = (tree, state, tree), (specs, of_state)
    return chips.cost(step, trees, (*out, specs), out, donated=(0, 1))


def metrics_cost(target: str, layout: str, dtype: str, variant: str) -> Row:
    """Of measuring updates: each layer with the next, or with all others for "full"."""
    chips, tree = Chips(target, layout), parameters(dtype)
    specs = specs_of(tree)
    keywords = chips.keywords(chips.shard(tree, specs)) | {"full": variant == "full"}
    return chips.cost(lambda tree: ds.depth_metrics(tree, **keywords), (tree,), (specs,), jax.P())


def cases(target: str) -> list[tuple[str, ...]]:
    """Target, layout, dtype, step and variant of every figure."""
    steps = {
        "together": {
            "stencil": ALONE,
            **dict.fromkeys(OPTIMIZERS, ("plain", *VARIANTS)),
            "metrics": MEASURES,
        },
        "split, auto": {"stencil": ALONE, "adamw": ("plain", *VARIANTS), "metrics": MEASURES},
        "split, explicit": {"stencil": ALONE, "metrics": MEASURES},
        "split, manual": {"stencil": ALONE, "metrics": MEASURES},
        "split, not told": {"stencil": ("standard",)},
    }
    return [
        (target, layout, dtype, step, variant)
        for dtype in ("float32", "bfloat16")
        for layout in LAYOUTS
        for step, variants in steps[layout].items()
        for variant in variants
    ]


def measure(target: str, layout: str, dtype: str, step: str, variant: str) -> Row:
    """One row of the table."""
    if step == "stencil":
        cost = stencil_cost(target, layout, dtype, variant)
    elif step == "metrics":
        cost = metrics_cost(target, layout, dtype, variant)
    else:
        cost = optimizer_cost(target, layout, dtype, step, variant)
    named = {"layout": layout, "dtype": dtype, "step": step, "variant": variant}
    return {"target": target, **named, **cost}


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'':5} {'dtype':9} {'layers':16} {'step':8} {'variant':16} "
        f"{'moved':>6} {'temp':>5} {'kernels':>7}  sent"
    ]
    for row in rows:
        sent = ", ".join(
            f"{about['exchanges']} {kind} {about['elements']:.3g}"
            for kind, about in row["sent"].items()
        )
        lines.append(
            f"{row['target']:5} {row['dtype']:9} {row['layout']:16} {row['step']:8} "
            f"{row['variant']:16} {row['moved']:6.2f} {row['temp']:5.2f} {row['kernels']:7}  {sent}"
        )
    return "\n".join(lines)


def markdown(result: Mapping[str, Any]) -> str:
    """What is moved in float32, for the documentation."""
    named = {
        "a product with a number": ("together", "stencil", "scale"),
        "smoothing": ("together", "stencil", "standard"),
        '… with `variant="norm_preserving"`': ("together", "stencil", "norm_preserving"),
        '… with `variant="directional"`': ("together", "stencil", "directional"),
        "`ds.shrink_over_depth`": ("together", "stencil", "shrunk"),
        "SGD with momentum": ("together", "sgd", "plain"),
        "… smoothed": ("together", "sgd", "standard"),
        "AdamW": ("together", "adamw", "plain"),
        "… smoothed ": ("together", "adamw", "standard"),
        '… `variant="norm_preserving"`': ("together", "adamw", "norm_preserving"),
        "smoothing layers that are split, automatic mode": ("split, auto", "stencil", "standard"),
        "… explicit mode": ("split, explicit", "stencil", "standard"),
        "… in `shard_map`": ("split, manual", "stencil", "standard"),
        "… by a `Depth` that does not know": ("split, not told", "stencil", "standard"),
        "`ds.depth_metrics`": ("together", "metrics", "neighbours"),
        "… with `full=True`": ("together", "metrics", "full"),
        "… of layers that are split, automatic mode": ("split, auto", "metrics", "neighbours"),
        "… with `full=True` ": ("split, auto", "metrics", "full"),
    }
    columns = []
    for about in result["targets"].values():
        moved = {
            (row["layout"], row["step"], row["variant"]): row["moved"]
            for row in about["rows"]
            if row["dtype"] == "float32"
        }
        columns.append([f"{moved[case]:.2f}" for case in named.values()])
    titles = ["| |", *(f" {name} |" for name in result["targets"])]
    lines = ["".join(titles), "|---|" + "---:|" * len(columns)]
    rows = zip(named, *columns, strict=True)
    return "\n".join(lines + [f"| {' | '.join(map(str.strip, row))} |" for row in rows])


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(targets.NAMES), metavar="target")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(targets.NAMES)
    if unknown:
        parser.error(f"no target {min(unknown)!r}: there are {', '.join(targets.NAMES)}")
    jax.config.update("jax_platforms", "cpu")
    known = results.read("compiled_cost") or {}
    rows = {name: known.get("targets", {}).get(name) for name in targets.NAMES}
    for name in arguments.targets:
        if targets.missing(name):
            print(f"{name}: left out, as {targets.missing(name)} is not installed")
            continue
        measured = [
            measure(*case) for case in tqdm.tqdm(cases(name), desc=name, unit="step", leave=False)
        ]
        rows[name] = {"compiler": targets.version(name), "rows": measured}
        print(table(measured), flush=True)
    result = {
        "kernels": [LEAVES, LAYERS, INPUTS, OUTPUTS],
        "targets": {name: about for name, about in rows.items() if about},
    }
    results.write("compiled_cost", result, on="compiled, not run")


if __name__ == "__main__":
    main()
