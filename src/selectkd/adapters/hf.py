"""distil(TrainerClass): any transformers.Trainer, its data and its settings as they are, with the distillation loss.

b rows, t tokens of what a collator gives.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selectkd.config import Teacher as Section
from selectkd.data.collate import Batch
from selectkd.data.durable import json_bytes, write_whole
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, IntegrityError
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import FirstPass
from selectkd.models.head import head_of
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule
from selectkd.teachers import exactness
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.model import shared_rows
from selectkd.teachers.open import plan_teacher
from selectkd.training.checkpoint.encoding import join, split
from selectkd.training.counts import summed
from selectkd.training.first_pass import MicroBatch
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.sums import named, rates, step_sums, zeros
from selectkd.training.trainer import check_arguments
from selectkd.training.uniforms_of_text import draws

MICRO_BATCH = "selectkd"
"""Where a micro-batch keeps what the loss needs of it, and the argument by which a student is asked for the loss."""
IGNORED = -100
MEASURES = ("kl", "tar", "acceptance", "bite", "overlap")
WITHOUT_LOSS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
STATE = "selectkd.json"
"""In a Trainer's checkpoint: the ledger's state."""
BESIDE_TEXT = ("pixel_values", "image", "video", "audio", "input_features", "inputs_embeds")
"""How inputs that are no text begin."""


@cache
def distil(trainer_class: type[Trainer]) -> type[Any]:
    """A subclass of ``trainer_class`` whose loss is the distillation loss.

    It takes the arguments of ``trainer_class`` and, by keyword, those of ``Distilling``. Data sets, collator, adapters,
    optimizer, logging and checkpoints stay those of ``trainer_class``; its own loss is not computed.

    >>> from transformers import Trainer
    >>> distil(Trainer).__name__
    'DistillingTrainer'
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise ConfigError(
            f"{trainer_class!r} is no transformers.Trainer. Pass the class, such as trl.SFTTrainer."
        )
    return type(
        f"Distilling{trainer_class.__name__}", (Distilling, trainer_class), {"__doc__": Distilling.__doc__}
    )


