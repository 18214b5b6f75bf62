"""RESULTS.md: the verdicts, what they rest on, and every arm that ran."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.quality.arms import Arm, Base
from benchmarks.quality.studies import CANDIDATES
from benchmarks.report.claims import OPPONENTS, Claim, claims
from benchmarks.report.evidence import Evidence, last
from benchmarks.report.statistics import RELEVANT, Comparison, Verdict, corrected

NEGLIGIBLE = 1.03
"""The ratio of step times up to which cost is negligible."""
OPPONENT_NAMES = {
    "untuned": "minus base, both at 1×",
    "retuned": "minus base, each at its best",
    "shuffled": "minus shuffled layers",
    "shrunk": "minus smaller step",
    "mean": "minus mean over layers",
}
PICTURES = {
    "alpha": "What α does, at one learning rate and at each arm's best",
    "rates": "Loss at every learning rate: AdamW, the smoothed arm, its controls",
    "depth": "What smoothing gains or loses, against the number of layers",
    "mechanism": "Updates, gradients and hidden states over training, all at one learning rate",
}
MEASURED = {
    "accuracy": "accuracy",
    "bits_per_byte": "bits per byte",
    "reward": "mean reward",
    "exact": "exact match",
}


def document(evidence: Sequence[Evidence], pictures: Sequence[str]) -> str:
    """The whole page."""
    found = claims(evidence)
    parts = [
        _INTRODUCTION,
        _verdicts(found),
        recommendation(evidence, found),
        _replication(evidence),
        *(_claim(claim) for claim in found),
        _overhead(),
        *(
            f"![{PICTURES[name]}](docs/results/{name}.png)\n\n*{PICTURES[name]}.*"
            for name in pictures
        ),
        "## Every arm that ran",
        *(_arms(each, base) for each in evidence for base in each.bases),
        _HOW,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def recommendation(evidence: Sequence[Evidence], found: Sequence[Claim]) -> str:
    """What to do, in three lines that README repeats."""
    return ""


def _verdicts(found: Sequence[Claim]) -> str:
    rows = []
    for claim in found:
        verdicts = [finding.verdict for finding in claim.findings]
        counts = [f"{verdicts.count(each)} {each.value}" for each in Verdict if each in verdicts]
        title = f"[{claim.title}](#{_anchor(claim.title)})"
        won = [_won(claim, name) for name in ("untuned", "retuned", "shuffled")]
        rows.append([title, f"**{claim.verdict.value}**", ", ".join(counts), *won])
    ratios = [row["ratio"] for row in _training()]
    cost = f"a training step takes {min(ratios):.3f} to {max(ratios):.3f} times as long"
    title = "[Negligible overhead](#negligible-overhead)"
    rows.append([title, f"**{_overhead_verdict().value}**", cost, "", "", ""])
    names = ("untuned base", "retuned base", "shuffled layers")
    header = ["claim", "verdict", "settings", *(f"beats {name} in" for name in names)]
    best = [
        f"{claim.title.lower()} ({finding.setting})"
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
    rows = []
    for finding in claim.findings:
        rows.append(
            [
                finding.setting,
                f"`{finding.arm}`",
                f"{finding.ours:.4f}",
                *(_compared(finding.comparisons.get(name)) for name in OPPONENTS),
                finding.verdict.value,
            ]
        )
    header = [
        "setting",
        "chosen arm",
        "mean",
        *(OPPONENT_NAMES[name] for name in OPPONENTS),
        "verdict",
    ]
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


def _arms(evidence: Evidence, base: Base) -> str:
    """One row for each arm of a study."""
    study = evidence.study
    tuned = len(study.rates) > 1
    arms = evidence.arms(base)
    plain = Arm(base)
    compared = corrected(
        [Comparison.between(evidence.values(a), evidence.values(plain)) for a in arms[1:]]
    )
    untuned = {
        arm: Comparison.between(evidence.values(arm, rate=1.0), evidence.values(plain, rate=1.0))
        for arm in study.untuned
        if tuned and arm.base == base and arm != plain
    }
    chosen = study.claim(base, evidence.results)
    others = [name for name in MEASURED if name in _curves(evidence)]
    rows = []
    for arm, comparison in zip(arms, [None, *compared], strict=True):
        name = f"**`{arm}`**" if arm == chosen else f"`{arm}`"
        cells = [name, f"{evidence.rate(arm):g}×", f"{evidence.values(arm).mean():.4f}"]
        cells += [f"{evidence.values(arm, last(other)).mean():.4f}" for other in others]
        cells += _details(comparison) if comparison else ["", "", ""]
        if untuned:
            cells.append(str(untuned[arm]) if arm in untuned else "")
        rows.append(cells)
    header = ["arm", "rate", "final loss", *(MEASURED[name] for name in others)]
    header += [f"minus {base}, each at its rate", "better", "p (Holm)"]
    header += ["minus it, both at 1×"] if untuned else []
    title = f"{evidence.task}, {study.name}, {base}: {study.layers} layers, {study.steps} steps"
    note = f"{len(study.test)} seeds. {evidence.environment()}."
    return (
        f"<details><summary>{title} ({len(arms)} arms)</summary>\n\n{table(header, rows)}\n\n"
        f"*{note}*\n\n</details>"
    )


def _curves(evidence: Evidence) -> Iterable[str]:
    run = evidence.study.tests(evidence.study.arms[0], evidence.rate(evidence.study.arms[0]))[0]
    curves: dict[str, Any] = evidence.results.lines[run]["curves"]
    return curves


def _details(comparison: Comparison) -> list[str]:
    difference = comparison.difference
    return [str(comparison), f"{difference.better}/{difference.seeds}", f"{comparison.p:.2g}"]


def _compared(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    sign = "better" if comparison.better else "worse" if comparison.worse else "same"
    return f"{comparison} {sign}"


def _training() -> list[dict[str, Any]]:
    measured = results.read("speed") or {"rows": []}
    return [row for row in measured["rows"] if row["part"] == "training"]


def _overhead_verdict() -> Verdict:
    small = max(row["ratio"] for row in _training()) <= NEGLIGIBLE
    return Verdict.SUPPORTED if small else Verdict.NOT_SUPPORTED


def _overhead() -> str:
    rows = [
        [
            str(row["layers"]),
            str(row["width"]),
            f"{row['parameters']:,}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["quartiles"]),
        ]
        for row in _training()
    ]
    measured = json.loads((results.DIRECTORY / "speed.json").read_text())
    header = ["layers", "width", "parameters", "step time, smoothed over plain", "quartiles"]
    return (
        "## Negligible overhead\n\nMeasured: whole training steps with as many tokens for each "
        f"parameter as nanochat has, in pairs; negligible is up to {NEGLIGIBLE:g}. What is "
        f"compiled for TPU and H100 is in [docs/sharding.md](docs/sharding.md).\n\n"
        f"{table(header, rows)}\n\n"
        f"*{measured['device']}; Python {measured['python']}, JAX {measured['jax']}*"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


_INTRODUCTION = f"""\
# Does Gradient Smoothing help?

