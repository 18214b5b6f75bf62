"""What can be read in more than one way: the leaves, and the rules that could be theirs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from depthsmooth.depth.leaves import Axes, Shape
from depthsmooth.depth.names.families import Family, blocks_within, holds_layers
from depthsmooth.depth.names.nodes import Known, Node, common_axes, spare_axes
from depthsmooth.depth.names.words import SEVERAL, has_word
from depthsmooth.depth.rules import Rule, match, numbered, sequence


@dataclasses.dataclass(frozen=True)
class Doubt:
    """Leaves that can be read in more than one way.

    Attributes:
      leaves: the leaves; the first is named in messages.
      stems: patterns that match them, and may match others, the simplest first.
      why: what speaks against a single reading.
      rules: the rules that they could be read by, if they are layers.
      grave: whether they look like layers so much that leaving them alone is a guess.
      is_likely: whether that they are layers is said first.
    """

    leaves: tuple[Known, ...]
    stems: tuple[str, ...]
    why: str
    rules: tuple[Rule, ...]
    grave: bool = True
    is_likely: bool = True

    @property
    def paths(self) -> set[str]:
        """The paths of the leaves."""
        return {leaf.path for leaf in self.leaves}

    def pattern(self, shapes: Mapping[str, Shape]) -> str:
        """The pattern of a rule for the leaves, and for no others of a tree."""
        whole = "|".join(re.escape(leaf.path) for leaf in self.leaves)
        best, more = whole, len(self.leaves)
        for stem in self.stems:
            matched = {path for path in shapes if re.fullmatch(stem, path)}
            others = sorted(matched - self.paths)
            if self.paths <= matched and len(others) < more:
                excluded = f"(?!(?:{'|'.join(map(re.escape, others))})$)" if others else ""
                best, more = f"{excluded}{stem}", len(others)
        return best

    def readings(self, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
        """The rules that fit the leaves, as users write them."""
        pattern = self.pattern(shapes)
        fitting = [rule for rule in self.rules if _fits(rule, pattern, shapes)]
        return tuple(dict.fromkeys(map(str, fitting)))

    def sentence(self, pattern: str, readings: Sequence[str]) -> str:
        """What is not certain of the leaves, and what to say of them."""
        *layers, none = [f"{{{pattern!r}: {rule}}}" for rule in (*readings[:2], "()")]
        others = f" (or {', '.join(readings[2:])})" if readings[2:] else ""
        rules = f"{none} if not"
        if layers and self.is_likely:
            rules = f"{' or '.join(layers)} if it is layers{others}, and {rules}"
        elif layers:
            rules = f"{rules} layers, and {' or '.join(layers)} if it is{others}"
        return f"{self.leaves[0]}: {self.why}; the rule is {rules}."


def _fits(rule: Rule, pattern: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a rule can be said of the leaves that a pattern matches."""
    try:
        return bool(match({pattern: rule}, shapes, []))
    except ValueError:
        return False


