"""RESULTS.md: the verdicts, what they rest on, and every arm that ran."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import gpu, results
from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.studies import CANDIDATES, RATES, SCREENING
from benchmarks.report import own, why
from benchmarks.report.claims import OPPONENTS, SHARE, Claim, claims, relevant_share
from benchmarks.report.evidence import Evidence, last
from benchmarks.report.markdown import difference, table
from benchmarks.report.statistics import Comparison, Verdict, corrected

TOO_HIGH = "**If the learning rate is too high and has to stay, make the steps smaller.**"
NEGLIGIBLE = 1.05
"""The ratio of step times up to which cost is negligible."""
NAMES = {
    "untuned": "minus base, both at 1×",
    "retuned": "minus base, each at its best",
    "own": "minus base, both with the layers' own rate",
    "deepest": "minus base, at the most layers",
    "shuffled": "minus shuffled layers",
    "shrunk": "minus smaller step",
    "mean": "minus mean over layers",
}
PICTURES = {
    "alpha": "What α does: at one learning rate, and with each arm at its best",
    "rates": "Loss against the learning rate, over the best of each arm",
    "depth": "What smoothing gains or loses, against the number of layers",
    "mechanism": "Updates, gradients and hidden states over training, all at one learning rate",
}
"""Those that have a section of their own; another is in that on why."""
MEASURED = {
    "accuracy": "accuracy",
    "bits_per_byte": "bits per byte",
    "reward": "mean reward",
    "exact": "exact match",
}


def document(
    evidence: Sequence[Evidence],
    begun: Sequence[str],
    pictures: Sequence[str],
    signals: why.Signals | None = None,
) -> str:
    """The whole page."""
    found = claims(evidence)
    sweeps = [each for each in evidence if each.study.swept]
    parts = [
        "# Does Gradient Smoothing help?",
        "## Recommendation\n\n" + bullets(recommendation(evidence, found)),
        _introduction(),
        _verdicts(found),
        f"Only begun, and left out: {'; '.join(begun)}." if begun else "",
        own.section(own.own_rates(evidence)),
        why.section(evidence, signals or {}, pictures),
        _tallies(_with_their_base(evidence)),
        _replication(evidence),
        *map(_claim, found),
        "\n\n".join(["## Loss at every learning rate", *map(_sweep, sweeps)]) if sweeps else "",
        _overhead(),
        _on_a_gpu(),
        *(
            f"## {PICTURES[name]}\n\n![{PICTURES[name]}](docs/results/{name}.png)"
            for name in pictures
            if name in PICTURES
        ),
        "## Every arm that ran",
        *(_arms(each, base) for each in evidence for base in each.study.bases),
        _HOW,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def recommendation(evidence: Sequence[Evidence], found: Sequence[Claim]) -> list[str]:
    """What to do, in four sentences, each with what it rests on; README repeats three."""
    settings = {
        (finding.trial.task, finding.trial.arm.base): finding
        for claim in found
        for finding in claim.findings
        if finding.trial.task
    }
    won = [
        sum(finding.comparisons[name].better for finding in settings.values())
        for name in ("retuned", "shuffled")
    ]
    won.append(sum(each.verdict is Verdict.SUPPORTED for each in settings.values()))
    advice = "it may add to that" if won[-1] else "it replaces smoothing"
    return [
        f"**Tune the learning rate first: {advice}.** With each arm at its best learning rate, the "
        f"chosen smoothed arm beat its base optimizer in {won[0]} of {len(settings)} settings, "
        f"shuffled layers in {won[1]}, and all that it has to beat in {won[2]}. A setting is a "
        "task with a base optimizer; to beat is to be significantly better.",
        *_own_rate(own.own_rates(evidence)),
        *_as_a_smaller_step(evidence),
        _safe(_with_their_base(evidence)),
    ]


def in_readme(lines: Sequence[str]) -> list[str]:
    """The recommendation without what is to be done where the rate has to stay."""
    return [line for line in lines if not line.startswith(TOO_HIGH)]


def bullets(lines: Sequence[str]) -> str:
    """In Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def _own_rate(found: Sequence[own.Own]) -> list[str]:
    """Whether the layers want a rate of their own, and whether mixing adds to it."""
    if not found:
        return []
    won, lost = (
        [sum(getattr(getattr(each, of), sign) for each in found) for of in ("gained", "mixing")]
        for sign in ("better", "worse")
    )
    advice = (
        "Then tune a learning rate for the layers alone"
        if won[0] > lost[0]
        else "A learning rate for the layers alone does not help either"
    )
    tasks = "task" if len(found) == 1 else "tasks"
    return [
        f"**{advice}.** AdamW with such a rate, which mixes nothing, beat AdamW in {won[0]} of "
        f"{len(found)} {tasks} and lost in {lost[0]}. With smoothing on top it beat that in "
        f"{won[1]} and lost in {lost[1]}."
    ]


