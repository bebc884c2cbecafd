"""A causal language model taken apart: its backbone, and its head as a ``rows.Head``.

b sequences, t positions, d width, v vocabulary.
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from selectkd.errors import ConfigError
from selectkd.loss.head import Head
from selectkd.models.fake_quantized import multiplied
from selectkd.models.vision import sees_images

LOGITS_SCALING_MULTIPLIES = frozenset({"hyperclovax"})
"""Model types whose ``logits_scaling`` multiplies; everywhere else (Granite and its kin) it divides."""
LOGIT_SCALE = frozenset({"cohere", "cohere2", "cohere2_moe", "cohere_compass_text"})
"""Model types whose forward pass reads ``logit_scale``; MPT has it in its configuration and does not."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What Gemma, RecurrentGemma and xLSTM call it."""


def head_of(model: nn.Module) -> Head:
    """The head H with H.logits(backbone(model)(...)) = model(...).logits, its tensors by reference.

    A weight that is rounded as it trains (``fake_quantized``) is the rounded one.

    Scale and soft-cap follow the architecture: ``final_logit_softcapping`` (Gemma; ``logits_soft_cap`` in
    RecurrentGemma, ``output_logit_soft_cap`` in xLSTM), ``logits_scaling`` (Granite, divides), ``logit_scale``
    (Cohere), ``lm_head_multiplier`` (Falcon-H1), ``logits_mup_width_multiplier`` (Inkling, divides). peft-wrapped
    models are unwrapped. ConfigError where there is no plain linear head: none at all, a quantised one, or one with an
    adapter on it.
    """
    plain = unwrapped(model)
    layer = plain.get_output_embeddings()
    if layer is None:
        raise ConfigError(f"{type(plain).__name__} has no language-model head. Name a causal language model.")
    if hasattr(layer, "modules_to_save"):  # a head that peft trains whole: the trained copy is the live one
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if hasattr(layer, "base_layer"):
        raise ConfigError(
            f"an adapter sits on the head of {type(plain).__name__}; its delta is not part of the weight. "
            "Leave the head out of target_modules, or merge the adapter first."
        )
    weight = multiplied(layer)
    if not weight.is_floating_point():
        raise ConfigError(
            f"the head of {type(plain).__name__} is stored as {weight.dtype}. Do not quantise the head."
        )
    config = plain.config.get_text_config()
    return Head(weight, getattr(layer, "bias", None), _scale(config), _softcap(config))


def backbone(model: nn.Module) -> Callable[..., Tensor]:
    """The function (**model inputs) -> last hidden state [b, t, d], what the head multiplies.

    No cache is built. Inside a peft-wrapped model the adapter stays in effect. Prompt-learning adapters,
    which live in the wrapper's own forward, are refused.
    """
    decoder = decoder_of(model)

    def last_hidden(**inputs: Any) -> Tensor:
        return decoder(**{"use_cache": False, **inputs}).last_hidden_state

    return last_hidden


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that turns ids into hidden states: the model without its head and without peft's wrapper.

    Of a model that sees images it is all of tower, projector and language model.
    """
    plain = unwrapped(model)
    head = plain.get_output_embeddings()
    own = () if sees_images(plain.config) else (plain.get_decoder(),)
    for found in (*own, plain.base_model, getattr(plain, "model", None)):
        if isinstance(found, nn.Module) and found is not plain and found is not head:
            return found
    raise ConfigError(f"{type(plain).__name__} does not keep its backbone apart from its head.")


def text_decoder_of(model: nn.Module) -> nn.Module:
    """The module that has the layers: ``decoder_of``, of a model that sees images its language model."""
    plain = unwrapped(model)
    return plain.get_decoder() if sees_images(plain.config) else decoder_of(model)


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model itself, out of peft's wrapper where it has one."""
    wrapper: Any = model
    if not hasattr(wrapper, "get_base_model"):
        return wrapper
    if getattr(wrapper.active_peft_config, "is_prompt_learning", False):
        raise ConfigError(
            f"{wrapper.active_peft_config.peft_type} adds virtual tokens outside the backbone. Use LoRA."
        )
    return wrapper.get_base_model()


def _scale(config: Any) -> float:
    scale = float(getattr(config, "lm_head_multiplier", None) or 1.0)
    if config.model_type in LOGIT_SCALE:
        scale *= float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_mup_width_multiplier", None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scale * scaling if config.model_type in LOGITS_SCALING_MULTIPLIES else scale / scaling


def _softcap(config: Any) -> float | None:
    caps = [cap for cap in (getattr(config, name, None) for name in SOFT_CAPS) if cap]
    return float(caps[0]) if caps else None
