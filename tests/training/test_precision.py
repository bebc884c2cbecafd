"""training.precision: which dtypes a run computes in, and which it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments, get_scheduler

from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.models.precision import FP32, PRECISIONS, precision_of, unmoved_share
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, recipe_of, texts, tiny_llama, write_pair

BF16 = PRECISIONS["bf16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=4))
    return root


@pytest.fixture
def run(folders: Path, tmp_path: Path) -> Callable[..., Any]:
    """run(name, **training): the run folder of a recipe, and what it warned of."""

    def made(name: str, **training: Any) -> Any:
        sections = {"objective": {"verifier": {"name": "greedy_topk", "k": 20}}}
        sections |= {key: training.pop(key) for key in ("teacher", "data") if key in training}
        settings = {
            "output_dir": str(tmp_path / name), "max_steps": 4, "batch_size": 3, "learning_rate": 1e-3,
            "max_length": 32, "max_prompt_length": 16, "evaluate_every": 2,
        }  # fmt: skip
        data = sections.pop("data", {}) | {"evaluation": 0.25}
        return train(recipe_from(recipe_of(folders, data=data, training=settings | training, **sections)))

    return made


@pytest.mark.parametrize(
    ("device", "has_bf16", "meant"),
    [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "tf32"), ("mps", True, "fp32")],
)
def test_auto_is_bf16_where_a_gpu_has_it(device, has_bf16, meant, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert precision_of("auto", device).name == meant


def test_bf16_is_refused_on_a_gpu_that_only_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match="no bfloat16"):
        precision_of("bf16", "cuda")
    assert precision_of("auto", "cuda").tf32


def test_tf32_is_switched_for_the_run_and_put_back():
    switch = torch.backends.cuda.matmul
    before = switch.allow_tf32
    with PRECISIONS["tf32"].products("cuda"):
        assert switch.allow_tf32
        with FP32.products("cuda"):
            assert not switch.allow_tf32
        assert switch.allow_tf32
    assert switch.allow_tf32 == before


@pytest.fixture
def dtypes_of_linears() -> Iterator[set[torch.dtype]]:
    """The dtypes that linear layers gave in a forward pass of any model."""
    seen: set[torch.dtype] = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.add(out.dtype) if isinstance(module, nn.Linear) else None
    )
    yield seen
    hook.remove()


def by_loop(student: Any, teacher: Any, lines: list[Any], precision: Any) -> None:
    ledger = Ledger(Objective("forward_kl", {"name": "greedy_topk", "k": 9}), streams=("a", "b"), seed=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    lines += train_loop(
        DistillationModel(student, LiveTeacher(teacher)), BatchFeed(lambda _: padded(texts(12), 4)), ledger,
        optimizer, steps=5, schedule=get_scheduler("linear", optimizer, 0, 5), accumulation=2, precision=precision,
    )  # fmt: skip


def by_trainer(student: Any, teacher: Any, lines: list[Any], folder: Path, **given: Any) -> LedgerTrainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=5, learning_rate=1e-3, gradient_accumulation_steps=2, logging_steps=1,
        optim="adamw_torch", seed=5, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **given,
    )  # fmt: skip
    trainer = LedgerTrainer(
        DistillationModel(student, LiveTeacher(teacher)), BatchFeed(lambda _: padded(texts(12), 4)),
        Ledger(Objective("forward_kl", {"name": "greedy_topk", "k": 9}), streams=("a", "b"), seed=5), args,
        on_line=lines.append,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_the_trainers_bf16_gives_the_loops_numbers_in_bf16(
    teacher_model, new_student, tmp_path, dtypes_of_linears
):
    loop, trainer, lines, others = new_student(), new_student(), [], []
    by_loop(loop, tiny_llama(1, dtype=torch.bfloat16), lines, BF16)
    assert dtypes_of_linears == {torch.bfloat16}
    dtypes_of_linears.clear()
    by_trainer(trainer, tiny_llama(1, dtype=torch.bfloat16), others, tmp_path, bf16=True)
    assert dtypes_of_linears == {torch.bfloat16}
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "kl", "tar", "grad_norm"):
            assert line[name] == other[name], name
    for name, parameter in loop.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, trainer.get_parameter(name)), name


def test_a_teacher_in_float32_stays_there_while_the_student_is_in_bf16(new_student, dtypes_of_linears):
    teacher, student = tiny_llama(1), new_student()
    seen: dict[str, set[torch.dtype]] = {"teacher": set(), "student": set()}
    for name, model in (("teacher", teacher), ("student", student)):
        projection = model.model.layers[0].mlp.up_proj
        projection.register_forward_hook(lambda _, __, out, name=name: seen[name].add(out.dtype))
    by_loop(student, teacher, [], BF16)
    assert seen == {"teacher": {torch.float32}, "student": {torch.bfloat16}}


def test_fp16_is_refused_by_name(new_student, teacher_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="fp16"):
        by_trainer(new_student(), teacher_model, [], tmp_path)


def test_a_launch_in_another_precision_than_the_recipes_is_refused(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="--mixed_precision bf16"):
        run("launched", precision="fp32")


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16", "bf16-pure"])
def test_a_run_saves_its_student_in_the_dtype_of_its_precision(run, precision):
    one = run("run", precision=precision)
    weights = load_file(one.run_dir / "student" / "model.safetensors")
    narrow = precision.startswith("bf16")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16 if narrow else torch.float32}
    config = json.loads((one.run_dir / "student" / "config.json").read_text("utf-8"))
    assert config["dtype"] == ("bfloat16" if narrow else "float32")
    assert "lm_head.weight" not in weights  # tied, written once
    manifest = json.loads((one.run_dir / "manifest.json").read_text("utf-8"))
    assert manifest["precision"] == ("fp32" if precision == "auto" else precision)


def test_the_saved_student_is_the_trained_one_rounded_once(run, folders):
    kept: list[Any] = []
    settings = recipe_of(
        folders,
        training={
            "output_dir": str(run("aside", precision="bf16").run_dir.parent / "own"), "max_steps": 3, "batch_size": 3,
            "max_length": 32, "max_prompt_length": 16, "precision": "bf16", "learning_rate": 1e-3,
        },
    )  # fmt: skip
    result = train(recipe_from(settings), on_assembled=kept.append)
    student = kept[0].student
    assert all(p.dtype == torch.float32 for p in student.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(result.run_dir / "student", dtype="auto")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name).bfloat16()), name


def test_evaluation_in_bf16_is_that_of_the_training_forward(new_student, teacher_model, dtypes_of_linears):
    student, batches = new_student(), padded(texts(6), 3)
    teacher = LiveTeacher(teacher_model.to(torch.float32))
    plain = evaluate(student, teacher, batches, Objective(), streams=("a", "b"))
    dtypes_of_linears.clear()
    under = evaluate(student, teacher, batches, Objective(), streams=("a", "b"), precision=BF16)
    assert torch.bfloat16 in dtypes_of_linears
    # bf16 keeps 8 bits of each product: another number, and near
    assert under.kl != plain.kl and under.kl == pytest.approx(plain.kl, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure"])
def test_adapters_are_fp32_on_a_bf16_base_and_bf16_where_all_is(run, precision):
    kept: list[Any] = []
    result = run("lora", precision=precision, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    assert result.skipped == 0
    recipe = json.loads((result.run_dir / "manifest.json").read_text("utf-8"))["config"]
    recipe["training"]["output_dir"] += "-again"
    train(recipe_from(recipe), on_assembled=kept.append)
    trained = {p.dtype for p in kept[0].student.parameters() if p.requires_grad}
    frozen = {p.dtype for p in kept[0].student.parameters() if not p.requires_grad}
    assert trained == {torch.float32 if precision == "bf16" else torch.bfloat16} and frozen == {
        torch.bfloat16
    }
    assert (
        AutoModelForCausalLM.from_pretrained(result.run_dir / "student", dtype="auto").dtype == torch.bfloat16
    )


def test_a_student_that_writes_its_text_trains_in_bf16(run):
    policy = {"policy": {"name": "student", "probability": 1.0}, "max_new_tokens": 6}
    result = run("writes", precision="bf16", data=policy)
    assert result.skipped == 0 and result.steps == 4


def test_unmoved_share_counts_the_weights_a_step_cannot_change():
    weights = torch.tensor([1.0, 2.0**-8, 2.0**-20, -1.0], dtype=torch.bfloat16)
    # 2^-9 beside 1.0 is half of what bf16 tells apart below it, and a quarter above
    assert unmoved_share([weights], 2.0**-10) == 0.5
    assert unmoved_share([weights.float()], 2.0**-10) == 0.0


def test_bf16_pure_says_how_many_weights_stand_still(run):
    result = run("pure", precision="bf16-pure", learning_rate=1e-5)
    assert any("bf16-pure" in told and "%" in told for told in result.warnings)
    assert not any(
        "bf16-pure" in told for told in run("mixed", precision="bf16", learning_rate=1e-5).warnings
    )


def test_bf16_moves_the_weights_that_fp32_moves(new_student, teacher_model):
    moved = {}
    for name in ("fp32", "bf16", "bf16-pure"):
        student = new_student()
        if name == "bf16-pure":
            student.to(torch.bfloat16)
        before = {key: p.detach().clone() for key, p in student.named_parameters()}
        ledger = Ledger(Objective(), streams=("a", "b"))
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
        steps = train_loop(
            DistillationModel(student, LiveTeacher(teacher_model)), BatchFeed(lambda _: padded(texts(4), 4)), ledger,
            optimizer, steps=1, precision=PRECISIONS[name],
        )  # fmt: skip
        next(steps)
        changed = sum(int((p != before[key]).sum()) for key, p in student.named_parameters())
        moved[name] = changed / sum(p.numel() for p in student.parameters())
    assert moved["bf16"] == pytest.approx(moved["fp32"], abs=0.01)
    assert moved["bf16-pure"] < 0.2 * moved["fp32"]


def test_a_recipe_with_dtype_is_told_the_key_for_it(folders):
    training = {"output_dir": "r", "max_steps": 1, "batch_size": 1, "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"training\.precision.*bf16"):
        recipe_from(recipe_of(folders, training=training))


def test_a_student_with_a_teachers_quantization_says_what_a_student_takes(folders):
    content = recipe_of(folders, training={"output_dir": "unused", "max_steps": 1, "batch_size": 1})
    content["student"]["load_in_4bit"] = True
    with pytest.raises(ConfigError, match=r"a student takes bitsandbytes-4bit.*training\.lora"):
        recipe_from(content)
