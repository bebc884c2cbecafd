"""SelecTKDLoss where other trainers call their loss: by the host where it is installed, else by its signature."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.test_module import GATES, Texts, plainly, same
from selectkd.errors import ConfigError
from selectkd.nn import SelecTKDLoss


def test_automodel_makes_it_from_yaml_and_calls_it_with_a_count():
    """Automodel makes ``_target_`` of the other keys, and calls kd_loss_fn(student, teacher, labels, count)."""
    section = {"_target_": "selectkd.nn.SelecTKDLoss", "divergence": "forward_kl",
               "verifier": {"name": "greedy_topk", "k": 3}, "beta": 0.1}  # fmt: skip
    module, _, name = section.pop("_target_").rpartition(".")
    kd_loss_fn = getattr(importlib.import_module(module), name)(**section)
    texts = Texts()
    ours = kd_loss_fn(texts.student("logits"), texts.teacher("logits"), texts.labels, num_batch_labels=11)
    same(texts.gradients(ours), texts.gradients(plainly(texts, GATES[0], count=11)))


def test_modelopt_calls_it_as_a_criterion_of_two_outputs():
    """ModelOpt calls each criterion as loss_fn(student_output, teacher_output, **what compute_kd_loss is given)."""
    criteria = {("lm_head", "lm_head"): SelecTKDLoss(*GATES[0], 0.1)}
    texts = Texts()

    def compute_kd_loss(**loss_fn_kwargs: Any) -> torch.Tensor:
        (loss_fn,) = criteria.values()
        return loss_fn(texts.student("logits"), texts.teacher("logits"), **loss_fn_kwargs)

    ours = compute_kd_loss(labels=texts.labels)
    same(texts.gradients(ours), texts.gradients(plainly(texts, GATES[0])))


@pytest.mark.filterwarnings("ignore")  # the host's own
@pytest.mark.parametrize("block", range(2))
def test_the_code_of_the_page_runs(block, capsys):
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.S)[block]
    if "import lightning" in code:
        pytest.importorskip("lightning", exc_type=ImportError)
    exec(compile(code, "docs/hosts.md", "exec"), {"__name__": "page"})
    assert block == 1 or 0.0 <= float(capsys.readouterr().out) <= 1.0


class Pair(nn.Module):
    """A student and a teacher of one linear layer each, for a host that trains modules."""

    def __init__(self) -> None:
        super().__init__()
        texts = Texts(dtype=torch.float32)
        self.student, self.teacher = nn.Linear(8, 24), nn.Linear(6, 24).requires_grad_(False)
        self.texts, self.loss_fn = texts, SelecTKDLoss("forward_kl", {"name": "greedy_topk", "k": 3})


@pytest.mark.filterwarnings("ignore")  # the host's own
def test_lightning_trains_by_a_training_step():
    lightning = pytest.importorskip("lightning", exc_type=ImportError)

    class Distilled(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            hidden, teacher_hidden, labels = batch
            loss = self.pair.loss_fn((hidden, self.pair.student), (teacher_hidden, self.pair.teacher), labels)
            self.log("tar", self.pair.loss_fn.sums["accepted"] / self.pair.loss_fn.sums["n"])
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.pair.student.parameters(), lr=0.5)

    module = Distilled()
    texts = module.pair.texts
    rows = list(zip(texts.hidden.detach(), texts.teacher_hidden, texts.labels, strict=True))
    before = module.pair.student.weight.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=3))
    assert (module.pair.student.weight - before).abs().max() > 1e-4
    assert 0.0 <= float(trainer.callback_metrics["tar"]) <= 1.0


@pytest.mark.filterwarnings("ignore")  # the host's own
def test_torchtune_makes_it_from_its_config_and_calls_it_in_place_of_its_own_loss():
    """Its recipe shifts and flattens: kd_loss_fn(student_logits, teacher_logits, labels)."""
    config = pytest.importorskip("torchtune.config", exc_type=ImportError)
    section = {
        "_component_": "selectkd.nn.SelecTKDLoss",
        "verifier": {"name": "greedy_topk", "k": 3},
        "beta": 0.1,
    }
    from omegaconf import OmegaConf

    kd_loss_fn = config.instantiate(OmegaConf.create(section))
    texts = Texts()
    flat = [
        texts.student("logits").flatten(0, 1),
        texts.teacher("logits").flatten(0, 1),
        texts.labels.flatten(),
    ]
    same(texts.gradients(kd_loss_fn(*flat)), texts.gradients(plainly(texts, GATES[0])))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_verl_weighs_each_written_token_by_the_teacher_s_rank_of_it(k, monkeypatch):
    """By the signatures that verl publishes: its registry, its losses of the top-K and its padding."""
    import sys
    import types

    from selectkd.adapters import verl

    registry: dict[str, Any] = {}

    def register_distillation_loss(settings: Any) -> Any:
        return lambda function: registry.update(dict.fromkeys(settings.names, (settings, function)))

    class DistillationLossSettings:
        def __init__(self, names: list[str], use_topk: bool = False, use_estimator: bool = False) -> None:
            self.names, self.use_topk = names, use_topk

    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.workers", "verl.workers.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    losses = types.ModuleType("verl.trainer.distillation.losses")
    vars(losses).update(
        DistillationLossSettings=DistillationLossSettings,
        register_distillation_loss=register_distillation_loss,
    )
    padding = types.ModuleType("verl.workers.utils.padding")
    vars(padding).update(no_padding_2_padding=lambda values, data: values)
    monkeypatch.setitem(sys.modules, losses.__name__, losses)
    monkeypatch.setitem(sys.modules, padding.__name__, padding)

    verl.register(k=k, beta=0.25)
    settings, loss_of = registry["selectkd"]
    assert settings.use_topk
    logp = torch.randn(2, 5, 24).log_softmax(-1)
    best = logp.topk(4)
    written = torch.randint(0, 24, (2, 5))
    written[0] = best.indices[0, :, 1]  # the second best
    each = torch.rand(2, 5, requires_grad=True)
    data = {"teacher_ids": best.indices, "teacher_logprobs": best.values, "responses": written,
            "response_mask": torch.ones(2, 5)}  # fmt: skip
    found, metrics = loss_of(
        config=None, distillation_config=None, model_output={"distillation_losses": each}, data=data
    )
    rank = (logp > logp.gather(-1, written[..., None])).sum(-1)
    weight = torch.where(rank < k, 1.0, 0.25)
    assert (
        found.equal(weight * each) and metrics["distillation/acceptance"] == (rank < k).float().mean().item()
    )
    with pytest.raises(ConfigError, match="5 best tokens, and 4 are given"):
        verl.acceptance(best.indices, best.values, written, 5)
