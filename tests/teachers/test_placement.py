"""Where a teacher's layers are: on the device, in main memory one at a time, or over the ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_run import left, recipe_for, write_dropping_pair
from gpu.pretended import pretended
from selectkd.config import recipe_from
from selectkd.data.crossing import cross
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.models.sharded import CAN_SHARD
from selectkd.teachers.aligned import AlignedTeacher
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.placement import place_on
from selectkd.training.preflight.estimate import estimate
from selectkd.training.run import train
from teachers.tokens import TEXT, byte_level, model_for
from training.tiny import padded, texts, tiny_llama

CPU = torch.device("cpu")


can_shard = pytest.mark.skipif(not CAN_SHARD, reason="this transformers takes no model apart")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dropping_pair(tmp_path_factory.mktemp("placed"))


def recipe(pair: Path, run: Path, placement: str, **sections: Any) -> Any:
    content = recipe_for(pair, run).model_dump(mode="json", exclude_none=True)
    return recipe_from({**content, "teacher": {**content["teacher"], "placement": placement}, **sections})


def layers_on(model: Any) -> list[set[str]]:
    """Where the weights of each layer are."""
    return [{p.device.type for p in layer.parameters()} for layer in model.get_decoder().layers]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_offloaded_layers_are_on_the_device_while_they_work_and_give_the_same_rows(
    tied: bool, layers: int
) -> None:
    """The head, which the loss multiplies by, is there all the time. Nothing waits, and no cache is emptied."""
    model, seen = tiny_llama(1, layers=layers), []
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    with pretended() as gpu:
        batch = padded(texts(3), 3)[0].to("cuda")
        position = supervised(batch).position
        wanted = LiveTeacher(copy.deepcopy(model))(batch, position).hidden
        teacher = LiveTeacher(model, placement="offloaded")
        teacher.place(torch.device("cuda:0"))
        for layer in model.get_decoder().layers:
            layer.mlp.register_forward_pre_hook(lambda *_: seen.append(layers_on(model)))
        for turn in range(3):
            gpu.reset()
            rows = teacher(batch, position)
            assert torch.equal(rows.hidden, wanted) and rows.head.weight.device.type == "cuda"
            assert layers_on(model) == [{"cpu"}] * layers
            assert (
                not gpu.pageable and not gpu.called and not any("offloaded" in line for line in gpu.waits())
            )
            copies = sum(n for event, n in gpu.launched.items() if "offloaded" in event.where)
            first = turn == 0  # then on layer 0 is there already, and with two of them each stays
            assert copies == (layers + first if layers > 2 else layers * first)
    assert seen == [[{"cuda"} if i == at else {"cpu"} for i in range(layers)] for at in range(layers)] * 3


def test_where_the_device_is_a_cpu_offloaded_layers_stay_as_they_are() -> None:
    model = tiny_llama(1)
    before = [p.data_ptr() for p in model.parameters()]
    place_on(model, CPU, "offloaded")
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_teacher_of_another_tokenizer_can_be_offloaded() -> None:
    tokenizer, other = byte_level(300, text=TEXT[1:]), byte_level(330)
    (batch,) = padded(texts(2), 2)
    found = []
    for placement in ("device", "offloaded"):
        model = model_for(other, 2)
        teacher = AlignedTeacher(model, cross(tokenizer, other), student_width=300, placement=placement)
        found.append(teacher(batch, supervised(batch).position).teacher.hidden)
    assert torch.equal(*found)


def test_a_run_with_an_offloaded_teacher_leaves_the_bytes_of_one_without(pair: Path, tmp_path: Path) -> None:
    for placement in ("device", "offloaded"):
        train(recipe(pair, tmp_path / placement, placement))
    assert left(tmp_path / "device") == left(tmp_path / "offloaded")


@can_shard
def test_a_teacher_sharded_over_two_ranks_leaves_the_bytes_of_a_whole_one(pair: Path, tmp_path: Path) -> None:
    """Each rank holds half of every weight, and the head that rows are multiplied by whole."""
    run_on_two_ranks(Path(__file__).with_name("two_rank_teachers.py"), "sharded", str(tmp_path), str(pair))
    assert left(tmp_path / "device") == left(tmp_path / "sharded")


@can_shard
def test_a_teacher_cannot_be_sharded_over_one_process(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"placement: sharded shares a model.*torchrun"):
        train(recipe(pair, tmp_path / "run", "sharded"))


def test_a_model_without_a_list_of_layers_is_refused_by_name() -> None:
    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    with pytest.raises(ConfigError, match="GPT2Model has no list of layers"):
        place_on(GPT2LMHeadModel(config), CPU, "offloaded")


@pytest.mark.parametrize(
    ("teacher", "student", "told"),
    [
        (
            {"placement": "disk"},
            None,
            "teacher.placement = 'disk' must be 'device', 'offloaded' or 'sharded'",
        ),
        (
            {"placement": "offloaded", "quantization": "bitsandbytes-4bit"},
            None,
            "keeps its weights on the device.*placement = 'offloaded'",
        ),
        (
            {"placement": "offloaded"},
            {"from_teacher": {"layers": 1}},
            "needs the whole teacher on the device.*placement = 'offloaded'",
        ),
    ],
)
def test_a_placement_that_cannot_work_is_refused_by_key(
    teacher: dict[str, Any], student: Any, told: str, pair: Path, tmp_path: Path
) -> None:
    content = recipe_for(pair, tmp_path / "run").model_dump(mode="json", exclude_none=True)
    content["teacher"].update(teacher)
    with pytest.raises(ConfigError, match=told):
        recipe_from(content if student is None else {**content, "student": student})


def test_a_sharded_teacher_can_be_averaged_and_not_routed(pair: Path, tmp_path: Path) -> None:
    content = recipe_for(pair, tmp_path / "run").model_dump(mode="json", exclude_none=True)
    one, other = {"model": "a", "placement": "sharded"}, {"model": "b"}
    recipe_from({**content, "teacher": [{**one, "weight": 1.0}, {**other, "weight": 1.0}]})
    with pytest.raises(ConfigError, match=r"a is sharded, so.*give the teachers weights"):
        recipe_from({**content, "teacher": [{**one, "streams": ["made"]}, {**other, "streams": ["more"]}]})


@can_shard
def test_a_sharded_teacher_does_not_write_text(pair: Path, tmp_path: Path) -> None:
    """Two ranks write texts of different length, and would wait for each other for ever."""
    told = run_on_two_ranks(
        Path(__file__).with_name("two_rank_teachers.py"), "writes", str(tmp_path), str(pair)
    )
    assert "the policy teacher has the teacher write, so the teacher must be one whole model" in told


def test_the_estimate_counts_two_layers_of_an_offloaded_teacher_on_an_accelerator(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of main memory alone the layers take what they take anyway."""
    on_cpu = [estimate(recipe(pair, tmp_path / "run", where)) for where in ("device", "offloaded")]
    assert on_cpu[0].teacher == on_cpu[1].teacher and on_cpu[1].offloaded == 0
    layers = list(tiny_llama(1, layers=3).get_decoder().layers)
    tiny_llama(1, layers=3).save_pretrained(tmp_path / "deep")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "deep" / name).write_bytes((pair / "teacher" / name).read_bytes())
    one = sum(p.numel() * 4 for p in layers[0].parameters())
    deep = {"model": str(tmp_path / "deep")}
    content = json.loads(recipe(pair, tmp_path / "run", "device").model_dump_json(exclude_none=True))
    content["training"]["precision"] = "fp32"
    whole = estimate(recipe_from({**content, "teacher": deep}), device="cuda")
    apart = estimate(recipe_from({**content, "teacher": {**deep, "placement": "offloaded"}}), device="cuda")
    assert apart.teacher == whole.teacher - one and apart.offloaded == 3 * one  # one at work, one on its way
    assert apart.total == sum(v for k, v in vars(apart).items() if k not in ("saved", "offloaded"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    sharded = estimate(recipe_from({**content, "teacher": {**deep, "placement": "sharded"}}), device="cuda")
    assert (
        sharded.teacher == whole.teacher - one and sharded.offloaded == 0
    )  # a third of three, and one whole
