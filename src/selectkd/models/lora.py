"""Low-rank adapters on a student (peft): added to its linear layers, and merged back."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from selectkd.errors import ConfigError
from selectkd.models.vision import text_layers

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like block, all of which are adapted by default."""


def add_lora(
    model: Any,
    *,
    r: int = 16,
    alpha: int = 128,
    dropout: float = 0.05,
    target_modules: Sequence[str] | Literal["all-linear"] = LINEAR_LAYERS,
    in_fp32: bool = True,
) -> nn.Module:
    """The model with W + (alpha / r) B A in place of each named linear W; only A and B are trainable.

    target_modules: names of ``linear_layers``, or "all-linear" for all of them; of a model that sees images those of
    its language model. in_fp32: A and B are fp32 on a narrower
    base, too; otherwise in the base's dtype.
    B starts at zero, so the outputs are unchanged. ConfigError for a name that is no linear layer of the
    model, for the head (its weight is used by reference), and for r, alpha or dropout out of range.
    Source: Hu et al. 2021, equation 3.
    """
    from peft import LoraConfig, prepare_model_for_kbit_training

    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"lora r = {r}, alpha = {alpha}, dropout = {dropout} cannot work. "
            "Use r >= 1, alpha > 0 and dropout from 0 up to, not including, 1."
        )
    available = linear_layers(model)
    if target_modules == "all-linear":
        target_modules = available
    within = text_layers(model)
    unknown = [name for name in target_modules if name not in available]
    if unknown or not target_modules:
        wrong = f"names {', '.join(map(repr, unknown))}, not" if unknown else "is empty: it needs"
        raise ConfigError(
            f"lora.target_modules {wrong} linear layers of {type(model).__name__}. "
            f"It has: {', '.join(available)}; all-linear takes them all."
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return adapted(
        model,
        LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_full_names(model, target_modules, within) if within else list(target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        ),
        in_fp32=in_fp32,
    )


def _full_names(model: Any, names: Sequence[str], within: set[str]) -> list[str]:
    """The modules of a language model that have one of these names, whatever a vision tower calls its own."""
    return sorted(name for name in within if name.rpartition(".")[2] in names)


def adapted(model: Any, config: Any, *, in_fp32: bool = False) -> nn.Module:
    """The model in peft's wrapper with the adapters of ``config``, new; in_fp32: as of ``add_lora``."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft asks for a name that transformers has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=in_fp32)
        # peft has an error of its own kind for each module that it cannot adapt; the user's remedy is the same
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            names = sorted(config.target_modules)
            others = [name for name in linear_layers(model) if name not in names]
            raise ConfigError(
                f"peft cannot put adapters on {', '.join(names)} of {type(model).__name__}: "
                f"{' '.join(str(error).split())[:300]} It has: {', '.join(others)}."
            ) from error


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """While it lasts the model is its base, W in place of W + (alpha / r) B A, in evaluation mode.

    Afterwards, however it ends, each module has its mode, adapters are on and each parameter asks for its gradient
    as before. No random number is drawn.
    """
    modes = [(module, module.training) for module in model.modules()]
    required = [(p, p.requires_grad) for p in model.parameters()]  # peft turns all of an adapter on
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)


def check_base(model: Any) -> None:
    """ConfigError unless a model with its adapters off is the model before training.

    The adapters alone must be trained: no bias, head or embedding (``modules_to_save``), and no adapter merged into
    the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "disable_adapter"):
        raise ConfigError(
            f"{type(model).__name__} has no adapters to switch off: training changes the weights themselves. Train it "
            "with LoRA (training.lora), or name a separate teacher: teacher: {model: ...}."
        )
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    merged = [name for name, layer in layers if layer.merged]
    if merged:
        raise ConfigError(
            f"the adapter of {merged[0]} is merged into its weight, so it cannot be switched off. Unmerge it first."
        )
    adapter_parameters = {
        id(parameter)
        for _, layer in layers
        for part in layer.adapter_layer_names
        for parameter in getattr(layer, part).parameters()
    }
    others = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapter_parameters
    ]
    if others:
        raise ConfigError(
            f"{others[0]} is trained beside the adapters, so the model without them is not the base model. Train the "
            "adapters alone (no modules_to_save, bias: none), or name a separate teacher: teacher: {model: ...}."
        )


def linear_layers(model: Any) -> list[str]:
    """The last names of the layers that can have adapters, in order of first appearance.

    Linear layers but the head, and no name that stands for one whose product an adapter cannot reach: a router, whose
    module returns more than its product, and a state-space layer's out_proj, whose weight alone its kernel takes.
    """
    head = model.get_output_embeddings()
    names: dict[str, None] = {}
    others = set()
    within = text_layers(model)
    for path, module in model.named_modules():
        if within and path not in within:
            continue
        above, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.isdigit():
            names[name] = None
            if not _is_product(module) or (name == "out_proj" and _state_space(model.get_submodule(above))):
                others.add(name)
    return [name for name in names if name not in others]


def _is_product(module: nn.Module) -> bool:
    """Whether a linear layer returns its product alone; a class with another forward pass is tried out."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or not module.weight.is_floating_point():
        return True
    try:
        with torch.no_grad():
            out = module(module.weight.new_zeros(1, 1, module.in_features))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(out, Tensor) and out.shape == (1, 1, module.out_features)


def _state_space(module: nn.Module) -> bool:
    """Whether a module is a Mamba-like mixer: it has a state matrix and a skip."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def merge(model: Any) -> Any:
    """The plain model with each adapter's product added to its weight; a model without adapters as it is.

    In place: the wrapper must not be used afterwards.
    """
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
