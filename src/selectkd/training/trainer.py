"""LedgerTrainer: the same numbers on transformers.Trainer, for DDP and FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainingArguments

from selectkd.loss.block_compiled import pays
from selectkd.loss.plan import FirstPass
from selectkd.models.devices import peak_memory
from selectkd.models.sharded import is_sharded, plain_copy, whole
from selectkd.training.arguments import check_arguments
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.parts import Named, OptimizerState, Weights
from selectkd.training.counts import rank, ranks
from selectkd.training.feed import BatchFeed
from selectkd.training.first_pass import MicroBatch
from selectkd.training.ledger import Ledger
from selectkd.training.optimizer import decaying
from selectkd.training.step import DistillationModel

OnLine = Callable[[dict[str, Any]], None]
AfterStep = Callable[[int], bool]


class LedgerTrainer(Trainer):
    """A transformers.Trainer whose loss is the distillation loss; equals ``train_loop`` on the same
    micro-batches.

    model: student, teacher and the options of the loss. feed: the micro-batches (args.per_device_train_batch_size is
    not read). ledger: objective, reduction, schedules and guard of the run; where it names no total_steps, the
    Trainer's count. args.bf16 computes as training.precision: bf16 does, where the student is in float32; the teacher
    computes in its own dtype. A process trains on one device, ``args.device``: with several GPUs start a process for
    each (``accelerate launch``). Loss scaling, counts over accumulation and ranks, and the skipping of steps that are
    not finite are ours, and so are checkpoints (``checkpoints``, not args.save_strategy): they go on to the bit.
    Optimizer, learning rate, logging intervals and distribution are the Trainer's. ``save_model`` writes the student
    as a plain Hugging Face folder.

    Raises ConfigError for arguments that would change the loss behind our back, and for DeepSpeed.
    """

    loss_is_scaled_for_ga = True  # by the counts of the whole step; dividing again would be wrong

    def __init__(
        self,
        model: DistillationModel,
        feed: BatchFeed,
        ledger: Ledger,
        args: TrainingArguments,
        *,
        on_line: OnLine | None = None,
        after_step: AfterStep | None = None,
        checkpoints: Checkpoints | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_arguments(args)
        if args.n_gpu > 1:
            args._n_gpu = 1  # else the Trainer wraps the model in DataParallel over every GPU that it sees
        # it reads each micro-batch's loss; the ledger reads the step's once
        args.logging_nan_inf_filter = False
        if args.max_steps < 0:
            args.max_steps = feed.steps_in(args.num_train_epochs, args.gradient_accumulation_steps)
        caches = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model, args=args, eval_dataset=eval_dataset, processing_class=processing_class, callbacks=callbacks
        )  # fmt: skip
        if caches is not None:  # the Trainer turns it off for good; the loss asks for no cache anyway
            model.config.use_cache = caches
        ledger.device, ledger.total_steps = args.device, ledger.total_steps or args.max_steps
        if model.options.compiled == "auto" and not pays(args.max_steps, args.device):
            model.options = replace(model.options, compiled=False)
        self.distillation, self.feed, self.ledger = model, feed, ledger
        self.on_line, self.after_step, self.checkpoints = on_line, after_step, checkpoints
        if checkpoints is not None:
            checkpoints.register("ledger", ledger)
        self._rate, self._ended, self._begun = 0.0, 0, False
        self.add_callback(_Steps(self))

    @property
    def student(self) -> nn.Module:
        """The student, unwrapped."""
        return self.accelerator.unwrap_model(self.model).student

    def get_train_dataloader(self) -> Any:
        """The feed itself: it knows its rank, and the ledger moves batches to the device."""
        return self.feed

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of one optimizer step with their scales; the Trainer divides by nothing."""
        if self.checkpoints is not None and not self._begun:
            self.checkpoints.begin()
        self._begun = True
        return self.ledger.begin([next(epoch_iterator) for _ in range(num_batches)], self._first_pass), None

    @torch.no_grad()
    def _first_pass(self, micro: MicroBatch, first: FirstPass) -> list[Tensor]:
        """A first pass over a micro-batch, by the wrapped model as its loss will be."""
        model: Any = self.model_wrapped
        model.train()
        with self.compute_loss_context_manager():
            return model(micro.batch, micro.row_scale, micro.uniform, first)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The distillation loss of one micro-batch, computed inside the wrapped forward."""
        loss, sums = model(inputs.batch, inputs.row_scale, inputs.uniform, inputs.plan)
        self.ledger.add(inputs, loss, sums)
        return (loss, sums) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; after the last one the gradient is finished."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[arg-type]
        if inputs.last:
            self.distillation.finish_gradient()
            self.ledger.reduce(model.parameters())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        if not self.ledger.close_step(norm):  # type: ignore[arg-type]
            # AdamW leaves a parameter without a gradient, and its state, alone
            model.zero_grad(set_to_none=True)
        return norm

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Adapters on a sharded student begin alike on all ranks; ``finish_gradient`` averages their gradients."""
        for parameter in model.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and ranks() > 1:
                dist.broadcast(parameter.data, src=0)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices, as in ``train_loop``."""
        return decaying(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log line with ours in it; the loss is the ledger's."""
        if "loss" in logs and "learning_rate" in logs:
            line = self.ledger.line() | {"lr": self._rate, "grad_norm": self.ledger.grad_norm}
            line["peak_bytes"] = peak_memory(self.args.device)
            if self.on_line is not None and rank() == 0:
                self.on_line(line)
            logs.update({k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"})
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *given: Any, **named: Any) -> None:
        super()._maybe_log_save_evaluate(*given, **named)
        step = self.state.global_step
        if step != self._ended:
            self._ended = step
            if self.after_step is not None and self.after_step(step):
                self.control.should_training_stop = True
            self.student.train()
            if self.checkpoints is not None:
                self.checkpoints.after(step, last=self.control.should_training_stop)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student as a plain Hugging Face folder, put together first where it lies in parts over the ranks."""
        if is_sharded(self.student):
            plain = plain_copy(self.student)
            if plain is not None:
                self._write(plain, output_dir)
            self.accelerator.wait_for_everyone()
            return
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        if state_dict is not None:
            state_dict = {name.removeprefix("student."): value for name, value in state_dict.items()}
        self._write(self.student, output_dir, state_dict)

    def _write(self, student: Any, output_dir: str | None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(output_dir if output_dir is not None else self.args.output_dir)
        student.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


class _Steps(TrainerCallback):
    """Takes up a saved run where training begins; notes the learning rate a step is taken with, and the epoch by the
    feed, which alone knows it: to the Trainer a feed without an end is one epoch.
    """

    def __init__(self, trainer: LedgerTrainer) -> None:
        self.trainer = trainer
        self.epochs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        if trainer.checkpoints is not None:
            register_training(
                trainer.checkpoints,
                trainer.distillation,
                trainer.feed,
                trainer.optimizer,
                trainer.lr_scheduler,
            )
            state.global_step = trainer._ended = trainer.ledger.step
        self.epochs = int(trainer.feed.epochs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        optimizer: Any = self.trainer.optimizer
        self.trainer._rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.epoch, before = self.trainer.feed.epochs, self.epochs
        self.epochs = int(state.epoch)
        if (
            state.global_step >= args.max_steps
        ):  # on_epoch_end follows, with the Trainer's own strategies by epoch
            control.should_log = True
        elif self.epochs > before:
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= (
                args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            )


def register_training(
    checkpoints: Checkpoints, model: DistillationModel, feed: BatchFeed, optimizer: Any, scheduler: Any
) -> None:
    """Adds the parts of a run that train to its checkpoints; where the run goes on, all have their state afterwards."""
    checkpoints.register("student", Weights(model.student), heavy=True)
    checkpoints.register("optimizer", OptimizerState(optimizer), heavy=True)
    checkpoints.register("scheduler", scheduler, heavy=True)
    checkpoints.register("feed", feed)
    checkpoints.register("loss", Named(model, "chunk"))
