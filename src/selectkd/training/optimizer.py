"""The optimizers a recipe may name: transformers' own, the same for both engines."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from selectkd.errors import ConfigError

FUSED_ON = ("cuda", "xpu")
"""Devices on which AdamW takes one kernel for all weights; on a CPU the plain one is as fast."""


@dataclass(frozen=True)
class Kind:
    """transformers' name of an optimizer; package: what it needs, as imported and as installed. state: bytes it keeps
    for each trained weight, None for two moments in the weight's own dtype.
    """

    name: str
    package: tuple[str, str] | None = None
    state: float | None = None


BITSANDBYTES, TORCHAO = ("bitsandbytes", "bitsandbytes"), ("torchao", "torchao")
KINDS = {
    "adamw": Kind("adamw_torch"),
    "adamw_8bit": Kind("adamw_bnb_8bit", BITSANDBYTES, 2.0),
    "adamw_4bit": Kind("adamw_torch_4bit", TORCHAO, 1.0),
    "paged_adamw": Kind("paged_adamw_32bit", BITSANDBYTES, 8.0),
    "paged_adamw_8bit": Kind("paged_adamw_8bit", BITSANDBYTES, 2.0),
    "adafactor": Kind("adafactor", None, 0.0),
    "ademamix": Kind("ademamix", BITSANDBYTES, 12.0),
    "ademamix_8bit": Kind("ademamix_8bit", BITSANDBYTES, 3.0),
    "lion": Kind("lion_32bit", BITSANDBYTES, 4.0),
    "lion_8bit": Kind("lion_8bit", BITSANDBYTES, 1.0),
    "stable_adamw": Kind("stable_adamw", ("optimi", "torch-optimi")),
    "sgd": Kind("sgd", None, 0.0),
}
"""By the recipe's name."""
SMALL = 4096
"""Weights of a tensor below which bitsandbytes and torchao keep fp32 moments."""


def state_bytes(name: str, parameter: Tensor) -> int:
    """Bytes an optimizer keeps of a parameter: its moments, or adafactor's fp32 mean of each row and column."""
    n, kind = parameter.numel(), KINDS[name]
    if name == "adafactor":
        return 4 * (n if parameter.ndim < 2 else n // parameter.shape[-1] + n // parameter.shape[-2])
    if kind.state is None:
        return 2 * n * parameter.element_size()
    narrow = kind.state < 4.0 and n >= SMALL and parameter.ndim >= 2
    wide = {"ademamix_8bit": 12.0, "lion_8bit": 4.0, "sgd": 0.0}.get(name, 8.0)
    return int(n * (kind.state if narrow or kind.state >= 4.0 else wide))


def check_optimizer(name: str) -> None:
    """ConfigError where the package that an optimizer needs is not installed."""
    package = KINDS[name].package
    if package is not None and importlib.util.find_spec(package[0]) is None:
        raise ConfigError(
            f"training.optimizer = {name!r} needs a package that is not installed. Get it by `pip install "
            f"{package[1]}`, or use adamw or adafactor."
        )


def arguments(
    name: str = "adamw",
    *,
    learning_rate: float = 5e-5,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What TrainingArguments gets of an optimizer; AdamW is fused where the device has it."""
    chosen = KINDS[name].name
    if chosen == "adamw_torch" and torch.device(device).type in FUSED_ON:
        chosen = "adamw_torch_fused"
    first, second = betas or (0.9, 0.999)
    return {
        "optim": chosen,
        "learning_rate": learning_rate,
        "adam_beta1": first,
        "adam_beta2": second,
        "adam_epsilon": 1e-8 if eps is None else eps,
    }


def decaying(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: matrices, not the vectors of norms and biases."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def optimizer_for(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    name: str = "adamw",
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer the Trainer makes of ``arguments``, over the trainable parameters; weight decay on matrices alone.

    ConfigError where its package is missing.
    """
    check_optimizer(name)
    chosen = set(decaying(model))
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for key, p in trained if key in chosen], "weight_decay": weight_decay},
        {"params": [p for key, p in trained if key not in chosen], "weight_decay": 0.0},
    ]
    device = trained[0][1].device if trained else "cpu"
    given = arguments(name, learning_rate=learning_rate, betas=betas, eps=eps, device=device)
    of: Any = Trainer.get_optimizer_cls_and_kwargs
    made, options = of(SimpleNamespace(optim_args=None, **given), model)
    optimizer = made(groups, **options)
    if options.get("optim_bits") == 8:
        _embeddings_in_fp32(model)
    return optimizer


def _embeddings_in_fp32(model: nn.Module) -> None:
    """bitsandbytes' advice, which the Trainer follows: 32-bit moments for embeddings."""
    import bitsandbytes  # type: ignore[import-not-found]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
