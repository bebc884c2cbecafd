"""Teachers on one of two ranks (gloo): a student's own base with its adapters off, and layers sharded over the ranks.

torchrun --nproc-per-node 2 two_rank_teachers.py adapters|fsdp|sharded|writes FOLDER [PAIR]
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from faults.tiny_run import recipe_for
from selectkd import Objective
from selectkd.config import Recipe, recipe_from
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.models.lora import add_lora
from selectkd.teachers.adapters_off import AdaptersOffTeacher
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.counts import count, row_scale
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama


def recipe(pair: Path, run: Path, teacher: dict[str, Any], **more: Any) -> Recipe:
    content = recipe_for(pair, run, accumulation=2, **more).model_dump(mode="json", exclude_none=True)
    objective = {**content["objective"], "language_model": 1.0}
    return recipe_from({**content, "teacher": teacher, "objective": objective})


def adapters(folder: Path, pair: Path) -> None:
    for name, teacher in (("own", {"adapters_off": True}), ("copy", {"model": str(pair / "student")})):
        result = train(recipe(pair, folder / name, teacher, lora=True))
        assert result.skipped == 0 and result.steps == 6, result


def sharded(folder: Path, pair: Path) -> None:
    for placement in ("device", "sharded"):
        teacher = {"model": str(pair / "teacher"), "placement": placement}
        seen: list[Any] = []
        train(recipe(pair, folder / placement, teacher), on_assembled=seen.append)
        model = seen[0].teacher.model
        inside = list(model.parameters())
        assert all(isinstance(p, DTensor) for p in inside) == (placement == "sharded")
        if placement == "sharded":
            whole_model = sum(p.numel() for p in inside)
            mine = sum(p.to_local().numel() for p in inside)
            assert mine == whole_model // 2, (mine, whole_model)
        assert not isinstance(seen[0].teacher.head.weight, DTensor)


def fsdp(folder: Path) -> None:
    """Four steps of a sharded LoRA student, its adapters apart from zero, beside the gradient of a whole one."""
    rank = dist.get_rank()
    micro = padded(texts(4), 2)[rank]
    seen = supervised(micro)
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 5}, beta=0.5)
    found = []
    for shard in (False, True):
        torch.manual_seed(7)
        student: Any = add_lora(tiny_llama(3), r=4, alpha=8, dropout=0.0)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        teacher = AdaptersOffTeacher(student)
        model = DistillationModel(student, teacher).train()
        if shard:
            for layer in student.get_base_model().get_decoder().layers:
                fully_shard(layer)
            fully_shard(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            scale = row_scale(seen, count([seen]), "token_mean")
            loss, _ = model(micro, scale, torch.empty(len(seen.position), 0), objective)
            loss.backward()
            if not shard:
                for parameter in trained:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= 2
            optimizer.step()
            losses.append(loss.detach())
        found.append([torch.stack(losses), *(whole(p) for p in trained)])
    assert found[0][0][0] > 0 and len(found[0]) == len(found[1]) > 1
    for plain, parted in zip(*found, strict=True):
        torch.testing.assert_close(parted, plain, rtol=1e-4, atol=1e-6)
    if rank == 0:
        print("adapters off in a sharded student: as in a whole one")


def writes(folder: Path, pair: Path) -> None:
    teacher = {"model": str(pair / "teacher"), "placement": "sharded"}
    content = recipe(pair, folder / "run", teacher).model_dump(mode="json", exclude_none=True)
    content["data"] = {**content["data"], "policy": {"name": "teacher"}, "max_new_tokens": 4}
    try:
        train(recipe_from(content))
    except ConfigError as error:
        print(error)


def rows() -> None:
    """A sharded teacher's rows are those of a whole one, to the bit: what is gathered is what was cut."""
    micro = padded(texts(4), 2)[dist.get_rank()]
    position = supervised(micro).position
    one = LiveTeacher(tiny_llama(1), placement="sharded")
    other = LiveTeacher(tiny_llama(1))
    for _ in range(2):
        assert torch.equal(one(micro, position).hidden, other(micro, position).hidden)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "fsdp":
        dist.init_process_group("gloo")
        fsdp(where)
    elif what == "adapters":
        adapters(where, Path(sys.argv[3]))
    elif what == "writes":
        writes(where, Path(sys.argv[3]))
    else:
        sharded(where, Path(sys.argv[3]))
        rows()
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
