"""TRL's trainers with the verified loss: SFTTrainer, GKDTrainer and DistillationTrainer keep their arguments.

``trl`` is imported where one of the three is asked for. b rows, t tokens.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selectkd.adapters.hf import Distilling, distil
from selectkd.adapters.module import SelecTKDLoss
from selectkd.models.head import head_of
from selectkd.objective.objective import Objective


def __getattr__(name: str) -> Any:
    makers = {"SFTTrainer": _sft, "GKDTrainer": _gkd, "DistillationTrainer": _distillation}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(makers)}")
    return makers[name]()


def divergence_of(beta: float) -> dict[str, Any]:
    """The divergence that TRL's beta means: forward KL at 0, reverse KL at 1, generalised Jensen-Shannon between.

    >>> divergence_of(0.5)
    {'name': 'generalized_jsd', 'beta': 0.5}
    """
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {"name": ends[beta]} if beta in ends else {"name": "generalized_jsd", "beta": beta}


def _sft() -> type[Any]:
    from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    return distil(SFTTrainer)


@cache
def _gkd() -> type[Any]:
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    from trl.models.utils import unwrap_model_for_generation  # pyright: ignore[reportMissingImports]

    class VerifiedGKDTrainer(Distilling, GKDTrainer):
        """GKDTrainer whose text is written before it is counted, and whose loss is verified and memory-flat.

        Takes GKDTrainer's arguments and those of ``Distilling`` but teacher. Without an objective the divergence is the
        one args.beta means, behind greedy_topk. The mean is over the written tokens of the whole step and all ranks;
        args.temperature is of the sampling alone, as in TRL.
        """

        def __init__(
            self,
            model: Any = None,
            teacher_model: Any = None,
            args: Any = None,
            *given: Any,
            objective: Objective | None = None,
            **named: Any,
        ) -> None:
            objective = objective or Objective(divergence_of(args.beta))
            super().__init__(model, teacher_model, args, *given, teacher=None, objective=objective, **named)
            self._written = (self.lmbda, self.seq_kd)
            self.lmbda, self.seq_kd = -1.0, False  # no text is written behind the counts

        def own_teacher(self) -> Any:
            return self.accelerator.unwrap_model(self.teacher_model)

        def prepare_samples(self, samples: list[Any]) -> list[Any]:
            """The text of each micro-batch: the student's with probability lmbda, the teacher's under seq_kd."""
            lmbda, by_teacher = self._written
            return [self._with_text(one, random.random() <= lmbda, by_teacher) for one in samples]

        def _with_text(self, inputs: Any, by_student: bool, by_teacher: bool) -> Any:
            if not by_student and not by_teacher:
                return inputs
            inputs = self._prepare_inputs(inputs)
            writer = self.model_wrapped if by_student else self.teacher_model
            with unwrap_model_for_generation(
                writer, self.accelerator, generation_kwargs=self.generation_kwargs
            ) as unwrapped:
                ids, mask, labels = self.generate_on_policy_outputs(unwrapped, inputs, self.generation_config)
            return inputs | {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return VerifiedGKDTrainer


@cache
def _distillation() -> type[Any]:
    from trl import DistillationTrainer  # pyright: ignore[reportPrivateImportUsage]

    class VerifiedDistillationTrainer(DistillationTrainer):
        """DistillationTrainer with the verified loss in place of its own; all else is TRL's.

        Without an objective the divergence is the one args.beta means, behind greedy_topk. The log lines hold tar in
        place of the student's entropy, which this loss does not compute.
        """

        def __init__(self, *given: Any, objective: Objective | None = None, **named: Any) -> None:
            super().__init__(*given, **named)
            self.verified = SelecTKDLoss(temperature=self.temperature, seed=self.args.seed)
            self.verified.objective = objective or Objective(divergence_of(self.beta))

        def compute_loss(self, model: Any, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, *given, **named)
            metrics = self._metrics["train" if model.training else "eval"]
            metrics.pop("entropy", None)
            sums = self.verified.sums
            metrics["tar"].append((sums["accepted"] / sums["n"].clamp(min=1)).item())
            return loss

        def _compute_loss(
            self, student: Any, inputs: Any, num_items_in_batch: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            """(loss, no entropy, tokens): inside the student's wrapped forward, as TRL calls it."""
            ids, mask = (
                torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
                for name in ("ids", "mask")
            )
            counts = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            sides = (student, self.accelerator.unwrap_model(self.teacher_model))
            hidden = []
            for model, grad in zip(sides, (torch.is_grad_enabled(), False), strict=True):
                with torch.set_grad_enabled(grad):
                    hidden.append(self._get_last_hidden_state(model, ids, mask, counts.shape[1]))
            pairs = [(states, head_of(model)) for states, model in zip(hidden, sides, strict=True)]
            loss = self.verified(*pairs, counts.bool(), num_items_in_batch)
            tokens = counts.sum()
            return loss, torch.zeros_like(loss.detach()), tokens

    return VerifiedDistillationTrainer
