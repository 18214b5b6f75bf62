"""Words of keys: which name layers, which parts of them, and which what is side by side."""

from __future__ import annotations

import re
from collections.abc import Set


def words_of(key: str) -> list[str]:
    """The words of a key, in lower case: split at underscores, capitals and digits."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]


def has_word(among: Set[str], *keys: str) -> bool:
    """Whether one of the keys has one of some words.

    Example:
      >>> [has_word(BESIDE, key) for key in ("critic_0", "down_blocks", "language_model", "stage")]
      [True, True, True, False]
      >>> [has_word(ARRAYS, key) for key in ("experts", "critic", "output", "mlp/up")]
      [True, True, False, False]
      >>> [has_word(SEVERAL, key) for key in ("experts", "action_expert", "ensemble")]
      [True, False, True]
    """
    return any(word in among for key in keys for word in words_of(key))


def nesting_of(name: str) -> int | None:
    """How deep an axis of that name nests among those that run over layers; None if it does not."""
    words = words_of(name)
    # MaxText's pipelines, from outer to inner: circular_repeats, layers, layers_per_stage.
    if "repeats" in words:
        return 0
    # DeepSeek's axes in MaxText are dense_layers and moe_layers.
    if "layers" in words:
        return 2 if "per" in words else 1
    return None


def is_layer_name(key: str) -> bool:
    """Whether a key names a block that a network repeats, or the stack of them."""
    words = words_of(key)
    # MixerBlock_0 of big_vision ends with it, layers_outside_pipeline of MaxText begins with it.
    # In per_layer_input_gate of Gemma 3n it is between other words.
    ends = {words[0], words[-1]} if words else set()
    # One word may end with "block", like encoderblock_0 of big_vision. One that ends with "layer"
    # may be a player.
    is_layer = any(re.fullmatch(r".*blocks?|layers?", word) for word in ends)
    # Two words name a part of a block, like MlpBlock_0 of big_vision. More may name all of it.
    is_part = len(words) == 2 and words[0] in _BLOCK_PARTS
    # LayerNorm_0 of Flax has a layer in its name, expert_layer_0 is one of several.
    is_other = is_part or any(is_norm_word(word) or word in BESIDE for word in words)
    # GPT-2 of Hugging Face has its blocks in a list named h.
    return key == "h" or (is_layer and not is_other)


def is_part_name(key: str) -> bool:
    """Whether a key names a part of a block, or what belongs to one."""
    # Diffusion models have an AttnBlock here and there, Gemma 3n a per_layer_input_gate.
    return words_of(key)[:1] == ["per"] or has_word(_BLOCK_PARTS, key)


def is_norm_word(word: str) -> bool:
    """Whether a word names a normalisation."""
    # input_layernorm of Llama, RMSNorm_0 of Flax; ln of the Scaling Book, ln_1 of GPT-2.
    return word.endswith("norm") or word == "ln"


def _plurals(*words: str) -> frozenset[str]:
    # Those with "es" are branches.
    return frozenset(word + ending for word in words for ending in ("s", "es"))


# Flax has scale and bias, Equinox weight and bias, Haiku scale and offset, Keras gamma and beta,
# tunix w, the checkpoints of OpenAI's GPT-2 g and b.
NORM_VECTORS = frozenset({"b", "beta", "bias", "g", "gamma", "offset", "w", "weight"})
"""Names of the vectors of a normalisation, beside `scale`, which is one anywhere."""

# local_experts of Mixtral; shared_expert of Qwen3-Next and MoeBlock_0 of DeepSeek in MaxText.
EXPERTS = frozenset({"expert", "experts", "moe"})
"""Words for what is in the place of an MLP."""

# Praxis has a module `repeat` around the block that it repeats, Haliax an array `stacked`.
STACK_NAMES = frozenset({"repeat", "stacked"})
"""Keys of what holds one block many times over, whatever the block is."""

# AttnBlock_0 of DDPM, AttentionBlock_0 beside an MLP, MlpBlock_0 of big_vision.
_BLOCK_PARTS = frozenset({"attention", "attn", "mlp"})
"""Words for the parts of a block."""

_COPY = (
    "adapter",  # one for each language or task, beside frozen layers
    "agent",  # one for each of several that learn together
    "branch",  # of HRNet, of one resolution each
    "codebook",  # of EnCodec's residual quantiser: quantizer/layers/0/codebook
    "critic",  # the two of SAC and TD3, the ten of REDQ
    "discriminator",  # of HiFi-GAN, one for each period or scale
    "ensemble",  # of whole networks, by vmap
    "exit",  # after some of the layers, to stop early: exit_heads
    "expert",  # of a mixture: experts/0, expert_layer_0
    "head",  # one for each task, box (DETR) or future token (Medusa)
    "lateral",  # lateral_convs of a pyramid of features (MMDetection), one for each resolution
    "member",  # of an ensemble: members/0
    "output",  # output_blocks of DimeNet, one beside each of its interaction blocks
    "projection",  # input_projections, one for each of several inputs
    "quantizer",  # the stages of SoundStream's
    "task",  # task_heads, one for each of several tasks
)
"""Words for one of several copies side by side."""

# The output of BERT's attention, the projection behind the heads of an attention.
_ALSO_MATRICES = frozenset({"output", "projection"})
"""Those of them that name a matrix in a layer, too."""

ARRAYS = frozenset(_COPY) - _ALSO_MATRICES | _plurals(*{*_COPY} - _ALSO_MATRICES)
"""Words for copies that may be in one array, with an axis for them."""

SEVERAL = _plurals(*_COPY) | {"ensemble"}
"""Words for containers of several copies: of what, names tell not."""

# language_model beside vision_tower, and a list of towers; modality_submodules of Megatron-LM.
_TOWERS = frozenset({"language", "modality", "tower", "towers"})
"""Words for models side by side, each of which has layers."""

# Outputs on the way: aux_heads of deep supervision, side1 of U²-Net, skip_convs of WaveNets.
# Stages of a U-Net: down_blocks and up_blocks of Diffusers.
# Features of each resolution: fpn/layer_blocks of Torchvision's detectors.
_SIDES = frozenset({"aux", "down", "fpn", "pyramid", "side", "skip", "up"})
"""Words for what is beside the layers, or between stages of other widths."""

COPIES = _plurals(*_COPY) | _SIDES | {*_COPY}
"""Words for copies side by side, or their outputs: no model of its own has them."""

BESIDE = COPIES | _TOWERS
"""Words for what is side by side rather than one after another."""

# The action_expert of openpi, or the critic of an actor, may have a list of layers.
NETWORKS = frozenset({"critic", "expert"})
"""Words for a whole network, where there is one: items of a list in it are layers, or copies."""

# layers/0/_codebook of EnCodec's quantizer, fpn/layer_blocks of Torchvision's detectors.
FLAT = frozenset({"codebook", "codebooks", "fpn", "pyramid"})
"""Words for what is no layer, whatever the list that it is in, or that is in it, is named."""
