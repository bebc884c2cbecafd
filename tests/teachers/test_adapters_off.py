"""`teacher: {adapters_off: true}`: the base a LoRA student was made from teaches it, with the student's own weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_post_hook

from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_run import left, recipe_for, write_dropping_pair
from faults.two_rank_runs import StopsAt
from selectkd import Objective
from selectkd.cli import main
from selectkd.config import Recipe, recipe_from
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, Preempted
from selectkd.models.lora import add_lora
from selectkd.teachers.adapters_off import AdaptersOffTeacher
from selectkd.teachers.live import LiveTeacher
from selectkd.training.assembly import ITS_OWN_TEACHER, checkpoint_activations
from selectkd.training.counts import count, row_scale
from selectkd.training.preflight.estimate import estimate
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama

OFF = {"adapters_off": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dropping_pair(tmp_path_factory.mktemp("adapted"))


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """A recipe with its teacher replaced and keys of the other sections changed."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    for name, values in sections.items():
        content[name] = values if name in ("teacher", "student") else {**content[name], **values}
    return recipe_from(content)


def recipe(pair: Path, run: Path, teacher: Any = OFF, *, language_model: float = 1.0, **more: Any) -> Recipe:
    """A LoRA run on the text's own tokens that is held close to its base."""
    plain = recipe_for(pair, run, lora=True, **more)
    return changed(plain, teacher=teacher, objective={"language_model": language_model})


def moved(dropout: float = 0.3) -> Any:
    """A student whose adapters have left zero, with dropout in its base as well."""
    torch.manual_seed(11)
    base = tiny_llama(3)
    for layer in base.get_decoder().layers:
        layer.self_attn.attention_dropout = dropout
    student: Any = add_lora(base, r=4, alpha=8, dropout=dropout)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return student.train()


def state_of(student: Any) -> Any:
    return (
        [module.training for module in student.modules()],
        [parameter.requires_grad for parameter in student.parameters()],
        [layer.disable_adapters for layer in student.modules() if hasattr(layer, "disable_adapters")],
        torch.get_rng_state().tolist(),
    )


def test_the_rows_are_those_of_the_base_before_it_was_adapted_and_the_head_is_not_copied() -> None:
    student, batch = moved(), padded(texts(3), 3)[0]
    position = supervised(batch).position
    wanted = LiveTeacher(tiny_llama(3))(batch, position)
    rows = AdaptersOffTeacher(student)(batch, position)
    assert torch.equal(rows.hidden, wanted.hidden) and not rows.hidden.requires_grad
    assert rows.head.weight is student.get_output_embeddings().weight
    with torch.no_grad():
        adapted = student.eval().get_base_model().get_decoder()(batch.input_ids).last_hidden_state
    assert not torch.allclose(adapted.reshape(-1, adapted.shape[-1])[position], wanted.hidden)


def test_the_student_is_left_as_it_was_and_no_random_number_is_drawn_even_where_the_forward_pass_raises() -> (
    None
):
    student, batch = moved(), padded(texts(3), 3)[0]
    first = student.get_base_model().get_decoder().layers[0]
    first.eval()  # a mode of its own comes back as well
    student.get_base_model().get_decoder().layers[1].self_attn.q_proj.lora_A.requires_grad_(False)
    teacher, before = AdaptersOffTeacher(student), state_of(student)
    teacher(batch, supervised(batch).position)
    assert state_of(student) == before

    def fails(*_: Any) -> None:
        raise RuntimeError("in the middle")

    first.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        teacher(batch, supervised(batch).position)
    assert state_of(student) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_beside_a_second_copy_of_the_base(checkpointing: bool) -> None:
    """Also where activations are computed again in the backward pass, after the adapters were off."""
    (batch,) = padded(texts(4), 4)
    seen = supervised(batch)
    found = []
    for own in (True, False):
        student = moved()
        if checkpointing:
            checkpoint_activations(student.get_base_model())
        teacher = AdaptersOffTeacher(student) if own else LiveTeacher(tiny_llama(3))
        model = DistillationModel(student, teacher)
        torch.manual_seed(5)
        scale = row_scale(seen, count([seen]), "token_mean")
        objective = Objective("reverse_kl", {"name": "greedy_topk", "k": 5}, beta=0.1)
        loss, _ = model(batch, scale, torch.empty(len(seen.position), 0), objective)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
    assert len(found[0]) > 1 and found[0][0] > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.*is trained beside the adapters"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.*is trained beside the adapters"),
        ({"modules_to_save": ["norm"]}, "norm.*is trained beside the adapters"),
    ],
)
def test_a_student_that_trains_more_than_adapters_is_refused(how: dict[str, Any], told: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **how)
    untied = tiny_llama(3)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ConfigError, match=told):
        AdaptersOffTeacher(get_peft_model(untied, config))


