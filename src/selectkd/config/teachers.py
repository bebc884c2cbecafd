"""What ``teacher:`` may be, one model per kind; the key that only one kind has tells which kind is meant."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from selectkd.config.section import Count, Dtype, Section, Text


class ModelTeacher(Section):
    """The model that is distilled, held in memory: a hub id, a folder, or a .gguf file."""

    model: Text
    revision: Text | None = None
    dtype: Dtype | None = None
    quantization: Text | None = None


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
