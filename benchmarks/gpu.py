"""What smoothing costs and does on one GPU, in one command of less than nine minutes on an H100.

``python -m benchmarks.gpu`` measures, of 24 layers:

- bandwidth: bytes read and written per second by the stencil, a scale, and a device copy;
- optimizer: AdamW's step in bfloat16, with and without smoothing;
- training: the whole step, with as many tokens for each parameter as nanochat has;
- text: AdamW, AdamW with a rate of the layers' own, and AdamW with smoothing, on the source code of
  installed packages, each at the best of a few rates, on as many seeds as time allows.

Each part is written to ``results/gpu.json`` when it is done, and the same command goes on from
there. ``--toy`` is so small that a CPU runs it, and shows nothing but that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import hashlib
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import depthsmooth as ds
from benchmarks import results
from benchmarks.report.statistics import Comparison
from benchmarks.speed import TOKENS_PER_PARAMETER, compiled, pairs, repeated, summary

LAYERS, ALPHA = 24, 0.1
TUNING, SEEDS = 100, tuple(range(8))
FEWEST = 3
"""Seeds that are tested, whatever time is left."""
RATES, OWN, ALPHAS = (0.5, 1.0, 2.0, 4.0), (0.25, 0.5), (0.1, 0.2)
EXAMINED = 64
"""Windows of held-out text in a batch of examination; there are four of these."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the parts are.

    Attributes:
      stencil: numbers in each layer of the array whose bandwidth is measured.
      width: of the transformer that is timed.
      context: tokens in a sequence.
      batch: sequences that are computed at once.
      rounds: pairs of timed steps.
      text_width: of the transformer that is trained.
      steps: of its training.
      rate: its learning rate, which is multiplied by ``RATES``.
    """

    stencil: int
    width: int
    context: int
    batch: int
    rounds: int
    text_width: int
    steps: int
    rate: float


FULL = Size(2**25, 1024, 1024, 16, 20, 384, 400, 1e-3)
TOY = Size(2**12, 16, 16, 4, 3, 16, 20, 1e-2)


class Block(nn.Module):
    """Causal attention, then an MLP, each normalised before and added to the stream."""

    heads: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps the stream (batch, context, width) to itself; ``nn.scan`` wants the None."""
        batch, context, width = x.shape
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=jnp.bfloat16, param_dtype=self.param_dtype
        )
        norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16, param_dtype=self.param_dtype)
        hidden = dense(3 * width, name="qkv")(norm(name="attention_norm")(x))
        queries, keys, values = jnp.split(hidden.reshape(batch, context, self.heads, -1), 3, -1)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + dense(width, name="out")(mixed.reshape(x.shape))
        hidden = dense(4 * width, name="mlp_in")(norm(name="mlp_norm")(x))
        return x + dense(width, name="mlp_out")(nn.gelu(hidden)), None


