"""Rules: how the next token of each text is chosen from the logits of one model or of two. b texts, v vocabulary.

A rule has ``uniforms`` (numbers it reads for a token) and ``__call__(logits, uniform [b, r]) -> (token [b], replaced
[b])``, logits holding one [b, v] for each model it was given; replaced says where the second model overruled the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.rollouts.sampling import Sampling, drawn

ANYTHING = Sampling()
"""The model's own distribution."""


class Rule(Protocol):
    """How a token is chosen."""

    @property
    def uniforms(self) -> int: ...

    @property
    def models(self) -> int: ...

    def __call__(self, logits: Sequence[Tensor], uniform: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Draw:
    """One model writes alone."""

    sampling: Sampling = ANYTHING
    uniforms = 1
    models = 1

    def __call__(self, logits: Sequence[Tensor], uniform: Tensor) -> tuple[Tensor, Tensor]:
        token = chosen(logits[0], self.sampling, uniform[:, 0])
        return token, torch.zeros_like(token, dtype=torch.bool)


@dataclass(frozen=True)
class Interleaved:
    """The first model proposes a draw; where it is not among the second's ``window`` best, the second draws instead.

    The window is of the second model's own order, whatever the sampling; ties at its edge are inside. Default 25 as in
    the paper. Source: SKD (arXiv 2410.11325).
    """

    sampling: Sampling = ANYTHING
    window: int = 25
    uniforms = 2
    models = 2

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"Interleaved(window={self.window}): the window holds 1 token or more.")

    def __call__(self, logits: Sequence[Tensor], uniform: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = logits
        token = chosen(student, self.sampling, uniform[:, 0])
        better = (teacher > teacher.gather(-1, token[:, None])).sum(-1)
        replaced = better >= self.window
        if not replaced.is_cpu or bool(replaced.any()):  # an accelerator would have to be waited for
            token = torch.where(replaced, chosen(teacher, self.sampling, uniform[:, 1]), token)
        return token, replaced


@dataclass(frozen=True)
class Mixed:
    """A draw from share * second + (1 - share) * first. Default .2 as in the paper.

    Source: MiniLLM (arXiv 2306.08543), teacher-mixed sampling.
    """

    sampling: Sampling = ANYTHING
    share: float = 0.2
    uniforms = 1
    models = 2

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"Mixed(share={self.share}): share must lie in [0, 1].")

    def __call__(self, logits: Sequence[Tensor], uniform: Tensor) -> tuple[Tensor, Tensor]:
        q, p = (self.sampling.probabilities(one) for one in logits)
        token = drawn(torch.lerp(q, p, self.share), uniform[:, 0])
        return token, torch.zeros_like(token, dtype=torch.bool)


def chosen(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """A token of each row, [b]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return drawn(sampling.probabilities(logits), uniform)
