"""Words of keys: which name layers, which parts of them, and which what is side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

VECTORS = frozenset({"b", "beta", "bias", "g", "gamma", "offset", "w", "weight"})


EXPERTS = frozenset({"expert", "experts", "moe"})
"""Words for what is in the place of an MLP: experts/0, local_experts, MoeBlock_0."""


def nesting_of(name: str) -> int | None:
    """How deep an axis of that name nests among those that run over layers; None if it does not."""
    words = words_of(name)
    if "repeats" in words or "repeat" in words:
        return 0
    if "layers" in words or words == ["layer"]:
        return 2 if "per" in words else 1
    return None


def is_layer_name(key: str) -> bool:
    """Whether a key names a block that a network repeats, or the stack of them."""
    words = words_of(key)
    ends = {words[0], words[-1]} if words else set()
    is_layer = any(re.fullmatch(r".*blocks?|(.*coder|.*former)?layers?", word) for word in ends)
    is_part = len(words) == 2 and words[0] in _PARTS
    is_other = is_part or any(is_norm_word(word) or word in _BESIDE for word in words)
    return key == "h" or (is_layer and not is_other)


def is_stack_name(key: str) -> bool:
    """Whether a key names what holds one block many times over, whatever the block is.

    Example:
      >>> [is_stack_name(key) for key in ("repeat", "stacked", "stacked_critics", "encoder")]
      [True, True, False, False]
    """
    words = words_of(key)
    return bool(_STACKS & {*words[:1], *words[-1:]}) and not are_beside([key])


_STACKS = frozenset({"repeat", "repeated", "stacked"})
"""Words for one block many times over: `repeat` of Praxis, `stacked` of Haliax."""


_PARTS = frozenset({"attention", "attn", "ffn", "mlp"})
"""Words for the parts of a block: AttnBlock_0, MlpBlock_0."""


def is_part_name(key: str) -> bool:
    """Whether a key names a part of a block, or what belongs to one.

    Diffusion models have an AttnBlock here and there, Gemma 3n a per_layer_input_gate.
    """
    words = words_of(key)
    return words[:1] == ["per"] or any(word in _PARTS for word in words)


def _plurals(*words: str) -> frozenset[str]:
    return frozenset(word + ending for word in words for ending in ("s", "es"))


_COPIES = (
    "adapter",  # one for each language or task, beside frozen layers
    "agent",  # of several that learn together
    "branch",  # of HRNet, of one resolution each
    "codebook",  # of a residual quantiser: EnCodec's quantizer/layers/0/codebook
    "critic",  # the two of SAC and TD3, the ten of REDQ
    "discriminator",  # of HiFi-GAN, one for each period or scale
    "ensemble",  # of whole networks
    "exit",  # one after each of some layers, to stop early
    "expert",  # of a mixture: experts/0, expert_layer_0
    "head",  # one for each task, box or future token
    "lateral",  # of a pyramid of features, one for each resolution
    "member",  # of an ensemble
    "output",  # DimeNet's output_blocks, one beside each of its interaction blocks
    "projection",  # one for each of several inputs
    "quantizer",  # the stages of SoundStream's
    "task",  # what each of several tasks has
)
"""Words for what there are several of, side by side."""


_MATRICES = frozenset({"exit", "lateral", "output", "projection"})
"""Those of them that name a matrix in a layer, too: the `output` of BERT's attention."""


_ARRAYS = frozenset(_COPIES) - _MATRICES | _plurals(*{*_COPIES} - _MATRICES)
"""Words for copies that may be in one array, with an axis for them."""


_SEVERAL = _plurals(*_COPIES) | {"ensemble"}
"""Words for containers of several copies."""


_TOWERS = frozenset({"language", "languages", "modality", "tower", "towers"})
"""Words for models side by side, each of which has layers: `language_model`, `vision_tower`."""


_SIDES = frozenset({"aux", "down", "fpn", "pyramid", "side", "skip", "up"})
"""Words for outputs on the way, pyramids of features, and the stages of a U-Net."""


_BESIDE = _plurals(*_COPIES) | _TOWERS | _SIDES | {*_COPIES}
"""Words for what is side by side rather than one after another."""


FLAT = frozenset({"codebook", "codebooks", "fpn", "lateral", "laterals", "pyramid"})
"""Words for what is no layer, whatever the list that it is in, or that is in it, is named.

The pyramid of features of a detector has layer_blocks, EnCodec's quantizer layers/0/codebook.
"""


def are_beside(keys: Sequence[str]) -> bool:
    """Whether one of the containers with these keys holds what is side by side."""
    return any(word in _BESIDE for key in keys for word in words_of(key))


def are_copies(keys: Sequence[str]) -> bool:
    """Whether one of these keys names copies side by side, or their outputs: no model of its own.

    Example:
      >>> [are_copies([key]) for key in ("critic_0", "down_blocks", "language_model", "stage")]
      [True, True, False, False]
    """
    return any(word in _BESIDE - _TOWERS for key in keys for word in words_of(key))


def have_copies(keys: Sequence[str]) -> bool:
    """Whether what has one of these keys may be one array of copies, with an axis for them.

    Example:
      >>> [have_copies([key]) for key in ("experts", "critic", "output", "mlp/up")]
      [True, True, False, False]
    """
    return any(word in _ARRAYS for key in keys for word in words_of(key))


def hold_copies(keys: Sequence[str]) -> bool:
    """Whether one of the containers with these keys holds several copies: of what, names tell not.

    Example:
      >>> [hold_copies([key]) for key in ("experts", "action_expert", "ensemble")]
      [True, False, True]
    """
    return any(word in _SEVERAL for key in keys for word in words_of(key))


def is_network_name(key: str) -> bool:
    """Whether a key names one network: the items of a list in it are its layers, or copies.

    Example:
      >>> [is_network_name(key) for key in ("action_expert", "experts", "medusa_head")]
      [True, False, False]
    """
    return bool(_NETWORKS & {*words_of(key)})


_NETWORKS = frozenset({"agent", "critic", "expert"})
"""Words for a whole network, where there is one: the action_expert of openpi."""


def is_norm_word(word: str) -> bool:
    """Whether a word names a normalisation."""
    return word.endswith("norm") or word == "ln"


def words_of(key: str) -> list[str]:
    """The words of a key, in lower case: split at underscores, capitals and digits."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
