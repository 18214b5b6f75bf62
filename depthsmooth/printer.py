"""A Depth on standard output: as wide as a terminal and in colour, or plain."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Literal

from depthsmooth.layout import Depth, table_of

if TYPE_CHECKING:
    import rich.console

NUMBERS = ("layers", "leaves", "parameters")
STYLES = {"group": "cyan", "layers": "bold green", "found by": "dim"}


def show(depth: Depth) -> None:
    """Prints a Depth: on a terminal what :func:`pretty` makes, elsewhere ``str(depth)``."""
    if sys.stdout.isatty():
        with contextlib.suppress(ModuleNotFoundError):
            from rich.console import Console

            Console().print(pretty(depth))
            return
    print(depth)


def pretty(depth: Depth) -> rich.console.Group:
    """The table of a Depth for Rich, which fits it into the width of its console."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    (heads, *rows), below = table_of(depth)
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for head in heads:
        side: Literal["left", "right"] = "right" if head in NUMBERS else "left"
        table.add_column(head, style=STYLES.get(head), justify=side, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="dim" if row[0] == "left alone" else None)
    return Group(table, Text(f"\n{below}" if below else "", style="dim", overflow="fold"))
