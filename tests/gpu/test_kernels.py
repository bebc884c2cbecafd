"""The Triton kernels equal block.evaluate_block, for every divergence, verifier and kind of head they claim.

Without a GPU they run in Triton's interpreter (tests/conftest.py switches it on).
"""

from __future__ import annotations

import functools

import pytest
import torch

from selectkd import Head, LiveRows, Objective, distillation_loss, uniforms
from selectkd.loss import block_triton as kernels
from selectkd.loss import chunks as chunked
from selectkd.loss.block import evaluate_block as reference
from selectkd.loss.block_steps import BlockConfig, BlockInputs
from selectkd.loss.block_triton import launch
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import LiveChunk, Scratch
from selectkd.objective.verifiers import VERIFIERS, traits_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, V, D, E = 7, 300, 8, 12
READ_STATISTICS = [name for name, factory in VERIFIERS.items() if traits_of(factory()).reads is not None]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "TILE", 128)  # three tiles, the last one cut off


def made(*, student=None, teacher=None, shared=None, seed=0, v=V):
    g = torch.Generator().manual_seed(seed)
    hidden, other = torch.randn(C, D, generator=g), torch.randn(C, E, generator=g)
    weight, teacher_weight = torch.randn(v, D, generator=g) * 0.7, torch.randn(v, E, generator=g) * 0.7
    head = (student or Head)(weight).to(DEVICE)
    shared = None if shared is None else shared.to(DEVICE)
    rows = LiveRows(other.to(DEVICE), (teacher or Head)(teacher_weight).to(DEVICE), shared=shared)
    return hidden.to(DEVICE), head, rows


def compare(
    objective,
    *,
    temperature=1.0,
    student=None,
    teacher=None,
    shared=None,
    spoil=None,
    fault=torch.nan,
    near=2e-6,
):
    hidden, head, live = made(student=student, teacher=teacher, shared=shared)
    if spoil is not None:
        live.hidden[spoil] = fault
    uniform = uniforms(C, objective.uniforms_per_token, seed=1, step=3)
    columns = (
        uniform,
        torch.linspace(0.1, 1.0, C),
        torch.arange(C) * 3,
        torch.zeros(C, dtype=torch.long),
    )
    at = BlockInputs(*(x.to(DEVICE) for x in columns), None)
    settings = BlockConfig(objective, head, LossOptions(temperature, also_kl=True), wants_gradient=True)
    results = []
    for run in ("kernel", "reference"):
        raw = head.raw(hidden).detach().clone()
        chunk = live.open(slice(0, C), V, Scratch())
        if run == "kernel":
            assert kernels.claims(settings, chunk)
            seen = kernels.evaluate_chunk(raw, chunk, at, settings)
        else:
            seen = reference(raw, slice(0, C), chunk, at, settings, Scratch())
        results.append((raw, seen))
    (raw, seen), (raw_there, seen_there) = results
    assert int(seen.bad) == int(seen_there.bad)
    torch.testing.assert_close(seen.kl, seen_there.kl, atol=1e-5, rtol=2e-5)
    # fp32 sums of 300 terms in another order
    torch.testing.assert_close(raw, raw_there, atol=2e-6, rtol=2e-5)
    for name in ("divergence", "weight", "acceptance", "overlap"):
        torch.testing.assert_close(
            getattr(seen, name),
            getattr(seen_there, name),
            atol=near if name == "acceptance" else 2e-6,
            rtol=2e-5,
            msg=name,
        )
    return seen


PARAMETERS = [
    *[(name, {}) for name in kernels.TERMS],
    ("jeffreys", {"weight": 0.2}),
    ("skew_kl", {"alpha": 0.4}),
    ("skew_reverse_kl", {"alpha": 0.4, "detach_mixture": True}),
    ("generalized_jsd", {"beta": 0.1}),
    ("alpha_beta", {"alpha": 0.9, "beta": 0.3}),
]


@pytest.mark.parametrize(("name", "params"), PARAMETERS)
def test_every_divergence_of_the_kernels_equals_the_reference(name, params):
    compare(Objective({"name": name, **params}, {"name": "greedy_topk", "k": 40}, beta=0.2))


@pytest.mark.parametrize("name", READ_STATISTICS)
def test_every_verifier_that_reads_statistics_equals_the_reference(name):
    compare(Objective("forward_kl", name, beta=0.2))


def test_the_rank_at_the_edge_equals_the_references():
    hidden, head, live = made()
    student, teacher = head.raw(hidden), live.head.raw(live.hidden)
    better = (teacher > teacher.gather(-1, student.argmax(-1, keepdim=True))).sum(-1)
    edge = int(better[better > 0].min())  # this row has exactly so many tokens before its own
    for k in (edge, edge + 1):
        compare(Objective("forward_kl", {"name": "greedy_topk", "k": k}, beta=0.2))


