"""An extension of griffe: docstrings with roles and formulas of reStructuredText, as Markdown."""

import re
import textwrap

import griffe

MATH = re.compile(r"^\.\. math::\n((?:    .*\n?|\n)+)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:func|meth|class):`~?([\w.]+)`")
LINK = re.compile(r"`([^`<]+?)\s+<([^>]+)>`_")
LITERAL = re.compile(r"::$", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """The docstring of an object, for mkdocstrings and for formulas."""
    text = MATH.sub(lambda match: _display(match.group(1)), text)
    text = INLINE.sub(lambda match: rf"\({' '.join(match.group(1).split())}\)", text)
    text = ROLE.sub(lambda match: _reference(match.group(1), obj), text)
    text = LINK.sub(lambda match: f"[{match.group(1)}]({match.group(2)})", text)
    text = LITERAL.sub(":", text)
    return EXAMPLE.sub("Examples:", text)


def _display(formula: str) -> str:
    """A formula of its own, whose lines are aligned if it says where."""
    formula = textwrap.dedent(formula).strip()
    if "&" in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    return f"$$\n{formula}\n$$\n\n"


def _reference(name: str, obj: griffe.Object) -> str:
    """A link to a name of the package, or of the class that an object is or belongs to."""
    owner = obj if obj.is_class else obj.parent
    path = name if name.startswith("depthsmooth.") else f"depthsmooth.{name}"
    if path == name or name in obj.package.all_members or owner is None or not owner.is_class:
        return f"[`{name.split('.')[-1]}`][{path}]"
    return f"[`{name}`][depthsmooth.{owner.name}.{name}]"