class Distilling(Trainer):
    """The loss of a Trainer is sum_i scale_i V_i D(p_i || q_i) over the tokens whose label is not -100.

    teacher: a folder or hub name of a model, a cache folder, a mapping as a recipe's ``teacher:`` (a server, for
    instance), a model, or anything of ``selectkd.teachers``. objective: default SelecTKD's, forward KL behind
    greedy_topk. reduction: token_mean, sequence_mean or weight_mean, over the whole optimizer step and all ranks.
    beta: a schedule in place of the objective's. options: of the loss, such as temperature.

    The loss is computed inside the student's wrapped forward pass. The log lines hold kl (KL(p || q), nats a token),
    tar, acceptance, bite and beta; ``evaluate`` gives eval_kl and the others over the tokens of the whole data set,
    and eval_loss is the mean of the objective a token. A step whose loss or gradient is not finite is left out.
    Checkpoints hold the state of the loss, so a run that is resumed draws and weighs as one without a stop.
    Raises ConfigError for a teacher that does not fit, label smoothing, fp16, DeepSpeed, FSDP, metrics of logits and
    another loss.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step; dividing again would be wrong

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        objective: Objective | None = None,
        reduction: str = "token_mean",
        beta: BetaSchedule | None = None,
        options: LossOptions | None = None,
        **given: Any,
    ) -> None:
        super().__init__(*args, **given)
        check_arguments(self.args)
        if self.is_fsdp_enabled:
            raise ConfigError(
                "the arguments ask for FSDP, under which a foreign Trainer's student cannot give its loss. Use "
                "selectkd.DistillTrainer, which shards, or replicas (DDP)."
            )
        self.args._n_gpu = min(self.args.n_gpu, 1)  # else the Trainer wraps the model in DataParallel
        if (
            self.args.use_liger_kernel
        ):  # its kernels of layers; its loss would take the place of the student's forward
            self.args.liger_kernel_config = (self.args.liger_kernel_config or {}) | WITHOUT_LOSS
        _check_unread(self, given)
        objective = objective or Objective()
        student: Any = self.accelerator.unwrap_model(self.model)
        options = options or LossOptions(also_kl=True)
        teacher = self.own_teacher() if teacher is None else teacher
        self.teacher = teacher_of(teacher, self.processing_class, student, objective, options)
        self.distillation = DistillationModel(student, self.teacher, options=options)
        self.ledger = Ledger(
            objective, reduction, beta, seed=self.args.seed, streams=("train",), device=self.args.device
        )
        self._measured: Tensor | None = None  # the sums of an evaluation
        self.add_callback(_SavesLedger(self.ledger))
        gives_loss(student, self.distillation)

    def own_teacher(self) -> Any:
        """The teacher of a Trainer that has one itself; ConfigError for others."""
        raise ConfigError("there is no teacher. Pass teacher=: a model, a cache folder or a server.")

    def batch_of(self, inputs: Mapping[str, Any]) -> Batch:
        """``batch_of``, where a subclass adds to it."""
        return batch_of(inputs)

    def prepare_samples(self, samples: list[Any]) -> list[Any]:
        """The micro-batches of a step before anything is counted: a subclass writes its text here."""
        return samples

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, with their scales; the Trainer divides by nothing."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = self.prepare_samples(samples)
        self.ledger.total_steps = max(self.state.max_steps, 1)
        micro_batches = self.ledger.begin([self.batch_of(one) for one in samples], self._first_pass)
        for one, micro in zip(samples, micro_batches, strict=True):
            one[MICRO_BATCH] = micro
        return samples, None

    @torch.no_grad()
    def _first_pass(self, micro: MicroBatch, first: FirstPass) -> list[Tensor]:
        """A first pass over a micro-batch, for verdicts that rank the tokens of a whole step."""
        model: Any = self.model_wrapped
        model.train()
        with self.compute_loss_context_manager():
            return model(**{MICRO_BATCH: (micro.batch, micro.row_scale, micro.uniform, first)})

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The distillation loss of one micro-batch of a step, computed inside the wrapped forward."""
        micro = inputs[MICRO_BATCH]
        loss, sums = model(**{MICRO_BATCH: (micro.batch, micro.row_scale, micro.uniform, micro.plan)})
        self.ledger.add(micro, loss, sums)
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; after the last one the gradient is finished."""
        last = inputs[MICRO_BATCH].last
        loss = super().training_step(model, inputs, num_items_in_batch)
        if last:
            self.ledger.reduce(model.parameters())
        return loss

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_ledger(self.ledger, Path(checkpoint))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.ledger.close_step(norm):  # type: ignore[arg-type]
            model.zero_grad(set_to_none=True)  # AdamW leaves a parameter without a gradient alone
        return norm

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """(the mean of the objective a token, no logits, no labels) of a batch of held-out text."""
        batch = self.batch_of(self._prepare_inputs(inputs))
        seen = supervised(batch)
        objective = self.ledger.now
        numbers = draws(batch, seen, objective.uniforms_per_token, seed=self.args.seed, step=0)
        scale = torch.ones(len(seen), device=numbers.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, sums = model(**{MICRO_BATCH: (batch, scale, numbers, objective)})
        if self._measured is not None:
            self._measured += step_sums(
                MicroBatch(batch, seen, scale, numbers, last=True), loss, sums, streams=1
            )
        return loss.detach() / max(len(seen), 1), None, None

    def evaluation_loop(self, *args: Any, **given: Any) -> Any:
        """As of the Trainer, with the measures of the whole data set over all ranks among its metrics."""
        self._measured = zeros(1, self.args.device)
        output: Any = super().evaluation_loop(*args, **given)
        sums, self._measured = named(summed(self._measured)), None
        prefix = given.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        found = rates(sums)
        output.metrics.update(
            {f"{prefix}_{name}": found[name] for name in MEASURES if found[name] is not None}
        )
        if sums["n"]:
            output.metrics[f"{prefix}_loss"] = sums["loss"] / sums["n"]
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log line with the measures of its steps in it; the loss is the ledger's."""
        if "loss" in logs and "learning_rate" in logs:
            line = self.ledger.line()
            logs.update({k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"})
        super().log(logs, start_time)


class _SavesLedger(TrainerCallback):
    """Writes the ledger's state into each checkpoint of a Trainer."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_whole(folder / STATE, json_bytes(split(self.ledger.state_dict(), {})))


def load_ledger(ledger: Ledger, checkpoint: Path) -> None:
    """Sets a ledger to the state in a Trainer's checkpoint; one of a Trainer without our loss has none, and changes
    nothing. IntegrityError for a damaged state.
    """
    path = checkpoint / STATE
    if not path.is_file():
        return
    try:
        ledger.load_state_dict(join(json.loads(path.read_bytes()), {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}: {error}). Resume from an older checkpoint."
        ) from error


def _check_unread(trainer: Any, given: Mapping[str, Any]) -> None:
    """ConfigError for arguments that would be left unread: functions of logits that never exist, and another loss."""
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name, None) is not None:
            raise ConfigError(
                f"{name} needs the logits of all held-out text, which are never built. Leave it out; evaluations hold "
                f"{', '.join(MEASURES)}."
            )
    if given.get("compute_loss_func") is not None:
        raise ConfigError("compute_loss_func is another loss. Leave it out, or pass objective=.")


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """The batch of a Hugging Face collator's tensors: input_ids, labels [b, t], attention_mask and position_ids.

    A token counts where its label is not -100. Without an attention mask, positions that begin again are samples that
    share a row. Raises ConfigError where a label is not the token itself, and for inputs beside text.
    """
    ids, labels = inputs["input_ids"], inputs.get("labels")
    if labels is None:
        raise ConfigError(f"a batch has {', '.join(inputs)} and no labels. Use a collator that gives them.")
    beside = [name for name in inputs if name.startswith(BESIDE_TEXT)]
    if beside:
        raise ConfigError(f"a batch has {beside[0]}, and the loss reads text alone. Use a collator of text.")
    if labels.shape != ids.shape:
        raise ConfigError(
            f"labels have shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}; both must be [rows, tokens]."
        )
    counts = labels != IGNORED
    if not bool((labels[counts] == ids[counts]).all()):
        raise ConfigError(
            "a label is not the token at its place, and the loss is on the text itself. Use labels that equal "
            "input_ids, or -100."
        )
    mask, places = inputs.get("attention_mask"), inputs.get("position_ids")
    mask = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask.long()
    packed = places is not None and inputs.get("attention_mask") is None
    if packed and places is not None:
        starts = torch.diff(places, dim=1, prepend=places[:, :1] - 1) != 1
        starts[:, 0] = True
        sequence = starts.flatten().cumsum(0).reshape(ids.shape) - 1
    else:
        places = (mask.cumsum(1) - 1).clamp_(min=0)
        sequence = torch.arange(ids.shape[0], device=ids.device)[:, None].where(mask > 0, -1)
    samples = int(sequence.max()) + 1
    stream = torch.zeros(
        max(samples, ids.shape[0] if not packed else 0), dtype=torch.int64, device=ids.device
    )
    return Batch(ids, mask, counts & (mask > 0), places, sequence, stream, packed)


def gives_loss(student: Any, distillation: DistillationModel) -> None:
    """Has ``student(selectkd=(batch, row_scale, uniform, plan))`` return what ``distillation`` gives of these; every
    other call is the student's own. What wraps the student later (DDP) sees one forward pass.
    """
    plain = student.forward

    def forward(self: Any, *args: Any, **given: Any) -> Any:
        asked = given.pop(MICRO_BATCH, None)
        return plain(*args, **given) if asked is None else distillation(*asked)

    signature = inspect.signature(plain)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(forward)["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    student.forward = MethodType(forward, student)


def teacher_of(
    teacher: Any, processor: Any, student: nn.Module, objective: Objective, options: LossOptions
) -> Any:
    """A teacher of ``selectkd.teachers`` from what ``Distilling`` takes; ConfigError where it does not fit."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(teacher, nn.Module):
        if tokenizer is None:
            return LiveTeacher(teacher)
        widths = {"teacher_width": head_of(teacher).width, "student_width": head_of(student).width}
        return LiveTeacher(teacher, shared=shared_rows(tokenizer, tokenizer, **widths))
    if callable(teacher):
        return teacher
    if tokenizer is None:
        raise ConfigError(
            "the Trainer has no tokenizer to compare with the teacher's. Pass processing_class=tokenizer."
        )
    plan = plan_teacher(TypeAdapter(Section).validate_python(_section(teacher)))
    exactness.check(objective, plan.payload, k=plan.k, temperature=options.temperature, source=plan.source)
    plan.check_tokenizer(tokenizer)
    return plan.open(tokenizer, student=student)


def _section(teacher: Any) -> dict[str, Any]:
    """A recipe's ``teacher:`` section from a mapping, a name or a folder."""
    if isinstance(teacher, Mapping):
        return dict(teacher)
    if (Path(str(teacher)) / "index.json").is_file():
        return {"cache": str(teacher)}
    if str(teacher).startswith(("http://", "https://")):
        return {"url": str(teacher), "kind": "selectkd"}
    return {"model": str(teacher)}
