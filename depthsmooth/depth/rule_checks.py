"""Refusals of rules, with the remedy: what fits no leaf, or would mix nothing, or wrong layers."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence, Set

from depthsmooth.depth.leaves import Axes, Place, Shape, stacked
from depthsmooth.depth.names.families import Family, families_of
from depthsmooth.depth.names.nodes import Known, Node
from depthsmooth.depth.names.words import is_layer_name
from depthsmooth.depth.paths import common_path, named, numbered_key, shown, some


@dataclasses.dataclass(frozen=True)
class Member(Known):
    """A leaf that a rule matches.

    Attributes:
      tensor: which of a layer's tensors it holds.
      number: the number in its path, where that tells layers apart.
      template: its path, or its container's, with ``*`` for the number.
    """

    tensor: str = ""
    number: int | None = None
    template: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """The leaves of a rule, or of one container of a sequence.

    Attributes:
      group: the pattern of the rule.
      pattern: the same, or that of the container.
      axes: the axes that run over layers.
      by_number: how users write the rule if a number tells layers apart; else nothing.
      members: the leaves.
      masked: paths where leaves are hidden.
    """

    group: str
    pattern: str
    axes: Axes
    by_number: str
    members: Sequence[Member]
    masked: Sequence[str]

    @property
    def in_sequence(self) -> bool:
        """Whether they are in a container."""
        return self.group != self.pattern

    @property
    def is_explicit(self) -> bool:
        """Whether the pattern says which number tells layers."""
        return bool(self.by_number) and re.compile(self.pattern).groups > 0

    @property
    def is_in_part(self) -> bool:
        """Whether others of the rule may be masked."""
        return _may_hide(self.group, [leaf.path for leaf in self.members], self.masked)

    def said(self, pattern: str, rule: str) -> str:
        """Another rule, or container, for them, as users write it."""
        return f"({pattern!r}, {rule})" if self.in_sequence else f"{{{pattern!r}: {rule}}}"

    def with_number(self) -> str:
        """A pattern like the path of the first, with the number of its layer in parentheses."""
        start, rest = _number_in(self.members[0].path, self.members[0].template)
        return start + ("/.*" if rest and not self.in_sequence else "")


def check_matches(
    pattern: str,
    paths: Sequence[str],
    places: Mapping[str, Place],
    shapes: Mapping[str, Shape],
    masked: Sequence[str],
) -> None:
    """Raises if a rule matches no leaf, or one that another rule has placed."""
    if not paths and not any(re.fullmatch(pattern, path) for path in masked):
        raise ValueError(_matches_nothing(pattern, shapes, masked))
    for path in paths:
        if path in places:
            raise ValueError(
                f"{shown(path, shapes[path])} is matched by two rules, "
                f"{places[path].group!r} and {pattern!r}. Narrow one of them, so that "
                "each leaf has one place in depth."
            )


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


def check_container(
    pattern: str,
    container: str,
    members: Sequence[Member],
    rest: Set[str],
    shapes: Mapping[str, Shape],
    is_masked: bool,
) -> None:
    """Raises if a container of a rule has no leaf, or one that is in another container, too."""
    if not members and not is_masked:
        raise ValueError(
            f"The container {container!r} of the rule {pattern!r} has no leaf. A container's "
            "pattern has to match the beginning of its leaves' paths, up to a '/', and the "
            f"rule matches {some(named(shapes, container))}."
        )
    for member in members:
        if member.path not in rest:
            raise ValueError(
                f"{member} is in two containers of the rule "
                f"{pattern!r}. Narrow one of their patterns."
            )


def check_one_layer(container: str, name: str, is_numbered: bool, inside: Sequence[Member]) -> None:
    """Raises if a container that is to be one layer is a list of layers itself."""
    items: dict[str, dict[str, Shape]] = {}
    for leaf in inside:
        key, _, rest = leaf.tensor.partition("/")
        items.setdefault(key, {})[rest] = leaf.shape
    are_alike = len({tuple(sorted(item.items())) for item in items.values()}) == 1
    is_list = all(map(str.isdecimal, items)) and len(items) > 1 and are_alike
    if is_list or (is_numbered and numbered_key(name)[1] is None):
        pattern = re.sub(r"\d+$", r"\\d+", next(iter(items)))
        is_said = all(re.fullmatch(pattern, key) for key in items)
        keys = [pattern] if is_said else items
        each = ", ".join(f"r'{container}/{key}'" for key in keys)
        raise ValueError(
            f"{inside[0]} is in the container {container!r}, which would be one layer, but holds "
            f"{some(items)}. If these are layers, write {each} for it."
        )


def check_tensors(
    source: str, places: Mapping[str, Place], shapes: Mapping[str, Shape], remedy: str = ""
) -> None:
    """Raises unless a tensor has one shape in all layers, and is in each just once.

    ``source`` is what says so, ``remedy`` what to do where it is no rule.
    """
    first: dict[tuple[str, str], str] = {}
    held: dict[tuple[str, str, int], str] = {}
    for path, place in places.items():
        other = first.setdefault((place.group, place.tensor), path)
        shape, expected = (places[p].layer_shape(shapes[p]) for p in (path, other))
        if shape != expected:
            narrowed = f" Correct its axes, or narrow its pattern{_rule_for_alike(places, shapes)}."
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


def _rule_for_alike(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> str:
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


def check_layout(found: Found) -> None:
    """Raises if leaves look like single layers where a rule says stacks, or the reverse."""
    vector = next((leaf for leaf in found.members if leaf.is_vector), None)
    if found.is_explicit or not found.members:
        return
    if found.axes and vector and (remedies := if_siblings(found)):
        raise ValueError(
            f"{vector} is a vector, all of which the rule "
            f"{found.pattern!r} would take for layers.{remedies}"
        )
    if found.by_number == "numbered()" and _is_like_a_stack(found) and not found.is_in_part:
        [first, *_], axis = found.members, _common_axis(found.members)
        numbers = found.with_number()
        raise ValueError(
            f"{first}, like all that the rule {found.pattern!r} matches, "
            "has an axis more than one layer needs: they look like parts of a stack, which "
            "numbered() would mix with each other. If they are, the rule is "
            f"{found.said(found.pattern, str(axis))} or, if they take turns in depth, "
            f"{found.said(numbers, f'interleaved({axis})')}. If the numbers are layers, put them "
            f"in parentheses: {found.said(numbers, 'numbered()')}."
        )


def if_siblings(found: Found) -> str:
    """The rules for leaves that are numbered siblings, and like each other; empty if none are.

    Nor if a vector has an axis besides those of the rule: then each of them is a stack.
    """
    axes = found.axes
    if any(leaf.is_vector and len(leaf.shape) > len(axes) for leaf in found.members):
        return ""
    family = next(iter(_siblings(found.members)), None)
    if family is None:
        return ""
    pattern, _ = family.patterns
    [start] = re.findall(r"^.*?\(\\d[*+]\)", pattern)
    end = "" if found.in_sequence else pattern.removeprefix(start)
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
    if found.by_number:
        numbers = found.said(start + end, found.by_number)
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


def _is_like_a_stack(found: Found) -> bool:
    """Whether leaves have an axis more than one layer needs, and their numbers name parts of it.

    Without a vector among them only the names can tell: experts have such an axis, too.
    """
    [first, *_] = found.members
    above, _, stem = first.template.removesuffix("*").rpartition("/")
    vectors = [leaf for leaf in found.members if leaf.is_vector]
    return (
        all(len(leaf.shape) > (1 if leaf.is_vector else 2) for leaf in found.members)
        and (vectors != [] or not is_layer_name(stem or above.rpartition("/")[2]))
        and _common_axis(found.members) is not None
    )


def _common_axis(leaves: Sequence[Known]) -> int | None:
    """The first axis on which all leaves have the same size, of more than 1."""
    sizes = zip(*(leaf.shape for leaf in leaves), strict=False)
    return next((k for k, of in enumerate(sizes) if len(set(of)) == 1 and of[0] > 1), None)


def check_mixes(
    pattern: str,
    by_number: str,
    is_one_layer: bool,
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
        said = _if_one_tensor(by_number, path, places, shapes)
    else:
        others = shapes.keys() - places.keys() if by_number else ()
        is_all = not any(re.fullmatch(start + re.escape(rest), other) for other in others)
        if is_all and is_one_layer:
            return
        why = "is in the only layer that it finds"
        one = f"{{{start + ('/.*' if rest else '')!r}: numbered()}}"
        said = f" If its number tells layers, the rule is {one}." if by_number else ""
    raise ValueError(
        f"The rule {pattern!r} would mix nothing: {shown(path, shapes[path])} {why}. Correct the "
        f"pattern, give the axis of stacked layers, or leave the rule out.{said}"
    )


def _if_one_tensor(
    by_number: str, path: str, places: Mapping[str, Place], shapes: Mapping[str, Shape]
) -> str:
    """The rule for a tensor that has the number of its layer in its own name, too."""
    start, rest = _number_in(path, places[path].tensor)
    container = start + re.sub(r"\d+", r"\\d+", re.escape(rest))
    alike = [other for other in places if re.fullmatch(container, other)]
    shape = {places[other].layer_shape(shapes[other]) for other in alike}
    is_run = {places[other].layer for other in alike} == set(range(len(alike)))
    if not by_number or len(alike) < 2 or len(shape) > 1 or not is_run:
        return ""
    said = repr(container) if by_number == "numbered()" else f"({container!r}, {by_number})"
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
