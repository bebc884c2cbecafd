"""Value and gradient of every divergence, by every way through the loss, against 60 digits.

Rows from p = q to an overlap of 1e-12, logits of deviation 1 to 32, dead vocabulary rows beside logits shifted by
+-3e4, and tokens that one model's bias forbids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from numerics.oracle import VALUES, value_and_gradient
from selectkd import CachedRows, Head, LiveRows, Objective
from selectkd.loss import block_compiled as compiled
from selectkd.loss import block_eager as dense
from selectkd.loss.block_compiled import plan_of
from selectkd.loss.distillation import distillation_loss
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.divergences.closed_form import closed_form_of

V = 9
OVERLAPS = (1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.7)
DEVIATIONS = (1.0, 4.0, 16.0, 32.0)
TOLERANCE = 1e-9
"""Relative to the divergence, and to the largest entry of its gradient."""
ROUNDING = 64 * torch.finfo(torch.float64).eps
"""What may be lost beside it, over the size of what is summed, 1 or the divergence: entries of a gradient are
differences, and where all of them are near 0 (a one-hot student), no sum in fp64 keeps nine digits."""


def rows() -> tuple[Tensor, Tensor]:
    """Teacher's and student's logits [n, V] in fp64."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for overlap in OVERLAPS:
        z = torch.randn(2, V, generator=generator, dtype=torch.float64)
        apart = -math.log(overlap)
        z[0, : V // 2] += apart
        z[1, V // 2 :] += apart
        pairs.append(z)
    for deviation in DEVIATIONS:
        pairs.append(deviation * torch.randn(2, V, generator=generator, dtype=torch.float64))
    for apart in (1e-2, 1e-4):
        z = torch.randn(1, V, generator=generator, dtype=torch.float64)
        pairs.append(torch.cat([z, z + apart * torch.randn(1, V, generator=generator, dtype=torch.float64)]))
    both = torch.stack(pairs, 1)
    return both[0], both[1]


@cache
def truth(name: str, case: str) -> tuple[Tensor, Tensor]:
    """(D [n], dD / dzq [n, width]) of a case."""
    zp, zq, dead, merge = CASES[case]()
    found = [
        value_and_gradient(name, p, q, dead=dead, merge=merge)
        for p, q in zip(zp.tolist(), zq.tolist(), strict=True)
    ]
    values = torch.tensor([float(value) for value, _ in found], dtype=torch.float64)
    return values, torch.tensor([[float(one) for one in g] for _, g in found], dtype=torch.float64)


def plain() -> tuple[Tensor, Tensor, list[int], None]:
    return *rows(), [], None


def dead(shift: float) -> Callable[[], tuple[Tensor, Tensor, list[int], None]]:
    """Half of all rows, with two dead ids among the others, every living logit shifted."""

    def made() -> tuple[Tensor, Tensor, list[int], None]:
        widened = []
        for z in rows():
            z = z[::2] + shift
            widened.append(
                torch.cat(
                    [z[:, :3], torch.zeros(len(z), 1).double(), z[:, 3:], torch.ones(len(z), 1).double()], 1
                )
            )
        return *widened, [3, V + 1], None

    return made


def forbidden(*, teacher: bool, student: bool) -> Callable[[], tuple[Tensor, Tensor, list[int], None]]:
    """Rows at which a bias of -inf forbids token 1, which the other model likes."""

    def made() -> tuple[Tensor, Tensor, list[int], None]:
        zp, zq = (z[3:8].clone() for z in rows())
        for z, here in ((zp, teacher), (zq, student)):
            z[:, 1] = -math.inf if here else z.amax(-1) - 0.1
        return zp, zq, [], None

    return made


def stored() -> tuple[Tensor, Tensor, list[int], int]:
    """Two tokens of the teacher's and a tail, stored as 1 - sum p, of the rows where that keeps enough digits."""
    zp, zq = rows()
    known = zp.softmax(-1)[:, 2:].sum(-1) > 1e-6
    return zp[known], zq[known], [], 2


CASES: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "dead, shifted up": dead(3e4),
    "dead, shifted down": dead(-3e4),
    "forbidden by the teacher": forbidden(teacher=True, student=False),
    "forbidden by the student": forbidden(teacher=False, student=True),
    "stored": stored,
}


def agree(name: str, case: str, divergence: Any, **given: Any) -> None:
    """The loss's divergence and gradient of a case are the oracle's."""
    zp, zq, gone, merge = CASES[case]()
    width = zp.shape[1]
    shared = None
    if gone:
        shared = torch.ones(width, dtype=torch.bool)
        shared[gone] = False
    bias_p, bias_q = (
        torch.where(z[0].isneginf(), -math.inf, 0.0) if bool(z.isinf().any()) else None for z in (zp, zq)
    )
    zp, zq = (z.nan_to_num(neginf=0.0) for z in (zp, zq))
    eye = torch.eye(width, dtype=torch.float64)
    hidden = zq.clone().requires_grad_()
    if merge is None:
        teacher: Any = LiveRows(zp, Head(eye, bias_p), shared=shared)
    else:
        teacher = CachedRows(torch.arange(merge).expand(len(zp), -1), zp.log_softmax(-1)[:, :merge])
    ones = torch.ones(len(zp), dtype=torch.float64)
    objective = Objective(divergence, "always", beta=1.0)
    loss, sums = distillation_loss(hidden, Head(eye, bias_q), teacher, objective, row_scale=ones, **given)
    (gradient,) = torch.autograd.grad(loss, hidden)
    values, slopes = truth(name, case)
    close(sums["row_divergence"], gradient, values, slopes)


def close(value: Tensor, gradient: Tensor, values: Tensor, slopes: Tensor) -> None:
    room = ROUNDING * values.abs().clamp(min=1.0)
    off, steep = (value - values).abs(), (gradient - slopes).abs().amax(-1)
    assert bool((off <= TOLERANCE * values.abs() + room).all()), f"value off by {off.tolist()}"
    allowed = TOLERANCE * slopes.abs().amax(-1) + room
    assert bool((steep <= allowed).all()), (
        f"gradient off by {steep.tolist()} of {slopes.abs().amax(-1).tolist()}"
    )


LIVE = [case for case in CASES if case != "stored"]


@pytest.mark.parametrize("case", LIVE)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_of_a_live_teacher_is_the_oracles(name: str, case: str) -> None:
    agree(name, case, name)


@pytest.mark.parametrize("case", LIVE)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_so_is_it_by_autograd_alone(name: str, case: str) -> None:
    agree(name, case, lambda logp, logq: DIVERGENCES[name](logp, logq))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_so_is_it_of_a_teachers_best_tokens_and_a_tail(name: str) -> None:
    agree(name, "stored", name)


def test_the_oracle_knows_every_divergence() -> None:
    assert set(VALUES) == set(DIVERGENCES)


STATED = [name for name in DIVERGENCES if closed_form_of(DIVERGENCES[name])]


@pytest.mark.parametrize("case", LIVE)
@pytest.mark.parametrize("name", STATED)
def test_so_is_it_by_the_program_that_is_compiled(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "program", lambda plan: plan)  # untraced: the same functions
    monkeypatch.setattr(dense, "BLOCK_ENTRIES", CASES[case]()[0].shape[1])
    agree(name, case, name, compiled=True)


def compiled_by_torch() -> None:
    """All closed forms as one program of torch.compile, on the plain rows; prints the name of each that is right.

    ``equivalence.compiled_cases`` calls it, in a process without the shape checks, which cannot be compiled.
    """
    zp, zq, _, _ = plain()
    head = Head(torch.eye(V, dtype=torch.float64))
    plans = [
        replace(plan_of(DIVERGENCES[name], head, head, 1.0, (), kl=False), shifts=True) for name in STATED
    ]

    def every(zq: Tensor, zp: Tensor) -> list[tuple[Tensor, Tensor]]:
        outs = [torch.empty_like(zq) for _ in plans]
        return [
            (plan(zq, zp, None, None, None, None, out)["divergence"], out)
            for plan, out in zip(plans, outs, strict=True)
        ]

    for name, (value, gradient) in zip(STATED, torch.compile(every, dynamic=False)(zq, zp), strict=True):
        close(value.clamp(min=0.0), gradient, *truth(name, "plain"))
        print("oracle:", name)
