"""What test_compiled.py runs in a process of its own: the shape checks of the tests' annotations cannot be compiled."""

from __future__ import annotations

import torch

from selectkd import LiveRows, Objective, compiled, dense
from selectkd.distill import distillation_loss
from selectkd.rows import Head

N, V = 2 * dense.ROWS_AT_ONCE + 3, 40
"""Two whole blocks, which are compiled, and three rows more, which are not."""


CASES = [
    ("forward_kl", "greedy_topk", torch.float32, {}, {}),
    ("forward_kl", "spec_k", torch.bfloat16, {}, {"also_kl": True}),
    ("generalized_jsd", "greedy_topk", torch.float32, {"unshared": 5, "broken": True}, {"also_kl": True}),
    ("skew_reverse_kl", "label_top_k", torch.float32, {"bias": True, "softcap": 5.0}, {"temperature": 2.0}),
    ("total_variation", "teacher_entropy", torch.float64, {}, {}),
]


def case(dtype, *, softcap=None, bias=False, unshared=0, broken=False):
    seed = torch.Generator().manual_seed(1)
    states = [torch.randn(*shape, generator=seed) for shape in ((N, 8), (V, 8), (N, 12), (V, 12))]
    hidden, head, teacher, teacher_head = (x.to(dtype) for x in states)
    if broken:
        teacher[3] = torch.nan
    of = torch.randn(V, generator=seed).to(dtype) if bias else None
    shared = torch.arange(V) >= unshared if unshared else None
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
        labels=torch.arange(N) % V, compiled=compiled, **settings,
    )  # fmt: skip
    loss.backward()
    gradients = [hidden.grad, head.grad] + ([] if bias is None else [bias.grad])
    return loss.detach(), sums, gradients


def close(name, found, plain, tolerance):
    torch.testing.assert_close(found, plain, **tolerance, msg=lambda text: f"{name}: {text}")


def main() -> None:
    # as if the caches held less than a row, so that a block has ROWS_AT_ONCE rows
    dense.level_two_bytes = lambda: V
    program, calls = compiled.program, []
    compiled.program = lambda plan: calls.append(plan) or program(plan)
    for divergence, verifier, dtype, shape, settings in CASES:
        calls.clear()
        parts = case(dtype, **shape)
        plain = outcome(parts, divergence, verifier, compiled=False, **settings)
        assert not calls
        found = outcome(parts, divergence, verifier, compiled=True, **settings)
        assert len(calls) == N // dense.ROWS_AT_ONCE and len(set(calls)) == 1
        exact = {"rtol": 1e-5, "atol": 1e-6}
        tolerance = exact if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-3}
        name = f"{divergence}, {verifier}"
        close(name, found[0], plain[0], exact)
        for key in plain[1]:
            close(f"{name}, {key}", found[1][key], plain[1][key], exact)
        for ours, theirs in zip(found[2], plain[2], strict=True):
            close(name, ours, theirs, tolerance)
        print("equal:", name, flush=True)


if __name__ == "__main__":
    main()