def _as_a_smaller_step(evidence: Sequence[Evidence]) -> list[str]:
    """What is gained at the published learning rate, by smoothing and by its control."""
    arm = Arm("adamw", scope="proj", alpha=0.2)
    for each in evidence:
        if each.study.name == "published" and arm in each.study.arms:
            base = each.values(arm.plain)
            ours, control = (
                str(Comparison.between(each.values(one), base))
                for one in (arm, arm.controlled("shrunk"))
            )
            return [
                f"{TOO_HIGH} In {each.task}, α = {arm.alpha:g} changes the loss by {ours}. "
                f"Steps as small, without mixing, change it by {control}."
            ]
    return []


def _with_their_base(evidence: Sequence[Evidence]) -> list[tuple[Arm, Comparison]]:
    """All smoothed arms of grids and studies of depth with their base optimizers, by α."""
    compared: list[tuple[Arm, Comparison]] = []
    for each in evidence:
        for base in each.study.bases if each.study.name in ("grid", "depth") else ():
            arms = [arm for arm in each.arms(base) if arm.alpha and not arm.control]
            values = each.values(Arm(base))
            pairs = corrected([Comparison.between(each.values(arm), values) for arm in arms])
            compared += zip(arms, pairs, strict=True)
    return sorted(compared, key=lambda pair: pair[0].alpha)


def _safe(compared: Sequence[tuple[Arm, Comparison]]) -> str:
    """Up to which α no arm did harm, and whether there is a variant or scope to prefer."""
    harmful = min((arm.alpha for arm, one in compared if one.worse), default=math.inf)
    safe = max((arm.alpha for arm, _ in compared if arm.alpha < harmful), default=0.0)
    worse = [one.worse for arm, one in compared if arm.alpha > safe]
    advice = f"If you smooth, keep α at {safe:g} or below" if safe else "Every α did harm"
    below = (
        f"Up to there, none of {len(compared) - len(worse)} smoothed arms ended significantly "
        "worse than its base optimizer, each at its best rate. "
    )
    above = (
        f"Above it {sum(worse)} of {len(worse)} did. "
        if safe
        else (
            f"{sum(worse)} of {len(worse)} smoothed arms ended significantly worse than their base "
            "optimizer, each at its best rate. "
        )
    )
    best = "No variant or scope was significantly better with any α."
    better = collections.Counter(_kind(arm) for arm, one in compared if one.better)
    if better:
        [(kind, count)] = better.most_common(1)
        ours = [one for arm, one in compared if _kind(arm) == kind]
        best = (
            f"{kind} was significantly better most often: {count} times of {len(ours)}. It was "
            f"worse {sum(one.worse for one in ours)} times."
        )
    return f"**{advice}.** {below if safe else ''}{above if worse else ''}{best}"


