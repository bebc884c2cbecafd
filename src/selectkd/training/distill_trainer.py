"""DistillTrainer: distillation as TRL's trainers begin it, from models and data sets by name or as objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, set_seed

from selectkd.config import Recipe
from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.order import Padded
from selectkd.data.render import pad_id_of
from selectkd.data.sources import dataset_source
from selectkd.data.template import ChatTemplate
from selectkd.errors import ConfigError, DataError
from selectkd.models.ends import end_ids
from selectkd.models.load import load_model, load_tokenizer
from selectkd.models.lora import adapted
from selectkd.models.precision import FP32, PRECISIONS, Precision
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import TaidSchedule
from selectkd.rollouts.streams import losses_of, options_of, streams_of
from selectkd.teachers.cache.origin import weights_checksum
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.protocol import ReadsAhead, Teacher
from selectkd.training.activations import checkpoint_activations
from selectkd.training.assembly import epoch_of
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.folder import Found, all_in, check, find
from selectkd.training.checks import check_objective, check_references, objective_of
from selectkd.training.counts import ranks
from selectkd.training.distill_config import DistillConfig
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.ledger import Ledger
from selectkd.training.recipe_text import rules_of
from selectkd.training.run_folder import CHECKPOINTS, check_same, hash_of, identity
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer

Model = str | os.PathLike[str] | nn.Module
STEP = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "weight_decay", "optim",
    "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_accumulation_steps", "bf16",
    "tf32",
)  # fmt: skip
"""Arguments of the Trainer on which a step's numbers depend."""

REFERENCE = "Pass one: teacher=LiveTeacher(model, reference=LiveTeacher(student)), of selectkd.teachers."
MEASURES = ("kl", "perplexity", "teacher_perplexity", "tar", "acceptance", "bite", "overlap")


