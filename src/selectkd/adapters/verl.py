"""The verified loss among verl's on-policy distillation losses: ``distillation_loss.loss_mode: selectkd``.

verl computes the divergence of each written token from the teacher's best tokens; the student's token is the proposal,
and a rejected one has weight beta. b rows, r written tokens, K of the teacher's best tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selectkd.errors import ConfigError

NAME = "selectkd"


def acceptance(teacher_ids: Tensor, teacher_logp: Tensor, written: Tensor, k: int) -> Tensor:
    """1 where the written token [b, r] is among the teacher's k best, else 0: [b, r].

    teacher_ids, teacher_logp [b, r, K] in any order, of which one may be the written token's own beyond the best.
    ConfigError where fewer than k are given.

    >>> import torch
    >>> ids, logp = torch.tensor([[[4, 7, 9]]]), torch.tensor([[[-0.1, -2.0, -9.0]]])
    >>> [acceptance(ids, logp, torch.tensor([[token]]), k=2).item() for token in (4, 7, 9, 5)]
    [1.0, 1.0, 0.0, 0.0]
    """
    if teacher_ids.shape[-1] < k:
        raise ConfigError(
            f"the verifier looks at the teacher's {k} best tokens, and {teacher_ids.shape[-1]} are given. Set "
            f"distillation_loss.topk to {k} or more."
        )
    hit = teacher_ids == written[..., None]  # [b, r, K]
    own = torch.where(hit, teacher_logp, torch.nan).nan_to_num(-torch.inf).amax(-1, keepdim=True)
    better = (teacher_logp > own).sum(-1)
    return (hit.any(-1) & (better < k)).to(teacher_logp.dtype)


def verified(losses: Tensor, accepted: Tensor, beta: float) -> Tensor:
    """(beta + (1 - beta) a) times the loss of each token, [b, r]; the weight has no gradient."""
    return losses * (beta + (1.0 - beta) * accepted.detach())


def register(*, k: int = 5, beta: float = 0.01, name: str = NAME) -> None:
    """Adds the loss to verl's registry; import it before verl reads its configuration. ValueError where it is there."""
    from verl.trainer.distillation.losses import (  # pyright: ignore[reportMissingImports]
        DistillationLossSettings,
        register_distillation_loss,
    )
    from verl.workers.utils.padding import no_padding_2_padding  # pyright: ignore[reportMissingImports]

    def loss_of(
        config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        losses = no_padding_2_padding(model_output["distillation_losses"], data).clamp_min(0.0)
        ids, logp = (no_padding_2_padding(data[one], data) for one in ("teacher_ids", "teacher_logprobs"))
        written, counts = (_padded(data[one]) for one in ("responses", "response_mask"))
        accepted = acceptance(ids, logp, written, k)
        there = counts.bool()
        share = accepted[there].mean().item() if bool(there.any()) else 0.0
        return verified(losses, accepted, beta), {"distillation/acceptance": share}

    register_distillation_loss(DistillationLossSettings(names=[name], use_topk=True))(loss_of)


def _padded(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values