def _tallies(compared: Sequence[tuple[Arm, Comparison]]) -> str:
    """How often each α, variant and scope was better or worse than its base optimizer."""
    tallies: dict[str, list[Comparison]] = {}
    names = [(f"α = {arm.alpha:g}", one) for arm, one in compared]
    names += [(_kind(arm), one) for arm, one in compared]
    for name, one in names:
        tallies.setdefault(name, []).append(one)
    rows = [
        [name, str(sum(c.better for c in ours)), str(sum(c.worse for c in ours)), str(len(ours))]
        for name, ours in tallies.items()
    ]
    header = ["smoothed arms", "significantly better", "significantly worse", "all"]
    return (
        "## Which α, variant and scope\n\nAll smoothed arms of grids and studies of depth beside "
        f"their base optimizer, each at its best rate:\n\n{table(header, rows)}"
    )


def _kind(arm: Arm) -> str:
    return f"`{arm.variant}/{arm.scope}`"


def _verdicts(found: Sequence[Claim]) -> str:
    rows = []
    for claim in found:
        verdicts = [finding.verdict for finding in claim.findings]
        counts = [f"{verdicts.count(each)} {each.value}" for each in Verdict if each in verdicts]
        title = f"[{claim.title}](#{_anchor(claim.title)})"
        won = [_won(claim, name) for name in ("untuned", "retuned", "shuffled", "shrunk")]
        rows.append([title, f"**{claim.verdict.value}**", ", ".join(counts), *won])
    ratios = [row["ratio"] for row in _training()["rows"]]
    cost = f"a training step takes {min(ratios):.3f} to {max(ratios):.3f} times as long"
    title = "[Negligible overhead](#negligible-overhead)"
    rows.append([title, f"**{_overhead_verdict().value}**", cost, "", "", "", ""])
    names = ("untuned base", "retuned base", "shuffled layers", "smaller step")
    header = ["claim", "verdict", "settings", *(f"beats {name} in" for name in names)]
    best = [
        f"{claim.title.lower()} ({finding.trial.setting})"
        for claim in found
        for finding in claim.findings
        if finding.beats_all
    ]
    every = (
        f"Smoothing beats the retuned base and *every* control in: {'; '.join(best) or 'nothing'}."
    )
    return f"## Verdicts\n\n{table(header, rows)}\n\n{every}"


def _won(claim: Claim, opponent: str) -> str:
    met = [each.comparisons[opponent] for each in claim.findings if opponent in each.comparisons]
    return f"{sum(each.better for each in met)} of {len(met)}" if met else ""


def _claim(claim: Claim) -> str:
    met = [name for name in OPPONENTS if any(name in each.comparisons for each in claim.findings)]
    rows = [
        [
            finding.trial.setting,
            f"`{finding.trial.arm}`",
            f"{finding.ours:.4f}",
            *(difference(finding.comparisons.get(name)) for name in met),
            finding.verdict.value,
        ]
        for finding in claim.findings
    ]
    header = ["setting", "smoothed arm", "mean", *(NAMES[name] for name in met), "verdict"]
    return f"## {claim.title}\n\nMeasured: {claim.measured}.\n\n{table(header, rows)}"


def _replication(evidence: Sequence[Evidence]) -> str:
    """The published comparison beside the same of ours, and the controls at its learning rate."""
    published = results.read("published") or {"rows": []}
    sections = []
    for row in published["rows"]:
        size = row["layers"], row["steps"]
        for each in evidence:
            if each.study.name == "published" and (each.study.layers, each.study.steps) == size:
                sections.append(_repeated(each, row, published["arm"]))
    if not sections:
        return ""
    heading = f"## The published comparison, repeated\n\nPublished in {published['source']}."
    return "\n\n".join([heading, *sections])