class DistillTrainer(LedgerTrainer):
    """A transformers.Trainer that distils ``teacher`` into ``model`` on a data set; its loss is a recipe's.

    model, teacher: a folder, a hub name or a model; a teacher may be anything of ``selectkd.teachers``, too. A model
    that is given as an object trains as it is; a teacher that is, has the student's tokenizer. train_dataset,
    eval_dataset: a ``datasets.Dataset`` or a list of records, with ``messages``, ``prompt`` and ``completion`` or any
    other format of a recipe. processing_class: the student's tokenizer, by default that of ``model``. peft_config: of
    adapters that train in place of the weights. ``evaluate``, and so eval_strategy, measures eval_kl (KL(p || q) in
    nats a token), eval_tar and MEASURES' others. ``train(resume_from_checkpoint=True)`` goes on to the bit.
    On several ranks it trains as in one process of as many micro-batches a step.

    Raises ConfigError and DataError before weights load where it can.
    """

    def __init__(
        self,
        model: Model,
        teacher: Model | Teacher,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = DistillConfig() if args is None else args
        if not isinstance(args, DistillConfig):
            raise ConfigError(f"args is a {type(args).__name__}. Pass a selectkd.DistillConfig.")
        if args.neftune_noise_alpha is not None:
            raise ConfigError(
                f"neftune_noise_alpha = {args.neftune_noise_alpha}: no noise is added to embeddings here. Leave it out."
            )
        self._recipe = recipe = args.recipe
        tokenizer = processing_class or _tokenizer_of(model)
        precision = PRECISIONS["bf16"] if args.bf16 else FP32
        objective, beta, taid_follows = objective_of(recipe.objective, tokenizer)
        plan = _plan_of(teacher, tokenizer, precision)
        ends = frozenset().union(*(_ends_of(one, tokenizer) for one in (model, teacher)))
        self._read = partial(_source, recipe=recipe, tokenizer=tokenizer, ends=ends)
        self._pad = pad_id_of(tokenizer)
        self._source = self._read(train_dataset, "train_dataset")
        streams = streams_of([self._source.name], recipe.data.policies)
        losses = losses_of(recipe, streams)
        for one in (objective, *(one for spec in losses for one in spec.objectives_on(objective))):
            _check(one, recipe, teacher, plan, width=len(tokenizer))
        self._heldout = () if eval_dataset is None else self._batches(eval_dataset, args)

        set_seed(args.seed)  # of adapters that begin here; the Trainer sets it later
        student = _student_of(model, args, peft_config, precision)
        self.teacher: Teacher = teacher if plan is None else plan.open(tokenizer, student=student)  # type: ignore[assignment]
        self._revision = None if plan is None else plan.revision
        ahead = self.teacher.ahead if isinstance(self.teacher, ReadsAhead) else None
        feed = BatchFeed(partial(epoch_of, [self._source], recipe, self._pad), ahead)
        ledger = Ledger(
            objective, args.reduction, beta, seed=args.seed, streams=[stream.name for stream in streams],
            losses=losses, device=args.device,
        )  # fmt: skip
        self._measured, self._precision = replace(objective, beta=beta.end), precision
        super().__init__(
            DistillationModel(student, self.teacher, options=options_of(recipe, losses, [])), feed, ledger, args,
            eval_dataset=eval_dataset, checkpoints=_checkpoints(args), processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
        if taid_follows:
            ledger.taid = TaidSchedule(steps=args.max_steps)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *,
        allow_change: Sequence[str] = (),
        **options: Any,
    ) -> Any:
        """As of the Trainer. resume_from_checkpoint: True for the newest one in args.output_dir, or its path.

        A run goes on with the loss, text, models and optimizer that it began with. allow_change: names of values that
        may differ, such as "learning_rate" or "objective.beta". Raises ConfigError for others.
        """
        folder = Path(str(self.args.output_dir)) / CHECKPOINTS
        if self.checkpoints is None:
            if resume_from_checkpoint:
                raise ConfigError(
                    f"resume_from_checkpoint = {resume_from_checkpoint} and save_strategy = no: set it to steps."
                )
            return super().train(**options)
        if resume_from_checkpoint:
            self.checkpoints.opened = opened = _opened(resume_from_checkpoint, folder)
            self.checkpoints.step = opened.step
        elif all_in(folder):
            raise ConfigError(
                f"{folder} holds checkpoints of a run. Call train(resume_from_checkpoint=True) to resume it, or "
                "name another output_dir."
            )
        values = self._values()
        self.checkpoints.recipe = hash_of(values)
        self.checkpoints.register(
            "values", _Values(values, allow_change, where=f"output_dir = {self.args.output_dir}")
        )
        self.checkpoints.register("ledger", self.ledger)
        return super().train(**options)

    def _values(self) -> dict[str, Any]:
        """What this run is made of, by key, as plain data."""
        teacher = self.teacher.model if isinstance(self.teacher, LiveTeacher) else None
        found = {
            **identity(self._recipe),
            **{name: value for name, value in vars(self.args).items() if name in STEP},
            "text": self._source.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.processing_class),
            "student_weights": weights_checksum(self.student, frozen=True),
            "teacher_weights": self._revision or (None if teacher is None else weights_checksum(teacher)),
            "ranks": ranks(),
        }
        return json.loads(json.dumps(found, default=str))

    def _batches(self, data: Any, args: Any) -> Padded:
        examples = self._read(data, "eval_dataset").examples
        return Padded(examples, pad_id=self._pad, batch_size=args.per_device_eval_batch_size)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The held-out measures of the student as it is, at the verifier of the loss and the beta it ends with."""
        batches = self._heldout if eval_dataset is None else self._batches(eval_dataset, self.args)
        if not batches:
            raise ConfigError("there is no text to evaluate on: pass eval_dataset.")
        found = evaluate(
            self.student, self.teacher, batches, self._measured, seed=self.args.seed, streams=self.ledger.streams,
            chunk=self.distillation.chunk, precision=self._precision,
        ).as_dict()  # fmt: skip
        metrics = {f"{metric_key_prefix}_{name}": found[name] for name in MEASURES if found[name] is not None}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _tokenizer_of(model: Any) -> Any:
    if isinstance(model, nn.Module):
        model = getattr(model.config, "_name_or_path", None)
        if not model:
            raise ConfigError(
                "the model does not say where its tokenizer is. Pass it: processing_class=tokenizer."
            )
    return load_tokenizer(model)


def _ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn by the generation settings of a model or of its folder."""
    if isinstance(model, str | os.PathLike):
        return end_ids(model, tokenizer)
    settings = getattr(model, "generation_config", None)
    found = None if settings is None else settings.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return frozenset(one for one in ids if isinstance(one, int) and one in tokenizer.added_tokens_decoder)


