"""Tables and comparisons in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.statistics import Comparison


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown.

    Example:
      >>> print(table(["a", "b"], [["1", "2"]]))
      | a | b |
      | --- | --- |
      | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def difference(comparison: Comparison | None) -> str:
    """A difference, and whether it is sure."""
    if comparison is None:
        return "–"
    sign = " better" if comparison.better else " worse" if comparison.worse else ""
    return f"{comparison}{sign}"
