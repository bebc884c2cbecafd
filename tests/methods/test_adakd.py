"""AdaKD: the share of tokens follows the loss's moving average, through a run and through its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.pair import hellinger_distance
from selectkd.objective.schedules import ShareSchedule
from selectkd.objective.selectors import SELECTORS
from selectkd.training.run import train


def lines_of(result: Any) -> list[dict[str, Any]]:
    text = (result.run_dir / "metrics.jsonl").read_text("utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def test_the_share_of_a_run_follows_its_loss(recipe: Callable[..., Any]) -> None:
    made = recipe(
        method="adakd", objective={"selector": {"name": "adakd", "share": 0.8, "change": 0.05}},
        training={"max_steps": 12, "learning_rate": 0.03, "warmup_ratio": 0.0},
    )  # fmt: skip
    schedule = ShareSchedule(0.8, change=0.05)
    used = 0.8
    lines = lines_of(train(made))
    for line in lines:
        rows = line["acceptance"]  # of the step, ranked by the share before it
        assert rows == pytest.approx(used, abs=0.06)  # at most one row of the step's 20 is rounded up
        used = schedule.update(line["loss"])
        assert line["share"] == pytest.approx(used)
    assert len({line["share"] for line in lines}) > 1


@pytest.mark.parametrize("change", [{"change": 1.0}, {"floor": 0.0}, {"share": 0.2, "floor": 0.3}])
def test_a_share_that_cannot_be_is_refused(change: Any, unchecked: Any) -> None:
    with pytest.raises(ConfigError, match="change lies in"):
        SELECTORS["adakd"](**change)


def test_a_temperature_of_each_token_is_low_where_the_models_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, logq = (
        torch.log_softmax(2 * torch.randn(50, 7, generator=generator, dtype=torch.float64), -1)
        for _ in range(2)
    )
    value = DIVERGENCES["token_temperature"](logp, logq, scale=0.5, middle=0.4, of="reverse_kl")
    for row in range(50):
        r = float(hellinger_distance(logp[row : row + 1], logq[row : row + 1])) / 0.4
        heat = math.exp(-0.5 * math.tanh(math.log(r)))
        p, q = (torch.log_softmax(one[row] / heat, -1) for one in (logp, logq))
        assert float(value[row]) == pytest.approx(heat**2 * float((q.exp() * (q - p)).sum()), rel=1e-6)
    with pytest.raises(ConfigError, match="of is forward_kl or reverse_kl"):
        DIVERGENCES["token_temperature"](logp, logq, of="todi")


def test_the_preset_names_the_papers_share_change_and_floor(recipe: Callable[..., Any]) -> None:
    objective = recipe(method="adakd").objective
    assert objective.selector == {"name": "adakd", "share": 1.0, "change": 0.1, "floor": 0.1}
    assert objective.beta == 0.0
