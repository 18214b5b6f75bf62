"""Where depth is, as users say it: rules from path patterns to the layout of the layers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from depthsmooth.depth import rule_checks as checks
from depthsmooth.depth.fitting import axes_name
from depthsmooth.depth.leaves import Axes, Place, Shape, stacked
from depthsmooth.depth.names.families import Family, name_kinds
from depthsmooth.depth.names.nodes import Known, Node
from depthsmooth.depth.paths import numbered_key, shown, some
from depthsmooth.depth.rule_checks import Found, Member
from depthsmooth.depth.rule_checks import check_tensors as check_tensors


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the layers are laid out in the leaves that a pattern matches.

    Attributes:
      axes: the axes that run over layers, outer to inner; none if each leaf holds one.
      numbered: whether a number in the path tells layers, or places in a repeating
        pattern of layers, apart.
      containers: for a sequence, the patterns and rules of its containers.
    """

    axes: Axes = ()
    numbered: bool = False
    containers: tuple[tuple[str, Rule], ...] = ()

    def __str__(self) -> str:
        """The rule as users write it."""
        containers = [
            repr(name) if rule == Rule() else f"({name!r}, {rule})"
            for name, rule in self.containers
        ]
        if containers:
            return f"sequence({', '.join(containers)})"
        axes = str(self.axes[0] if len(self.axes) == 1 else self.axes)
        if self.numbered:
            return f"interleaved({axes})" if self.axes else "numbered()"
        return axes

    @property
    def by_number(self) -> str:
        """The rule as users write it if a number tells its layers apart, else nothing."""
        return str(self) if self.numbered else ""


Axis = int | Sequence[int]
RuleLike = int | Sequence[int] | Rule


def numbered() -> Rule:
    r"""The rule for layers with leaves of their own: the number in the path is the layer.

    The number is the first, at the end of a key, that is not the same in all the
    leaves that the pattern matches, or the one that the pattern puts in parentheses:
    ``r"decoder/block_(\d+)/.*"``. One in parentheses is believed, also where a tree looks
    like a stack, or has but one layer. Numbers begin with 0 or 1; the first layer may
    have none (Haiku's ``block``, ``block_1``, …). Layers of several kinds that take turns
    have an order for each kind.

    Returns:
      The rule, for :meth:`depthsmooth.Depth.from_rules`.

    Example:
      >>> import depthsmooth as ds
      >>> params = {f"block_{i}": {"kernel": np.ones((4, 4))} for i in range(12)}
      >>> depth = ds.Depth.from_rules({"block_.*": ds.numbered()}).resolve(params)
      >>> depth["block_10/kernel"].layer
      10
    """
    return Rule(numbered=True)


def interleaved(axis: Axis) -> Rule:
    """The rule for stacks whose layers alternate: the number is the place in the pattern.

    Of k stacks the one of number j holds the layers j, k + j, 2k + j, … along ``axis``.

    Args:
      axis: the axis, or the axes from outer to inner, that runs over a stack.

    Returns:
      The rule, for :meth:`depthsmooth.Depth.from_rules`.

    Raises:
      ValueError: if the axis is no integer.

    Example:
      >>> import depthsmooth as ds
      >>> params = {"layers": {f"layers_{j}": np.ones((4, 2, 8)) for j in range(6)}}
      >>> rules = {"layers/layers_.*": ds.interleaved(axis=1)}
      >>> ds.Depth.from_rules(rules).resolve(params)["layers/layers_5"].layers
      (5, 11)
    """
    return Rule(_as_axes(axis, "interleaved"), numbered=True)


def sequence(*containers: str | tuple[str, RuleLike]) -> Rule:
    r"""The rule for containers that follow one another in depth.

    What is below a container is the tensor, so that ``in_blocks/mlp/kernel`` goes on
    in ``mid_block/mlp/kernel``.

    Args:
      *containers: for each a pattern for its path, the beginning of its leaves'
        paths; with the rule for its layers as a pair, or alone if its layers are
        not stacked: it then is one layer, or, if the pattern matches several
        containers that differ in a number, one layer each.

    Returns:
      The rule, for :meth:`depthsmooth.Depth.from_rules`. Its pattern there has to match
      the leaves of all the containers.

    Raises:
      ValueError: if there is no container, or one is not as described.

    Example:
      >>> import depthsmooth as ds
      >>> stack, block = np.ones((3, 8)), np.ones(8)
      >>> params = {"in_blocks": stack, "mid_block": block, "out_blocks": stack, "norm": block}
      >>> rules = {".*_blocks?": ds.sequence(("in_blocks", 0), "mid_block", ("out_blocks", 0))}
      >>> depth = ds.Depth.from_rules(rules).resolve(params)
      >>> [depth[path].layers for path in depth]
      [(0, 1, 2), (3,), (4, 5, 6)]
    """
    if not containers:
        raise ValueError("sequence() needs the patterns of its containers, in the order of depth.")
    pairs = [(part, Rule()) if isinstance(part, str) else part for part in containers]
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(
                f"sequence() has the container {pair!r}; it takes patterns, and pairs of a pattern "
                "and the rule for its layers, like ('decoder/layers', 0)."
            )
    rules = tuple((pattern, as_rule(pattern, rule)) for pattern, rule in pairs)
    if any(rule.containers for _, rule in rules):
        raise ValueError(
            "A sequence() cannot be a container of another: list its containers there."
        )
    return Rule(containers=rules)


