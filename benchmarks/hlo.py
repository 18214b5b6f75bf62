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

    Of what a kernel only takes slices of, these alone count.

    Example:
      >>> kernels("ENTRY %main {\n  %p = f32[4] parameter(0)\n  ROOT %m = f32[4] fusion(%p)\n}")
      [Kernel(op='fusion', moved=32)]
    """
    programs = {
        header.group(1): block.splitlines()
        for block in re.split(r"\n}", text)
        if (header := re.search(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", block, re.M))
    }
    entry = text[text.index("ENTRY") :]
    sizes: dict[str, int] = {}
    found = []
    for line in entry[: entry.index("\n}")].splitlines():
        match = _KERNEL.match(line)
        if match is None:
            continue
        size = sizes[match["name"]] = sum(_sizes(match["type"]))
        if match["op"] in _NO_KERNELS or match["op"].endswith("-done"):
            continue
        operands = re.findall(r"%([\w.-]+)", match["in"].split("), ")[0])
        read = [sizes.get(name, 0) for name in operands]
        called = re.search(r"calls=%?([\w.-]+)", line)
        if called and called[1] in programs:
            slices = _slices(programs[called[1]])
            read = [slices.get(k, whole) for k, whole in enumerate(read)]
        elif "slice" in match["op"]:
            read = [size]
        elif match["op"].endswith("-start"):
            read = []  # what is read is part of the result, beside what is written
        found.append(Kernel(match["op"], size + sum(read)))
    return found


def _slices(program: list[str]) -> dict[int, int]:
    """What is taken, in bytes, of the parameters of which only slices are used."""
    lines = [match for line in program if (match := _KERNEL.match(line))]

    def taken(name: str) -> int | None:
        """How much of a value is used; None if all of it is."""
        uses = re.compile(rf"%{re.escape(name)}(?![\w.-])")
        total = 0
        for user in [line for line in lines if uses.search(line["in"])]:
            if user["op"] in ("slice", "dynamic-slice"):
                part: int | None = sum(_sizes(user["type"]))
            else:
                part = taken(user["name"]) if user["op"] == "bitcast" else None
            if part is None:
                return None
            total += part
        return total or None

    parameters = {
        int(line["in"].split(")")[0]): taken(line["name"])
        for line in lines
        if line["op"] == "parameter"
    }
    return {index: part for index, part in parameters.items() if part is not None}


def _sizes(shapes: str) -> Iterator[int]:
    """The size of each array in a type, in bytes."""
    for dtype, dimensions in _SHAPE.findall(shapes):
        bits = _BITS.search(dtype)
        size = max(int(bits[0]) // 8, 1) if bits else 1
        yield size * math.prod(int(n) for n in dimensions.split(",") if n)
