"""The pages for users of other tools: whole recipes, options that the other tool has, figures that are reproduced."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import TrainingArguments

from docs.test_named import names_of_others
from selectkd import CachedRows, LiveRows, Objective, distillation_loss
from selectkd.config import Recipe
from selectkd.config.load import recipe_from
from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.data.supervised import supervised

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page for page in sorted((ROOT / "docs" / "coming_from").glob("*.md"))}
PLAIN = partial(Objective, verifier="always")
P, Q = torch.tensor([0.6, 0.39, 0.01]), torch.tensor([0.024, 0.0156, 0.9604])
THIRDS = torch.tensor([0.5, 0.3, 0.2])


def recipe(name: str) -> Recipe:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGES[name].read_text("utf-8"), re.S | re.M)
    return recipe_from(yaml.safe_load(block))


def says(name: str, *figures: str) -> None:
    text = PAGES[name].read_text("utf-8")
    assert not [one for one in figures if not re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", text)], figures


def live(student: Tensor, teacher: Tensor, divergence: Any = "forward_kl") -> float:
    """Our loss of one row of logits."""
    one = torch.ones(1, 1)
    rows = LiveRows(one, teacher[:, None])
    loss, _ = distillation_loss(one.clone().requires_grad_(), student[:, None], rows, PLAIN(divergence))
    return loss.item()


def top_k(student: Tensor, teacher: Tensor, k: int) -> float:
    """Our loss of one row of probabilities with a teacher's k best."""
    best = teacher.topk(k)
    rows = CachedRows(best.indices[None], best.values.log()[None])
    one = torch.ones(1, 1)
    head = student.log()[:, None]
    return distillation_loss(one.clone().requires_grad_(), head, rows, PLAIN("forward_kl"))[0].item()


def renormalised(student: Tensor, teacher: Tensor, k: int) -> float:
    """DistillKit's `zero` and axolotl's template: the teacher's k tokens sum to 1, the student's do not."""
    best = teacher.topk(k)
    p = best.values / best.values.sum()
    return float((p * (p / student[best.indices]).log()).sum())


@pytest.mark.parametrize("name", PAGES)
def test_each_page_has_one_recipe_that_is_whole_and_names_the_version_it_was_checked_with(name: str) -> None:
    assert recipe(name).teacher and re.search(r"Checked against \S+ [\d.]+", PAGES[name].read_text("utf-8"))


