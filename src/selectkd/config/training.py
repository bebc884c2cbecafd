"""What ``training:`` may be: how the student is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from selectkd.config.quantization import FakeQuantization
from selectkd.config.section import Count, Section, Share, Text, Whole, refuse
from selectkd.config.sharding import Sharding


class Lora(Section):
    """Low-rank adapters. The defaults are SelecTKD's, from DistiLLM-2."""

    r: Count = 16
    """Rank of the adapters. The default is SelecTKD's."""
    alpha: Annotated[float, Field(gt=0.0)] = 128
    """Scale of the adapters: their product counts alpha / r. The default is SelecTKD's."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of an adapter's inputs set to 0 in training. The default is SelecTKD's."""
    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    """Names of the linear layers that get adapters, or `all-linear` for all but the head. The default is
    SelecTKD's, for Llama-like models."""


class EarlyStopping(Section):
    """When a run ends before its last step."""

    patience: Count
    """Number of evaluations without a lower held-out loss after which the run stops."""


Optimizer = Literal[
    "adamw", "adamw_8bit", "adamw_4bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "ademamix", "ademamix_8bit",
    "lion", "lion_8bit", "stable_adamw", "sgd",
]  # fmt: skip
WITHOUT_BETAS = ("adafactor", "sgd")
WITHOUT_EPS = ("adafactor", "sgd", "lion", "lion_8bit")


class Training(Section):
    """How the student is trained. Defaults named SelecTKD's are those of DistiLLM-2, whose recipe it takes over."""

    output_dir: Text
    """Folder of the run: metrics, checkpoints and the student. A run that is there goes on."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), Whole] = 42
    """Seed of every random number of the run. The default is SelecTKD's."""
    max_steps: Count | None = None
    """Number of optimizer steps. Needed where epochs is left out."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the text, in place of max_steps; may be a fraction."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-5
    """Highest learning rate, reached at the end of the warm-up. The default is SelecTKD's."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up; cosine and linear end at 0. The default is SelecTKD's."""
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises from 0. The default is SelecTKD's."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decay of the weights, per step and unit of learning rate. The default is none."""
    optimizer: Optimizer = "adamw"
    """An optimizer of transformers by its short name, fused where the device allows. Names with 8bit, 4bit or paged
    need another package. The default is SelecTKD's."""
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] | None = None
    """The optimizer's two decay rates, such as [0.9, 0.999]. Left out: the optimizer's own."""
    eps: Annotated[float, Field(gt=0.0)] | None = None
    """Small number that the optimizer adds to its denominator. Left out: the optimizer's own."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Longer gradients are scaled down to this norm. The default is that of transformers."""
    batch_size: Count
    """Sequences in a micro-batch, on each rank. Evaluation takes as many."""
    gradient_accumulation: Count = 1
    """Micro-batches in one optimizer step."""
    max_length: Annotated[int, Field(ge=2), Whole] = 1024
    """Most tokens of a sample, prompt and completion together. The default is SelecTKD's."""
    max_prompt_length: Count | None = None
    """Most tokens of a prompt, which is cut on its left. Left out: three quarters of max_length, fewer where
    data.max_new_tokens needs more room."""
    precision: Literal["auto", "bf16", "bf16-pure", "fp32", "tf32"] = "auto"
    """`bf16` multiplies in bf16 and keeps weights and optimizer in fp32; `bf16-pure` keeps all in bf16. `tf32`
    rounds the inputs of fp32 products. `auto`: bf16 on a GPU that has it, tf32 on other GPUs, fp32 on a CPU."""
    lora: Lora | None = None
    """Trains adapters in place of the weights: a mapping of the keys of lora. Left out: every weight is trained."""
    fake_quantization: FakeQuantization | None = None
    """Trains the weights as they will be exported, rounded to few bits: `q8_0`, `q4_0`, `int8` or `int4`, or a mapping
    of the keys of fake_quantization. Left out: no rounding."""
    freeze: list[Literal["vision_tower", "projector", "language_model"]] = []
    """Parts of a student that sees images whose weights stay as they are. The default trains all, or with lora the
    adapters of the language model."""
    gradient_checkpointing: bool = False
    """`true` computes activations again in the backward pass: less memory, more time."""
    activation_offload: bool = False
    """`true` keeps what the backward pass needs in main memory: less device memory, more transfers."""
    save_every: Count | Literal["auto"] | None = "auto"
    """Optimizer steps from one checkpoint to the next. `auto` saves every ten minutes, less often where saving is
    slow; null saves only at a stop."""
    keep: Annotated[int, Field(ge=2), Whole] = 2
    """Number of checkpoints that stay. The default leaves one where the newest is damaged."""
    evaluate_every: Count | None = None
    """Optimizer steps from one evaluation on held-out text to the next. Left out: before and after the run only."""
    early_stopping: EarlyStopping | None = None
    """Ends the run where the held-out loss no longer falls. Needs evaluate_every."""
    chunk: Count | None = None
    """Rows in one matrix product of the loss: fewer need less memory. Left out: as many as memory and speed
    suggest."""
    gradient_filter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Leaves out vocabulary columns with gradients below this share of the largest: faster, slightly inexact. The
    default, 0, is exact."""
    compile_loss: Literal["auto"] | bool = "auto"
    """Compiles the loss on a processor with torch.compile; needs a C++ compiler. `auto` does in runs of 200 steps or
    more, where one is found."""
    log_every: Count = 1
    """Optimizer steps from one line of the log to the next."""
    probe_samples: Annotated[int, Field(ge=0), Whole] = 16
    """Samples of a fixed batch on which acceptance is followed during the run; 0 follows none. The default is a
    choice of ours."""
    sharding: Sharding | None = None
    """Spreads the student over the ranks (FSDP2): a mapping, {} for its defaults. Left out: each rank has a whole
    student."""
    report_to: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "trackio"]
    ] = []
    """Loggers that receive the metrics beside metrics.jsonl. Each needs its package."""

    report: bool = True
    """`true` writes the page report.html into the run folder at the end of `selectkd train`."""

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
        if len(set(self.freeze)) == 3:
            raise refuse(
                "freeze names every part of the student, so nothing is trained; leave one out", at="freeze"
            )
        if self.lora is not None and self.freeze:
            raise refuse("lora trains adapters of the language model alone; leave freeze out", at="freeze")
        if self.activation_offload and self.gradient_checkpointing:
            raise refuse(
                "gradient_checkpointing computes activations again and activation_offload keeps them in main memory; "
                "set one of the two to false"
            )
        if self.fake_quantization is not None and (self.lora is not None or self.sharding is not None):
            other = "lora" if self.lora is not None else "sharding"
            raise refuse(
                f"fake_quantization rounds whole weights that train themselves, so it does not go with {other}; leave "
                "one of the two out"
            )
        if (self.max_steps is None) == (self.epochs is None):
            raise refuse("needs exactly one of max_steps and epochs; set the other to null")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise refuse(
                f"max_prompt_length = {self.max_prompt_length} leaves no room for a completion within "
                f"max_length = {self.max_length}; lower the one or raise the other"
            )
        if self.early_stopping is not None and self.evaluate_every is None:
            raise refuse("early_stopping needs evaluations; set evaluate_every to a number of steps")
        return self
