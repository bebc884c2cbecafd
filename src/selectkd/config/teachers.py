"""What ``teacher:`` may be, one model per kind; the key that only one kind has tells which kind is meant."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from selectkd.config.section import Count, Dtype, Section, Share, Text


class CrossTokenizer(Section):
    """How a teacher of another tokenizer is put beside the student: ``spans``, or these keys.

    pairing: ``spans`` of the same text, or the i-th token beside the i-th (``index``, for uld alone: its paper's way).
    matched_weight: what the divergence on the tokens of both counts, and 1 minus it the sorted distance of the
    others; default the part of the teacher's vocabulary that the student has. unverified_weight: weight of a span
    whose proposal the teacher has no token for; default beta, the weight of a rejected one.
    """

    pairing: Literal["spans", "index"] = "spans"
    matched_weight: Share | None = None
    unverified_weight: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _pairing_alone(cls, value: Any) -> Any:
        return {"pairing": value} if isinstance(value, str) else value


class ModelTeacher(Section):
    """The model that is distilled, held in memory: a hub id, a folder, or a .gguf file.

    cross_tokenizer: for a teacher whose tokenizer is not the student's.
    """

    model: Text
    revision: Text | None = None
    dtype: Dtype | None = None
    quantization: Text | None = None
    cross_tokenizer: CrossTokenizer | None = None


class CacheTeacher(Section):
    """A folder that `selectkd cache build` fills with the teacher's rows of this text, and a run reads.

    A build needs model, and payload and k where the payload is not hidden. A run needs none of them: each one that
    is given must be the cache's own.
    """

    cache: Text
    model: Text | None = None
    revision: Text | None = None
    dtype: Dtype | None = None
    quantization: Text | None = None
    payload: Literal["hidden", "top_k", "sampled"] | None = None
    k: Count | None = None
    precision: Literal["bfloat16", "float32", "packed"] | None = None
    shard_rows: Count | None = None


def _kind(value: Any) -> str:
    """The tag of the kind that is meant; a mapping without any kind's own key is read as a model."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "a cache" if "cache" in keys else "a model"


# A tag with a space is no key, so that `problems` tells the two apart.
Teacher = Annotated[
    Annotated[ModelTeacher, Tag("a model")] | Annotated[CacheTeacher, Tag("a cache")], Discriminator(_kind)
]
