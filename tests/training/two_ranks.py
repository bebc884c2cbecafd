"""One optimizer step on one of two ranks, replicated (DDP) or sharded (FSDP2); writes the loss and gradients it ends
with.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from selectkd.models.sharded import CAN_SHARD, Spread, shard, whole
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts

KINDS = ("ddp", "fsdp") if CAN_SHARD else ("ddp",)


def main(folder: Path, reductions: list[str]) -> None:
    dist.init_process_group("gloo")
    for reduction in reductions:
        for kind in KINDS:
            one_step(dist.get_rank(), folder, reduction, kind)
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.barrier()
    dist.destroy_process_group()


def one_step(rank: int, folder: Path, reduction: str, kind: str) -> None:
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    if kind == "fsdp":
        student = shard(student, Spread(2))
    own = DistillationModel(student, LiveTeacher(teacher)).train()
    model = own if kind == "fsdp" else DistributedDataParallel(own)
    ledger = Ledger(
        Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.1), reduction, streams=("a", "b")
    )
    micro = next(BatchFeed(lambda epoch: padded(texts(7), 2)).steps(2))
    for micro_batch in ledger.begin(micro):
        with contextlib.nullcontext() if micro_batch.last else model.no_sync():
            loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.now)
            loss.backward()
        ledger.add(micro_batch, loss, sums)
    own.finish_gradient()
    total = ledger.reduce(student.parameters())
    gradients = {name: whole(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    save_file({**gradients, "loss": total.float()}, folder / f"{reduction}-{kind}-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
