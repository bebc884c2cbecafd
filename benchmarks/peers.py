"""The same loss in other people's packages: what each one offers, and how to call it as its own trainer does.

n rows, v vocabulary, K stored tokens. A loss is (student hidden [n, d], student head [v, d], teacher hidden [n, e],
teacher head [v, e]) -> the mean over rows, differentiable in the first two; for a cached teacher the last two are ids
[n, K] and their log-probabilities [n, K]. Nothing is imported before a peer is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}
"""The beta that GKD's family of losses gives each divergence; .5 is selectkd's default, too."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss. ``load`` turns a divergence it ``offers`` into a Loss, and imports the package.

    quick: whether ``--quick`` measures it; the variants it leaves out are named in the output.
    """

    name: str
    package: str
    load: Callable[[str], Loss]
    offers: tuple[str, ...] = tuple(BETAS)
    compiled: bool = False
    quick: bool = True

    @property
    def version(self) -> str:
        """The installed version of the package, or "" if there is none."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""

    def absence(self) -> str | None:
        """Why the peer cannot be measured here, in one line; None if it can."""
        if not self.version:
            return f"{self.package} is not installed"
        try:
            self.load(self.offers[0])
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            return f"{self.package} {self.version} cannot be imported: {type(error).__name__}: {first}"
        return None


