"""How the loss is computed, whatever its rows and objective: one object from the recipe to the last block."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import TypedDict

from selectkd.errors import ConfigError


@dataclass(frozen=True)
class LossOptions:
    """The options of ``distillation_loss``, whose docstring explains them. ConfigError for a value out of range."""

    temperature: float = 1.0
    chunk: int | None = None
    also_kl: bool = False
    gradient_filter: float = 0.0
    compiled: bool = False

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
    compiled: bool
