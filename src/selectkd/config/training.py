"""What ``training:`` may be: how the student is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from selectkd.config.section import Count, Section, Share, Text, Whole, refuse
from selectkd.config.sharding import Sharding


class Lora(Section):
    """Low-rank adapters; the defaults are the paper's."""

    r: Count = 16
    alpha: Annotated[float, Field(gt=0.0)] = 128
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: Annotated[list[Text], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


class EarlyStopping(Section):
    """Stop after so many evaluations without a lower held-out loss."""

    patience: Count


Optimizer = Literal[
    "adamw", "adamw_8bit", "adamw_4bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "ademamix", "ademamix_8bit",
    "lion", "lion_8bit", "stable_adamw", "sgd",
]  # fmt: skip
WITHOUT_BETAS = ("adafactor", "sgd")
WITHOUT_EPS = ("adafactor", "sgd", "lion", "lion_8bit")


class Training(Section):
    """How the student is trained. Optimizer, schedule and lengths default to the paper's.

    precision: ``bf16`` multiplies in bf16 with weights and optimizer in fp32, ``bf16-pure`` has them in bf16 too,
    ``tf32`` lets a GPU round the inputs of fp32 products; ``auto`` is bf16 on a GPU that has it, tf32 on another, fp32
    on a CPU. optimizer: transformers' by this name, fused where the device has it. activation_offload: what the
    backward pass needs waits in main memory.
    """

    output_dir: Text
    seed: Annotated[Whole, Field(ge=0, le=2**32 - 1)] = 42
    max_steps: Count | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    optimizer: Optimizer = "adamw"
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] | None = None
    eps: Annotated[float, Field(gt=0.0)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Count
    gradient_accumulation: Count = 1
    max_length: Annotated[Whole, Field(ge=2)] = 1024
    max_prompt_length: Count = 512
    precision: Literal["auto", "bf16", "bf16-pure", "fp32", "tf32"] = "auto"
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    save_every: Count | Literal["auto"] | None = "auto"
    keep: Annotated[Whole, Field(ge=2)] = 2
    evaluate_every: Count | None = None
    early_stopping: EarlyStopping | None = None
    chunk: Count | None = None
    gradient_filter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    compile_loss: bool = False
    log_every: Count = 1
    probe_samples: Annotated[Whole, Field(ge=0)] = 16
    engine: Literal["trainer", "loop"] = "trainer"
    sharding: Sharding | None = None
    report_to: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "trackio"]
    ] = []

    @field_validator("betas")
    @classmethod
    def _two_betas(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and len(value) != 2:
            raise refuse(
                f"= {value} must be two numbers from 0 up to, not including, 1, such as [0.9, 0.999]"
            )
        return value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for key, without in (("betas", WITHOUT_BETAS), ("eps", WITHOUT_EPS)):
            if getattr(self, key) is not None and self.optimizer in without:
                raise refuse(f"optimizer = {self.optimizer} has no {key}; leave the key out", at=key)
        if self.activation_offload and self.gradient_checkpointing:
            raise refuse(
                "gradient_checkpointing computes activations again and activation_offload keeps them in main memory; "
                "set one of the two to false"
            )
        if (self.max_steps is None) == (self.epochs is None):
            raise refuse("needs exactly one of max_steps and epochs; set the other to null")
        if self.max_prompt_length >= self.max_length:
            raise refuse(
                f"max_prompt_length = {self.max_prompt_length} leaves no room for a completion within "
                f"max_length = {self.max_length}; lower the one or raise the other"
            )
        if self.early_stopping is not None and self.evaluate_every is None:
            raise refuse("early_stopping looks at evaluations; set evaluate_every to a number of steps")
        if self.report_to and self.engine == "loop":
            raise refuse(
                f"report_to = {self.report_to} needs engine: trainer; the plain loop writes metrics.jsonl alone"
            )
        return self
