"""What is compared in each task: its models, arms and seeds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import shlex
from collections.abc import Callable, Iterable
from typing import get_args

from benchmarks.quality.aligned import Aligned
from benchmarks.quality.arms import Arm, Base, Scope
from benchmarks.quality.diffusion import Diffusion
from benchmarks.quality.digits import Digits
from benchmarks.quality.mlp import Mlp
from benchmarks.quality.policy import Policy
from benchmarks.quality.reversal import Reversal
from benchmarks.quality.starts import Start, Starts
from benchmarks.quality.studies import Study
from benchmarks.quality.task import TUNING, Task
from benchmarks.quality.text import Text
from depthsmooth.transform import Variant

TASKS: dict[str, Callable[..., Task]] = {
    "reversal": Reversal,
    "text": Text,
    "digits": Digits,
    "mlp": Mlp,
    "diffusion": Diffusion,
    "policy": Policy,
    "dropped": functools.partial(Aligned, "dropped"),
    "private": functools.partial(Aligned, "private"),
    **{
        f"{start}_{how}": functools.partial(Starts, start, how == "coupled")
        for start in get_args(Start)
        for how in ("free", "coupled")
    },
}
PURPOSE = tuple(name for name in TASKS if name in ("dropped", "private") or "_" in name)
"""Those that ask why: what they learn is what mlp and text do."""
NOISY = tuple(range(TUNING, TUNING + 10))
"""Tuning seeds where losses differ much from seed to seed."""
CHANCE = {
    "reversal": math.log(32),
    "text": math.log(256),
    "digits": math.log(10),
    "mlp": math.log(10),
    "cifar100": math.log(100),
    "diffusion": 1.0,
    "policy": 1.0,
    "dropped": math.log(10),
    "private": math.log(10),
    **{name: math.log(256) for name in TASKS if name.endswith(("_free", "_coupled"))},
}
"""The loss of who knows nothing."""
ALPHAS = (0.05, 0.1, 0.2, 0.35, 0.5)
BASES: tuple[Base, ...] = ("adamw", "sgd", "muon")
VARIANTS: tuple[Variant, ...] = ("standard", "norm_preserving", "directional")
SCOPES: tuple[Scope, ...] = ("full", "proj")
PUBLISHED = (
    Arm("adamw"),
    *(
        arm
        for alpha in (0.2, 0.5)
        for arm in (
            Arm("adamw", scope="proj", alpha=alpha),
            *Arm("adamw", scope="proj", alpha=alpha).controls,
        )
    ),
)
SMOOTHED = Arm("adamw", alpha=0.2)
OWN = (0.125, 0.25, 0.5, 1.0, 2.0)
"""What the layers' rate is multiplied by, with a best rate for the rest beside each."""
DEEPER_OWN = (1 / 32, 1 / 16, *OWN)
"""For MLPs without norms, whose layers want the smallest of those."""
DEPTHS = (4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Source:
    """A task and the data that its options name, for any process to build.

    Attributes:
      task: its name.
      text: a file or directory to learn from, in ``text``.
      cifar100: the directory with the python files of CIFAR-100, for ``digits``.
    """

    task: str
    text: pathlib.Path | None = None
    cifar100: pathlib.Path | None = None

    @property
    def name(self) -> str:
        """What its results are kept under."""
        return "cifar100" if self.cifar100 else self.task

    def options(self) -> str:
        """The options that name it."""
        paths = {"--text": self.text, "--cifar100": self.cifar100}
        named = [f"{key} {shlex.quote(str(path))}" for key, path in paths.items() if path]
        return " ".join([self.task, *named])


@functools.cache
def build(source: Source, layers: int | None = None, steps: int | None = None) -> Task:
    """The task, of its own size if none is given."""
    given = {"layers": layers, "steps": steps, "text": source.text, "cifar100": source.cifar100}
    return TASKS[source.task](**{key: value for key, value in given.items() if value})


def studies(task: str, quick: bool = False) -> list[Study]:
    """What is run for a task."""
    return _quick() if quick else list(_STUDIES[task]())


def _quick() -> list[Study]:
    """So small that it shows nothing but that it runs."""
    arms = Arm("adamw"), Arm("adamw", alpha=0.2)
    return [Study("quick", 5, 10, arms, rates=(0.5, 1.0), tuning=(100,), test=(0, 1))]


def _reversal() -> Iterable[Study]:
    yield Study("published", 24, 200, PUBLISHED, rates=(1.0,))
    yield Study("published", 48, 100, PUBLISHED, rates=(1.0,))
    arms = [arm for base in BASES for arm in _grid(base)]
    yield Study("grid", 24, 200, tuple(arms), untuned=tuple(_grid("adamw")), swept=True)
    yield from _depths(200, 0.1, 0.5)
    yield _mechanism(24, 200)
    yield _own(24, 200)


def _text() -> Iterable[Study]:
    arms = [arm for base in ("adamw", "muon") for arm in _selection(base)]
    yield Study("grid", 16, 300, tuple(arms), untuned=tuple(_selection("adamw")), swept=True)
    yield from _depths(150)
    yield _mechanism(16, 300)
    yield _own(16, 300)


def _digits() -> Iterable[Study]:
    arms = [arm for base in BASES for arm in _selection(base)]
    untuned = tuple(_selection("adamw"))
    yield Study("grid", 12, 300, tuple(arms), untuned=untuned, swept=True, tuning=NOISY)
    yield dataclasses.replace(_mechanism(12, 300), tuning=NOISY)
    yield dataclasses.replace(_own(12, 300), tuning=NOISY)


def _mlp() -> Iterable[Study]:
    arms = tuple(_selection("adamw"))
    yield Study("grid", 24, 300, arms, untuned=arms, swept=True, tuning=NOISY)
    yield dataclasses.replace(_own(24, 300, DEEPER_OWN), tuning=NOISY)


def _diffusion() -> Iterable[Study]:
    arms = tuple(_selection("adamw"))
    yield Study("grid", 9, 600, arms, untuned=arms, swept=True)
    yield _own(9, 600)


def _policy() -> Iterable[Study]:
    arms = tuple(_selection("adamw"))
    yield Study("grid", 12, 100, arms, untuned=arms, swept=True)
    yield _own(12, 100)


def _noise() -> Iterable[Study]:
    """As the layers' own rate, with the mean over layers, for what is the same in all of them."""
    arms = [Arm("adamw", alpha=alpha, own=own) for alpha in (0.0, 0.2, 0.5) for own in DEEPER_OWN]
    arms += [Arm("adamw", alpha=0.9, control="mean", own=own) for own in DEEPER_OWN]
    yield Study("noise", 24, 300, tuple(arms), tuning=NOISY)


def _start() -> Iterable[Study]:
    yield Study("start", 16, 300, (Arm("adamw"),))


def _depths(steps: int, *alphas: float) -> Iterable[Study]:
    """The claim is tested with the published share, for it must not change with depth."""
    arms = SMOOTHED.plain, SMOOTHED, *(Arm("adamw", alpha=alpha) for alpha in alphas)
    for layers in DEPTHS:
        yield Study("depth", layers, steps, arms, SMOOTHED)


def _mechanism(layers: int, steps: int) -> Study:
    arms = SMOOTHED.plain, SMOOTHED
    return Study("mechanism", layers, steps, arms, SMOOTHED, untuned=arms, observed=True)


def _own(layers: int, steps: int, factors: tuple[float, ...] = OWN) -> Study:
    """The base optimizer and smoothing, each with the layers' rate tuned beside the rest's."""
    arms = (Arm("adamw", alpha=alpha, own=own) for alpha in (0.0, 0.1, 0.2, 0.5) for own in factors)
    return Study("own", layers, steps, tuple(arms))


def _grid(base: Base) -> Iterable[Arm]:
    """All of alpha, variant and scope, and controls of the published variant and scope."""
    yield Arm(base)
    for alpha, variant, scope in itertools.product(ALPHAS, VARIANTS, SCOPES):
        yield Arm(base, variant, scope, alpha)
    for alpha in ALPHAS:
        yield from Arm(base, scope="proj", alpha=alpha).controls


def _selection(base: Base) -> Iterable[Arm]:
    """All of alpha; the other variants and scope at one, with controls of that alpha."""
    yield from (Arm(base, alpha=alpha) for alpha in (0.0, *ALPHAS))
    yield Arm(base, scope="proj", alpha=0.2)
    yield Arm(base, "norm_preserving", alpha=0.2)
    yield Arm(base, "directional", alpha=0.2)
    yield from Arm(base, alpha=0.2).controls


_STUDIES = {
    "reversal": _reversal,
    "text": _text,
    "digits": _digits,
    "mlp": _mlp,
    "diffusion": _diffusion,
    "policy": _policy,
    "cifar100": _digits,
    "dropped": _noise,
    "private": _noise,
    **{name: _start for name in TASKS if name.endswith(("_free", "_coupled"))},
}
