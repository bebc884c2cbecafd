"""SelecTKDLoss: the loss as a module that any training loop calls with both models' outputs and the labels.

b rows, t tokens, n tokens that count, v vocabulary, d / e student / teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from selectkd.errors import ConfigError
from selectkd.loss.chunks import LossCall
from selectkd.loss.distillation import fused_loss
from selectkd.loss.head import Head, LogitHead, wide
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import LiveRows, TeacherRows
from selectkd.objective.objective import Objective
from selectkd.objective.uniforms import uniforms

Output = Tensor | tuple[Tensor, Any] | Any
"""A model's output: logits [..., v], (hidden [..., d], head), or an object with ``logits``. A head is its weight
[v, d], an ``nn.Linear``, or a ``selectkd.Head``."""


class SelecTKDLoss(nn.Module):
    """sum_i w_i V_i D(p_i || q_i) / count over the tokens that count, V_i = beta + (1 - beta) a_i.

    divergence, verifier, beta: as of ``selectkd.Objective``; names and mappings, so that a YAML file can say them.
    temperature: of both models in the divergence, as of ``LossOptions``; the loss is not multiplied by its square.
    ignore_index: labels of tokens that do not count. shift: labels are those of the inputs, so position i predicts
    labels[i + 1], as Hugging Face's are; else labels[i] is predicted at i. seed: of the verifier's random numbers.
    chunk: rows per matrix product, default by memory.

    With hidden states and heads no [n, v] tensor is built; with logits the gradient of the student's is the only one.
    After a call ``sums`` holds detached sums of its rows, as ``distillation_loss`` gives them: accepted / n is the
    share of accepted tokens. No parameter and nothing to save; ``step`` counts the calls in training mode.
    Source: SelecTKD (arXiv 2510.24021), equation 4.

    >>> import torch
    >>> loss_fn = SelecTKDLoss("forward_kl", {"name": "greedy_topk", "k": 5}, beta=0.01)
    >>> student, teacher = torch.randn(2, 6, 32, requires_grad=True), torch.randn(2, 6, 32)
    >>> labels = torch.tensor([[-100, -100, 7, 8, 9, 2], [-100, 4, 5, 6, 2, -100]])
    >>> loss_fn(student, teacher, labels).backward()
    >>> int(loss_fn.sums["n"]), student.grad[0, :2].abs().sum().item()
    (8, 0.0)
    """

    def __init__(
        self,
        divergence: str | Mapping[str, Any] = "forward_kl",
        verifier: str | Mapping[str, Any] = "greedy_topk",
        beta: float = 0.01,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        shift: bool = False,
        seed: int = 42,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        as_spec = lambda one: dict(one) if isinstance(one, Mapping) else one  # noqa: E731
        self.objective = Objective(as_spec(divergence), as_spec(verifier), beta)
        self.options = LossOptions(temperature=temperature, chunk=chunk)
        self.ignore_index, self.shift, self.seed, self.step = ignore_index, shift, seed, 0
        self.sums: dict[str, Tensor] = {}

    def forward(
        self,
        student: Output,
        teacher: Output | TeacherRows,
        labels: Tensor | None = None,
        num_batch_labels: int | Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a micro-batch, in fp32 or wider.

        student, teacher: see ``Output``; the vocabularies may have different widths over the same ids. A teacher may be
        ``CachedRows`` or other rows, of every position or of those that count. labels [...]: token ids, or a mask
        (bool); None: every position counts. num_batch_labels: what the sum is divided by, the tokens that count in the
        whole optimizer step over all ranks; default those of this call, which is right without accumulation. A wrapper
        that averages gradients over w ranks needs w times the loss. weight [...]: of each token, multiplied in.

        Raises ConfigError where shapes do not fit, and for a student in fp16.
        """
        hidden, head = _taken_apart(student, "student")
        chosen, tokens = self._chosen(labels, hidden)  # [n], [n] or None
        rows = hidden.reshape(-1, hidden.shape[-1])[chosen]  # [n, d]
        n = rows.shape[0]
        count = max(n, 1) if num_batch_labels is None else num_batch_labels
        scale = rows.new_ones(n, dtype=wide(rows.dtype))
        if weight is not None:
            scale = scale * _flat(weight, hidden, "weight")[chosen]
        with torch.no_grad():
            numbers = uniforms(
                n, self.objective.uniforms_per_token, seed=self.seed, step=self.step, rank=_rank(), counter=chosen,
                device=rows.device,
            )  # fmt: skip
        length = hidden.shape[-2] if hidden.ndim > 2 else max(hidden.shape[0], 1)
        call = LossCall(
            self._teacher(teacher, hidden, chosen), self.objective, numbers, scale / count, tokens, chosen // length,
            options=self.options,
        )  # fmt: skip
        loss, self.sums = fused_loss(rows, head, call)
        self.step += self.training
        return loss

    def _chosen(self, labels: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """(flat positions that count [n], the tokens predicted there [n] where labels are ids)."""
        if labels is None:
            return torch.arange(hidden.shape[:-1].numel(), device=hidden.device), None
        labels = cast(Tensor, _whole(labels))
        blank = False if labels.dtype == torch.bool else self.ignore_index
        if self.shift:
            labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], blank)], -1)
        flat = _flat(labels, hidden, "labels").to(hidden.device)
        chosen = (flat != blank).nonzero()[:, 0]
        return chosen, None if labels.dtype == torch.bool else flat[chosen].long()

    def _teacher(self, teacher: Any, hidden: Tensor, chosen: Tensor) -> TeacherRows:
        """The teacher's rows at the positions that count."""
        if isinstance(teacher, TeacherRows):
            everywhere = teacher.count == hidden.shape[:-1].numel() != chosen.shape[0]
            return teacher.take(chosen) if everywhere else teacher
        states, head = _taken_apart(teacher, "teacher")
        if states.shape[:-1] != hidden.shape[:-1]:
            raise ConfigError(
                f"the student's output is {tuple(hidden.shape)} and the teacher's {tuple(states.shape)}; they must be "
                "of the same positions."
            )
        return LiveRows(states.detach().reshape(-1, states.shape[-1])[chosen], head.detach())

    def extra_repr(self) -> str:
        return f"{self.objective}, shift={self.shift}"


def _taken_apart(output: Any, whose: str) -> tuple[Tensor, Head]:
    """(hidden states or logits, the head that goes with them)."""
    if isinstance(output, tuple) and len(output) == 2:
        hidden, head = _whole(output[0]), output[1]
        if isinstance(head, nn.Linear):
            head = Head(head.weight, head.bias)
        return hidden, Head.of(_whole(head))
    logits = _whole(output if isinstance(output, Tensor) else getattr(output, "logits", None))
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"the {whose}'s output is a {type(output).__name__}. Pass its logits [..., v], (hidden [..., d], head), or "
            "an output that has logits."
        )
    return logits, LogitHead.beside(logits.reshape(-1, logits.shape[-1]))


def _whole(value: Any) -> Any:
    """A tensor that lies in parts over the ranks, put together; its gradient goes back to the parts."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _flat(values: Tensor, hidden: Tensor, name: str) -> Tensor:
    """One value for each position, flat."""
    if values.shape != hidden.shape[:-1]:
        raise ConfigError(
            f"{name} has shape {tuple(values.shape)}, and the student's output is {tuple(hidden.shape)}; it must be "
            f"{tuple(hidden.shape[:-1])}."
        )
    return values.reshape(-1)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