Small models, trained on a CPU, with repeated seeds and controls. This page is made out of
[benchmarks/results](benchmarks/results) by `python -m benchmarks.report`.

- **Arms** are named `base/variant/scope/α/control`. Every arm has its own best learning rate, found
  on seeds 100 to 102 and tested on seeds 0 to 9, with the same start, batches and examination for
  all arms. The smoothed arm that a claim is tested with was chosen on the former seeds as well.
- **Controls** of an arm: *shuffled layers*, the same mixing with layers in a random order, another
  for each seed; *smaller step*, each layer gets the norm that mixing would have left, and no
  mixing; *mean over layers*, the share α is taken from the mean over all layers.
- **Differences** are paired over seeds, with 95 % t-intervals; below 0 is better. "Better" and
  "worse" are said by the paired t-test at 5 %, with Holm's correction over each table.
- **Supported**: smoothing beats its base optimizer *with a retuned learning rate*, and shuffled
  layers. **Not supported**: it is worse than one of them, or the interval excludes a gain of
  {100 * RELEVANT:.2f} %, half of the published replication's. **Inconclusive**: neither. In several
  settings a claim is supported if it is in all, and not supported if in none, and refused in some.
"""

_HOW = f"""\
## How to repeat it

Each line in `benchmarks/results/quality/*.jsonl` is a run, with the command that repeats it;
`python -m benchmarks.quality TASK` makes all that are missing, and `--help` says how long that
took. Where the best rate is at the edge of ¼ to 4, the next power of 2 is tried too, down to
{CANDIDATES[0]:g} and up to {CANDIDATES[-1]:g}.
"""
