"""Command line: shows where depth is in a checkpoint or a model, before any training."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Sequence

from depthsmooth.cli.rules_file import in_toml, read_rules, write_rules
from depthsmooth.cli.targets import children, read_target, subtree
from depthsmooth.depth.layout import Depth, DepthNotFoundError, Rules
from depthsmooth.depth.names.find import AmbiguousDepthError, find_depth

NOT_FOUND, WRONG, INTERRUPTED = 1, 2, 130
"""Exit statuses: depth is ambiguous or absent; anything else is wrong; Ctrl-C."""

EXAMPLES = r"""examples:
  python -m depthsmooth inspect checkpoints/1000/default --subtree params
  python -m depthsmooth inspect model.safetensors --explain model/layers/3/mlp/weight
  python -m depthsmooth inspect flax_model.msgpack --rules rules.toml
  python -m depthsmooth inspect train:shapes --json > depth.json

where train.py has, say,
  def shapes():
      return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]

rules.toml has a line for each pattern, with its rule:
  'layers/.*' = 0  # stacked along axis 0
  'blocks/.*' = [0, 1]  # stacked along several axes, outer to inner
  'codebooks/.*' = []  # no layers
  'block_(\d+)/.*' = {numbered = true}  # each layer has leaves of its own
  'layers_.*' = {interleaved = 1}  # stacks along axis 1, whose layers alternate
  # Containers that follow one another. One with a rule of its own is a table.
  '.*_blocks?/.*' = {sequence = [{'in_blocks' = 0}, 'mid_block', {'out_blocks' = 0}]}"""


def parser() -> argparse.ArgumentParser:
    """The options, each with its help text."""
    options = argparse.ArgumentParser(
        prog="python -m depthsmooth", description="Gradient Smoothing for Optax."
    )
    commands = options.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show where depth is",
        description="Shows where depth is, from paths and shapes alone: no weight is loaded.\nThe "
        "arrays of a .msgpack are passed over one at a time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = inspect.add_argument
    add(
        "target",
        metavar="TARGET",
        help="a directory that Orbax wrote; a .npz, .msgpack (of Flax) or .safetensors file; a "
        "directory of .safetensors files, or their index; or module:function, which returns "
        "arrays, their shapes, or a Depth",
    )
    add("--subtree", metavar="PATH", help="only what is below, like params in a train state")
    add(
        "--rules",
        metavar="FILE",
        type=pathlib.Path,
        help="say where depth is, where names do not: TOML with lines as below, or .json as "
        "depth.to_json() writes it",
    )
    output = inspect.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, for Depth.from_json")
    output.add_argument("--explain", metavar="PATH", help="say why a leaf is smoothed, or is not")
    add("--debug", action="store_true", help="show the traceback of an error")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 if depth was found."""
    given = parser().parse_args(arguments)
    try:
        _inspect(given)
        sys.stdout.flush()
    except BrokenPipeError:  # as by head; the interpreter would flush again, and fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if given.debug:
            traceback.print_exception(error)
        if isinstance(error, AmbiguousDepthError | DepthNotFoundError):
            print(f"{error}\n\n{_remedy(error, given.rules)}", file=sys.stderr)
            return NOT_FOUND
        said = in_toml(str(error)) if given.rules else str(error)
        message = textwrap.shorten(said or type(error).__name__, 1000, placeholder=" …")
        print(f"error: {message}", file=sys.stderr)
        return WRONG
    return 0


def _inspect(given: argparse.Namespace) -> None:
    """Prints what is asked for of a target."""
    tree = read_target(given.target)
    depth: Depth | Rules
    if isinstance(tree, Depth | Rules):
        if given.subtree or given.rules:
            raise ValueError(
                f"{given.target} returns a Depth, which is shown as it is: leave --subtree and "
                "--rules out."
            )
        depth = tree
    else:
        known = read_rules(given.rules) if given.rules else None
        if given.subtree:
            tree = subtree(tree, given.subtree)
        elif "params" in children(tree):
            hint = "--subtree params shows the tree that most optimizers get, with its paths."
            print(f"note: {hint}", file=sys.stderr)
        depth = find_depth(tree, known=known)
    if given.json:
        print(depth.to_json())
    elif given.explain is not None:
        print(depth.explain(given.explain))
    else:
        print(depth)


def _remedy(error: ValueError, rules: pathlib.Path | None) -> str:
    """How to say on this command line what an error asks for."""
    file = rules if rules and rules.suffix != ".json" else pathlib.Path("rules.toml")
    if not isinstance(error, AmbiguousDepthError):
        return (
            f"On this command line: --rules {file}, a file with a line like '.*layers/.*' = 0, or "
            "'.*block_(\\d+)/.*' = {numbered = true} where each layer has leaves of its own; or "
            "give module:function, a function that returns the Depth of trace_depth."
        )
    lines = "\n".join(write_rules(error.readings))
    where = f"add to {file}" if file == rules else f"put into {file}"
    return (
        f"On this command line: {where} these lines, changed where another reading is the true "
        f"one, and give --rules {file}\n\n{lines}"
    )
