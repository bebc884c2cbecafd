"""DistillConfig: transformers.TrainingArguments with the loss and the text of a recipe beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from selectkd.config import Recipe, recipe_from
from selectkd.errors import ConfigError

OBJECTIVE = (
    "divergence", "verifier", "selector", "beta", "reduction", "temperature", "verify_temperature", "language_model",
)  # fmt: skip
TRAINING = ("max_length", "max_prompt_length", "chunk", "gradient_filter", "compile_loss")


@dataclass
class DistillConfig(TrainingArguments):
    """TrainingArguments with the loss and the text beside them; each field means what it means in a recipe.

    divergence, verifier, selector: a name of ``selectkd show``, or {"name": ..., PARAMETER: value}; without verifier
    and selector SelecTKD's greedy_topk with k = 5. beta: the weight of a rejected token (not Jensen-Shannon's beta,
    which is a parameter of generalized_jsd), or a mapping that makes it change. language_model: the weight of a
    cross-entropy beside the divergence. max_length counts prompt and completion. train_on: completion, or all.
    compile_loss: None is a recipe's auto.
    save_strategy "steps" writes checkpoints that a run goes on from to the bit; save_total_limit of them stay.

    Raises ConfigError for a value that cannot work.
    """

    divergence: dict[str, Any] | str | None = "forward_kl"
    verifier: dict[str, Any] | str | None = None
    selector: dict[str, Any] | str | None = None
    beta: float = 0.01
    reduction: str = "sequence_mean"
    temperature: float = 1.0
    verify_temperature: float = 1.0
    language_model: float = 0.0
    max_length: int = 1024
    max_prompt_length: int | None = None
    train_on: str = "completion"
    chunk: int | None = None
    gradient_filter: float = 0.0
    compile_loss: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_strategy not in ("no", "steps") or (
            self.save_strategy == "steps" and self.save_steps < 1
        ):
            strategy = SaveStrategy(self.save_strategy).value
            raise ConfigError(
                f"save_strategy = {strategy}, save_steps = {self.save_steps}: checkpoints come every so many "
                "whole steps. Set save_strategy to steps or no, and save_steps to 1 or more."
            )
        if self.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end = True: the Trainer cannot put our students back. Set it to False; a recipe's "
                "training.early_stopping keeps the best student."
            )
        self.recipe  # noqa: B018 - every value is checked now

    @property
    def recipe(self) -> Recipe:
        """The recipe that these values stand for; its models and its text are the trainer's arguments."""
        return recipe_from(
            {
                "teacher": {"model": "teacher"},
                "student": {"model": "student"},
                "data": {"sources": [{"path": "train_dataset", "name": "train"}], "train_on": self.train_on},
                "objective": {name: vars(self)[name] for name in OBJECTIVE if vars(self)[name] is not None},
                "training": {
                    "output_dir": str(self.output_dir), "max_steps": 1, "seed": self.seed,
                    "batch_size": self.per_device_train_batch_size,
                    **{name: vars(self)[name] for name in TRAINING if vars(self)[name] is not None},
                },
            }
        )  # fmt: skip
