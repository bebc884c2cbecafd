"""The Trainer's arguments: those of a recipe, and which ones a distillation loss cannot take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from selectkd.errors import ConfigError
from selectkd.models.devices import use_device
from selectkd.models.precision import Precision
from selectkd.training.optimizer import trainers_name

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""A recipe's name of a learning-rate schedule, and the one transformers knows it by; all of them warm up."""


def training_arguments(
    training: Any, *, steps: int, precision: Precision, device: torch.device
) -> TrainingArguments:
    """The arguments of a recipe's ``training`` section for ``steps`` optimizer steps on ``device``.

    They save and report nothing: checkpoints and metrics are the run's own.
    """
    first, second = training.betas or (0.9, 0.999)
    args = TrainingArguments(
        output_dir=str(training.output_dir),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        optim=trainers_name(training.optimizer, device),
        learning_rate=training.learning_rate,
        adam_beta1=first,
        adam_beta2=second,
        adam_epsilon=training.eps or 1e-8,
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=round(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.log_every,
        bf16=precision.autocasts,
        seed=training.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    on_device(args, device)
    return args


def check_arguments(args: TrainingArguments) -> None:
    """ConfigError for arguments that would change the loss behind our back, and for DeepSpeed."""
    if args.label_smoothing_factor != 0:
        raise ConfigError(
            f"label_smoothing_factor = {args.label_smoothing_factor}: the loss has no smoothing. Set it to 0."
        )
    if args.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed precision {args.mixed_precision}: a row's gradient of the loss is below fp16's range, where "
            "loss scaling does not reach it. Use bf16=True, or float32 with tf32=True."
        )
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ConfigError(
            "the arguments ask for DeepSpeed, which takes the optimizer step before a bad one can be left out. "
            "Leave deepspeed and --use_deepspeed out; FSDP2 shards the student: "
            "`accelerate launch --use_fsdp --fsdp_version 2`."
        )


def on_device(args: TrainingArguments, device: torch.device) -> None:
    """Has the Trainer train on ``device``: alone in its process it would take the first GPU, whichever is current."""
    if args.world_size == 1 and args.device != device:
        state: Any = args.distributed_state
        state.device = device
        args.__dict__["_setup_devices"] = (
            device  # a cached property, so this is the answer it gives from now on
        )
        use_device(device)