def _repeated(evidence: Evidence, row: Mapping[str, Any], name: str) -> str:
    study = evidence.study
    plain = Arm.named(name).plain
    arms = [arm for arm in study.arms if arm != plain]
    base = evidence.values(plain)
    compared = corrected([Comparison.between(evidence.values(arm), base) for arm in arms])
    difference = "{:+.4f}".format(row.get("difference", row["smoothed"] - row["adamw"]))
    if "interval" in row:
        difference += " [{:+.4f}, {:+.4f}]".format(*row["interval"])
    seeds = f"{row['seeds']} seeds"
    rows = [
        [f"published: {plain}, {seeds}", f"{row['adamw']:.4f}", "", "", ""],
        [f"published: `{name}`, {seeds}", f"{row['smoothed']:.4f}", difference, "", ""],
        [f"`{plain}`", f"{base.mean():.4f}", "", "", ""],
    ]
    for arm, comparison in zip(arms, compared, strict=True):
        rows.append([f"`{arm}`", f"{evidence.values(arm).mean():.4f}", *_details(comparison)])
    header = ["arm", "final loss", f"minus {plain} [95 %]", "better", "p (Holm)"]
    return (
        f"{study.layers} layers, {study.steps} steps, {len(study.test)} seeds of ours, all at the "
        f"published learning rate:\n\n{table(header, rows)}\n\n*{evidence.environment()}*"
    )


def _sweep(evidence: Evidence) -> str:
    """What the sensitivity is computed from."""
    rows = []
    for arm in evidence.study.compared("adamw", evidence.results):
        losses = evidence.swept(arm).mean(axis=0)
        rows.append([f"`{arm}`", f"{evidence.rate(arm):g}×", *(f"{loss:.4f}" for loss in losses)])
    header = ["arm", "its best rate", *(f"{factor:g} of it" for factor in RATES)]
    return f"{evidence.task}, mean of the final held-out loss:\n\n{table(header, rows)}"


def _arms(evidence: Evidence, base: Base) -> str:
    """One row for each arm of a study."""
    study, plain = evidence.study, Arm(base)
    arms = evidence.arms(base)
    ours = [evidence.values(arm) for arm in arms]
    compared = corrected([Comparison.between(values, ours[0]) for values in ours[1:]])
    untuned = [arm for arm in arms if arm in study.untuned and arm != plain]
    others = [name for name in MEASURED if name in _curves(evidence)]
    claimed = study.claimed(base, evidence.results)
    rows = []
    for arm, values, comparison in zip(arms, ours, [None, *compared], strict=True):
        cells = [f"**`{arm}`**" if arm == claimed else f"`{arm}`", _rate(evidence, arm)]
        cells.append(f"{values.mean():.4f}")
        cells += [f"{evidence.values(arm, last(other)).mean():.4f}" for other in others]
        cells += _details(comparison) if comparison else ["", "", ""]
        if untuned:
            pair = (evidence.values(each, rate=1.0) for each in (arm, plain) if arm in untuned)
            cells.append(str(Comparison.between(*pair)) if arm in untuned else "")
        rows.append(cells)
    header = ["arm", "rate", "final loss", *(MEASURED[name] for name in others)]
    header += [f"minus {base}, each at its rate", "better", "p (Holm)"]
    header += ["minus it, both at 1×"] if untuned else []
    title = f"{evidence.task}, {study.name}, {base}: {study.layers} layers, {study.steps} steps"
    return (
        f"<details><summary>{title} ({len(arms)} arms)</summary>\n\n{table(header, rows)}\n\n"
        f"*{len(study.test)} seeds. {evidence.environment()}.*\n\n</details>"
    )


def _rate(evidence: Evidence, arm: Arm) -> str:
    rate = evidence.rate(arm)
    return f"{rate:g}×" + " (edge)" * (rate in (CANDIDATES[0], CANDIDATES[-1]))


def _curves(evidence: Evidence) -> Mapping[str, Any]:
    arm = evidence.study.arms[0]
    return evidence.curves(evidence.study.tests(arm, evidence.rate(arm))[0])


def _details(comparison: Comparison) -> list[str]:
    difference = comparison.difference
    return [str(comparison), f"{difference.better}/{difference.seeds}", f"{comparison.p:.2g}"]


def _training() -> dict[str, Any]:
    """What was measured of whole training steps."""
    measured = results.read("speed") or {"rows": []}
    return {**measured, "rows": [row for row in measured["rows"] if row["part"] == "training"]}


def _overhead_verdict() -> Verdict:
    low, high = np.transpose([row["quartiles"] for row in _training()["rows"]])
    if (high <= NEGLIGIBLE).all():
        return Verdict.SUPPORTED
    return Verdict.NOT_SUPPORTED if (low > NEGLIGIBLE).any() else Verdict.INCONCLUSIVE