def as_rule(pattern: object, rule: object) -> Rule:
    """The rule of a pattern, as users give it; raises unless they are a pattern and a rule."""
    try:
        re.compile(pattern)  # type: ignore[call-overload]
        known = isinstance(pattern, str)
    except (re.error, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"The rule {pattern!r} is no regular expression. A rule is a pattern for the whole "
            "path of a leaf, like '.*layers/.*'."
        )
    if not isinstance(rule, Rule):
        return Rule(_as_axes(rule, pattern))
    if rule.numbered and re.compile(str(pattern)).groups > 1:
        raise ValueError(
            f"The rule {pattern!r} has several pairs of parentheses, but one number tells the "
            "layers apart. Write (?:...) for the others."
        )
    return rule


def _as_axes(axes: object, rule: object) -> Axes:
    listed = axes if isinstance(axes, tuple | list) else (axes,)
    if all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in listed):
        return tuple(int(axis) for axis in listed)
    raise ValueError(
        f"The rule {rule!r} has the axis {axes!r}; it needs the integer axis that runs over the "
        "layers, like 0 or -1, a tuple of axes from outer to inner, numbered(), interleaved(axis) "
        "or sequence(...)."
    )


class AxisError(ValueError):
    """A leaf does not have the axis, or the number of layers there, that a rule says."""


def match(
    rules: Mapping[str, Rule], shapes: Mapping[str, Shape], masked: Sequence[str]
) -> dict[str, Place]:
    """The place of every leaf that a rule matches. No rule has to find what is masked.

    Raises:
      ValueError: if a rule fits the leaves in no way, or would mix nothing, or two rules
        match one leaf.
    """
    places: dict[str, Place] = {}
    for pattern, rule in rules.items():
        paths = [path for path in shapes if re.fullmatch(pattern, path)]
        checks.check_matches(pattern, paths, places, shapes, masked)
        placed = _placed(pattern, rule, paths, shapes, masked)
        if rule != Rule():  # which says that the leaves are no layers
            is_one_layer = _says_one_layer(pattern, rule)
            checks.check_mixes(pattern, rule.by_number, is_one_layer, placed, shapes, masked)
        places |= placed
    return places


def _says_one_layer(pattern: str, rule: Rule) -> bool:
    """Whether a rule says how many layers there are: by an axis, or a number in parentheses."""
    is_captured = rule.numbered and re.compile(pattern).groups > 0
    return bool(rule.axes) or is_captured or any(_says_one_layer(*of) for of in rule.containers)