def test_most_verifiers_read_statistics():
    assert set(VERIFIERS) - set(READ_STATISTICS) == {
        "spec_k_literal",
        "prefix_gate",
        "iw_opd",
        "fire",
        "prefix_product",
        "matched_shuffle",
        "matched_position",
    }


@pytest.mark.parametrize(
    "head",
    [
        lambda w: Head(w, bias=torch.linspace(-1, 1, V)),
        lambda w: Head(w, scale=0.4),
        lambda w: Head(w, softcap=3.0),
        lambda w: Head(w, bias=torch.linspace(-1, 1, V), scale=1.5, softcap=4.0),
    ],
)
@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd"])
def test_heads_with_bias_scale_and_softcap(head, name):
    compare(Objective(name, "greedy_topk", beta=0.2), student=head, teacher=head)


def test_temperatures_of_loss_and_verifier():
    compare(Objective("reverse_kl", {"name": "expected_spec_k", "k": 2}, beta=0.2), temperature=2.0)
    compare(
        Objective("forward_kl", {"name": "expected_spec_k", "k": 2}, verify_temperature=0.5), temperature=2.0
    )


def test_unshared_ids_take_no_part():
    shared = torch.ones(V, dtype=torch.bool)
    shared[[0, 130, 299]] = False
    compare(Objective("generalized_jsd", "greedy_topk", beta=0.2), shared=shared)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_teacher_row_that_is_not_finite_teaches_nothing():
    seen = compare(Objective("forward_kl", "always", beta=0.2), spoil=2)
    assert int(seen.bad) == 1 and seen.weight[2] == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [name for name in READ_STATISTICS if name != "label_top_k"])
def test_statistics_of_rows_whose_teacher_is_not_finite_equal_the_references(name, fault):
    """One row, and all of them: acceptance, weight, overlap and KL, as they are logged."""
    near = (
        1e-3 if name == "hellinger" else 2e-6
    )  # of p = q: a root of 1 - bhattacharyya, which is fp32's rounding
    for spoil in (2, slice(None)):
        seen = compare(Objective("forward_kl", name, beta=0.2), spoil=spoil, fault=fault, near=near)
        assert not seen.weight[spoil].any() and seen.acceptance.isfinite().all()
        assert all(
            getattr(seen, column)[spoil].isfinite().all() for column in ("divergence", "overlap", "kl")
        )


def test_always_accept_and_thinning():
    compare(Objective("forward_kl", "greedy_topk", beta=0.5, always_accept=(3, 9), thin_rejected=True))


def test_what_the_kernels_do_not_claim_is_left_to_the_reference():
    _, head, live = made()
    chunk = live.open(slice(0, C), V, Scratch())

    def claimed(*objective):
        return kernels.claims(BlockConfig(Objective(*objective), head, LossOptions(), True), chunk)

    assert claimed("forward_kl", "greedy_topk")
    assert not claimed("adaptive_kl", "greedy_topk") and not claimed("taid", "greedy_topk")
    assert not claimed("forward_kl", "spec_k_literal")
    assert not claimed({"name": "alpha_beta", "alpha": 0.0, "beta": 1.0}, "greedy_topk")
    assert not claimed(lambda p, q: (p.exp() - q.exp()).abs().sum(-1), "greedy_topk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "skew_reverse_kl"])
def test_the_whole_loss_with_the_kernels_equals_the_whole_loss(name, dtype, monkeypatch):
    hidden, head, live = made()
    results = []
    for module in (None, kernels):
        monkeypatch.setattr(chunked, "kernels_for", lambda *_, module=module, **__: module)
        h = hidden.to(dtype).detach().requires_grad_()
        w = head.weight.to(dtype).detach().requires_grad_()
        teacher = LiveRows(live.hidden.to(dtype), live.head.weight.to(dtype))
        objective = Objective(name, {"name": "greedy_topk", "k": 40}, beta=0.2)
        loss, sums = distillation_loss(h, w, teacher, objective, chunk=3)
        results.append((loss, *torch.autograd.grad(loss, (h, w)), sums["row_weight"], sums["overlap"]))
    # bf16: both round the same gradient of the logits to 8 bits, at most one unit apart
    tolerance = {"atol": 2e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def evaluated(
    student: torch.Tensor, teacher: torch.Tensor, objective: Objective, label: torch.Tensor | None = None
):
    """What the kernels see in logits of both models as they stand, and the gradient they leave."""
    c, v = student.shape
    ours, theirs = (
        LiveRows(torch.zeros(c, 1), torch.zeros(v, 1)).open(slice(0, c), v, Scratch()) for _ in range(2)
    )
    raw, chunk = (
        student.clone().to(DEVICE),
        LiveChunk(teacher.clone().to(DEVICE), theirs.head.to(DEVICE), None),
    )
    label = None if label is None else label.to(DEVICE)
    at = BlockInputs(torch.empty(c, 0, device=DEVICE), torch.ones(c, device=DEVICE), label, None, None)
    settings = BlockConfig(objective, ours.head.to(DEVICE), LossOptions(), wants_gradient=True)
    return kernels.evaluate_chunk(raw, chunk, at, settings), raw


def exact_kl(p_logits, q_logits):
    logp, logq = (torch.log_softmax(z.double(), -1) for z in (p_logits, q_logits))
    return torch.where(logp.exp() > 0, logp.exp() * (logp - logq), 0.0).sum(-1)


@pytest.mark.parametrize(
    ("name", "sides"), [("forward_kl", (1, 0)), ("reverse_kl", (0, 1)), ("jeffreys", None)]
)
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_a_divergence_near_the_teacher_keeps_its_digits(name, sides, distance):
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 2000, generator=g) * 3
    student = teacher + distance * torch.randn(4, 2000, generator=g)
    if sides is None:
        true = 0.5 * exact_kl(teacher, student) + 0.5 * exact_kl(student, teacher)
    else:
        p, q = (teacher, student) if sides == (1, 0) else (student, teacher)
        true = exact_kl(p, q)
    seen, _ = evaluated(student, teacher, Objective(name, "always"))
    # 2^-22: what the logarithm of a probability near e^-4 is rounded by
    torch.testing.assert_close(seen.divergence.cpu().double(), true, atol=2.0**-22, rtol=1e-4)


@pytest.mark.parametrize("label", [-100, -1, 300, 10**6])
def test_a_label_outside_the_vocabulary_is_no_token_and_is_not_read(label):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 300, generator=g)
    labels = torch.tensor([label, int(logits[1].argmax()), label])
    seen, _ = evaluated(logits, logits, Objective("forward_kl", "label_top_k", beta=0.0), labels)
    assert seen.acceptance.tolist() == [0.0, 1.0, 0.0]


