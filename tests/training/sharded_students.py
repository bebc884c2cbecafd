"""Runs of a student in parts over two ranks (FSDP2, gloo) as they are and as recipes of one process; what is refused.

torchrun --nproc-per-node 2 sharded_students.py FOLDER PAIR
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel

from faults.two_rank_runs import StopsAt
from selectkd.config import Recipe, recipe_from
from selectkd.errors import ConfigError, IntegrityError, Preempted
from selectkd.models.head import unwrapped
from selectkd.training.run import train
from training.tiny import VOCABULARY, recipe_of, tiny_llama, tiny_tokenizer, write_pair

GREEDY, SPEC_K = {"name": "greedy_topk", "k": 5}, {"name": "spec_k", "k": 2}
LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
BF16 = {"precision": "bf16"}
LATER = {"evaluate_every": 1, "early_stopping": {"patience": 1}}
CASES: dict[str, dict[str, Any]] = {
    "full, greedy, tied": {"verifier": GREEDY, "reduction": "weight_mean", "accumulation": 2},
    "full, spec-k, untied, both sharded": {
        "verifier": SPEC_K, "reduction": "token_mean", "student": "untied", "teacher": True,
        "accumulation": 2, "more": {"gradient_checkpointing": True},
    },
    "LoRA, greedy, untied, both sharded": {"verifier": GREEDY, "student": "untied", "teacher": True, "lora": LORA},
    "LoRA, spec-k, tied": {"verifier": SPEC_K, "lora": LORA, "accumulation": 2},
    "rollouts, early stopping": {"verifier": SPEC_K, "policy": {"name": "student"}, "more": LATER},
    "bf16, rows of a step ranked, files in parts": {
        "selector": {"name": "se_kd"}, "student": "in files", "accumulation": 2, "more": BF16,
    },
    "bf16, LoRA, rows of a step ranked, loop, both sharded": {
        "selector": {"name": "se_kd"}, "lora": LORA, "teacher": True, "accumulation": 2, "more": BF16,
    },
}  # fmt: skip
STOPPED = ("full, greedy, tied", "LoRA, spec-k, tied")


def write_models(root: Path) -> Path:
    """The tiny pair, a student with a head of its own, and one without a list of layers."""
    write_pair(root, tiny_llama(1))
    untied = tiny_llama(3)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().flip(0))
    flat = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=8,
            n_layer=1,
            n_head=1,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for name, model, size in (("untied", untied, "1GB"), ("in files", untied, "20KB"), ("gpt2", flat, "1GB")):
        model.save_pretrained(root / name, max_shard_size=size)
        tiny_tokenizer().save_pretrained(root / name)
    shutil.copytree(root / "in files", root / "damaged")
    largest = max((root / "damaged").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    return root


def recipe(
    pair: Path,
    run: Path,
    case: dict[str, Any],
    *,
    ranks: int = 1,
    sharding: dict[str, Any] | None = None,
) -> Recipe:
    """Six steps of a case; on one process with as many micro-batches a step as ``ranks`` take together."""
    written = {"policy": case["policy"], "max_new_tokens": 4} if "policy" in case else {}
    content = recipe_of(
        pair,
        data={"evaluation": 0.25, **written},
        objective={
            **{judge: case[judge] for judge in ("verifier", "selector") if judge in case},
            "beta": {"start": 0.5, "end": 0.1, "until_tar": 0.9},
            "reduction": case.get("reduction", "sequence_mean"),
        },
        training={
            "output_dir": str(run),
            "max_steps": 6,
            "batch_size": 3,
            "gradient_accumulation": case.get("accumulation", 1) * ranks,
            "learning_rate": 1e-3,
            "max_length": 32,
            "max_prompt_length": 16,
            "evaluate_every": 3,
            "save_every": 2,
            "lora": case.get("lora"),
            "sharding": sharding,
            **case.get("more", {}),
        },
    )
    content["student"]["model"] = str(pair / case.get("student", "student"))
    content["teacher"]["placement"] = "sharded" if sharding is not None and case.get("teacher") else "device"
    return recipe_from(content)


def check_parts(made: Any, case: dict[str, Any]) -> None:
    """Every weight of a sharded model lies in parts, half of it here, and only adapters are whole."""
    models = [made.student, *([made.teacher.model] if case.get("teacher") else [])]
    for model in models:
        assert isinstance(unwrapped(model), FSDPModule)
        whole, here = 0, 0
        for name, parameter in model.named_parameters():
            if "lora" in name:
                assert not isinstance(parameter, DTensor)
            else:
                assert isinstance(parameter, DTensor), name
                whole, here = whole + parameter.numel(), here + parameter.to_local().numel()
        assert here * 2 == whole


def refused(pair: Path, run: Path, **changed: Any) -> None:
    case = {"verifier": GREEDY, **{k: v for k, v in changed.items() if k != "sharding"}}
    try:
        train(recipe(pair, run, case, sharding=changed["sharding"]))
    except (ConfigError, IntegrityError) as error:
        print("refused:", error)
    dist.barrier()  # rank 0 takes the folder away
    assert not run.exists()


def main(folder: Path, pair: Path) -> None:
    for name, case in CASES.items():
        made: list[Any] = []
        train(recipe(pair, folder / name, case, sharding={}), on_assembled=made.append)
        check_parts(made[0], case)
    for name in STOPPED:
        stops = recipe(pair, folder / f"{name}, stopped", CASES[name], sharding={})
        steps = 3
        hook = register_optimizer_step_post_hook(StopsAt(steps if dist.get_rank() == 1 else -1))
        try:
            train(stops)
            raise SystemExit("the stop was not heard")
        except Preempted:
            hook.remove()
        dist.barrier()
        assert train(stops).resumed_from == steps
    refused(pair, folder / "refused", sharding={"fsdp": 3})
    refused(pair, folder / "refused", sharding={"replicate": 2})
    refused(pair, folder / "refused", sharding={"fsdp": 2, "replicate": 2})
    refused(pair, folder / "refused", sharding={}, student="gpt2")
    refused(pair, folder / "refused", sharding={}, student="damaged")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
