"""One run of one arm: the same start and the same batches, a different optimizer."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from depthsmooth import depth_metrics, smooth_over_depth, trace_depth
from depthsmooth.demo.model import Transformer
from depthsmooth.demo.text import Text
from depthsmooth.depth.paths import path_string

EVALUATIONS = 20
"""How often a run looks at the validation loss and at its updates."""
VALIDATION_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """What all runs that are compared have in common."""

    layers: int
    width: int
    steps: int
    batch: int
    context: int
    learning_rate: float
    text: str


@dataclasses.dataclass(frozen=True, order=True)
class Arm:
    """One way to train. ``alpha`` is 0 for plain AdamW.

    Attributes:
      alpha: the smoothing whose effect is studied.
      control: whether, in place of smoothing, the layers' updates are scaled by
        the factor by which that smoothing shrank them.
    """

    alpha: float = 0.0
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
      arm: how it trained.
      seed: of initialisation and batches.
      train_loss: nats per byte before each step, shape ``(steps,)``.
      evaluated_at: number of steps made at each evaluation.
      validation_loss: nats per byte at each evaluation.
      seconds_per_step: median over the steps, without the evaluations.
      shrink: the factor by which smoothing shrank (or the control scaled) the
        norm of the layers' updates.
      cosine_before: of a smoothed run, the cosine of the updates of layers i and
        i + 1 before smoothing, mean over the run, shape ``(layers - 1,)``.
      cosine_after: the same after smoothing.
    """

    arm: Arm
    seed: int
    train_loss: list[float]
    evaluated_at: list[int]
    validation_loss: list[float]
    seconds_per_step: float
    shrink: float
    cosine_before: list[float]
    cosine_after: list[float]


Step = Callable[
    [optax.Params, optax.OptState, jax.Array], tuple[optax.Params, optax.OptState, jax.Array]
]
Observe = Callable[
    [float, optax.Params, optax.OptState, jax.Array], tuple[jax.Array, jax.Array, jax.Array]
]


class Experiment:
    """The model, its depth, and the compiled steps, shared by all runs."""

    def __init__(self, config: Config, text: Text) -> None:
        self.config = config
        self.text = text
        self.model = Transformer(config.layers, config.width)
        self.init = jax.jit(self._init)
        self.depth = trace_depth(self.loss, self.abstract_params(), self.abstract_batch())
        self.step = functools.cache(self._step)

    def loss(self, params: optax.Params, windows: jax.Array) -> jax.Array:
        """Mean cross-entropy of the next byte, in nats."""
        logits = self.model.apply(params, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return jnp.mean(losses)

    def _init(self, seed: int) -> optax.Params:
        """Parameters, the same for every arm of a seed."""
        tokens = jnp.zeros((1, self.config.context), jnp.int32)
        return self.model.init(jax.random.key(seed), tokens)

    def abstract_params(self) -> optax.Params:
        """Shapes and dtypes of the parameters."""
        return jax.eval_shape(self.init, 0)

    def abstract_batch(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch."""
        shape = (self.config.batch, self.config.context + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def optimizer(self, arm: Arm, shrink: float = 1.0) -> optax.GradientTransformation:
        """AdamW with the arm's own transformation between Adam and weight decay."""
        warmup = max(1, self.config.steps // 10)
        return optax.chain(
            self.preconditioner,
            self._between(arm, shrink),
            optax.add_decayed_weights(0.1, mask=_matrices),
            optax.scale_by_learning_rate(
                optax.warmup_cosine_decay_schedule(
                    0.0, self.config.learning_rate, warmup, max(self.config.steps, warmup + 1)
                )
            ),
        )

    @functools.cached_property
    def preconditioner(self) -> optax.GradientTransformation:
        """What comes before smoothing."""
        return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))

    def _between(self, arm: Arm, shrink: float) -> optax.GradientTransformation:
        if arm.control:
            scale = optax.inject_hyperparams(optax.scale)(step_size=shrink)
            return optax.masked(scale, self._in_layers)
        if arm.alpha:
            return smooth_over_depth(arm.alpha, depth=self.depth)
        return optax.identity()

    def _in_layers(self, params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: path_string(keys) in self.depth, params
        )

    def _step(self, arm: Arm) -> Step:
        """The arm's jitted training step: new params, new state, loss."""
        tx = self.optimizer(arm)

        def step(
            params: optax.Params, state: optax.OptState, windows: jax.Array
        ) -> tuple[optax.Params, optax.OptState, jax.Array]:
            loss, gradients = jax.value_and_grad(self.loss)(params, windows)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        return jax.jit(step, donate_argnums=(0, 1))

    @functools.cached_property
    def evaluate(self) -> Callable[[optax.Params], jax.Array]:
        """The jitted validation loss."""
        windows = self.text.validation_batch(VALIDATION_WINDOWS, self.config.context)
        return functools.partial(jax.jit(self.loss), windows=jnp.asarray(windows))

    @functools.cached_property
    def observe(self) -> Observe:
        """Jitted: shrink factor, and neighbours' cosines before and after smoothing."""

        def observe(
            alpha: float, params: optax.Params, state: optax.OptState, windows: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            smooth = smooth_over_depth(alpha, depth=self.depth)
            gradients = jax.grad(self.loss)(params, windows)
            updates, _ = self.preconditioner.update(gradients, state[0], params)
            [before] = depth_metrics(updates, self.depth).values()
            smoothed, _ = smooth.update(updates, smooth.init(params))
            [after] = depth_metrics(smoothed, self.depth).values()
            shrink = jnp.linalg.norm(after.norms) / jnp.linalg.norm(before.norms)
            return shrink, before.cosines, after.cosines

        return jax.jit(observe)

    def run(self, arm: Arm, seed: int, shrink: float = 1.0) -> Iterator[float | Run]:
        """Trains; yields the loss of each step and, last, the :class:`Run`."""
        config = self.config
        params = self.init(seed)
        state = self.optimizer(arm, shrink).init(params)
        batches = self.text.batches(config.steps, config.batch, config.context, seed)
        every = max(1, config.steps // EVALUATIONS)
        losses, seconds, evaluations, observations = [], [], [], []
        for count, windows in enumerate(batches):
            if count % every == 0:
                evaluations.append((count, float(self.evaluate(params))))
                if arm.alpha and not arm.control:
                    observations.append(self.observe(arm.alpha, params, state, windows))
            began = time.perf_counter()
            params, state, loss = self.step(arm)(params, state, windows)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - began)
            yield losses[-1]
        evaluations.append((config.steps, float(self.evaluate(params))))
        before = after = np.array([])
        if observations:
            shrinks, before, after = map(np.array, zip(*observations, strict=True))
            shrink, before, after = float(shrinks.mean()), before.mean(axis=0), after.mean(axis=0)
        yield Run(
            arm=arm,
            seed=seed,
            train_loss=losses,
            evaluated_at=[count for count, _ in evaluations],
            validation_loss=[loss for _, loss in evaluations],
            seconds_per_step=float(np.median(seconds[1:] or seconds)),  # the first compiles
            shrink=shrink,
            cosine_before=before.tolist(),
            cosine_after=after.tolist(),
        )


def _matrices(params: optax.Params) -> optax.Params:
    """Weight decay is for kernels and embeddings, told by name: stacking adds an axis."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: path_string(keys).endswith(("kernel", "embedding")), params
    )
