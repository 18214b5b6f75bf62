"""Rules in a file of TOML: reads them, and writes those that settle a doubt."""

from __future__ import annotations

import ast
import json
import pathlib
import tomllib
from collections.abc import Callable, Mapping, Sequence

from depthsmooth.depth.layout import Depth
from depthsmooth.depth.rules import Rule, RuleLike, interleaved, numbered, sequence

FUNCTIONS: dict[str, Callable[..., Rule]] = {
    "interleaved": interleaved,
    "numbered": numbered,
    "sequence": sequence,
}


def read_rules(path: pathlib.Path) -> Depth:
    r"""The rules in a file: TOML, or what ``depth.to_json()`` wrote if it ends in ``.json``.

    A line of TOML is a pattern and its rule, which is an axis, a list of axes, or the call of
    a function of rules, as Python writes it::

        'encoder/layers/.*' = 0
        'block_(\d+)/.*' = "numbered()"
        'decoder/.*' = "interleaved(1)"
        'codebooks/.*' = []

    Raises:
      ValueError: if the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            return Depth.from_json(text)
        return Depth.from_rules({key: _rule(rule) for key, rule in tomllib.loads(text).items()})
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{path} is no TOML: {error}. A line is a pattern in quotes and its rule, like "
            "'layers/.*' = 0; a function is in quotes, too: 'block_(\\d+)/.*' = \"numbered()\"."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"The rules in {path} cannot be read: {error}") from error


def write_rules(readings: Mapping[str, Sequence[str]]) -> list[str]:
    """The lines of TOML that say the first reading of each pattern, and the others beside it.

    Example:
      >>> print(*write_rules({"layers/.*": ("0", "1"), "items/.*": ("numbered()",)}), sep=chr(10))
      'layers/.*' = 0  # or 1, or [] if it holds no layers
      'items/.*' = "numbered()"  # or [] if it holds no layers
    """
    lines = []
    for pattern, rules in readings.items():
        first, *others = [*map(_toml, rules), "[]"]
        beside = f"  # or {', or '.join(others)} if it holds no layers" if others else ""
        is_literal = "'" not in pattern and pattern.isprintable()
        key = f"'{pattern}'" if is_literal else json.dumps(pattern)
        lines.append(f"{key} = {first}{beside}")
    return lines


def _rule(rule: object) -> RuleLike:
    """The rule that a value of TOML says."""
    if isinstance(rule, dict):
        raise ValueError("a pattern with dots has to be in quotes, like 'layers/.*' = 0.")
    if not isinstance(rule, str):
        return rule  # type: ignore[return-value]  # Depth.from_rules checks it
    try:
        return _evaluated(ast.parse(rule, mode="eval").body)  # type: ignore[return-value]
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{rule!r} is no rule. Write an axis, a list of axes, or in quotes numbered(), "
            "interleaved(1) or sequence('stem', ('layers', 0))."
        ) from error


def _evaluated(node: ast.expr) -> object:
    """The value of an expression of literals, tuples and functions of rules."""
    if isinstance(node, ast.Tuple):
        return tuple(map(_evaluated, node.elts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
        named = {str(keyword.arg): _evaluated(keyword.value) for keyword in node.keywords}
        return FUNCTIONS[node.func.id](*map(_evaluated, node.args), **named)
    return ast.literal_eval(node)


def _toml(rule: str) -> str:
    """A rule in the words of Python, in those of TOML."""
    try:
        axes = ast.literal_eval(rule)
    except ValueError:
        return json.dumps(rule)
    return str(list(axes) if isinstance(axes, tuple) else axes)
