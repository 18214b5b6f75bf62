"""Where depth is, as users say it: rules from path patterns to the layout of the layers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from depthsmooth.layers import Axes
from depthsmooth.places import Place, Shape, named, numbered_key, some, stacked


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
        if self.containers:
            return f"sequence({', '.join(f'{name!r}: {rule}' for name, rule in self.containers)})"
        axes = ", ".join(map(str, self.axes))
        if self.numbered:
            return f"interleaved({axes})" if self.axes else "numbered()"
        return (
            f"axes {axes}" if len(self.axes) > 1 else f"axis {axes}" if self.axes else "one layer"
        )


Axis = int | Sequence[int]
RuleLike = int | Sequence[int] | Rule


def numbered() -> Rule:
    r"""The rule for layers with leaves of their own: the number in the path is the layer.

    The number is the first, at the end of a key, that is not the same in all the
    leaves that the pattern matches, or the one that the pattern puts in parentheses:
    ``r"decoder/block_(\d+)/.*"``. Numbers begin with 0 or 1; the first layer may have
    none (Haiku's ``block``, ``block_1``, …).

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
    return Rule(_axes(axis, "interleaved"), numbered=True)


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
    """The rule of a pattern as users give it.

    Raises:
      ValueError: if the pattern is no regular expression, or the rule is none.
    """
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
        return Rule(_axes(rule, pattern))
    if rule.numbered and re.compile(str(pattern)).groups > 1:
        raise ValueError(
            f"The rule {pattern!r} has several pairs of parentheses, but one number tells the "
            "layers apart. Write (?:...) for the others."
        )
    return rule


def _axes(axes: object, rule: object) -> Axes:
    listed = axes if isinstance(axes, tuple | list) else (axes,)
    if all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in listed):
        return tuple(int(axis) for axis in listed)
    raise ValueError(
        f"The rule {rule!r} has the axis {axes!r}; it needs the integer axis that runs over the "
        "layers, like 0 or -1, a tuple of axes from outer to inner, numbered(), interleaved(axis) "
        "or sequence(...)."
    )


@dataclasses.dataclass(frozen=True)
class _Member:
    """A leaf that a rule matches.

    Attributes:
      path: its path.
      tensor: which of a layer's tensors it holds.
      number: the number in its path, where that tells layers apart.
      template: its path, or its container's, with ``*`` for the number.
    """

    path: str
    tensor: str
    number: int | None = None
    template: str = ""


def match(
    rules: Mapping[str, Rule], shapes: Mapping[str, Shape], masked: Sequence[str]
) -> dict[str, Place]:
    """The place of every leaf that a rule matches.

    Args:
      rules: from pattern to rule.
      shapes: from path to shape.
      masked: paths where leaves are hidden, which no rule has to find.

    Raises:
      ValueError: if a rule fits the leaves in no way, or two rules match one.
    """
    places: dict[str, Place] = {}
    for pattern, rule in rules.items():
        paths = [path for path in shapes if re.fullmatch(pattern, path)]
        if not paths and not any(re.fullmatch(pattern, path) for path in masked):
            raise ValueError(_matches_nothing(pattern, shapes, masked))
        for path in paths:
            if path in places:
                raise ValueError(
                    f"{path} {shapes[path]} is matched by two rules, {places[path].group!r} and "
                    f"{pattern!r}. Narrow one of them, so that each leaf has one place in depth."
                )
        places |= _placed(pattern, rule, paths, shapes, masked)
    return places


