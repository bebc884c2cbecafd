"""How a divergence states its gradient beside its formula. n rows, s support columns; p = teacher, q = student.

The gradient of a row's divergence D to the student's logits is g = h - q sum(h), where h_v = dD / d log q_v with log q
taken as free. A closed form computes D and h together from what the loss has at hand, without autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from jaxtyping import Float
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Block:
    """A block of rows as the closed forms see it, each [n, s]; every log-probability is finite.

    logp, logq, p, q are read only. out receives h; spare is memory for temporaries. shift: log p - log q is
    logp - logq + shift; not 0 only where the closed form said ``differences_only``: logp and logq are then logits,
    known up to one constant a row.
    """

    logp: Float[Tensor, "n s"]
    logq: Float[Tensor, "n s"]
    p: Float[Tensor, "n s"]
    q: Float[Tensor, "n s"]
    out: Float[Tensor, "n s"]
    spare: Float[Tensor, "n s"]
    shift: Float[Tensor, " n"] | float = 0.0


class ClosedForm(Protocol):
    """(block, **params) -> (D [n], sum of h [n] where it is known beforehand, else None); h is left in block.out."""

    def __call__(self, block: Block, **params: float) -> tuple[Tensor, Tensor | float | None]: ...


def with_gradient(
    closed_form: Callable[..., tuple[Tensor, Tensor | float | None]], *, differences_only: bool = False
) -> Callable[[F], F]:
    """Declares ``closed_form`` as value and gradient of the divergence it decorates; both take the same parameters.

    differences_only: it reads logp and logq only as logp - logq + shift, so that nobody has to normalise them.
    The contract suite holds the two equal in fp64.
    """

    def declare(divergence: F) -> F:
        divergence.closed_form = closed_form  # type: ignore[attr-defined]
        divergence.differences_only = differences_only  # type: ignore[attr-defined]
        return divergence

    return declare


def closed_form_of(
    divergence: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, Tensor | float | None]] | None:
    """The closed form a divergence declares, with the parameters bound to the divergence; None where it has none."""
    function = getattr(divergence, "func", divergence)
    closed_form = getattr(function, "closed_form", None)
    if closed_form is None:
        return None
    params = getattr(divergence, "keywords", {})

    def bound(block: Block) -> tuple[Tensor, Tensor | float | None]:
        return closed_form(block, **params)

    return bound


def reads_differences_only(divergence: Callable[..., Tensor]) -> bool:
    """Whether the divergence's closed form can do with logits and ``Block.shift``."""
    return getattr(getattr(divergence, "func", divergence), "differences_only", False)
