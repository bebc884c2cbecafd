"""The held-out text of a run, and a loss on one fixed batch of it. n supervised rows, v vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.config import recipe_from
from selectkd.data.collate import collate
from selectkd.data.render import pad_id_of
from selectkd.data.supervised import supervised
from selectkd.evals.runs import read_manifest
from selectkd.training.checks import Plan, prepare
from selectkd.training.run_folder import date_of


def plan_of(run: str | os.PathLike[str]) -> Plan:
    """The text, tokenizer and teacher of a run's recipe, from its manifest; no weight is loaded."""
    return prepare(recipe_from(read_manifest(run)["config"]), date=date_of(Path(run)))


def heldout_batch(plan: Plan, samples: int) -> Any:
    """The first ``samples`` held-out texts as one batch; of a run without held-out text, the first it trained on."""
    examples = plan.heldout or plan.examples
    return collate(examples[:samples], pad_id=pad_id_of(plan.tokenizer))


def text_loss(model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    """A closure: the mean of -log q(token) over the batch's supervised tokens, in nats, with its graph."""
    seen = supervised(batch)

    def loss() -> Tensor:
        logits = _logits(model, batch, seen.position)  # [n, v]
        return nn.functional.cross_entropy(logits, seen.labels)

    return loss


def divergence_loss(model: nn.Module, teacher: nn.Module, batch: Any) -> Callable[[], Tensor]:
    """A closure: the mean of KL(p || q) over the same tokens; the teacher is asked once. Ids that one head lacks are
    impossible on both sides, as in training.
    """
    seen = supervised(batch)
    with torch.no_grad():
        logits = _logits(teacher, batch, seen.position)  # [n, v]

    def loss() -> Tensor:
        own = _logits(model, batch, seen.position)
        shared = min(own.shape[-1], logits.shape[-1])
        logp, logq = (torch.log_softmax(x[:, :shared], -1) for x in (logits, own))
        return nn.functional.kl_div(logq, logp, reduction="batchmean", log_target=True)

    return loss


def _logits(model: nn.Module, batch: Any, position: Tensor) -> Tensor:
    logits = model(**batch.model_inputs(), use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1])[position].float()