def doubts_among(family: Family, kinds: Sequence[Family], parts: bool) -> list[Doubt]:
    """What speaks against siblings of these kinds being layers, and what can be said of them."""
    are_blocks = any(kind.first.is_block for kind in kinds)
    why = next((kind.why_stacks for kind in kinds if kind.why_stacks), "")
    if why:
        return [
            doubt_stacks(kind, why, are_blocks)
            if kind.why_stacks
            else doubt_siblings(kind, why, are_blocks, family.has_holes)
            for kind in kinds
        ]
    why = family.misfit
    # Stages of one width hold blocks, and so do lists of lists. layers/10 comes after layers/9.
    nested = [sorted(blocks_within(kind.members.values()), key=_in_numeric_order) for kind in kinds]
    if not why and any(nested):
        group = next(inner[0].group for inner in nested if inner)
        why = f"its siblings hold what may be layers, {group}, themselves"
        return [
            doubt_nested(kind, inner, why) if inner else doubt_siblings(kind, why, are_blocks)
            for kind, inner in zip(kinds, nested, strict=True)
        ]
    uneven = "" if why else unevenness_of(family, kinds)
    why = why or uneven or _doubt_of(family)
    # A list of Dense, named layers, may be a perceptron within one layer, as in DETR's heads.
    if not (why or are_blocks or parts):
        why = "its siblings may be layers, or steps within one"
    # wav2vec 2.0 has a feature encoder, conv_layers, beside the layers of its encoder.
    grave = are_blocks and not (uneven and has_word({"conv"}, family.name))
    if not why:
        return []
    alike = alike_among(kinds) or kinds
    # A bare list of matrices of several sizes is a perceptron: no part of it is a stack.
    if uneven and family.first.is_leaf:
        alike = [family]
    doubts = [doubt_siblings(each, why, grave, family.has_holes) for each in alike]
    # One answer is enough for kinds without a pattern, as in Nemotron-H.
    if any(doubt.rules != (numbered(),) for doubt in doubts) and _are_numbered(family):
        doubts = [doubt_siblings(family, why, grave)]
    return [dataclasses.replace(doubt, is_likely=not uneven) for doubt in doubts]


def _are_numbered(family: Family) -> bool:
    """Whether one rule says of siblings of several kinds that each is a layer."""
    shapes = {leaf.path: leaf.shape for leaf in family.leaves}
    are_layers = not (family.has_holes or any(map(holds_layers, family.members.values())))
    return are_layers and _fits(numbered(), family.patterns[0], shapes)


def unevenness_of(family: Family, kinds: Sequence[Family]) -> str:
    """Which tensor has other shapes in some siblings that makes these another part of a network."""
    # The first unit of each stage of a ResNet has other inputs, each stage has another width.
    uneven = [kind for kind in kinds if not kind.is_even]
    if not (uneven or family.is_pyramid):
        return ""
    tensor = uneven[0].uneven if uneven else family.uneven
    return f"{tensor} has not the same shape in all of its siblings"


def _doubt_of(family: Family) -> str:
    """Why siblings that are numbered without a hole may not be the layers of one network, if so."""
    # experts/layers/0: an expert for each layer, or layers in each of the experts.
    if has_word(SEVERAL, *family.container):
        return f"{family.container[0]}, which holds them, may be copies side by side"
    # A stem and a head in the list of the blocks.
    if family.strangers:
        return f"{family.strangers[0].path} has nothing in common with its siblings"
    # Recurrence and attention that share an MLP, attention and MLP that share an output.
    if family.halves:
        return halves_of(family)
    return "" if family.is_regular else "its siblings are of several kinds, which take no turns"


def halves_of(family: Family) -> str:
    """What to say of siblings of which names do not tell whether they are of one kind."""
    one, two = family.halves or (family.first, family.first)
    return f"{one.path} and {two.path} have half of their matrices in common"


def alike_among(kinds: Iterable[Family]) -> list[Family]:
    """The siblings of each kind that are alike in all shapes, where there are several."""
    return [alike for kind in kinds for alike in kind.alike if len(alike.members) > 1]


def doubt_siblings(family: Family, why: str, grave: bool, has_holes: bool = False) -> Doubt:
    """A doubt of siblings each of which may be one layer.

    ``has_holes`` tells whether numbers are missing among theirs and those of their other siblings.
    """
    numbers = [*family.members]
    steps = {two - one for one, two in itertools.pairwise(numbers)}
    rules: list[Rule] = []
    if numbers[0] <= 1 and steps <= {1}:
        rules.append(numbered())
    elif not has_holes or len(steps) == 1:
        # Activations have numbers in a Sequential, and no parameters. Where steps are uneven, a
        # layer is missing, and those around it are no neighbours.
        rules.append(_one_after_another(family.members.values()))
    return Doubt(tuple(family.leaves), family.patterns, why, tuple(rules), grave)