def _placed(
    pattern: str,
    rule: Rule,
    paths: Sequence[str],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> dict[str, Place]:
    """The places of the leaves of one rule, in one group, or in one for each kind."""
    places: dict[str, Place] = {}
    own, rest, start = {path: shapes[path] for path in paths}, set(paths), 0
    for part, inner in rule.containers or ((pattern, rule),):
        if rule.containers:
            members = _contained(part, inner, own)
            is_masked = any(_beginning(part, path) for path in masked)
            checks.check_container(pattern, part, members, rest, own, is_masked)
        elif rule.numbered:
            members = _members_by_number(pattern, own, masked)
        else:
            members = [Member(path, shape, tensor=path) for path, shape in own.items()]
        rest -= {member.path for member in members}
        found = Found(pattern, part, inner.axes, inner.by_number, members, masked)
        # Of a masked container that it was there is known, not how long it was: enough to keep
        # those before it from those after it.
        start += _add(places, inner, found, start) or 1
    if rest:
        path = min(rest)
        raise ValueError(
            f"{shown(path, shapes[path])} is matched by the rule {pattern!r}, but is in none of "
            f"its containers {some([repr(name) for name, _ in rule.containers])}. Narrow the "
            "rule's pattern, or name the container."
        )
    check_tensors(f"the rule {pattern!r}", places, shapes)
    return places


def _add(places: dict[str, Place], rule: Rule, found: Found, start: int) -> int:
    """Places leaves from layer ``start`` on; gives their number of layers."""
    checks.check_layout(found)
    axes = {leaf.path: _axes_of(leaf, rule, found.pattern) for leaf in found.members}
    counts = {leaf.path: stacked(leaf.shape, axes[leaf.path]) for leaf in found.members}
    for leaf in found.members:
        first = found.members[0]
        if counts[leaf.path] != counts[first.path]:
            raise AxisError(
                f"{leaf} has {counts[leaf.path]} layers on {axes_name(rule.axes)}, but {first} of "
                f"the same rule {found.pattern!r} has {counts[first.path]}. The leaves of a rule "
                "share their layers: give each stack a rule of its own, or correct the axis."
                f"{checks.if_siblings(found)}"
            )
    numbers = _numbers(found)
    orders = _orders_by_kind(found, numbers)
    for leaf in found.members:
        name, order = orders.get(leaf.number, (found.group, numbers))
        j = 0 if leaf.number is None else order.index(leaf.number)
        layers = tuple(start + i * len(order) + j for i in range(counts[leaf.path]))
        if layers:
            places[leaf.path] = Place(name, leaf.tensor, axes[leaf.path], layers, "rule")
    return len(numbers) * max(counts.values(), default=0)


def _orders_by_kind(
    found: Found, numbers: Sequence[int]
) -> dict[int | None, tuple[str, Sequence[int]]]:
    """For each number, if layers are of several kinds, its group and the numbers in that.

    Those of containers in a sequence are what it says. A masked leaf counts with the shape that
    its tensor has elsewhere. Of what kind a layer is that is masked as a whole is not known: all
    numbers then count, and what they leave out keeps two apart.
    """
    if not found.by_number or found.in_sequence:
        return {}
    shapes = {leaf.tensor: leaf.shape for leaf in found.members}
    leaves: dict[int, set[Known]] = {}
    for leaf in found.members:
        if leaf.number is not None:
            leaves.setdefault(leaf.number, set()).add(Known(leaf.tensor, leaf.shape))
    for number, template, rest in _hidden(found):
        tensor = template + rest
        if number in leaves and tensor in shapes:
            leaves[number].add(Known(tensor, shapes[tensor]))
    nodes = {number: Node("", tuple(leaves[number])) for number in numbers if number in leaves}
    kinds = Family(Node("", ()), found.group, nodes).kinds
    tensors = {frozenset(name for name, _ in kind.first.tensors) for kind in kinds}
    if len(tensors) < len(kinds) or len(kinds) in (1, len(nodes)):
        return {}
    names = name_kinds(found.group, [2] * len(kinds))
    return {
        number: (name, numbers if found.is_in_part else list(kind.members))
        for name, kind in zip(names, kinds, strict=True)
        for number in kind.members
    }


def _hidden(found: Found) -> Iterator[tuple[int, str, str]]:
    """The number, the template and the rest of each masked path that is like those of members."""
    for template in {member.template for member in found.members}:
        like = re.escape(template).replace(r"\*", r"[-_]?(\d+)") + "(.*)"
        for match in filter(None, (re.fullmatch(like, path) for path in found.masked)):
            yield int(match[1]), template, match[2]


def _numbers(found: Found) -> list[int]:
    """The numbers that a rule finds, without a hole but for those that are masked."""
    numbers = {member.number for member in found.members if member.number is not None}
    if not numbers:
        return [0]
    lowest = min(numbers)
    numbers |= {number for number, _, rest in _hidden(found) if rest[:1] in ("", "/")}
    first, last = min(numbers), max(numbers)
    holes = [number for number in range(first, last + 1) if number not in numbers]
    if holes or first > 1:
        leaf = next(leaf for leaf in found.members if leaf.number == lowest)
        missing = f"without {some(map(str, holes))}" if holes else f"from {first} on"
        raise ValueError(
            f"The layers that the rule {found.pattern!r} finds, like {leaf}, have the numbers "
            f"{first} to {last} {missing}, but layers are numbered from 0 or 1 without "
            "holes. Correct the pattern, or put the number that tells layers in parentheses."
        )
    return list(range(first, last + 1))


def _axes_of(leaf: Known, rule: Rule, pattern: str) -> Axes:
    """The axes of a rule, counted from 0, in one leaf."""
    rank = len(leaf.shape)
    for axis in rule.axes:
        if not -rank <= axis < rank:
            raise AxisError(
                f"{leaf} has no axis {axis}, where the rule {pattern!r} says its "
                "layers are. Correct the axis, or give this leaf a rule of its own."
            )
    axes = tuple(axis % rank for axis in rule.axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"{leaf} has the axes {rule.axes} twice, by the rule {pattern!r}. "
            "Correct the axes, or give this leaf a rule of its own."
        )
    return axes


def _members_by_number(
    pattern: str, shapes: Mapping[str, Shape | None], masked: Sequence[str]
) -> list[Member]:
    """The leaves with the number that tells them apart, also from those that are masked."""
    if re.compile(pattern).groups:
        return [_captured(pattern, path, shape) for path, shape in shapes.items()]
    hidden = [path for path in masked if re.fullmatch(pattern, path)]
    level = _level_of_numbers(pattern, [*shapes, *hidden], shapes)
    keys = {path: [*path.split("/"), *[""] * level] for path in shapes}
    ends = {path: numbered_key(keys[path][level]) for path in shapes}
    stems = {stem for stem, number in ends.values() if number is not None}
    members = []
    for path, (stem, number) in ends.items():
        if number is None and stem not in stems:
            raise _unnumbered(path, shapes[path], pattern)
        template = "/".join([*keys[path][:level], f"{stem}*"])
        tensor = "/".join([template, *path.split("/")[level + 1 :]])
        known = path, shapes[path] or ()
        members.append(Member(*known, tensor=tensor, number=number or 0, template=template))
    return members


def _level_of_numbers(
    pattern: str, paths: Sequence[str], shapes: Mapping[str, Shape | None]
) -> int:
    """The place in the paths of the key whose number tells layers apart: the first that varies.

    Raises where another above it, or one that varies and that the pattern names, may be meant.
    """
    levels = list(itertools.zip_longest(*(path.split("/") for path in paths), fillvalue=""))
    numbers = [{numbered_key(key)[1] for key in keys} for keys in levels]
    varying = [level for level, found in enumerate(numbers) if len(found) > 1]
    numbered = [level for level, found in enumerate(numbers) if found != {None}]
    if not numbered:
        raise _unnumbered(paths[0], shapes.get(paths[0]), pattern)
    chosen = (varying or numbered)[0]
    for level in numbered:
        upper, lower = (
            next(key for key in levels[at] if numbered_key(key)[1] is not None)
            for at in sorted((level, chosen))
        )
        stem, _ = numbered_key(lower)
        is_said = re.search(f"(^|/){re.escape(upper)}(/|$)", pattern) is not None
        is_named = stem != "" and re.search(f"(^|/){re.escape(stem)}", pattern) is not None
        is_below = level > chosen and level in varying and is_named
        if is_below or (level < chosen and not is_said):
            raise ValueError(
                f"{shown(paths[0], shapes.get(paths[0]))} has several numbers, and the rule "
                f"{pattern!r} does not say which one tells layers, that in {upper!r} or that in "
                f"{lower!r}. Put it in parentheses: {upper!r} would be "
                f"{_parenthesised(upper)!r}."
            )
    return chosen


def _parenthesised(key: str) -> str:
    stem, number = numbered_key(key)
    return key[: len(key) - len(str(number))] + r"(\d+)" if number is not None else stem


def _captured(pattern: str, path: str, shape: Shape | None) -> Member:
    """The leaf with the number that its pattern has in parentheses, 0 where that is empty."""
    match = re.fullmatch(pattern, path)
    if not match or match[1] is None or not f"0{match[1]}".isdecimal():
        raise _unnumbered(path, shape, pattern)
    template = path[: match.start(1)].rstrip("-_") + "*"
    tensor, number = template + path[match.end(1) :], int(match[1] or 0)
    return Member(path, shape or (), tensor=tensor, number=number, template=template)


def _unnumbered(path: str, shape: Shape | None, pattern: str) -> ValueError:
    return ValueError(
        f"{shown(path, shape)} has no number at the end of a key that would tell its "
        f"layer, as the rule {pattern!r} says. Narrow the pattern, put the number in parentheses, "
        r"as (\d*) if the first layer has none, or give the axis of stacked layers."
    )


def _contained(container: str, rule: Rule, shapes: Mapping[str, Shape]) -> list[Member]:
    """The leaves below a container, which may be several that differ in a number."""
    names = {path: name for path in shapes if (name := _beginning(container, path))}
    inside = [
        Member(path, shapes[path], tensor=path[len(name) + 1 :]) for path, name in names.items()
    ]
    apart = sorted(set(names.values()))
    if not rule.axes and len(apart) == 1:
        checks.check_one_layer(container, apart[0], rule.numbered, inside)
    if len(apart) < 2 or (rule.axes and not rule.numbered):
        return inside
    found = {of.path: of for of in _members_by_number(container, dict.fromkeys(apart), ())}
    return [
        dataclasses.replace(leaf, number=found[name].number, template=found[name].template)
        for leaf, name in zip(inside, names.values(), strict=True)
    ]


def _beginning(container: str, path: str) -> str:
    """The beginning of a path that the pattern of a container matches; empty if none does."""
    beginnings = itertools.accumulate(path.split("/"), "{}/{}".format)
    return next((name for name in beginnings if re.fullmatch(container, name)), "")