def test_the_first_of_several_best_tokens_is_proposed():
    student, teacher = torch.zeros(3, 300), torch.zeros(3, 300)
    for row, (first, others) in enumerate(((5, (6, 133)), (129, (131, 299)), (0, (128, 256)))):
        student[row, [first, *others]] = 4.0  # in one thread's columns, in one tile, and in several
        teacher[row, first], teacher[row, list(others)] = 1.0, -1.0
    seen, _ = evaluated(student, teacher, Objective("forward_kl", {"name": "greedy_topk", "k": 1}, beta=0.0))
    assert seen.acceptance.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("where", [slice(0, 3), slice(0, 130), slice(297, 300)], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd"])
def test_tokens_that_both_models_forbid_take_no_part(name, where):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 300, generator=g)
    rest = torch.ones(300, dtype=torch.bool)
    rest[where] = False
    alone, gradient_alone = evaluated(student[:, rest], teacher[:, rest], Objective(name, "hellinger"))
    student[:, where], teacher[:, where] = -torch.inf, -torch.inf
    seen, gradient = evaluated(student, teacher, Objective(name, "hellinger"))
    torch.testing.assert_close(seen.divergence, alone.divergence, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient[:, rest], gradient_alone, atol=1e-6, rtol=1e-5)
    assert not gradient[:, where].any() and int(seen.bad) == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_row_that_counts_nothing_leaves_zeros_over_whatever_it_held():
    student, teacher = torch.randn(2, 300), torch.randn(2, 300)
    student[0] = torch.nan
    teacher[0] = torch.nan
    seen, gradient = evaluated(student, teacher, Objective("forward_kl", "always"))
    assert int(seen.bad) == 1 and not gradient[0].any() and gradient[1].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_loss_on_the_gpu_equals_the_loss_on_the_cpu():
    hidden, head, live = made()
    results = []
    for device in ("cpu", "cuda"):
        h, w = (t.detach().to(device).requires_grad_() for t in (hidden, head.weight))
        teacher = LiveRows(live.hidden.to(device), live.head.weight.to(device))
        loss, _ = distillation_loss(h, w, teacher, Objective("forward_kl", "greedy_topk"))
        results.append([t.cpu() for t in (loss, *torch.autograd.grad(loss, (h, w)))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # the GPU's products may use tf32


def test_partial_parameters_reach_the_kernels():
    objective = Objective(functools.partial(Objective("skew_kl").divergence, alpha=0.4), "always")
    compare(objective)


def test_a_shift_of_all_logits_changes_nothing_beside_unshared_ids() -> None:
    found = []
    for shift in (0.0, -30_000.0):
        hidden, head, live = made(shared=torch.arange(V) < V - 40)
        raw = head.raw(hidden).detach() + shift
        chunk = live.open(slice(0, C), V, Scratch())
        chunk.raw.add_(shift)
        settings = BlockConfig(
            Objective("forward_kl", "greedy_topk"), head, LossOptions(), wants_gradient=True
        )
        uniform = torch.empty(C, 0, device=DEVICE)
        at = BlockInputs(
            uniform, torch.ones(C, device=DEVICE), None, torch.zeros(C, dtype=torch.long, device=DEVICE), None
        )
        found.append(kernels.evaluate_chunk(raw, chunk, at, settings))
    for one, other in zip(found[0][:4], found[1][:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-2)
