"""Where depth is, as users say it: rules from path patterns to the layout of the layers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from depthsmooth.depth.leaves import Axes, Place, Shape, stacked
from depthsmooth.depth.names.families import Family, families_of, name_kinds
from depthsmooth.depth.names.nodes import Known, Node
from depthsmooth.depth.names.words import is_layer_name
from depthsmooth.depth.paths import common_path, named, numbered_key, shown, some


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


class AxisError(ValueError):
    """A leaf does not have the axis, or the number of layers there, that a rule says."""


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
      ValueError: if a rule fits the leaves in no way, or would mix nothing, or two rules
        match one leaf.
    """
    places: dict[str, Place] = {}
    for pattern, rule in rules.items():
        paths = [path for path in shapes if re.fullmatch(pattern, path)]
        if not paths and not any(re.fullmatch(pattern, path) for path in masked):
            raise ValueError(_matches_nothing(pattern, shapes, masked))
        for path in paths:
            if path in places:
                raise ValueError(
                    f"{shown(path, shapes[path])} is matched by two rules, "
                    f"{places[path].group!r} and {pattern!r}. Narrow one of them, so that "
                    "each leaf has one place in depth."
                )
        placed = _placed(pattern, rule, paths, shapes, masked)
        if rule != Rule():  # which says that the leaves are no layers
            _check_mixes(pattern, rule, placed, shapes, masked)
        places |= placed
    return places