def doubt_nested(family: Family, inner: Sequence[Family], why: str) -> Doubt:
    """A doubt of siblings that hold what may be the layers, one container after another."""
    containers = [re.sub(r"\\\*$", r"\\d+", re.escape(each.group)) for each in inner]
    rules = (numbered(), sequence(*containers))
    return Doubt(tuple(family.leaves), family.patterns, why, rules)


def doubt_stacks(family: Family, why: str, grave: bool) -> Doubt:
    """A doubt of siblings each of which may be a stack: in turn, or one after another."""
    # A norm with a second axis tells that each sibling is a stack. Adapters of heads have none.
    single = [] if any(spare_axes(family.leaves).values()) else [numbered()]
    rules = (*single, *rules_of_parts(family.leaves, family.members.values()))
    return Doubt(_norms_first(family.leaves), family.patterns, why, rules, grave)


def doubt_stack(
    node: Node, nodes: Sequence[Node], why: str, rules: Iterable[Rule], grave: bool = True
) -> Doubt:
    """A doubt of what may be one stack: nodes below a container, or the container itself."""
    above = f"{re.escape(node.path)}{_sign_below(node)}" if node.path else ""
    start = len(node.path) + 1 if node.level else 0
    keys = [re.escape(part.path[start:]) for part in nodes]
    stems = f"{above}.*", f"{above}(?:{'|'.join(keys)})(?:/.*)?"
    leaves = [leaf for part in nodes for leaf in part.leaves]
    return Doubt(_norms_first(leaves), stems, why, tuple(rules), grave)


def rules_of_stack(leaves: Sequence[Known]) -> list[Rule]:
    """The rules of one stack: each axis that it may be stacked along, or several in each order."""
    return [Rule(axes) for axes in orders_of_axes(leaves)]


def rules_of_turns(leaves: Sequence[Known]) -> list[Rule]:
    """The rules of stacks whose layers take turns."""
    return [Rule(axes, numbered=True) for axes in orders_of_axes(leaves)]


def rules_of_parts(leaves: Sequence[Known], parts: Collection[Node]) -> list[Rule]:
    """The rules of stacks that take turns, follow one another, or are parts of one block."""
    return [
        rule
        for axes in orders_of_axes(leaves)
        for rule in (Rule(axes, numbered=True), _one_after_another(parts, axes), Rule(axes))
    ]


def orders_of_axes(leaves: Sequence[Known]) -> list[Axes]:
    """The axes that leaves may be stacked along, outer to inner: those that are named come first.

    As many of them as norms have more than one; all leaves have one size along each.
    """
    # nn.remat_scan and pipelines have two axes or more.
    count = max(1, min(spare_axes(leaves).values(), default=1))
    named = [leaf.nested_axes for leaf in leaves if leaf.layer_axes]
    orders = list(itertools.permutations(common_axes(leaves), count))
    return list(dict.fromkeys([*(axes for axes in named if axes in orders), *orders]))


def _one_after_another(nodes: Iterable[Node], axes: Axes = ()) -> Rule:
    """The rule for containers that follow one another, each with one layer or a stack of them."""
    paths = [re.escape(node.path) for node in nodes]
    return sequence(*((path, axes) for path in paths)) if axes else sequence(*paths)


def _norms_first(leaves: Sequence[Known]) -> tuple[Known, ...]:
    """The leaves, one that tells the number of stacked axes at first."""
    return tuple(sorted(leaves, key=lambda leaf: not leaf.is_norm))


def _sign_below(node: Node) -> str:
    """The sign between the path of a node and the rest of its leaves' paths."""
    signs = {re.escape(leaf.path[len(node.path)]) for leaf in node.leaves if leaf.path != node.path}
    return signs.pop() if len(signs) == 1 else "."


def _in_numeric_order(family: Family) -> list[int | str]:
    parts = re.split(r"(\d+)", family.group)
    return [int(part) if part.isdecimal() else part for part in parts]
