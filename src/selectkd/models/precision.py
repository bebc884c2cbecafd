"""The dtypes in which a run holds its weights and multiplies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selectkd.errors import ConfigError

UNMOVED = 0.01
"""Share of a bf16 student's weights beyond one step's reach that a run warns of: what sets bf16 apart from fp32."""


@dataclass(frozen=True)
class Precision:
    """How a run computes. weights: dtype of what trains, and so of the optimizer's moments; frozen: of an adapter's
    base, and of a teacher that names none; saved: of the student's folder. autocasts: whether the student's products
    are in bf16 whatever its weights are. tf32: whether a GPU may round the inputs of fp32 products to 10 bits.
    """

    name: str
    weights: str = "float32"
    frozen: str = "float32"
    saved: str = "float32"
    autocasts: bool = False
    tf32: bool = False

    def autocast(self, device: torch.device | str) -> AbstractContextManager[object]:
        """The context of the student's forward pass and of its loss on ``device``."""
        if not self.autocasts:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def products(self, device: torch.device | str) -> Iterator[None]:
        """While it lasts an NVIDIA or AMD GPU's fp32 products are in TF32, or are not; afterwards as before."""
        if torch.device(device).type != "cuda":
            yield
            return
        # read by the newer name, which may have set it (torch 2.9), and set by the older, which everybody may read
        switch: Any = torch.backends.cuda.matmul
        newer = getattr(switch, "fp32_precision", None)
        before = switch.allow_tf32 if newer is None else newer == "tf32"
        switch.allow_tf32 = self.tf32
        try:
            yield
        finally:
            switch.allow_tf32 = before


FP32 = Precision("fp32")
PRECISIONS = {
    precision.name: precision
    for precision in (
        FP32,
        Precision("tf32", tf32=True),
        Precision("bf16", frozen="bfloat16", saved="bfloat16", autocasts=True),
        Precision("bf16-pure", weights="bfloat16", frozen="bfloat16", saved="bfloat16"),
    )
}


def precision_of(name: str, device: torch.device | str) -> Precision:
    """The precision a recipe's ``training.precision`` means on ``device``.

    auto: bf16 on a GPU that has it, tf32 on any other GPU, fp32 elsewhere. tf32 on a device without it is fp32.
    ConfigError for bf16 on a GPU that only emulates it. Of a GPU that is not here it is taken that it has bf16.

    >>> precision_of("auto", "cpu").name
    'fp32'
    """
    kind = torch.device(device).type
    has_bf16 = kind in ("cpu", "xpu") or (kind == "cuda" and _gpu_has_bf16())
    if name == "auto":
        plain = kind not in ("cuda", "xpu")
        name = "fp32" if plain else "bf16" if has_bf16 else "tf32"
    precision = PRECISIONS[name]
    if "bfloat16" in (precision.weights, precision.frozen) and not (has_bf16 or kind == "mps"):
        raise ConfigError(
            f"training.precision = {name!r}, and this {kind} device has no bfloat16. Use auto, which is tf32 here, or "
            "fp32."
        )
    return precision if kind == "cuda" else replace(precision, tf32=False)


def _gpu_has_bf16() -> bool:
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def check_launched(precision: Precision) -> None:
    """ConfigError where `accelerate launch --mixed_precision` asks for another precision than the recipe's."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16" if precision.autocasts else "no"):
        raise ConfigError(
            f"accelerate was launched with --mixed_precision {launched}, and training.precision is {precision.name} on "
            "this device. Leave the flag out; the recipe decides."
        )


@torch.no_grad()
def unmoved_share(parameters: Iterable[Tensor], learning_rate: float) -> float:
    """The share of weights that a step of +- ``learning_rate`` leaves as they are, by the rounding of their dtype.

    AdamW's first step changes each weight by the learning rate, up or down, and hardly a later step is larger. A weight
    counts by half where one of the two directions moves it.

    >>> unmoved_share([torch.ones(4, dtype=torch.bfloat16)], 1e-3)
    1.0
    """
    still = total = 0.0
    for parameter in parameters:
        weight = parameter.detach()
        for step in (learning_rate, -learning_rate):
            still += float((weight.add(step) == weight).sum()) / 2
        total += weight.numel()
    return still / total if total else 0.0


def bf16_warnings(precision: Precision, parameters: Iterable[Tensor], learning_rate: float) -> list[str]:
    """The warning for bf16 weights that a step of this learning rate does not change; empty where most weights move."""
    if precision.weights == "float32":
        return []
    share = unmoved_share(parameters, learning_rate)
    if share < UNMOVED:
        return []
    return [
        f"training.precision = bf16-pure: {share:.0%} of the trained weights are too large for a step of the learning "
        f"rate {learning_rate:g} to change them in bfloat16. training.precision: bf16 computes alike with fp32 weights."
    ]
