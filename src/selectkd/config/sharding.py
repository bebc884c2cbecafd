"""``training.sharding:`` how the student is spread over the ranks of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selectkd.config.section import Count, Section, Whole


class Sharding(Section):
    """Weights, gradients and optimizer of the student in parts over the ranks (FSDP2), one layer whole at a time."""

    fsdp: Annotated[int, Field(ge=2), Whole] | Literal["all"] = "all"
    """Number of ranks that share one copy of the student; `all` takes every rank."""
    replicate: Count = 1
    """Number of copies, each on fsdp ranks (HSDP). One copy a machine keeps most traffic inside it; fsdp times
    replicate is the number of ranks."""