def _overhead() -> str:
    measured = _training()
    rows = [
        [
            str(row["layers"]),
            str(row["width"]),
            f"{row['parameters']:,}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["quartiles"]),
        ]
        for row in measured["rows"]
    ]
    header = ["layers", "width", "parameters", "step time, smoothed over plain", "quartiles"]
    return (
        "## Negligible overhead\n\nMeasured: whole training steps with as many tokens for each "
        f"parameter as nanochat has, in pairs; negligible is up to {NEGLIGIBLE:g} in all "
        "quartiles. What is compiled for TPU and H100: [docs/sharding.md](docs/sharding.md).\n\n"
        f"{table(header, rows)}\n\n"
        f"*{measured['device']}; Python {measured['python']}, JAX {measured['jax']}*"
    )


def _on_a_gpu() -> str:
    """What was learnt there, if anything has run."""
    kept = results.read("gpu")
    if kept is None:
        return (
            "## On a GPU\n\nNothing on this page has run on a GPU. `python -m benchmarks.gpu` "
            "(extra `bench`) trains 24 layers and 42 million parameters with the controls that "
            "matter, in less than nine minutes on an H100, and saves as it goes."
        )
    learnt = kept["text"]
    return (
        "## On a GPU\n\nSource code of installed packages, 24 layers, "
        f"{learnt['parameters'] / 1e6:.0f} million parameters, {learnt['steps']} steps; rates and "
        "factors chosen on another seed:\n\n"
        f"{gpu.text_table(kept)}\n\n*{kept['device']}; JAX {kept['jax']}; {kept['date']}*"
    )


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _introduction() -> str:
    share = 100 * relevant_share()
    return f"""\
## What was done

Small models, trained on a CPU, with repeated seeds and controls. This page is made out of
[benchmarks/results](benchmarks/results) by `python -m benchmarks.report`.

- **Arms** are named `base/variant/scope/α/control`. Every arm has its own best learning rate, to
  a factor of √2, found on seeds 100 to 105 (100 to 109 in digits, where losses are noisy), and is
  tested on seeds 0 to 9, which are examined in other held-out data; start and batches are the same
  for all arms of a seed. The smoothed arm that a claim is tested with was chosen on the former
  seeds as well, or is the published α = 0.2. Rates are told in multiples of the task's own.
- **Controls** have the α of that arm: *shuffled layers*, the same mixing with layers in a random
  order, another for each seed (with 4 layers there is but one); *smaller step*, each layer gets the
  norm that mixing would have left, and no mixing; *mean over layers*, the share α is taken from the
  mean over all layers.
- **Differences** are paired over seeds, with 95 % t-intervals; below 0 is better. "Better" and
  "worse" are said by the paired t-test at 5 %, with Holm's correction over the table.
- **Supported**: smoothing beats its base optimizer *with a retuned learning rate*, shuffled
  layers and, where it makes the step smaller, the smaller step. **Not supported**: over one of them
  it surely gains less than matters: {share:.2f} % of a loss, half of what the published replication
  gained, and {100 * SHARE:g} % of other measures. **Inconclusive**: neither. Both are corrected by
  Holm over the settings of a claim. A claim is supported if it is in all settings, and not
  supported if it is in none and refused in most.
- Intervals are over seeds, and take the learning rates and the data for given."""


_HOW = f"""\
## How to repeat it

Each line in `benchmarks/results/quality/*.jsonl` is a run, with the command that repeats it;
`python -m benchmarks.quality TASK` makes all that are missing, and `--help` says how long that
took. They need `python -m pip install -e ".[bench]"`. Rates from ¼ to 4 times the task's are tried
first, then those beyond an edge, down to {CANDIDATES[0]:g} and up to {CANDIDATES[-1]:g}, and those
beside the best, on {SCREENING} seeds; the best and those beside it on all that tune. Losses above
chance, as where training diverged, count as chance.
"""