def _source(data: Any, name: str, *, recipe: Recipe, tokenizer: Any, ends: frozenset[int]) -> Any:
    """The samples of a data set as a recipe reads them."""
    if isinstance(data, Mapping):
        raise DataError(f"{name} has the splits {', '.join(map(str, data))}. Pass one of them.")
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise DataError(
            f"{name} is {data!r:.60}. Pass a datasets.Dataset or a list of records: "
            f"{name}=datasets.load_dataset(...)."
        )
    return dataset_source(
        {"path": name, "name": "train"},
        tokenizer,
        rules_of(recipe),
        data=list(data) if isinstance(data, Iterator) else data,
        eos_ids=ends,
        template=ChatTemplate.of(tokenizer),
    )


def _plan_of(teacher: Any, tokenizer: Any, precision: Precision) -> ModelPlan | None:
    """The plan of a teacher that is a name or a model; None for one of ``selectkd.teachers``."""
    if isinstance(teacher, nn.Module):
        return ModelPlan.holding(teacher, tokenizer)
    if not isinstance(teacher, str | os.PathLike):
        return None
    plan = ModelPlan(str(teacher), dtype=precision.frozen)
    plan.check()
    plan.check_tokenizer(tokenizer)
    return plan


def _check(objective: Objective, recipe: Recipe, teacher: Any, plan: ModelPlan | None, *, width: int) -> None:
    """ConfigError for an objective that the teacher or the vocabulary cannot give."""
    check_objective(objective, recipe, plan or ModelPlan(type(teacher).__name__), width=width)
    if plan is not None or (isinstance(teacher, LiveTeacher) and teacher.reference is None):
        check_references([objective], recipe, REFERENCE)


def _student_of(model: Model, args: DistillConfig, peft_config: Any, precision: Precision) -> nn.Module:
    """The student as it trains, with its adapters."""
    dtype = precision.weights if peft_config is None else precision.frozen
    student: Any = model if isinstance(model, nn.Module) else load_model(model, dtype=dtype).model
    if args.gradient_checkpointing:
        checkpoint_activations(student)
        args.gradient_checkpointing = False  # the Trainer would ask the loss for it
        vars(args).update(activation_checkpointing=False)  # its name from transformers 5.23 on
    return student if peft_config is None else adapted(student, peft_config, in_fp32=True)


class _Values:
    """The values of a run as a part of its checkpoints; ConfigError where the run would go on with others."""

    def __init__(self, values: dict[str, Any], allowed: Sequence[str], *, where: str) -> None:
        self.values, self.allowed, self.where = values, allowed, where

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        remedy = 'Name a new output_dir, or allow it: train(..., allow_change=["{key}"])'
        check_same(state, self.values, self.allowed, where=self.where, remedy=remedy)


def _checkpoints(args: DistillConfig) -> Checkpoints | None:
    if args.save_strategy == "no":
        return None
    folder, every = Path(str(args.output_dir)) / CHECKPOINTS, int(args.save_steps)
    args.save_strategy = "no"  # type: ignore[assignment] - ours stand in for the Trainer's
    return Checkpoints(folder, keep=max(2, args.save_total_limit or 2), every=every)


def _opened(named: str | bool, folder: Path) -> Found:
    if named is True:
        found = find(folder)[0]
        if found is None:
            raise ConfigError(f"{folder} has no checkpoint to resume from. Leave resume_from_checkpoint out.")
        return found
    path = Path(str(named))
    if not path.is_dir():
        raise ConfigError(
            f"resume_from_checkpoint = {named} is no folder. Use True, or a folder in {folder}."
        )
    return Found(path, check(path))
