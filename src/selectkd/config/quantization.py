"""What a recipe may say of a student in few bits: a 4-bit base under adapters, weights trained as they are exported."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from selectkd.config.section import Count, Dtype, Section, refuse


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Quantization(Section):
    """A student's base in 4 bits, on which adapters train (QLoRA). Needs training.lora and the package bitsandbytes.

    The defaults are QLoRA's (arXiv 2305.14314).
    """

    name: Literal["bitsandbytes-4bit"]
    """How the weights of linear layers are stored. Embeddings, norms and head stay in float32."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of a weight: quantiles of a normal distribution, or a 4-bit floating-point number. The default is
    QLoRA's."""
    double: bool = True
    """`true` stores the scales of blocks in 8 bits as well: 0.37 bits a weight less. The default is QLoRA's."""
    compute_dtype: Dtype | None = None
    """Number format in which the weights are multiplied. Left out: as training.precision computes."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return _named(value)


class FakeQuantization(Section):
    """Weights rounded in every forward pass as they are exported; the gradient goes to the weights before rounding."""

    name: Literal["q8_0", "q4_0", "int8", "int4"]
    """`q8_0` and `q4_0` round as the export to GGUF does: linear layers to the type, embeddings and head to q8_0.
    `int8` and `int4` round as torchao does, all linear layers but the head, and need that package."""
    group_size: Count | None = None
    """Weights of a row that share a scale, for int8 and int4. Left out: 32 for int4, a whole row for int8."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return _named(value)

    @model_validator(mode="after")
    def _blocks_of_gguf(self) -> Self:
        if self.name.startswith("q") and self.group_size is not None:
            raise refuse(f"group_size belongs to int8 and int4; {self.name} has blocks of 32. Leave it out")
        return self


def check_trainable(quantization: Quantization | None, training: Any) -> None:
    """Refuses a base in 4 bits that nothing can train on."""
    if quantization is None:
        return
    if training.lora is None:
        raise refuse(
            "student.quantization stores the weights in 4 bits, which cannot train; set training.lora, whose adapters "
            "do, or leave it out"
        )
    if training.sharding is not None:
        raise refuse(
            "student.quantization does not go with training.sharding: 4-bit weights are whole on each rank; leave one "
            "of the two out"
        )
