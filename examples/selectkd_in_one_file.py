"""SelecTKD in one file: the method of arXiv 2510.24021 on a tiny pair, with nothing but torch and transformers.

The student proposes a token at each position, the teacher verifies it, and the divergence of a rejected token counts
beta instead of 1. Written to be read: whole logits, plain formulas, no chunks. The library is tested equal to it,
step by step (tests/equivalence/test_one_file.py). Run it: python examples/selectkd_in_one_file.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

K = 5  # rank window of the greedy verifier, number of trials of the other; the paper's default for both
BETA = 0.01  # weight of a rejected token; the paper's default


# ---------------------------------------------------------------- 1. verification: does the teacher accept?


def greedy_topk(p: Tensor, q: Tensor, k: int = K) -> Tensor:
    """Variant A. The student proposes its argmax; accept if it is among the teacher's k best: [n] of 0 and 1."""
    proposal = q.argmax(-1, keepdim=True)  # [n, 1]
    better = (p > p.gather(-1, proposal)).sum(-1)  # tokens the teacher prefers to the proposal
    return (better < k).to(p.dtype)


def spec_k(p: Tensor, q: Tensor, draws: Tensor, tests: Tensor) -> Tensor:
    """Variant B, word for word. k draws y ~ q, each passes if r < min(1, p(y) / q(y)); accept if any passes.

    draws, tests: [n, k] uniform numbers; a draw is made by inverting the cumulative distribution.
    """
    cumulative = q.cumsum(-1)
    y = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(
        max=q.shape[-1] - 1
    )  # [n, k]
    ratio = p.gather(-1, y) / q.gather(-1, y)
    return (tests < ratio.clamp(max=1.0)).any(-1).to(p.dtype)


# ---------------------------------------------------------------- 2. the loss


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """sum_v p log(p / q): [n]."""
    return (logp.exp() * (logp - logq)).sum(-1)


def selectkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, supervised: Tensor, uniform: Tensor | None = None
) -> tuple[Tensor, float]:
    """Equation 4 with both reductions: a mean over each sequence's supervised tokens, then over the sequences.

    logits [b, t, v]; supervised [b, t]: whether token i is one to learn (a completion token). The shift happens
    here: the logits at position i predict token i + 1. uniform [n, 2k]: given, the verifier is spec-k, else greedy.
    Returns the loss and TAR, the token acceptance rate.
    """
    learn = supervised[:, 1:]  # [b, t - 1]
    logq = torch.log_softmax(student_logits[:, :-1][learn], -1)  # [n, v]
    logp = torch.log_softmax(teacher_logits[:, :-1][learn], -1)
    with torch.no_grad():  # the weight carries no gradient
        p, q = logp.exp(), logq.exp()
        accepted = greedy_topk(p, q) if uniform is None else spec_k(p, q, *uniform.to(p.dtype).split(K, -1))
        weight = BETA + (1 - BETA) * accepted  # [n]
    lengths = learn.sum(-1)  # |y| of each sequence
    row_scale = (1 / (lengths.to(logq.dtype) * len(lengths)))[learn.nonzero()[:, 0]]  # [n]
    loss = (row_scale * weight * forward_kl(logp, logq)).sum()
    return loss, float((row_scale * accepted).sum())


# ---------------------------------------------------------------- 3. a run


def train(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    learning_rate: float,
) -> list[tuple[float, float]]:
    """One AdamW step for each batch {input_ids, supervised}; the losses and TARs on the way."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    history = []
    for batch in batches:
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch["input_ids"]).logits
        student_logits = student(input_ids=batch["input_ids"]).logits
        loss, tar = selectkd_loss(student_logits, teacher_logits, batch["supervised"], batch.get("uniform"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), tar))
    return history


def tiny_pair(seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A random four-layer Llama as teacher, and the student that is its first two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    teacher = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4, initializer_range=0.3)).eval()
    student = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, initializer_range=0.3))
    student.model.embed_tokens = copy.deepcopy(teacher.model.embed_tokens)
    student.model.norm, student.lm_head = copy.deepcopy(teacher.model.norm), copy.deepcopy(teacher.lm_head)
    student.model.layers = copy.deepcopy(teacher.model.layers[:2])
    return student, teacher


def random_batches(
    steps: int, *, size: int = 4, length: int = 16, prompt: int = 5
) -> list[dict[str, Tensor]]:
    """Random token ids; the first ``prompt`` tokens of a sequence are not learned."""
    generator = torch.Generator().manual_seed(1)
    supervised = torch.ones(size, length, dtype=torch.bool)
    supervised[:, :prompt] = False
    ids = [torch.randint(0, 64, (size, length), generator=generator) for _ in range(steps)]
    return [{"input_ids": i, "supervised": supervised} for i in ids]


if __name__ == "__main__":
    pair = tiny_pair()
    for step, (loss, tar) in enumerate(train(*pair, random_batches(40), learning_rate=3e-3)):
        if step % 8 == 0:
            print(f"step {step:3d}  loss {loss:.4f}  TAR {tar:.3f}")