class Transformer(nn.Module):
    """Bytes (batch, context) to logits (batch, context, 256), computed in bfloat16."""

    width: int
    param_dtype: Any
    layers: int = LAYERS

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Applies embedding, blocks, norm and head; blocks are computed again going back."""
        normal = nn.initializers.normal(0.02)
        shape = tokens.shape[-1], self.width
        positions = self.param("positions", normal, shape, self.param_dtype)
        x = nn.Embed(256, self.width, param_dtype=self.param_dtype, name="embed")(tokens)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        heads = max(1, self.width // 64)
        stream = (x + positions).astype(jnp.bfloat16)
        x, _ = blocks(heads, self.param_dtype, name="blocks")(stream, None)
        x = nn.LayerNorm(dtype=jnp.float32, param_dtype=self.param_dtype, name="norm")(x)
        return nn.Dense(256, param_dtype=self.param_dtype, name="head")(x).astype(jnp.float32)


def loss_of(model: Transformer, params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per byte of windows (batch, context + 1)."""
    logits = model.apply(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def bandwidth(size: Size, dtype: str) -> Row:
    """Gigabytes per second that are read and written, by each of three programs."""
    updates = {"layers": jnp.ones((LAYERS, size.stencil), dtype)}
    smooth = ds.smooth_over_depth(ALPHA, depth=ds.Depth.from_rules({"layers": 0}))
    state = smooth.init(updates)
    programs: dict[str, Callable[[Any], Any]] = {
        "copy": lambda u: jax.tree.map(jnp.copy, u),
        "scale": lambda u: jax.tree.map(lambda x: x * jnp.asarray(0.9, x.dtype), u),
        "stencil": lambda u: smooth.update(u, state)[0],
    }
    ready = {name: compiled(program, updates)[0] for name, program in programs.items()}
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(size.rounds + 1):
        for name, program in ready.items():
            start = time.perf_counter()
            jax.block_until_ready([program(updates) for _ in range(4)][-1])
            if turn:  # the first warms up
                taken[name].append((time.perf_counter() - start) / 4)
    moved = 2 * updates["layers"].nbytes / 1e9
    rates = {name: round(moved / statistics.median(times), 1) for name, times in taken.items()}
    return {"dtype": dtype, "gigabytes": round(moved / 2, 3), **rates}


def timed_model(size: Size) -> tuple[Transformer, Any, int, list[optax.GradientTransformation]]:
    """A transformer in bfloat16, its parameters, how many, and AdamW without and with smoothing."""
    model = Transformer(size.width, jnp.bfloat16)
    tokens = jnp.zeros((1, size.context), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    depth = ds.trace_depth(model.apply, params, tokens)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return model, params, count, [optax.adamw(1e-4), ds.adamw(1e-4, alpha=ALPHA, depth=depth)]


def optimizer(size: Size) -> Row:
    """AdamW's step, with new parameters."""
    _, params, count, txs = timed_model(size)
    grads = jax.tree.map(jnp.ones_like, params)
    programs, steps = [], []
    for tx in txs:

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        programs.append(compiled(step, params, state, grads, donate=(0, 1)))
        steps.append(repeated(programs[-1][0], params, state, grads))
    return summary(pairs(*steps, size.rounds), programs) | {"parameters": count}


def training(size: Size) -> Row:
    """The whole step: gradients of several batches in turn, their mean, and AdamW."""
    model, params, count, txs = timed_model(size)
    at_once = size.batch * size.context
    batches = max(1, round(count * TOKENS_PER_PARAMETER / at_once))
    shape = batches, size.batch, size.context + 1
    windows = jax.random.randint(jax.random.key(1), shape, 0, 256)
    programs, steps = [], []
    for tx in txs:

        def step(params: Any, state: Any, windows: jax.Array, tx: Any = tx) -> tuple[Any, Any]:
            def add(total: Any, some: jax.Array) -> tuple[Any, None]:
                grads = jax.grad(functools.partial(loss_of, model))(params, some)
                return jax.tree.map(jnp.add, total, grads), None

            total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), windows)
            grads = jax.tree.map(lambda leaf: leaf / batches, total)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        programs.append(compiled(step, params, state, windows, donate=(0, 1)))
        steps.append(repeated(programs[-1][0], params, state, windows))
    row = summary(pairs(*steps, max(3, size.rounds // 4)), programs)
    return row | {"parameters": count, "tokens": batches * at_once}


Arm = tuple[float, float]
"""α, and what the layers' rate is multiplied by."""
BASE: Arm = (0.0, 1.0)


def sources(most: int) -> np.ndarray:
    """The first bytes of the source code of all installed packages."""
    root, content = pathlib.Path(sysconfig.get_path("purelib")), b""
    for path in sorted(root.rglob("*.py")):
        content += path.read_bytes()
        if len(content) >= most:
            break
    return np.frombuffer(content[:most], np.uint8)


class Learner:
    """Trains on text: one program for all arms, rates and seeds.

    Attributes:
      parameters: how many.
      digest: SHA-256 of the text.
      compile_s: how long the program took to compile.
    """

    def __init__(self, size: Size, text: np.ndarray) -> None:
        self.digest = hashlib.sha256(text.tobytes()).hexdigest()
        self.size = size
        self.model = Transformer(size.text_width, jnp.float32)
        half = len(text) // 20
        self.held_out = jnp.asarray(text[-2 * half :].reshape(2, half))
        self.train = jnp.asarray(text[: -2 * half])
        tokens = jnp.zeros((1, size.context // 4), jnp.int32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), tokens)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        self.depth = ds.trace_depth(self.model.apply, shapes, tokens)
        number = jnp.zeros([])
        self.program, self.compile_s = compiled(
            self._run, jnp.int32(0), number, number, number, self.train, self.held_out
        )

    def loss(self, arm: Arm, rate: float, seed: int) -> float:
        """On held-out text at the end: one half for the seeds that tune, the other for others."""
        numbers = (jnp.float32(number) for number in (*arm, self.size.rate * rate))
        return float(self.program(jnp.int32(seed), *numbers, self.train, self.held_out))

    def _run(
        self,
        seed: jax.Array,
        alpha: jax.Array,
        own: jax.Array,
        rate: jax.Array,
        train: jax.Array,
        held_out: jax.Array,
    ) -> jax.Array:
        context = self.size.context // 4
        start, batches, examined = jax.random.split(jax.random.key(seed), 3)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, 1.0, max(1, self.size.steps // 10), self.size.steps
        )
        factors = ds.diagonal(lambda layers, _: jnp.full(layers, own))
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.95),
            ds.smooth_over_depth(alpha, depth=self.depth),
            ds.augment_over_depth(factors, depth=self.depth),
            optax.add_decayed_weights(0.1, self.depth.decay_mask),
            optax.scale_by_learning_rate(lambda count: rate * schedule(count)),
        )

        def windows(text: jax.Array, key: jax.Array, count: int) -> jax.Array:
            starts = jax.random.randint(key, (count, 1), 0, text.size - context)
            return text[starts + jnp.arange(context + 1)].astype(jnp.int32)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = windows(train, key, 2 * self.size.batch)
            grads = jax.grad(functools.partial(loss_of, self.model))(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = self.model.init(start, jnp.zeros((1, context), jnp.int32))
        keys = jax.random.split(batches, self.size.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        text = held_out[(seed >= TUNING).astype(int)]
        losses = jax.lax.map(
            lambda key: loss_of(self.model, params, windows(text, key, EXAMINED)),
            jax.random.split(examined, 4),
        )
        return losses.mean()


def candidates(tried: Mapping[tuple[Arm, float], float]) -> list[tuple[Arm, float]]:
    """The arms and rates of the sweep: those of AdamW first, and then of others around its best."""
    base = [(BASE, rate) for rate in RATES]
    if not set(base) <= set(tried):
        return base
    best = min(base, key=tried.__getitem__)[1]
    own = [((0.0, own), rate * best) for own in OWN for rate in (1.0, 2.0)]
    smoothed = [((alpha, 1.0), rate * best) for alpha in ALPHAS for rate in (1.0, 2**0.5)]
    return [*base, *own, *smoothed]


def chosen(tried: Mapping[tuple[Arm, float], float]) -> dict[str, tuple[Arm, float]]:
    """The best of AdamW, of the layers' own rate, and of each α, by name."""

    def best(arms: Callable[[Arm], bool]) -> tuple[Arm, float]:
        return min((one for one in tried if arms(one[0])), key=tried.__getitem__)

    names = {"AdamW": best(lambda arm: arm == BASE)}
    names["the layers' own rate"] = best(lambda arm: arm[0] == 0)
    for alpha in ALPHAS:
        names[f"α = {alpha:g}"] = best(lambda arm, alpha=alpha: arm[0] == alpha)
    return names


def text(learner: Learner, before: Row, is_over: Callable[[], bool]) -> Iterator[Row]:
    """What has been learnt, after each run; goes on from what was before."""
    row: Row = {"tried": [], "tested": [], **before}
    row |= {"parameters": learner.parameters, "digest": learner.digest}
    row |= {"steps": learner.size.steps, "compile_s": round(learner.compile_s, 1)}

    def tried() -> dict[tuple[Arm, float], float]:
        return {((alpha, own), rate): loss for alpha, own, rate, loss in row["tried"]}

    while untried := [one for one in candidates(tried()) if one not in tried()]:
        arm, rate = untried[0]
        row["tried"].append([*arm, rate, learner.loss(arm, rate, TUNING)])
        yield row
    for seed in SEEDS:
        if is_over() and seed >= FEWEST:
            return
        for name, (arm, rate) in chosen(tried()).items():
            if [name, seed] not in [one[:2] for one in row["tested"]]:
                row["tested"].append([name, seed, learner.loss(arm, rate, seed)])
                yield row


def main() -> None:
    """Measures what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="so small that it shows nothing")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no seed is begun")
    given = parser.parse_args()
    began = time.monotonic()
    size, name = (TOY, "gpu_toy") if given.toy else (FULL, "gpu")
    if not given.toy and jax.default_backend() != "gpu":
        parser.error("there is no GPU here. --toy runs on a CPU.")
    kept = results.read(name) or {}
    if kept.get("device") != results.device():
        kept = {}

    def keep(part: str, row: Any) -> None:
        kept[part] = row
        kept["date"] = datetime.date.today().isoformat()
        results.write(name, kept)
        print(f"{time.monotonic() - began:5.0f} s  {part}", flush=True)

    parts: dict[str, Callable[[], Any]] = {
        "bandwidth": lambda: [bandwidth(size, dtype) for dtype in ("bfloat16", "float32")],
        "optimizer": lambda: optimizer(size),
        "training": lambda: training(size),
    }
    for part, measure in parts.items():
        if part not in kept:
            keep(part, measure())
    learner = Learner(size, sources(2**18 if given.toy else 2**26))
    for row in text(
        learner, kept.get("text", {}), lambda: time.monotonic() - began > 60 * given.minutes
    ):
        keep("text", row)
    print(f"\n{cost_table(kept)}\n\n{text_table(kept)}")


def cost_table(kept: Row) -> str:
    """What it costs, in Markdown."""
    lines = ["| | copy | scale | stencil |", "|---|---:|---:|---:|"]
    for row in kept["bandwidth"]:
        rates = " | ".join(f"{row[name]:.0f} GB/s" for name in ("copy", "scale", "stencil"))
        lines.append(f"| {row['dtype']}, {row['gigabytes']:g} GB | {rates} |")
    lines += ["", "| | plain | smoothed | ratio | compiled in |", "|---|---:|---:|---:|---:|"]
    for name, title in (("optimizer", "AdamW's step"), ("training", "training step")):
        row = kept[name]
        times = " | ".join(f"{ms:.2f} ms" for ms in row["ms"])
        seconds = " and ".join(f"{each:.0f} s" for each in row["compile_s"])
        size = f"{row['parameters'] / 1e6:.0f} M parameters"
        lines.append(f"| {title}, {size} | {times} | {row['ratio']:.3f} | {seconds} |")
    return "\n".join(lines)


def text_table(kept: Row) -> str:
    """What was learnt, in Markdown: means over seeds, and paired differences."""
    losses: dict[str, dict[int, float]] = {}
    for name, seed, loss in kept["text"]["tested"]:
        losses.setdefault(name, {})[seed] = loss
    seeds = sorted(set.intersection(*(set(each) for each in losses.values())))
    base = np.array([losses["AdamW"][seed] for seed in seeds])
    lines = [f"| {len(seeds)} seeds | final loss | minus AdamW [95 %] |", "|---|---:|---:|"]
    for name, each in losses.items():
        ours = np.array([each[seed] for seed in seeds])
        difference = "" if name == "AdamW" else str(Comparison.between(ours, base))
        lines.append(f"| {name} | {ours.mean():.4f} | {difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