def _placed(
    pattern: str,
    rule: Rule,
    paths: Sequence[str],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> dict[str, Place]:
    """The places of the leaves of one rule, which are one group."""
    places: dict[str, Place] = {}
    if not rule.containers:
        whole = [_Member(path, path) for path in paths]
        members = _numbered(pattern, paths, shapes, masked) if rule.numbered else whole
        _add(places, pattern, pattern, rule, members, shapes, masked)
    rest, start = set(paths), 0
    for container, inner in rule.containers:
        members = _contained(container, inner, paths, shapes)
        if not members and not any(_container_of(container, path) for path in masked):
            raise ValueError(
                f"The container {container!r} of the rule {pattern!r} has no leaf. A container's "
                "pattern has to match the beginning of its leaves' paths, up to a '/', and the "
                f"rule matches {some(named({path: shapes[path] for path in paths}, container))}."
            )
        for member in members:
            if member.path not in rest:
                raise ValueError(
                    f"{member.path} {shapes[member.path]} is in two containers of the rule "
                    f"{pattern!r}. Narrow one of their patterns."
                )
            rest.remove(member.path)
        # Of a masked container that it was there is known, not how long it was: enough to keep
        # those before it from those after it.
        start += _add(places, pattern, container, inner, members, shapes, masked, start) or 1
    if rule.containers and rest:
        path = min(rest)
        raise ValueError(
            f"{path} {shapes[path]} is matched by the rule {pattern!r}, but is in none of its "
            f"containers {some([repr(name) for name, _ in rule.containers])}. Narrow the rule's "
            "pattern, or name the container."
        )
    check_tensors(f"the rule {pattern!r}", places, shapes)
    return places


def _add(
    places: dict[str, Place],
    group: str,
    pattern: str,
    rule: Rule,
    members: Sequence[_Member],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
    start: int = 0,
) -> int:
    """Places the members of a container from layer ``start`` on; gives their number of layers."""
    axes = {m.path: _axes_of(m.path, shapes[m.path], rule, pattern) for m in members}
    counts = {path: stacked(shapes[path], axes[path]) for path in axes}
    for path, count in counts.items():
        first = members[0].path
        if count != counts[first]:
            raise ValueError(
                f"{path} {shapes[path]} has {count} layers on {rule}, but {first} "
                f"{shapes[first]} of the same rule {pattern!r} has {counts[first]}. The leaves of "
                "a rule share their layers: give each stack a rule of its own, or correct the axis."
            )
    numbers = _numbers(pattern, members, shapes, masked)
    for member in members:
        j = 0 if member.number is None else numbers.index(member.number)
        layers = tuple(start + i * len(numbers) + j for i in range(counts[member.path]))
        if layers:
            places[member.path] = Place(group, member.tensor, axes[member.path], layers, "rule")
    return len(numbers) * max(counts.values(), default=0)


def _axes_of(path: str, shape: Shape, rule: Rule, pattern: str) -> Axes:
    """The axes of a rule, counted from 0, in one leaf."""
    for axis in rule.axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{path} {shape} has no axis {axis}, where the rule {pattern!r} says its layers "
                "are. Correct the axis, or give this leaf a rule of its own."
            )
    axes = tuple(axis % len(shape) for axis in rule.axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"{path} {shape} has the axes {rule.axes} twice, by the rule {pattern!r}. Correct the "
            "axes, or give this leaf a rule of its own."
        )
    return axes


def _numbered(
    pattern: str, paths: Sequence[str], shapes: Mapping[str, Shape], masked: Sequence[str]
) -> list[_Member]:
    """The leaves with the number that tells them apart, also from those that are masked."""
    if re.compile(pattern).groups:
        matches = [(path, re.fullmatch(pattern, path)) for path in paths]
        return [
            _captured(path, found)
            if found and found[1] is not None and f"0{found[1]}".isdecimal()
            else _unnumbered(path, pattern, shapes)
            for path, found in matches
        ]
    hidden = [path for path in masked if re.fullmatch(pattern, path)]
    level = _level_of_numbers(pattern, [*paths, *hidden], shapes)
    keys = {path: [*path.split("/"), *[""] * level] for path in paths}
    ends = {path: numbered_key(keys[path][level]) for path in paths}
    stems = {stem for stem, number in ends.values() if number is not None}
    members = []
    for path, (stem, number) in ends.items():
        if number is None and stem not in stems:
            members.append(_unnumbered(path, pattern, shapes))
        template = "/".join([*keys[path][:level], f"{stem}*"])
        tensor = "/".join([template, *path.split("/")[level + 1 :]])
        members.append(_Member(path, tensor, number or 0, template))
    return members


def _level_of_numbers(pattern: str, paths: Sequence[str], shapes: Mapping[str, Shape]) -> int:
    """The place in the paths of the key whose number tells layers apart: the first that varies.

    Raises where another above it, or one that varies and that the pattern names, may be meant.
    """
    levels = list(itertools.zip_longest(*(path.split("/") for path in paths), fillvalue=""))
    numbers = [{numbered_key(key)[1] for key in keys} for keys in levels]
    varying = [level for level, found in enumerate(numbers) if len(found) > 1]
    numbered = [level for level, found in enumerate(numbers) if found != {None}]
    if not numbered:
        _unnumbered(paths[0], pattern, shapes)
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
                f"{paths[0]} {shapes.get(paths[0], '')} has several numbers, and the rule "
                f"{pattern!r} does not say which one tells layers, that in {upper!r} or that in "
                f"{lower!r}. Put it in parentheses: {upper!r} would be "
                f"{_parenthesised(upper)!r}."
            )
    return chosen


def _parenthesised(key: str) -> str:
    stem, number = numbered_key(key)
    return key[: len(key) - len(str(number))] + r"(\d+)" if number is not None else stem


def _captured(path: str, match: re.Match[str]) -> _Member:
    """The leaf with the number that its pattern has in parentheses, 0 where that is empty."""
    before = path[: match.start(1)].rstrip("-_")
    return _Member(path, f"{before}*{path[match.end(1) :]}", int(match[1] or 0), f"{before}*")


def _unnumbered(path: str, pattern: str, shapes: Mapping[str, Shape]) -> _Member:
    raise ValueError(
        f"{path} {shapes.get(path, '')} has no number at the end of a key that would tell its "
        f"layer, as the rule {pattern!r} says. Narrow the pattern, put the number in parentheses, "
        r"as (\d*) if the first layer has none, or give the axis of stacked layers."
    )


