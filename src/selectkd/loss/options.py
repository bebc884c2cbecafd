"""How the loss is computed, whatever its rows and objective: one object from the recipe to the last block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from typing_extensions import TypedDict

from selectkd.errors import ConfigError


@dataclass(frozen=True)
class LossOptions:
    """The options of ``distillation_loss``; a value out of range raises ConfigError.

    temperature: divides both models' logits in the divergence (the loss is not multiplied by its square); the verifier
    does not see it. chunk: rows per matrix product, default by memory. also_kl: the sums hold ``kl`` and ``row_kl`` as
    well, KL(p || q) at temperature 1 over all rows, from the same logits.
    gradient_filter: vocabulary columns whose largest gradient in a chunk is below this share of the chunk's largest
    take no part in its two gradient products; what hidden loses comes back as one tail (``products.strong_columns``
    states the bound). The loss does not change. 0 leaves none out; 2^-14 pays where the models are sure of most tokens;
    in fp32 2^-10 still errs less than bf16 does.
    compiled: the elementwise work of a live teacher's rows by torch.compile, which takes a C++ compiler and seconds at
    the first call. True refuses a divergence or a teacher without a closed form, "auto" computes theirs as ever. An
    accelerator's kernels do without.
    """

    temperature: float = 1.0
    chunk: int | None = None
    also_kl: bool = False
    gradient_filter: float = 0.0
    compiled: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature} must be above 0.")
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"chunk = {self.chunk} must be 1 or more rows.")
        if not 0.0 <= self.gradient_filter < 1.0:
            raise ConfigError(
                f"gradient_filter = {self.gradient_filter} must lie in [0, 1); 0 is exact, 2^-14 = 6.1e-5."
            )


class LossKeywords(TypedDict, total=False):
    """``LossOptions`` as keyword arguments."""

    temperature: float
    chunk: int | None
    also_kl: bool
    gradient_filter: float
    compiled: bool | Literal["auto"]