def trl_gkd(divergence: str, *, compiled: bool = False) -> Loss:
    """TRL's GKD: both models' whole logits, every row a completion token."""
    function: Any = importlib.import_module("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    if compiled:
        function = torch.compile(function)
    beta = BETAS[divergence]

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = linear(teacher, teacher_head)[None]  # [1, n, v]
        labels = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return function(linear(hidden, head)[None], theirs, labels=labels, beta=beta)

    return loss


def trl_chunked(divergence: str) -> Loss:
    """The chunked loss of TRL's DistillationTrainer; without Triton it runs its PyTorch fallback."""
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    beta = BETAS[divergence]

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        mask = torch.ones(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return function(hidden[None], teacher[None], head, teacher_head, mask, beta)[0]

    return loss


def liger(divergence: str, *, chunk: int, compiled: bool = False) -> Loss:
    """Liger's fused linear JSD without its cross-entropy."""
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[divergence],
        compiled=compiled,
        chunk_size=chunk,
    )

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
        return module(hidden, head, teacher, teacher_head, labels)

    return loss


def torchtune_losses() -> Any:
    """torchtune's file of distillation losses alone: the package refuses to be imported without torchao, which they
    do not use."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        raise ImportError("torchtune has no folder")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchtune(divergence: str) -> Loss:
    """torchtune's KL losses on whole logits."""
    names = {"forward_kl": "ForwardKLLoss", "reverse_kl": "ReverseKLLoss"}
    module = getattr(torchtune_losses(), names[divergence])()

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = linear(teacher, teacher_head)
        return module(
            linear(hidden, head), theirs, torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
        )

    return loss


def torchtune_chunked(divergence: str) -> Loss:
    """torchtune's KL losses on lists of 8 chunks of logits, as its recipes call them."""
    names = {"forward_kl": "ForwardKLWithChunkedOutputLoss", "reverse_kl": "ReverseKLWithChunkedOutputLoss"}
    module = getattr(torchtune_losses(), names[divergence])()
    chunks = module.num_output_chunks

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = [
                linear(part[None], teacher_head) for part in teacher.chunk(chunks)
            ]  # [1, n / 8, v] each
        ours = [linear(part[None], head) for part in hidden.chunk(chunks)]
        labels = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return module(ours, theirs, labels)

    return loss


def ms_swift(divergence: str) -> Loss:
    """ms-swift's GKD loss on whole logits, divided by its own count of rows."""
    module = importlib.import_module("swift.rlhf_trainers.gkd_loss")
    beta = BETAS[divergence]

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        labels = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        with torch.no_grad():
            theirs = module.TeacherOutput(full_logits=linear(teacher, teacher_head)[None], labels=labels)
        total, count = module.gkd_loss(linear(hidden, head)[None], theirs, labels, beta, 1.0)
        return total / count

    return loss


def distillkit(divergence: str) -> Loss:
    """DistillKit's dense KL on whole logits; it offers no other direction."""
    function = importlib.import_module("distillkit.lossfuncs.kl").dense_kl_div

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        n = hidden.shape[0]
        with torch.no_grad():
            theirs = linear(teacher, teacher_head)[None]
        return function(linear(hidden, head)[None], theirs, mask=torch.ones(1, n, device=hidden.device)) / n

    return loss


def axolotl_module(name: str) -> Any:
    """A file of axolotl's distillation without the rest of the package, whose own imports need an accelerator."""
    root = Path(str(metadata.distribution("axolotl").locate_file("axolotl")))
    for package in (
        "",
        ".integrations",
        ".integrations.kd",
        ".integrations.kd.kernels",
        ".integrations.kd.topk_logprob",
    ):
        bare = ModuleType(f"axolotl{package}")
        bare.__path__ = [str(root.joinpath(*package.split(".")))]
        sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(f"axolotl.integrations.kd.{name}")


def axolotl_top_k(divergence: str) -> Loss:
    """axolotl's KL on the stored tokens and the student's whole logits; the tail of both is left out."""
    function = axolotl_module("topk_logprob.forward_kl").loss

    def loss(hidden: Tensor, head: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
        mask = torch.ones_like(ids)[None]
        return function(linear(hidden, head)[None], ids[None], logp[None], mask, hidden.shape[0])

    return loss


def axolotl_fused(divergence: str, *, compiled: bool = False) -> Loss:
    """axolotl's chunked KL on the stored tokens, on Liger's base class, without its cross-entropy."""
    module = axolotl_module("kernels.liger").LigerFusedLinearKLTopKLogprobLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, compute_ce_loss=False,
        normalize_topk=False,
    )  # fmt: skip

    def loss(hidden: Tensor, head: Tensor, ids: Tensor, logp: Tensor) -> Tensor:
        labels = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        total = module(head, hidden[None], ids[None], logp[None], torch.ones_like(ids)[None], labels)
        return total / hidden.shape[0]

    return loss


def with_options(load: Callable[..., Loss], **options: Any) -> Callable[[str], Loss]:
    """``load`` with some options fixed."""
    return lambda divergence: load(divergence, **options)


KL_ONLY = ("forward_kl", "reverse_kl")
PEERS = (
    Peer("trl_gkd", "trl", trl_gkd),
    Peer("trl_chunked", "trl", trl_chunked),
    Peer("liger_256", "liger-kernel", with_options(liger, chunk=256)),
    Peer("liger_1024", "liger-kernel", with_options(liger, chunk=1024), quick=False),
    Peer("torchtune", "torchtune", torchtune, KL_ONLY),
    Peer("torchtune_chunked", "torchtune", torchtune_chunked, KL_ONLY, quick=False),
    Peer("ms_swift", "ms-swift", ms_swift, quick=False),
    Peer("distillkit", "distillkit", distillkit, ("forward_kl",)),
    Peer("trl_gkd_compiled", "trl", with_options(trl_gkd, compiled=True), compiled=True, quick=False),
    Peer(
        "liger_256_compiled",
        "liger-kernel",
        with_options(liger, chunk=256, compiled=True),
        compiled=True,
        quick=False,
    ),
    Peer(
        "liger_1024_compiled",
        "liger-kernel",
        with_options(liger, chunk=1024, compiled=True),
        compiled=True,
        quick=False,
    ),
)
"""Every peer, absent ones included: the benchmark lists what it cannot measure."""
TOP_K_PEERS = (
    Peer("axolotl", "axolotl", axolotl_top_k, ("forward_kl",)),
    Peer("axolotl_fused", "axolotl", axolotl_fused, ("forward_kl",)),
    Peer(
        "axolotl_fused_compiled",
        "axolotl",
        with_options(axolotl_fused, compiled=True),
        ("forward_kl",),
        compiled=True,
        quick=False,
    ),
    Peer("distillkit", "distillkit", distillkit, ("forward_kl",)),
)
"""The peers with a loss on a teacher's K stored tokens."""
