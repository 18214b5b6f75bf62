"""Rules in a file of TOML: reads them, and writes those that settle a doubt."""

from __future__ import annotations

import ast
import contextlib
import pathlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from depthsmooth.depth.layout import Depth, Layout
from depthsmooth.depth.rules import Rule, as_rule, interleaved, numbered, sequence

FORMS = (
    "an axis like 0, axes from outer to inner like [0, 1], [] for no layers, {numbered = true}, "
    "{interleaved = 1} or {sequence = ['first', {'stack' = 0}]}"
)
NO_RULE = (SyntaxError, TypeError, ValueError)
"""What is raised where Python writes no rule."""
FUNCTIONS: dict[str, Callable[..., Rule]] = {
    "interleaved": interleaved,
    "numbered": numbered,
    "sequence": sequence,
}


def read_rules(path: pathlib.Path) -> Layout:
    r"""The rules in a file: TOML, or what ``depth.to_json()`` wrote if it ends in ``.json``.

    A line of TOML is a pattern and its rule. In a sequence, a container that has a rule of its
    own is a table::

        'encoder/layers/.*' = 0
        'blocks/.*' = [0, 1]
        'codebooks/.*' = []
        'block_(\d+)/.*' = {numbered = true}
        'decoder/.*' = {interleaved = 1}
        '.*_blocks?/.*' = {sequence = [{'in_blocks' = 0}, 'mid_block', {'out_blocks' = 0}]}

    Args:
      path: of the file.

    Returns:
      The rules, or what the JSON holds.

    Raises:
      ValueError: if the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            return Depth.from_json(text)
        rules = tomllib.loads(text).items()
        return Depth.from_rules({pattern: _rule(pattern, value) for pattern, value in rules})
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{path} is no TOML: {error}. A line is a pattern in single quotes and its rule, like "
            "'layers/.*' = 0 or 'block_(\\d+)/.*' = {numbered = true}."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"The rules in {path} cannot be read: {error}") from error


def write_rules(readings: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of TOML that say the first reading of each pattern, and the others beside it.

    Args:
      readings: from the pattern to the rules that could be its own, as Python writes them.

    Returns:
      A line for each pattern.

    Example:
      >>> print(*write_rules({"layers/.*": ("0", "1"), "items/.*": ("numbered()",)}), sep=chr(10))
      'layers/.*' = 0  # or 1, or [] if it holds no layers
      'items/.*' = {numbered = true}  # or [] if it holds no layers
    """
    lines = []
    for pattern, rules in readings.items():
        first, *others = [as_toml(_from_python(rule)) for rule in (*rules, "()")]
        beside = f"  # or {', or '.join(others)} if it holds no layers" if others else ""
        lines.append(f"{_quoted(pattern)} = {first}{beside}")
    return lines


def as_toml(rule: Rule) -> str:
    """A rule as TOML.

    Args:
      rule: from :meth:`depthsmooth.Depth.from_rules` or a function of rules.

    Returns:
      The value for its pattern, which :func:`read_rules` reads.

    Example:
      >>> print(as_toml(sequence("first", ("stack", 0), ("turns", interleaved(1)))))
      {sequence = ['first', {'stack' = 0}, {'turns' = {interleaved = 1}}]}
    """
    if rule.containers:
        containers = [
            _quoted(name) if inner == Rule() else f"{{{_quoted(name)} = {as_toml(inner)}}}"
            for name, inner in rule.containers
        ]
        return f"{{sequence = [{', '.join(containers)}]}}"
    axes = str(rule.axes[0] if len(rule.axes) == 1 else list(rule.axes))
    if rule.numbered:
        return f"{{interleaved = {axes}}}" if rule.axes else "{numbered = true}"
    return axes


def in_toml(message: str) -> str:
    r"""A message whose rules are said in TOML instead of Python.

    Args:
      message: of an error.

    Returns:
      The message, with a line of TOML for each rule, and a table for each container of a sequence.

    Example:
      >>> print(in_toml(r"The rule is {'block_(\\d+)/.*': numbered()}."))
      The rule is 'block_(\d+)/.*' = {numbered = true}.
    """

    def said(match: re.Match[str]) -> str:
        is_rule, pattern, rule = match.groups()
        try:
            line = f"{_quoted(ast.literal_eval(pattern))} = {as_toml(_from_python(rule))}"
        except NO_RULE:
            return match[0]
        return line if is_rule else f"{{{line}}}"

    # {pattern: rule}, or (pattern, rule) for a container
    python = r"""(?:(\{)|\()('.*?'|".*?")[:,] (-?\d+|\w*\(.*?\)+)(?(1)\}|\))"""
    return re.sub(python, said, message).replace(" r'", " '")


def _rule(pattern: str, value: object) -> Rule:
    """The rule that a value of TOML says."""
    match value:
        case {"numbered": True, **others} if not others:
            return numbered()
        case {"interleaved": axes, **others} if not others and _are_axes(axes):
            return interleaved(axes)
        case {"sequence": [_, *_] as containers, **others} if not others:
            return sequence(*(_container(pattern, each) for each in containers))
        case _ if _are_axes(value):
            return as_rule(pattern, value)
    said, hint = repr(value), ""
    if isinstance(value, dict):
        said = f"{{{', '.join(f'{key} = {inner!r}' for key, inner in value.items())}}}"
        hint = " If dots are part of the pattern, put it in quotes, like 'layers/.*' = 0."
    elif isinstance(value, str):
        with contextlib.suppress(*NO_RULE):
            line = f"{_quoted(pattern)} = {as_toml(_from_python(value))}"
            said, hint = "a string", f" Write {line}"
    raise ValueError(f"The rule {_quoted(pattern)} is {said}, but has to be {FORMS}.{hint}")


def _container(pattern: str, value: object) -> str | tuple[str, Rule]:
    """A container of a sequence: its pattern, or with its rule in a table."""
    match value:
        case str():
            return value
        case dict() if len(value) == 1:
            [(name, inner)] = value.items()
            rule = _rule(name, inner)
            if not rule.containers:
                return name, rule
    raise ValueError(
        f"The rule {_quoted(pattern)} has the container {value!r}. A container is a pattern like "
        "'first', or a table of one pattern and its rule like {'stack' = 0}. A rule in a sequence "
        "is no sequence itself: list its containers there."
    )


def _are_axes(value: object) -> TypeGuard[int | list[int]]:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(axis, int) and not isinstance(axis, bool) for axis in listed)


def _from_python(rule: str) -> Rule:
    """The rule that Python writes so: ``0``, ``(0, 1)`` or the call of a function of rules."""
    return as_rule("", _evaluated(ast.parse(rule, mode="eval").body))


def _evaluated(node: ast.expr) -> object:
    """The value of an expression of literals, tuples and functions of rules."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_evaluated, node.elts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        named = {str(keyword.arg): _evaluated(keyword.value) for keyword in node.keywords}
        return FUNCTIONS[node.func.id](*map(_evaluated, node.args), **named)
    return ast.literal_eval(node)


def _quoted(text: str) -> str:
    """A string of TOML: in single quotes, where nothing is escaped, if it can be."""
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    escaped = (
        f"\\{sign}" if sign in '"\\' else sign if sign.isprintable() else f"\\U{ord(sign):08X}"
        for sign in text
    )
    return f'"{"".join(escaped)}"'
