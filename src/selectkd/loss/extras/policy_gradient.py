"""MiniLLM's sequence-level reverse KL by policy gradient. n rows; p teacher, q student, y the drawn text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.terms import Forward, Term


@dataclass(frozen=True)
class policy_gradient:
    """Per token w (sum_v q log(q / p), exact) - w R log q(y): the step's own term, and what comes after it.

    R is the mean over the later tokens of the sequence of log(p(y) / q(y)), each clipped to +- clip (``reward clip``
    and length normalisation of the paper); 0 at the last token. w = q(y) / (share p(y) + (1 - share) q(y)) corrects
    for text drawn from the mixture, at most 1 / (1 - share); share must be the policy's. w and R carry no gradient.
    The first part is the term's own divergence (reverse_kl), weighed by its verifier; the second is weighed alike.
    Source: MiniLLM (arXiv 2306.08543). The paper divides the later sum by T - t - 1 for its T - t terms; here it is
    their mean. clip: the default is that of the released code's cliprange_reward; its experiments' scripts set 100.
    """

    share: float = 0.2
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0 or not self.clip > 0:
            raise ConfigError(
                f"policy_gradient(share={self.share}, clip={self.clip}): share lies in [0, 1), clip above 0."
            )

    def __call__(self, forward: Forward, terms: list[Term], *, step: int) -> list[Term]:
        if not forward.hidden.shape[0]:
            return terms
        log_p, log_q = forward.label_log_probs.unbind(-1)  # [n]
        importance = 1.0 / (self.share * (log_p - log_q).exp() + (1.0 - self.share))
        later = later_mean((log_p - log_q).clamp(-self.clip, self.clip), forward.sequence)
        result: list[Term] = []
        for term in terms:
            w = term.of(importance) * term.scale
            result.append(replace(term, scale=w))
            if term.weighs:
                # -w R log q(y), gated like the rest: with the verifier's weights, from one more look at both models
                long = replace(term.objective, divergence="cross_entropy")
                result.append(replace(term, objective=long, scale=w * term.of(later), beside=True))
        return result


def later_mean(reward: Tensor, sequence: Tensor) -> Tensor:
    """The mean of ``reward`` [n] over the later rows of each row's sequence, [n]; 0 at its last row.

    Rows of a sequence stand in order and together, as ``supervised`` gives them.
    """
    flipped, owner = reward.double().flip(0), sequence.flip(0)
    running = flipped.cumsum(0)
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    start = first.nonzero()[:, 0][first.long().cumsum(0) - 1]  # [n] where the row's sequence starts
    before = running[start] - flipped[start]
    count = torch.arange(owner.shape[0], device=owner.device) - start  # later rows
    total = running - flipped - before
    mean = torch.where(count > 0, total / count.clamp(min=1), torch.zeros_like(total))
    return mean.flip(0).to(reward.dtype)