def of_trl(file: str, name: str) -> Any:
    """The syntax tree of a class of TRL, whose own import takes many seconds."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    tree = ast.parse(Path(spec.origin).parent.joinpath(file).read_text("utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def method_of(node: Any, name: str) -> ast.FunctionDef:
    return next(one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name)


def test_trl_s_options_are_trl_s_and_the_recipe_has_their_values() -> None:
    configs = ("experimental/gkd/gkd_config.py", "GKDConfig"), ("trainer/sft_config.py", "SFTConfig")
    found = [one for at in configs for one in of_trl(*at).body if isinstance(one, ast.AnnAssign)]
    fields = {ast.unparse(one.target): one.value.keywords[0].value for one in found}  # type: ignore[union-attr]
    arguments = method_of(of_trl("experimental/gkd/gkd_trainer.py", "GKDTrainer"), "__init__").args.args
    others = {one.name for one in dataclasses.fields(TrainingArguments)}
    known = {*fields, *others, *(one.arg for one in arguments), "model_name_or_path"}
    assert names_of_others(PAGES["trl_gkd"]) <= known
    defaults = {
        name: ast.literal_eval(value) for name, value in fields.items() if isinstance(value, ast.Constant)
    }
    ours: Any = recipe("trl_gkd")
    policy, divergence = ours.data.policy, ours.objective.divergence
    assert (policy.probability, policy.temperature) == (defaults["lmbda"], defaults["temperature"])
    assert (divergence["name"], divergence["beta"]) == ("generalized_jsd", defaults["beta"])
    assert ours.data.max_new_tokens == defaults["max_new_tokens"]
    assert ours.training.max_length == defaults["max_length"]


def test_trl_s_loss_is_as_its_page_describes_it() -> None:
    trainer = of_trl("experimental/gkd/gkd_trainer.py", "GKDTrainer")
    assert "temperature" not in ast.unparse(method_of(trainer, "compute_loss"))
    function = method_of(trainer, "generalized_jsd_loss")
    function.decorator_list = []
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(ast.unparse(function), names)
    loss = names["generalized_jsd_loss"]
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    at = {beta: float(loss(q.log()[None, None], p.log()[None, None], beta=beta)) for beta in (0, 0.001, 0.5)}
    says("trl_gkd", f"{at[0]:.3f}", f"{at[0.001]:.3f}")
    assert live(q.log(), p.log()) == pytest.approx(at[0], rel=1e-5)
    half = {"name": "generalized_jsd", "beta": 0.5}
    assert live(q.log(), p.log(), half) == pytest.approx(at[0.5], rel=1e-5)
    for written in (16, 67):
        rows = torch.randn(2, 1, written, 9, generator=torch.Generator().manual_seed(0))
        labels = torch.zeros(1, written, dtype=torch.long)
        mean, theirs = loss(*rows, labels=labels), loss(*rows, labels=labels, num_items_in_batch=8)
        says("trl_gkd", f"{float(theirs / mean):.3f}")


def test_axolotl_s_figures_follow_from_its_formulas() -> None:
    says("axolotl", f"{renormalised(THIRDS, THIRDS, 2):.3f}")
    p, q = THIRDS[:2], torch.tensor([0.6, 0.395])
    says("axolotl", f"{float((p * (p / q).log()).sum()):.3f}")
    assert top_k(THIRDS, THIRDS, 2) == pytest.approx(0, abs=1e-6)


def test_ms_swift_s_figures_follow_from_its_formulas() -> None:
    both = [one[:2] / one[:2].sum() for one in (P, Q)]
    kl = float((P * (P / Q).log()).sum())
    says("ms_swift", f"{abs(float((both[0] * (both[0] / both[1]).log()).sum())):.3f}", f"{kl:.3f}")
    assert live(Q.log(), P.log()) == pytest.approx(kl, rel=1e-5)
    assert top_k(Q, P, 2) == pytest.approx(kl, rel=1e-5)
    student, teacher = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, -5.0])
    for shift in (0, 10):
        moved = teacher + shift
        logp, logq = moved.log_softmax(0), torch.cat([student, moved[2:]]).log_softmax(0)
        says("ms_swift", f"{float((logp.exp() * (logp - logq)).sum()):.3f}")
        assert live(student, moved) == pytest.approx(0, abs=1e-6)


def test_distillkit_s_figures_follow_from_its_formulas() -> None:
    says("distillkit", f"{renormalised(THIRDS, THIRDS, 2):.3f}", f"{abs(top_k(THIRDS, THIRDS, 2)):.3f}")
    example = Example([5, 6, 7, 8, 9], [False] * 3 + [True] * 2)
    ours = supervised(collate([example], pad_id=0)).position
    says("distillkit", "positions 3 and 4", "positions 2 and 3")
    assert [i for i, trained in enumerate(example.completion) if trained] == [3, 4]
    assert ours.tolist() == [2, 3]


def test_torchtune_s_figures_follow_from_its_formulas() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    says("torchtune", f"{float(-(p * p.log()).sum()):.3f}")
    assert live(p.log(), p.log()) == pytest.approx(0, abs=1e-6)


def test_measured_figures_of_these_pages_are_rows_of_the_results() -> None:
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [one for one in csv.DictReader(file) if one["commit"] == "8baa95f"]

    def value(benchmark: str, case: str, who: str, metric: str) -> float:
        found = [float(one["value"]) for one in rows if one["benchmark"] == benchmark and one["metric"] == metric
                 and one["case"].startswith(case) and one["implementation"] == who]  # fmt: skip
        return found[0]

    for divergence in ("forward_kl", "generalized_jsd"):
        step = f"smollm2 into 10 layers, 768 tokens, 715 trained, float32, {divergence}"
        says("trl_gkd", f"{value('step', step, 'selectkd', 'ratio'):.2f}")
        for who in ("selectkd", "trl_gkd"):
            says("trl_gkd", f"{value('step', step, who, 'peak_bytes') / 1e6:,.0f} MB")
    cached = "smollm2, top 64, n 1024, float32, forward_kl"
    for who in ("selectkd", "axolotl", "axolotl_fused"):
        says("axolotl", f"{value('loss', cached, who, 'ratio_to_limit'):.2f}")
