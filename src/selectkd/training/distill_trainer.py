"""DistillTrainer: distillation as TRL's trainers begin it, from models and data sets by name or as objects."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from selectkd.config import Recipe
from selectkd.data.files import records_of
from selectkd.data.render import pad_id_of
from selectkd.data.sources import dataset_source
from selectkd.data.template import ChatTemplate
from selectkd.errors import ConfigError, DataError
from selectkd.loss.block_compiled import check_compiled
from selectkd.models.ends import end_ids
from selectkd.models.head import head_of
from selectkd.models.load import load_model, load_tokenizer
from selectkd.models.lora import adapted
from selectkd.models.precision import FP32, PRECISIONS
from selectkd.objective.schedules import TaidSchedule
from selectkd.rollouts.streams import losses_of, options_of, streams_of
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.model import ModelPlan, shared_rows
from selectkd.teachers.protocol import ReadsAhead, Teacher
from selectkd.training.activations import checkpoint_activations
from selectkd.training.assembly import epoch_of, objective_of, padded
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.folder import Found, all_in, check, find
from selectkd.training.distill_config import DistillConfig
from selectkd.training.feed import Feed
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.ledger import Ledger
from selectkd.training.recipe_text import rules_of
from selectkd.training.run_folder import CHECKPOINTS
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer

Model = str | os.PathLike[str] | nn.Module
MEASURES = ("kl", "perplexity", "teacher_perplexity", "tar", "acceptance", "bite", "overlap")


class DistillTrainer(LedgerTrainer):
    """A transformers.Trainer that distils ``teacher`` into ``model`` on a data set; its loss is a recipe's.

    model, teacher: a folder, a hub name or a model; a teacher may be anything of ``selectkd.teachers``, too. A model
    that is given as an object trains as it is; a teacher that is, has the student's tokenizer. train_dataset,
    eval_dataset: a ``datasets.Dataset`` or a list of records, with ``messages``, ``prompt`` and ``completion`` or any
    other format of a recipe. processing_class: the student's tokenizer, by default that of ``model``. peft_config: of
    adapters that train in place of the weights. ``evaluate``, and so eval_strategy, measures eval_kl (KL(p || q) in
    nats a token), eval_tar and MEASURES' others. ``train(resume_from_checkpoint=True)`` goes on to the bit.

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
        recipe, tokenizer = args.recipe, processing_class or _tokenizer_of(model)
        precision = PRECISIONS["bf16"] if args.bf16 else FP32
        objective, beta, taid_follows = objective_of(recipe.objective, tokenizer)
        if recipe.training.compile_loss:
            check_compiled(objective.divergence, whole=True)
        plan = (
            ModelPlan(str(teacher), dtype=precision.frozen)
            if isinstance(teacher, str | os.PathLike)
            else None
        )
        if plan is not None:
            plan.check()
            plan.check_tokenizer(tokenizer)
        ends = frozenset().union(*(_ends_of(one, tokenizer) for one in (model, teacher)))
        read = partial(_source, recipe=recipe, tokenizer=tokenizer, ends=ends)
        source = read(train_dataset, "train_dataset")
        heldout = [] if eval_dataset is None else read(eval_dataset, "eval_dataset").examples
        self._read, self._pad = read, pad_id_of(tokenizer)
        self._heldout = list(padded(heldout, pad_id=self._pad, batch_size=args.per_device_eval_batch_size))

        dtype = precision.weights if peft_config is None else precision.frozen
        student: Any = model if isinstance(model, nn.Module) else load_model(model, dtype=dtype).model
        if args.gradient_checkpointing:
            checkpoint_activations(student)
            args.gradient_checkpointing = False  # the Trainer would ask the loss for it
            vars(args).update(activation_checkpointing=False)  # its name from transformers 5.23 on
        if peft_config is not None:
            student = adapted(student, peft_config, in_fp32=True)
        self.teacher = _teacher_of(teacher, plan, tokenizer, student)
        streams = streams_of([source.name], recipe.data.policies)
        losses = losses_of(recipe, streams)
        feed = Feed(
            partial(epoch_of, [source], recipe, self._pad),
            self.teacher.ahead if isinstance(self.teacher, ReadsAhead) else None,
        )
        steps = args.max_steps
        if steps < 0:
            steps = feed.steps_in(args.num_train_epochs, args.gradient_accumulation_steps)
        ledger = Ledger(
            objective, args.reduction, beta, seed=args.seed, streams=[stream.name for stream in streams],
            total_steps=steps, taid=TaidSchedule(steps=steps) if taid_follows else None, losses=losses,
            device=args.device,
        )  # fmt: skip
        self._measured, self._precision = replace(objective, beta=beta.end), precision
        super().__init__(
            DistillationModel(student, self.teacher, options=options_of(recipe, losses, [])), feed, ledger, args,
            eval_dataset=eval_dataset, checkpoints=_checkpoints(args), processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As of the Trainer. resume_from_checkpoint: True for the newest one in args.output_dir, or its path."""
        folder = Path(str(self.args.output_dir)) / CHECKPOINTS
        if self.checkpoints is not None and resume_from_checkpoint:
            opened = _opened(resume_from_checkpoint, folder)
            self.checkpoints.opened, self.checkpoints.step = opened, opened.step
            self.checkpoints.register("ledger", self.ledger)
        elif resume_from_checkpoint:
            raise ConfigError(
                f"resume_from_checkpoint = {resume_from_checkpoint} and save_strategy = no: set it to steps."
            )
        elif self.checkpoints is not None and all_in(folder):
            raise ConfigError(
                f"{folder} holds checkpoints of a run. Call train(resume_from_checkpoint=True) to go on with it, or "
                "name another output_dir."
            )
        return super().train(**options)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The held-out measures of the student as it is, at the verifier of the loss and the beta it ends with."""
        batches = self._heldout
        if eval_dataset is not None:
            examples = self._read(eval_dataset, "eval_dataset").examples
            size = self.args.per_device_eval_batch_size
            batches = list(padded(examples, pad_id=self._pad, batch_size=size))
        if not batches:
            raise ConfigError("there is no text to evaluate on: pass eval_dataset.")
        found = evaluate(
            self.student, self.teacher, batches, self._measured, seed=self.args.seed, streams=self.ledger.streams,
            chunk=self.distillation.chunk, device=self.args.device, precision=self._precision,
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
    items = ((f"{name}[{index}]", dict(record)) for index, record in enumerate(data))
    return dataset_source(
        {"path": name, "name": "train"},
        tokenizer,
        rules_of(recipe),
        records=records_of(items, name),
        eos_ids=ends,
        template=ChatTemplate.of(tokenizer),
    )


def _teacher_of(teacher: Any, plan: ModelPlan | None, tokenizer: Any, student: nn.Module) -> Teacher:
    if plan is not None:
        return plan.open(tokenizer, student=student)
    if not isinstance(teacher, nn.Module):
        return teacher
    widths = {"teacher_width": head_of(teacher).width, "student_width": head_of(student).width}
    return LiveTeacher(teacher, shared=shared_rows(tokenizer, tokenizer, **widths))


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
            raise ConfigError(f"{folder} has no checkpoint to go on from. Leave resume_from_checkpoint out.")
        return found
    path = Path(str(named))
    if not path.is_dir():
        raise ConfigError(
            f"resume_from_checkpoint = {named} is no folder. Use True, or a folder in {folder}."
        )
    return Found(path, check(path))