def _contained(
    container: str, rule: Rule, paths: Sequence[str], shapes: Mapping[str, Shape]
) -> list[_Member]:
    """The leaves below a container, which may be several that differ in a number."""
    inside = {}
    for path in paths:
        name = _container_of(container, path)
        if name:
            inside[path] = (name, path[len(name) + 1 :])
    names = sorted({name for name, _ in inside.values()})
    if not rule.axes and len(names) == 1:
        _check_one_layer(container, names[0], rule, inside, shapes)
    if len(names) < 2 or (rule.axes and not rule.numbered):
        return [_Member(path, tensor) for path, (_, tensor) in inside.items()]
    found = {member.path: member for member in _numbered(container, names, {}, ())}
    return [
        _Member(path, tensor, found[name].number, found[name].template)
        for path, (name, tensor) in inside.items()
    ]


def _check_one_layer(
    container: str,
    name: str,
    rule: Rule,
    inside: Mapping[str, tuple[str, str]],
    shapes: Mapping[str, Shape],
) -> None:
    """Raises if a container that is to be one layer is a list of layers itself."""
    items: dict[str, dict[str, Shape]] = {}
    for path, (_, tensor) in inside.items():
        key, _, rest = tensor.partition("/")
        items.setdefault(key, {})[rest] = shapes[path]
    are_alike = len({tuple(sorted(item.items())) for item in items.values()}) == 1
    is_list = all(map(str.isdecimal, items)) and len(items) > 1 and are_alike
    unnumbered = rule.numbered and numbered_key(name)[1] is None
    if is_list or unnumbered:
        path, numbers = next(iter(inside)), f"{container}/\\d+"
        raise ValueError(
            f"{path} {shapes[path]} is in the container {container!r}, which would be one layer, "
            f"but holds {some(items)}. If these are layers, write r'{numbers}' for it."
        )


def _container_of(container: str, path: str) -> str:
    """The beginning of a path that the pattern of a container matches; empty if none does."""
    beginnings = itertools.accumulate(path.split("/"), "{}/{}".format)
    return next((name for name in beginnings if re.fullmatch(container, name)), "")


def _numbers(
    pattern: str,
    members: Sequence[_Member],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> list[int]:
    """The numbers that a rule finds, without a hole but for those that are masked."""
    numbers = {member.number for member in members if member.number is not None}
    if not numbers:
        return [0]
    lowest = min(numbers)
    for template in {member.template for member in members}:
        hidden = re.escape(template).replace(r"\*", r"[-_]?(\d+)") + "(?:/.*)?"
        found = [re.fullmatch(hidden, path) for path in masked]
        numbers |= {int(match[1]) for match in found if match}
    first, last = min(numbers), max(numbers)
    holes = [number for number in range(first, last + 1) if number not in numbers]
    if holes or first > 1:
        path = next(member.path for member in members if member.number == lowest)
        missing = f"without {some(map(str, holes))}" if holes else f"from {first} on"
        raise ValueError(
            f"The layers that the rule {pattern!r} finds, like {path} {shapes[path]}, have the "
            f"numbers {first} to {last} {missing}, but layers are numbered from 0 or 1 without "
            "holes. Correct the pattern, or put the number that tells layers in parentheses."
        )
    return list(range(first, last + 1))


def check_tensors(source: str, places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> None:
    """Raises unless a tensor has one shape in all layers, and is in each just once."""
    first: dict[tuple[str, str], str] = {}
    held: dict[tuple[str, str, int], str] = {}
    for path, place in places.items():
        other = first.setdefault((place.group, place.tensor), path)
        shape, expected = (places[p].layer_shape(shapes[p]) for p in (path, other))
        if shape != expected:
            raise ValueError(
                f"{path} {shapes[path]} has layers of shape {shape}, but {other} {shapes[other]} "
                f"has layers of shape {expected}, and {source} makes them the same "
                "tensor of different layers. Correct its axes, or narrow its pattern."
            )
        for layer in place.layers:
            key = (place.group, place.tensor, layer)
            twin = held.get(key)
            held[key] = path
            if twin is not None:
                raise ValueError(
                    f"{path} {shapes[path]} and {twin} {shapes[twin]} are both layer {layer} of "
                    f"{place.tensor!r} by {source}. Give each stack a rule of its own, "
                    "or put the number that tells layers in parentheses."
                )


def _matches_nothing(pattern: str, shapes: Mapping[str, Shape], masked: Sequence[str]) -> str:
    hidden = (
        f" {some(masked)} is masked: if the rule is for a leaf in there, match it before masking, "
        "with Depth.from_rules(rules).resolve(params)."
    )
    return (
        f"The rule {pattern!r} matches no leaf. A rule has to match the whole path of a leaf, and "
        f"the leaves are {some(named(shapes, like=pattern))}. Correct it or leave the rule out."
        f"{hidden if masked else ''}"
    )