def _placed(
    pattern: str,
    rule: Rule,
    paths: Sequence[str],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> dict[str, Place]:
    """The places of the leaves of one rule, in one group, or in one for each kind."""
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
                    f"{shown(member.path, shapes[member.path])} is in two containers of the rule "
                    f"{pattern!r}. Narrow one of their patterns."
                )
            rest.remove(member.path)
        # Of a masked container that it was there is known, not how long it was: enough to keep
        # those before it from those after it.
        start += _add(places, pattern, container, inner, members, shapes, masked, start) or 1
    if rule.containers and rest:
        path = min(rest)
        raise ValueError(
            f"{shown(path, shapes[path])} is matched by the rule {pattern!r}, but is in none of "
            f"its containers {some([repr(name) for name, _ in rule.containers])}. Narrow the "
            "rule's pattern, or name the container."
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
    leaves = [Known(member.path, shapes[member.path]) for member in members]
    found = _Found(group, pattern, rule, members, leaves)
    _check_layout(found, masked)
    axes = {m.path: _axes_of(m.path, shapes[m.path], rule, pattern) for m in members}
    counts = {path: stacked(shapes[path], axes[path]) for path in axes}
    for path, count in counts.items():
        first = members[0].path
        if count != counts[first]:
            raise AxisError(
                f"{shown(path, shapes[path])} has {count} layers on {rule}, but "
                f"{shown(first, shapes[first])} of the same rule {pattern!r} has {counts[first]}. "
                "The leaves of a rule share their layers: give each stack a rule of its own, or "
                f"correct the axis.{_if_siblings(found)}"
            )
    numbers = _numbers(pattern, members, shapes, masked)
    kinds = _kinds(found, numbers, masked)
    for member in members:
        name, order = kinds.get(member.number, (group, numbers))
        j = 0 if member.number is None else order.index(member.number)
        layers = tuple(start + i * len(order) + j for i in range(counts[member.path]))
        if layers:
            places[member.path] = Place(name, member.tensor, axes[member.path], layers, "rule")
    return len(numbers) * max(counts.values(), default=0)


def _kinds(
    found: _Found, numbers: Sequence[int], masked: Sequence[str]
) -> dict[int | None, tuple[str, Sequence[int]]]:
    """For each number, if layers are of several kinds, its group and the numbers in that.

    Those of containers in a sequence are what it says. A masked leaf counts with the shape that
    its tensor has elsewhere. Of what kind a layer is that is masked as a whole is not known: all
    numbers then count, and what they leave out keeps two apart.
    """
    if not found.rule.numbered or found.in_sequence:
        return {}
    shapes = {m.tensor: leaf.shape for m, leaf in zip(found.members, found.leaves, strict=True)}
    leaves: dict[int, set[Known]] = {}
    for member, leaf in zip(found.members, found.leaves, strict=True):
        if member.number is not None:
            leaves.setdefault(member.number, set()).add(Known(member.tensor, leaf.shape))
    for number, tensor in _hidden(found.members, masked):
        if number in leaves and tensor in shapes:
            leaves[number].add(Known(tensor, shapes[tensor]))
    nodes = {number: Node("", tuple(leaves[number])) for number in numbers if number in leaves}
    kinds = Family(Node("", ()), found.group, nodes).kinds
    tensors = {frozenset(name for name, _ in kind.first.tensors) for kind in kinds}
    if len(tensors) < len(kinds) or len(kinds) in (1, len(nodes)):
        return {}
    names = name_kinds(found.group, [2] * len(kinds))
    return {
        number: (name, numbers if found.is_in_part(masked) else list(kind.members))
        for name, kind in zip(names, kinds, strict=True)
        for number in kind.members
    }


def _hidden(members: Iterable[_Member], masked: Sequence[str]) -> Iterator[tuple[int, str]]:
    """The layer and the tensor of each masked leaf whose path is like those of members."""
    for template in {member.template for member in members}:
        like = re.escape(template).replace(r"\*", r"[-_]?(\d+)") + "(.*)"
        for match in filter(None, (re.fullmatch(like, path) for path in masked)):
            yield int(match[1]), template + match[2]


def _axes_of(path: str, shape: Shape, rule: Rule, pattern: str) -> Axes:
    """The axes of a rule, counted from 0, in one leaf."""
    for axis in rule.axes:
        if not -len(shape) <= axis < len(shape):
            raise AxisError(
                f"{shown(path, shape)} has no axis {axis}, where the rule {pattern!r} says its "
                "layers are. Correct the axis, or give this leaf a rule of its own."
            )
    axes = tuple(axis % len(shape) for axis in rule.axes)
    if len(set(axes)) < len(axes):
        raise ValueError(
            f"{shown(path, shape)} has the axes {rule.axes} twice, by the rule {pattern!r}. "
            "Correct the axes, or give this leaf a rule of its own."
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
                f"{shown(paths[0], shapes.get(paths[0]))} has several numbers, and the rule "
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
        f"{shown(path, shapes.get(path))} has no number at the end of a key that would tell its "
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
            f"{shown(path, shapes[path])} is in the container {container!r}, which would be one "
            f"layer, but holds {some(items)}. If these are layers, write r'{numbers}' for it."
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
            f"The layers that the rule {pattern!r} finds, like {shown(path, shapes[path])}, have "
            f"the numbers {first} to {last} {missing}, but layers are numbered from 0 or 1 without "
            "holes. Correct the pattern, or put the number that tells layers in parentheses."
        )
    return list(range(first, last + 1))


def check_tensors(
    source: str, places: Mapping[str, Place], shapes: Mapping[str, Shape], remedy: str = ""
) -> None:
    """Raises unless a tensor has one shape in all layers, and is in each just once.

    Args:
      source: what says so.
      places: from path to place.
      shapes: from path to shape.
      remedy: against layers of different shapes, where it is not that of a rule.

    Raises:
      ValueError: if it has several, or is twice in one.
    """
    first: dict[tuple[str, str], str] = {}
    held: dict[tuple[str, str, int], str] = {}
    for path, place in places.items():
        other = first.setdefault((place.group, place.tensor), path)
        shape, expected = (places[p].layer_shape(shapes[p]) for p in (path, other))
        if shape != expected:
            narrowed = f" Correct its axes, or narrow its pattern{_alike(places, shapes)}."
            raise ValueError(
                f"{shown(path, shapes[path])} has layers of shape {shape}, but "
                f"{shown(other, shapes[other])} has layers of shape {expected}, and {source} makes "
                f"them the same tensor of different layers.{remedy or narrowed}"
            )
        for layer in place.layers:
            key = (place.group, place.tensor, layer)
            twin = held.get(key)
            held[key] = path
            if twin is not None:
                raise ValueError(
                    f"{shown(path, shapes[path])} and {shown(twin, shapes[twin])} are both layer "
                    f"{layer} of {place.tensor!r} by {source}. Give each stack a rule of its own, "
                    "or put the number that tells layers in parentheses."
                )


def _alike(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> str:
    """The rule for the longest run of layers with leaves of their own that are alike."""
    layers: dict[int, list[str]] = {}
    for path, place in places.items():
        if place.axes:
            return ""
        layers.setdefault(place.layer, []).append(path)
    runs = itertools.groupby(
        sorted(layers), lambda layer: {(places[p].tensor, shapes[p]) for p in layers[layer]}
    )
    longest = max((list(run) for _, run in runs), key=len)
    containers = [re.escape(common_path(layers[layer])) for layer in longest]
    pattern = f"(?:{'|'.join(containers)})(?:/.*)?"
    matched = {path for path in shapes if re.fullmatch(pattern, path)}
    if len(longest) < 2 or matched != {path for layer in longest for path in layers[layer]}:
        return ""
    said = ", ".join(map(repr, containers))
    return f" to layers that are alike, as in {{{pattern!r}: sequence({said})}}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """The leaves of a rule, or of one container of a sequence.

    Attributes:
      group: the pattern of the rule.
      pattern: the same, or that of the container.
      rule: how their layers are laid out.
      members: the leaves.
      leaves: what the tree says of each.
    """

    group: str
    pattern: str
    rule: Rule
    members: Sequence[_Member]
    leaves: Sequence[Known]

    @property
    def in_sequence(self) -> bool:
        """Whether they are in a container."""
        return self.group != self.pattern

    @property
    def is_explicit(self) -> bool:
        """Whether the pattern says which number tells layers."""
        return self.rule.numbered and re.compile(self.pattern).groups > 0

    def is_in_part(self, masked: Sequence[str]) -> bool:
        """Whether others of the rule may be masked."""
        return _may_hide(self.group, [leaf.path for leaf in self.leaves], masked)

    def said(self, pattern: str, rule: str) -> str:
        """Another rule, or container, for them, as users write it."""
        return f"({pattern!r}, {rule})" if self.in_sequence else f"{{{pattern!r}: {rule}}}"

    def with_number(self) -> str:
        """A pattern like the path of the first, with the number of its layer in parentheses."""
        start, rest = _number_in(self.members[0].path, self.members[0].template)
        return start + ("/.*" if rest and not self.in_sequence else "")


def _check_layout(found: _Found, masked: Sequence[str]) -> None:
    """Raises if leaves look like single layers where a rule says stacks, or the reverse."""
    vector = next((leaf for leaf in found.leaves if leaf.is_vector), None)
    if found.is_explicit or not found.members:
        return
    if found.rule.axes and vector and (remedies := _if_siblings(found)):
        raise ValueError(
            f"{shown(vector.path, vector.shape)} is a vector, all of which the rule "
            f"{found.pattern!r} would take for layers.{remedies}"
        )
    if found.rule == numbered() and _is_like_a_stack(found) and not found.is_in_part(masked):
        [first, *_], axis = found.leaves, _common_axis(found.leaves)
        numbers = found.with_number()
        raise ValueError(
            f"{shown(first.path, first.shape)}, like all that the rule {found.pattern!r} matches, "
            "has an axis more than one layer needs: they look like parts of a stack, which "
            "numbered() would mix with each other. If they are, the rule is "
            f"{found.said(found.pattern, str(axis))} or, if they take turns in depth, "
            f"{found.said(numbers, f'interleaved({axis})')}. If the numbers are layers, put them "
            f"in parentheses: {found.said(numbers, 'numbered()')}."
        )


def _if_siblings(found: _Found) -> str:
    """The rules for leaves that are numbered siblings, and like each other; empty if none are.

    Nor if a vector has an axis besides those of the rule: then each of them is a stack.
    """
    axes = found.rule.axes
    if any(leaf.is_vector and len(leaf.shape) > len(axes) for leaf in found.leaves):
        return ""
    family = next(iter(_siblings(found.leaves)), None)
    if family is None:
        return ""
    [start] = re.findall(r"^.*?\(\\d[*+]\)", family.pattern)
    end = "" if found.in_sequence else family.pattern.removeprefix(start)
    first = next(iter(family.members.values()))
    entry = "container" if found.in_sequence else "rule"
    is_even = all(len(set(of.values())) == 1 for of in family.tensors.values())
    layers = found.said(start + end, "numbered()") if is_even else "numbered(), for those alike"
    said = (
        f" {family.group} are siblings with tensors in common. If each of them is a layer, the "
        f"{entry} is {layers}."
    )
    if not _could_be_a_stack(axes, first.leaves):
        return said
    if found.rule.numbered:
        numbers = found.said(start + end, str(found.rule))
        return f"{said} If each is a stack, put the number in parentheses: {numbers}."
    one = found.said(re.escape(first.path) + end, str(axes if len(axes) > 1 else axes[0]))
    return f"{said} If each is a stack, give each a {entry} of its own, like {one}."


def _could_be_a_stack(axes: Axes, leaves: Sequence[Known]) -> bool:
    """Whether leaves have these axes, of one size, and are no siblings again."""
    there = all(-len(leaf.shape) <= axis < len(leaf.shape) for leaf in leaves for axis in axes)
    return there and not _siblings(leaves) and len({stacked(v.shape, axes) for v in leaves}) == 1


def _siblings(leaves: Sequence[Known]) -> list[Family]:
    """Siblings that differ in a number and have a tensor in common: layers by name come first."""
    found: list[Family] = []
    nodes = [Node("", tuple(leaves))]
    while nodes:
        found += [
            family
            for node in nodes
            for family in families_of(node)
            if any(len(of) > 1 and len(set(of.values())) == 1 for of in family.tensors.values())
        ]
        nodes = [child for node in nodes for child in node.children.values() if not child.is_leaf]
    return sorted(found, key=lambda family: not is_layer_name(family.name))


def _is_like_a_stack(found: _Found) -> bool:
    """Whether leaves have an axis more than one layer needs, and their numbers name parts of it.

    Without a vector among them only the names can tell: experts have such an axis, too.
    """
    [first, *_] = found.members
    above, _, stem = first.template.removesuffix("*").rpartition("/")
    vectors = [leaf for leaf in found.leaves if leaf.is_vector]
    return (
        all(len(leaf.shape) > (1 if leaf.is_vector else 2) for leaf in found.leaves)
        and (vectors != [] or not is_layer_name(stem or above.rpartition("/")[2]))
        and _common_axis(found.leaves) is not None
    )


def _common_axis(leaves: Sequence[Known]) -> int | None:
    """The first axis on which all leaves have the same size, of more than 1."""
    sizes = zip(*(leaf.shape for leaf in leaves), strict=False)
    return next((k for k, of in enumerate(sizes) if len(set(of)) == 1 and of[0] > 1), None)


def _check_mixes(
    pattern: str,
    rule: Rule,
    places: Mapping[str, Place],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> None:
    """Raises if a rule finds nothing to mix, and nothing is masked that it might.

    A model of one layer has nothing to mix, and rules for it that say so are believed.
    """
    held: dict[tuple[str, str], set[int]] = {}
    for place in places.values():
        held.setdefault((place.group, place.tensor), set()).update(place.layers)
    is_mixed = any(layer + 1 in layers for layers in held.values() for layer in layers)
    if not places or is_mixed or _may_hide(pattern, list(places), masked):
        return
    path = min(places, key=lambda path: places[path].layer)
    start, rest = _number_in(path, places[path].tensor)
    if len({place.layer for place in places.values()}) > 1:
        why = f"is in layer {places[path].layer}, and no tensor is in two layers side by side"
        said = _if_one_tensor(rule, path, places, shapes)
    else:
        others = shapes.keys() - places.keys() if rule.numbered else ()
        is_all = not any(re.fullmatch(start + re.escape(rest), other) for other in others)
        if is_all and _says_one_layer(pattern, rule):
            return
        why = "is in the only layer that it finds"
        one = f"{{{start + ('/.*' if rest else '')!r}: numbered()}}"
        said = f" If its number tells layers, the rule is {one}." if rule.numbered else ""
    raise ValueError(
        f"The rule {pattern!r} would mix nothing: {shown(path, shapes[path])} {why}. Correct the "
        f"pattern, give the axis of stacked layers, or leave the rule out.{said}"
    )


def _says_one_layer(pattern: str, rule: Rule) -> bool:
    """Whether a rule says how many layers there are: by an axis, or a number in parentheses."""
    is_captured = rule.numbered and re.compile(pattern).groups > 0
    return bool(rule.axes) or is_captured or any(_says_one_layer(*of) for of in rule.containers)


def _if_one_tensor(
    rule: Rule, path: str, places: Mapping[str, Place], shapes: Mapping[str, Shape]
) -> str:
    """The rule for a tensor that has the number of its layer in its own name, too."""
    start, rest = _number_in(path, places[path].tensor)
    container = start + re.sub(r"\d+", r"\\d+", re.escape(rest))
    alike = [other for other in places if re.fullmatch(container, other)]
    shape = {places[other].layer_shape(shapes[other]) for other in alike}
    is_run = {places[other].layer for other in alike} == set(range(len(alike)))
    if rule.containers or len(alike) < 2 or len(shape) > 1 or not is_run:
        return ""
    said = f"({container!r}, {rule})" if rule.axes else repr(container)
    whole = container.replace(r"(\d", r"(?:\d")
    return f" If those like it are one tensor, the rule is {{{whole!r}: sequence({said})}}."


def _number_in(path: str, template: str) -> tuple[str, str]:
    """A pattern for the beginning of a path up to the number in a template, and the rest."""
    before, _, _ = template.partition("*")
    [(sign, number, rest)] = re.findall(r"^([-_]?)(\d*)(.*)$", path.removeprefix(before))
    return re.escape(before) + (rf"{sign}(\d+)" if number else r"[-_]?(\d*)"), rest


def _may_hide(pattern: str, paths: Sequence[str], masked: Sequence[str]) -> bool:
    """Whether masked leaves may be a rule's: by themselves, or with paths like those it matches."""
    ends = {"", *(path[match.start() :] for path in paths for match in re.finditer("/", path))}
    return any(re.fullmatch(pattern, hidden + end) for hidden in masked for end in ends)


def _matches_nothing(pattern: str, shapes: Mapping[str, Shape], masked: Sequence[str]) -> str:
    hidden = (
        f" {some(masked)} is masked: if the rule is for a leaf in there, match it before masking, "
        "with Depth.from_rules(rules).resolve(params)."
    )
    bare = ", whose path is ''" if "" in shapes else ""
    return (
        f"The rule {pattern!r} matches no leaf. A rule has to match the whole path of a leaf, and "
        f"the leaves are {some(named(shapes, like=pattern))}{bare}. Correct it or leave the "
        f"rule out.{hidden if masked else ''}"
    )
