"""What a compiled program does, read off its text: what devices send, what kernels move."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = re.compile(r"\d+")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<type>.+?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?P<start>-start)?\("
)
_KERNEL = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<op>[\w-]+)\((?P<in>.*)"
)
_NO_KERNELS = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: such as ``"collective-permute"``.
      size: what one device has of its result, in bytes.
    """

    kind: str
    size: int


def collectives(text: str) -> list[Collective]:
    """What devices send each other.

    Example:
      >>> collectives("%a = f32[2,3]{1,0} collective-permute(%b), channel_id=1")
      [Collective(kind='collective-permute', size=24)]
      >>> collectives("%a = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%b)")
      [Collective(kind='collective-permute', size=16)]
    """
    found = []
    for match in _COLLECTIVE.finditer(text):
        sizes = [size for size in _sizes(match["type"]) if size > 4 or not match["start"]]
        if match["start"] and match["kind"] != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]  # operands come first
        found.append(Collective(match["kind"], sum(sizes)))
    return found


class Kernel(NamedTuple):
    """One instruction of the main program that runs on the device.

    Attributes:
      op: such as ``"fusion"``.
      moved: its operands and results, in bytes.
    """

    op: str
    moved: int


def kernels(text: str) -> list[Kernel]:
    r"""What runs one after another: instructions of the entry that are more than names.

    Example:
      >>> kernels("ENTRY %main {\n  %p = f32[4] parameter(0)\n  ROOT %m = f32[4] fusion(%p)\n}")
      [Kernel(op='fusion', moved=32)]
    """
    entry = text[text.index("ENTRY") :]
    sizes: dict[str, int] = {}
    found = []
    for line in entry[: entry.index("\n}")].splitlines():
        match = _KERNEL.match(line)
        if match is None:
            continue
        sizes[match["name"]] = sum(_sizes(match["type"]))
        if match["op"] in _NO_KERNELS or match["op"].endswith("-done"):
            continue
        operands = re.findall(r"%([\w.-]+)", match["in"].split("), ")[0])
        moved = sizes[match["name"]] + sum(sizes.get(name, 0) for name in operands)
        found.append(Kernel(match["op"], moved))
    return found


def _sizes(shapes: str) -> Iterator[int]:
    """The size of each array in a type, in bytes."""
    for dtype, dimensions in _SHAPE.findall(shapes):
        bits = _BITS.search(dtype)
        size = max(int(bits[0]) // 8, 1) if bits else 1
        yield size * math.prod(int(n) for n in dimensions.split(",") if n)