def test_a_student_without_adapters_or_with_merged_ones_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no adapters to switch off"):
        AdaptersOffTeacher(tiny_llama(3))
    student = moved()
    student.merge_adapter()
    with pytest.raises(ConfigError, match="merged into its weight"):
        AdaptersOffTeacher(student)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"teacher": OFF}, "adapters_off needs a student with adapters.*set training.lora"),
        (
            {"teacher": OFF, "student": {"from_teacher": {"layers": 1}}, "training": {"lora": {"r": 2}}},
            "adapters_off uses the student's own base model, but student.from_teacher",
        ),
        ({"teacher": {"adapters_off": False}}, "teacher.adapters_off = False must be True"),
        ({"teacher": {"adapters_off": True, "model": "x"}}, "teacher.model is not a key"),
    ],
)
def test_a_recipe_that_cannot_have_such_a_teacher_is_refused_by_key(
    pair: Path, tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        changed(recipe_for(pair, tmp_path / "run"), **sections)


@pytest.fixture(scope="module", autouse=True)
def a_first_run(tmp_path_factory: Any) -> None:
    """The first run of a process draws more from Python's generator, by the checks of shapes, than those after it."""
    root = tmp_path_factory.mktemp("first")
    train(recipe(write_dropping_pair(root), root / "run", max_steps=1))


def test_a_run_leaves_the_bytes_of_one_beside_a_second_copy_of_the_base(pair: Path, tmp_path: Path) -> None:
    """Dropout in student and adapters, evaluations with their KL, a checkpoint: nothing tells the two apart."""
    own = train(recipe(pair, tmp_path / "own"))
    copied = {"model": str(pair / "student")}
    other = train(recipe(pair, tmp_path / "copy", copied))
    assert left(tmp_path / "own") == left(tmp_path / "copy")
    assert own.before is not None and own.before.kl == 0.0 and own.before.tar == 1.0
    assert own.after is not None and other.after is not None and own.after.kl == other.after.kl > 0.0
    assert json.loads((tmp_path / "own" / "manifest.json").read_text())["warnings"] == []


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    train(recipe(pair, tmp_path / "whole"))
    stops = recipe(pair, tmp_path / "stops")
    hook = register_optimizer_step_post_hook(StopsAt(3))
    try:
        with pytest.raises(Preempted):
            train(stops)
    finally:
        hook.remove()
    assert train(stops).resumed_from == 3
    assert left(tmp_path / "stops") == left(tmp_path / "whole")


def test_beside_a_second_teacher_it_is_one_of_several(pair: Path, tmp_path: Path) -> None:
    teacher = {"model": str(pair / "teacher"), "weight": 0.7}
    for name, base in (("own", OFF), ("copy", {"model": str(pair / "student")})):
        both = [teacher, {**base, "weight": 0.3}]
        train(recipe(pair, tmp_path / name, both, language_model=0.0))
    assert left(tmp_path / "own") == left(tmp_path / "copy")


def test_the_student_can_write_the_text_and_the_teacher_cannot(pair: Path, tmp_path: Path) -> None:
    written = {"policy": {"name": "student"}, "max_new_tokens": 4}
    own = recipe(pair, tmp_path / "run", language_model=0.0, max_steps=2)
    result = train(changed(own, data=written))
    assert result.steps == 2 and result.skipped == 0 and result.warnings[-1] == ITS_OWN_TEACHER
    by_teacher = {"policy": {"name": "teacher"}, "max_new_tokens": 4}
    with pytest.raises(ConfigError, match="policy teacher has the teacher write"):
        train(changed(recipe(pair, tmp_path / "other"), data=by_teacher))


def test_doctor_passes_it_and_says_where_nothing_would_move_the_student(
    pair: Path, tmp_path: Path, capsys: Any
) -> None:
    for factor, told in ((1.0, False), (0.0, True)):
        path = tmp_path / "recipe.yaml"
        content = recipe(pair, tmp_path / "run", language_model=factor)
        path.write_text(json.dumps(content.model_dump(mode="json", exclude_none=True)), "utf-8")
        assert main(["doctor", str(path), "--json", "-"]) == 0
        found = {row["check"]: row["message"] for row in json.loads(capsys.readouterr().out)}
        assert found["models"].startswith("teacher the student with its adapters off, student ")
        assert (ITS_OWN_TEACHER in found["models"]) is told


def test_the_estimate_counts_no_second_model(pair: Path, tmp_path: Path) -> None:
    own = estimate(recipe(pair, tmp_path / "run"))
    copied = estimate(recipe(pair, tmp_path / "run", {"model": str(pair / "student")}))
    weights = sum(p.numel() * 4 for p in tiny_llama(2, layers=1).parameters())
    assert own.teacher == 0 and copied.teacher >= weights
    assert own.loss == copied.loss  # its forward pass and its logits take room all the same


def test_on_two_ranks_it_leaves_the_bytes_of_one_beside_a_second_copy(pair: Path, tmp_path: Path) -> None:
    """DistributedDataParallel sees the adapters off in mid-forward and on again for the backward pass."""
    run_on_two_ranks(Path(__file__).with_name("two_rank_teachers.py"), "adapters", str(tmp_path), str(pair))
    assert left(tmp_path / "own") == left(tmp_path / "copy")
    lines = map(json.loads, (tmp_path / "own" / "metrics.jsonl").read_text("utf-8").splitlines())
    assert [line["evaluation"]["kl"] for line in lines if "evaluation" in line][-1] > 0


def test_a_student_sharded_over_two_ranks_trains_as_one_that_is_not(tmp_path: Path) -> None:
    """FSDP2: each layer is gathered once for the student and once for the teacher, and freed in between."""
    told = run_on_two_ranks(Path(__file__).with_name("two_rank_teachers.py"), "fsdp", str(tmp_path))
    assert "adapters off in a sharded student: as in a whole one" in told


def test_a_copy_of_the_student_is_a_teacher_of_its_own() -> None:
    """What saves a student merges a copy; the teacher's weights are not the copy's."""
    student, batch = moved(), padded(texts(2), 2)[0]
    position = supervised(batch).position
    teacher = AdaptersOffTeacher(student)
    before = teacher(batch, position).hidden
    copy.deepcopy(student).merge_and_unload()
    assert torch.equal(teacher(batch, position).hidden, before)
