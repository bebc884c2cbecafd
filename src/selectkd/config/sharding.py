"""``training.sharding:`` how the student is spread over the ranks of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selectkd.config.section import Count, Section, Whole


class Sharding(Section):
    """Weights, gradients and optimizer of the student in parts over the ranks (FSDP2), one layer whole at a time.

    fsdp: ranks that share a copy, 2 or more; ``all``: as many as there are. replicate: copies, each on ``fsdp`` ranks
    (HSDP); one copy a machine keeps most of the traffic inside it. fsdp times replicate is the number of ranks.
    """

    fsdp: Annotated[Whole, Field(ge=2)] | Literal["all"] = "all"
    replicate: Count = 1
