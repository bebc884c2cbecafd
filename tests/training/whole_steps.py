"""Every verifier, selector, extra, reduction and language-modelling loss as a case of one optimizer step.

``test_whole_steps`` runs each as one micro-batch and as eight; as a program of its own this file runs them on one of
two ranks and writes what they gave.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from selectkd.objective import Objective
from selectkd.registry import parameters
from selectkd.selectors import SELECTORS
from selectkd.teachers import LiveTeacher
from selectkd.terms import EXTRAS, StreamSpec
from selectkd.training.counts import REDUCTIONS
from selectkd.training.feed import Feed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import wrapped_for
from selectkd.training.step import DistillationModel
from selectkd.verifiers import VERIFIERS
from training.tiny import padded, texts, tiny_llama

EXAMPLES = texts(8, seed=3)
OF_EXTRA = {"adaptive_alpha": "skew_kl", "policy_gradient": "reverse_kl"}
"""The divergence an extra is for, where it is for one."""


def judge(name: str) -> Any:
    """A verifier or selector by name, with a k that rejects some rows of the tiny pair."""
    made = {**VERIFIERS, **SELECTORS}[name]
    return made(k=9) if "k" in parameters(made) else made()


def extra(name: str) -> Any:
    made = EXTRAS[name]()
    if name == "adaptive_alpha":  # as if its window were over
        made.window, made.anchor = 1, {"skew_kl": 0.01, "skew_reverse_kl": 0.01}
    return made


def ledger(divergence: str, verifier: Any, reduction: str, **given: Any) -> Ledger:
    made = Ledger(Objective(divergence, verifier, beta=0.1), reduction, streams=("a", "b"), **given)
    made.step = 1
    return made


def cases() -> dict[str, Callable[[], Ledger]]:
    """name -> a ledger of its own. Generated from the registries: a new entry of one is a new case here."""
    made: dict[str, Callable[[], Ledger]] = {}
    for reduction in REDUCTIONS:
        for name in (*VERIFIERS, *SELECTORS):
            made[f"{name}, {reduction}"] = lambda n=name, r=reduction: ledger("forward_kl", judge(n), r)
            if reduction != "weight_mean" and name != "greedy_topk":
                continue  # the loss beside it meets the verifier's weights there alone
            made[f"{name}, {reduction}, language"] = lambda n=name, r=reduction: ledger(
                "forward_kl",
                judge(n),
                r,
                losses=[StreamSpec(language_model=0.5), StreamSpec(weight=(2.0, 2.0, 1.0))],
            )
        for name in EXTRAS:
            made[f"{name}, {reduction}"] = lambda n=name, r=reduction: ledger(
                OF_EXTRA.get(n, "forward_kl"), judge("greedy_topk"), r, extras=[extra(n)],
                losses=[StreamSpec(language_model=0.5), StreamSpec()],
            )  # fmt: skip
    for name in SELECTORS:
        made[f"{name} beside matched_shuffle"] = lambda n=name: ledger(
            "forward_kl", judge("matched_shuffle"), "token_mean",
            losses=[StreamSpec(selector=SELECTORS[n](share=0.5)), StreamSpec()],
        )  # fmt: skip
        made[f"{name} of each sequence"] = lambda n=name: ledger(
            "forward_kl", SELECTORS[n](share=0.5, scope="sequence"), "token_mean"
        )
        made[f"{name} beside every extra"] = lambda n=name: ledger(
            "skew_kl",
            SELECTORS[n](share=0.5),
            "weight_mean",
            extras=[extra(one) for one in EXTRAS if one != "atkd"],
        )
    return made


def model() -> tuple[nn.Module, DistillationModel]:
    """(student, its loss) in fp64: two rows as good as equal in fp32 would rank differently from batch to batch."""
    student, teacher, reference = (
        tiny_llama(seed, layers=1, hidden=16, dtype=torch.float64) for seed in (2, 1, 5)
    )
    held = LiveTeacher(teacher, reference=LiveTeacher(reference))
    return student, DistillationModel(student, held).train()


def step_of(book: Ledger, micro: Sequence[Any], student: nn.Module, loss_of: nn.Module) -> Tensor:
    """The loss and the whole gradient of one optimizer step, one vector."""
    student.zero_grad(set_to_none=True)

    @torch.no_grad()
    def ask(portion: Any, first: Any) -> Any:
        return loss_of(portion.batch, portion.row_scale, portion.uniform, first)

    for portion in book.begin(micro, ask):
        apart = hasattr(loss_of, "no_sync") and not portion.last
        with loss_of.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            loss, sums = loss_of(portion.batch, portion.row_scale, portion.uniform, portion.plan)
            loss.backward()
        book.add(portion, loss, sums)
    total = book.settle(student.parameters())
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return torch.cat([total.reshape(1), *gradients]).detach()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "meeting"), 2), rank=rank, world_size=2)
    student, own = model()
    wrapped = wrapped_for(own, "cpu")
    found = {}
    for name, made in cases().items():
        micro = next(Feed(lambda epoch: padded(EXAMPLES, 1)).steps(4))
        found[name] = step_of(made(), micro, student, wrapped)
    save_file(found, folder / f"{rank}.safetensors")
    del wrapped
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
