"""What test_compiled.py runs in a process of its own: the shape checks of the tests' annotations cannot be compiled."""

from __future__ import annotations

import os

import torch
from torch._inductor import config as inductor

from numerics.test_oracle import compiled_by_torch
from selectkd import LiveRows, Objective
from selectkd.loss import block_compiled as compiled
from selectkd.loss import block_eager as dense
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.head import Head

ROWS = 8
N = 2 * ROWS + 3
"""Two whole blocks, which are compiled, and three rows more, which are not."""


# divergence, verifier, dtype, vocabulary (small, of whole pieces, of pieces and a rest), case, settings
CASES = [
    ("forward_kl", "greedy_topk", torch.float32, 40, {}, {}),
    ("forward_kl", "spec_k", torch.bfloat16, 128, {}, {"also_kl": True}),
    (
        "generalized_jsd",
        "greedy_topk",
        torch.float32,
        1100,
        {"unshared": 5, "broken": True},
        {"also_kl": True},
    ),
    ("reverse_kl", "greedy_topk", torch.float32, 192, {"loud": 60.0}, {}),
    (
        "skew_reverse_kl",
        "label_top_k",
        torch.float32,
        40,
        {"bias": True, "softcap": 5.0},
        {"temperature": 2.0},
    ),
    ("total_variation", "teacher_entropy", torch.float64, 40, {}, {}),
]


def case(dtype, v, *, softcap=None, bias=False, unshared=0, broken=False, loud=1.0):
    seed = torch.Generator().manual_seed(1)
    states = [torch.randn(*shape, generator=seed) for shape in ((N, 8), (v, 8), (N, 12), (v, 12))]
    hidden, head, teacher, teacher_head = (x.to(dtype) for x in states)
    if broken:
        teacher[3] = torch.nan
    hidden[5] *= loud  # its log-sum-exp is out of the ordinary
    of = torch.randn(v, generator=seed).to(dtype) if bias else None
    shared = torch.arange(v) >= unshared if unshared else None
    return hidden, head, of, LiveRows(teacher, teacher_head, shared=shared), softcap


def outcome(parts, divergence, verifier, *, compiled, **settings):
    hidden, head, bias, teacher, softcap = parts
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    objective = Objective(divergence, verifier, beta=0.3)
    uniform = torch.rand(N, objective.uniforms_per_token, generator=torch.Generator().manual_seed(2))
    student = Head(head, bias, 1.0 if bias is None else 1.5, softcap)
    loss, sums = distillation_loss(
        hidden, student, teacher, objective, uniform,
        labels=torch.arange(N) % len(head), compiled=compiled, **settings,
    )  # fmt: skip
    loss.backward()
    gradients = [hidden.grad, head.grad] + ([] if bias is None else [bias.grad])
    return loss.detach(), sums, gradients


def close(name, found, plain, tolerance):
    torch.testing.assert_close(found, plain, **tolerance, msg=lambda text: f"{name}: {text}")


def main() -> None:
    program, calls = compiled.program, []
    compiled.program = lambda plan: calls.append(plan) or program(plan)
    for divergence, verifier, dtype, vocabulary, shape, settings in CASES:
        calls.clear()
        dense.BLOCK_ENTRIES = ROWS * vocabulary + 1
        parts = case(dtype, vocabulary, **shape)
        plain = outcome(parts, divergence, verifier, compiled=False, **settings)
        assert not calls
        found = outcome(parts, divergence, verifier, compiled=True, **settings)
        again = len({"broken", "loud"} & {*shape})  # a block whose first program does not hold
        assert len(calls) == N // ROWS + again and len(set(calls)) == 1 + again
        exact = {"rtol": 1e-5, "atol": 1e-6}
        tolerance = exact if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-3}
        name = f"{divergence}, {verifier}"
        close(name, found[0], plain[0], exact)
        for key in plain[1]:
            close(f"{name}, {key}", found[1][key], plain[1][key], exact)
        for ours, theirs in zip(found[2], plain[2], strict=True):
            close(name, ours, theirs, tolerance)
        print("equal:", name, flush=True)
    compiled_by_torch()


if __name__ == "__main__":
    inductor.cpp.cxx = (None, os.environ["CXX"])  # torch may have been imported when the name was another
    inductor.compile_threads = 1  # more are processes that import torch
    print("can compile:", compiled.can_compile(), flush=True)
    main()
