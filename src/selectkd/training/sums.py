"""The sums of an optimizer step as one vector, and the rates they give: TAR, kl, bite and others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selectkd.training.counts import sequence_means
from selectkd.training.first_pass import MicroBatch

FIELDS = (
    "loss", "n", "sequences", "tar", "accepted", "kl", "divergence",
    "weighted_divergence", "weight", "overlap", "unverified", "teacher_nonfinite", "always_accepted",
)  # fmt: skip
LOSS, WEIGHT = FIELDS.index("loss"), FIELDS.index("weight")
STREAM_FIELDS = ("tar", "sequences", "divergence", "kl", "n")
"""Of each stream, behind FIELDS."""


def zeros(streams: int, device: torch.device | str = "cpu") -> Tensor:
    """A vector of no rows, fp64: FIELDS, then STREAM_FIELDS for each stream."""
    return torch.zeros(len(FIELDS) + streams * len(STREAM_FIELDS), dtype=torch.float64, device=device)


def step_sums(micro: MicroBatch, loss: Tensor, sums: dict[str, Tensor], *, streams: int) -> Tensor:
    """The sums of one micro-batch as one vector: FIELDS, then STREAM_FIELDS for each stream, fp64."""
    rows = micro.rows
    shares = sequence_means(sums["row_acceptance"], rows)  # [s]
    of_sequence = micro.batch.stream[rows.there]  # [s]
    values = {
        **sums,
        "loss": loss.detach(),
        "sequences": torch.full((), float(rows.sequences), device=loss.device),
        "tar": shares.sum(),
    }
    head = torch.stack([values[name].to(device=loss.device, dtype=torch.float64) for name in FIELDS])
    per_stream = torch.zeros(streams, len(STREAM_FIELDS), dtype=torch.float64, device=loss.device)
    for column, index, value in (
        (0, of_sequence, shares),
        (1, of_sequence, torch.ones_like(shares)),
        (2, rows.stream, sums["row_divergence"]),
        (3, rows.stream, sums["row_kl"]),
        (4, rows.stream, torch.ones_like(sums["row_divergence"])),
    ):
        per_stream[:, column].index_add_(0, index, value.double())
    return torch.cat([head, per_stream.reshape(-1)])


def named(total: Tensor) -> dict[str, float]:
    """FIELDS of a vector of sums, as floats."""
    return dict(zip(FIELDS, total[: len(FIELDS)].tolist(), strict=True))


def rates(sums: dict[str, float]) -> dict[str, float | None]:
    """kl, divergence, tar, acceptance, bite, overlap and unverified from sums; None where nothing divides. Also
    always_accepted, the share of the tokens that ``always_accept`` accepts, where there are any."""
    n, sequences = sums["n"], sums["sequences"]
    found = {
        "kl": sums["kl"] / n if n else None,
        "divergence": sums["divergence"] / n if n else None,
        "tar": sums["tar"] / sequences if sequences else None,
        "bite": 1.0 - sums["weighted_divergence"] / sums["divergence"] if sums["divergence"] else 0.0,
        "acceptance": sums["accepted"] / n if n else None,
        "overlap": sums["overlap"] / n if n else None,
        "unverified": sums["unverified"] / n if n else None,
        "weight": sums["weight"] / n if n else None,
    }
    return found | ({"always_accepted": sums["always_accepted"] / n} if sums["always_accepted"] else {})


def stream_rates(total: Tensor, streams: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """tar, divergence (of the run's objective) and kl (KL(p || q) at temperature 1), both a token, of each stream that
    had rows."""
    rows = total[len(FIELDS) :].reshape(len(streams), len(STREAM_FIELDS)).tolist()
    return {
        name: {"tar": tar / sequences if sequences else None, "kl": kl / n, "divergence": divergence / n}
        for name, (tar, sequences, divergence, kl, n) in zip(streams, rows, strict=True)
        if n
    }
