"""The optimizers a recipe may name: transformers' own, by short names."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


def trainers_name(name: str, device: torch.device | str = "cpu") -> str:
    """The Trainer's name of an optimizer; AdamW is fused where the device has it.

    >>> trainers_name("adamw"), trainers_name("adamw", "cuda")
    ('adamw_torch', 'adamw_torch_fused')
    """
    fused = name == "adamw" and torch.device(device).type in FUSED_ON
    return "adamw_torch_fused" if fused else KINDS[name].name


def decaying(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: matrices, not the vectors of norms and biases."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
