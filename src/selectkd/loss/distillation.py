"""distillation_loss: the one function a training loop needs. n rows, v vocabulary, d / e student / teacher width."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from selectkd.errors import ConfigError
from selectkd.loss.aligned_rows import AlignedRows
from selectkd.loss.block_compiled import check_compiled
from selectkd.loss.by_device import chunk_rows
from selectkd.loss.chunks import ROWS, ChunkedLoss, LossCall, first_pass, untraced
from selectkd.loss.head import Head, product_dtype
from selectkd.loss.options import LossKeywords, LossOptions
from selectkd.loss.teacher_rows import CachedRows, LiveRows, TeacherRows
from selectkd.loss.token_log_probs import token_log_probs
from selectkd.objective.divergences.uld import is_unpaired
from selectkd.objective.objective import Objective
from selectkd.objective.pair import one_of
from selectkd.objective.verifiers import traits_of


@untraced
def distillation_loss(
    hidden: Float[Tensor, "n d"],
    head: Float[Tensor, "v d"] | Head,
    teacher: TeacherRows,
    objective: Objective,
    uniform: Float[Tensor, "n r"] | None = None,
    *,
    row_scale: Float[Tensor, " n"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    sequence: Int[Tensor, " n"] | None = None,
    acceptance: Float[Tensor, " n"] | None = None,
    **options: Unpack[LossKeywords],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """sum_i row_scale_i * V_i * D(p_i || q_i) over n supervised rows, and the sums the metrics are made of.

    hidden [n, d]: the student's last hidden states where a supervised token is predicted; the gradient reaches them
    and the head's weight and bias. head: its weight [v, d], or a Head with bias, scale and soft-cap.
    teacher: LiveRows or CachedRows of the same n rows. uniform [n, r]: numbers in (0, 1), r =
    objective.uniforms_per_token (None where r is 0). row_scale [n]: what one row counts, for instance
    1 / (|y| * sequences); default 1 / n. labels [n]: the text's tokens, for those who look at them. sequence [n]: which
    sequence a row is of. acceptance [n]: verdicts in place of the verifier's; a selector ranks the rows of one call, so
    a step of several calls ranks them beforehand, as training does (``plan.LossPlan``). temperature, chunk, also_kl,
    gradient_filter, compiled: as of ``LossOptions``.

    Equals the plain program: logits of both models, log_softmax, verifier, divergence, one weighted sum; but no [n, v]
    tensor is ever built. The gradient is computed along with the value, so there is no second derivative, and
    torch.compile around it breaks its graph here. Nothing is divided here. A head in fp16 is refused: a row's gradient,
    some row_scale / v an entry, is below its range before any loss scaling; hidden states may be fp16.

    With AlignedRows, a teacher of another tokenizer, a row is a span of text: it counts once, at its first token.

    Under autocast to bf16 the products of an fp32 head are in bf16, its gradient is summed in fp32, and
    all else stays in fp32. The product of the teacher is in its own dtype.

    Returns (loss, sums). sums holds detached scalars n, accepted, always_accepted (by ``always_accept``, and part of
    accepted), weight, divergence, weighted_divergence, overlap, unverified (rows that no verdict can be given on) and
    teacher_nonfinite (rows left out because the teacher's were nan or infinite), and row_acceptance, row_divergence,
    row_weight, row_overlap, row_unverified [n]. TAR is accepted / n, bite 1 - weighted_divergence / divergence.
    Raises ConfigError where shapes or the teacher do not fit the objective.
    Source: SelecTKD (arXiv 2510.24021), equation 4.

    >>> import torch
    >>> from selectkd import LiveRows, Objective
    >>> _ = torch.manual_seed(0)
    >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    >>> teacher = LiveRows(torch.randn(6, 16), torch.randn(20, 16))
    >>> loss, sums = distillation_loss(hidden, head, teacher, Objective("forward_kl", {"name": "greedy_topk", "k": 5}))
    >>> loss.backward()
    >>> tuple(head.grad.shape), int(sums["n"])
    ((20, 8), 6)
    """
    n = hidden.shape[0]
    if uniform is None:
        uniform = torch.empty(n, 0, device=hidden.device)
    if row_scale is None:
        row_scale = torch.full((n,), 1.0 / max(n, 1), device=hidden.device)
    call = LossCall(
        teacher, objective, uniform, row_scale, labels, sequence, acceptance, LossOptions(**options)
    )
    return fused_loss(hidden, Head.of(head), call)


@untraced
def fused_loss(
    hidden: Float[Tensor, "n d"], student: Head, call: LossCall
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """``distillation_loss`` of a call whose parts are gathered."""
    if not torch.is_grad_enabled():  # a head that wants a gradient would get one all the same, for nothing
        hidden, student = hidden.detach(), student.detach()
    _check(hidden, student, call)
    n, width = hidden.shape[0], call.teacher.shared_width(student.width)
    products = product_dtype(student.weight)
    chunk = chunk_rows(n, width, call.options.chunk, products, hidden.device)
    call = replace(
        call,
        row_scale=call.row_scale.detach(),
        options=replace(call.options, chunk=chunk),
        products=products,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        loss, bad, columns = _fused(hidden, student, call, width)
    sums = {
        "n": torch.full((), float(n), device=hidden.device),  # filled there: a copy would wait for the device
        "accepted": columns["acceptance"].sum(),
        "weight": columns["weight"].sum(),
        "divergence": columns["divergence"].sum(),
        "weighted_divergence": (columns["weight"] * columns["divergence"]).sum(),
        "overlap": columns["overlap"].sum(),
        "unverified": columns["unverified"].sum(),
        "always_accepted": columns.pop("always_accepted").sum(),
        "teacher_nonfinite": bad,
    }
    if call.options.also_kl:
        sums["kl"] = columns["kl"].sum()
    else:
        del columns["kl"]
    return loss, sums | {f"row_{name}": values for name, values in columns.items()}


def _fused(
    hidden: Tensor, student: Head, call: LossCall, width: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, bad rows, columns [n]) of all rows."""
    if isinstance(call.teacher, AlignedRows):
        return _by_spans(hidden, student, call.teacher, call)
    if call.acceptance is None and call.objective.ranks_the_batch and hidden.shape[0]:
        call = replace(call, acceptance=first_pass(hidden.detach(), student.detach(), call, width))
    loss, bad, *rows = ChunkedLoss.apply(hidden, student.weight, student.bias, None, student, call)  # type: ignore[misc]
    named = _always_accepted(call.objective, call.labels, hidden)
    return loss, bad, dict(zip(ROWS, rows, strict=True)) | {"always_accepted": named}


def _always_accepted(objective: Objective, labels: Tensor | None, hidden: Tensor) -> Tensor:
    """1 for each row that ``always_accept`` accepts, 0 for others, [n]."""
    if labels is None or not objective.always_accept:
        return torch.zeros(hidden.shape[0], device=hidden.device)
    return one_of(labels, objective.always_accept).float()


def _by_spans(
    hidden: Tensor, student: Head, teacher: AlignedRows, call: LossCall
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, bad rows, columns [n]) of a teacher aligned by spans: the loss of the spans, laid out over the rows.

    A span's divergence and weight stand at its first row, its verdict and overlap at each of its rows.
    """
    if teacher.by_index is not None and is_unpaired(call.objective.divergence):
        teacher = teacher.by_index
    first, span, later_rows = teacher.first, teacher.span, teacher.later
    dead = teacher.vocabularies.dead(student.width)
    log_probs = token_log_probs(
        hidden[later_rows],
        student,
        teacher.token[later_rows],
        dead=dead,
        chunk=call.chunk,
        products=call.products,
    )
    later = log_probs.new_zeros(first.shape[0]).index_add(0, span[later_rows], log_probs)
    chosen = {
        name: None if (value := vars(call)[name]) is None else value[first]
        for name in ("uniform", "row_scale", "labels", "sequence")
    }
    call = replace(call, teacher=teacher.with_later(later.detach()), **chosen)
    loss, bad, *rows = ChunkedLoss.apply(hidden[first], student.weight, student.bias, later, student, call)  # type: ignore[misc]
    inside = span >= 0
    columns = {}
    named = _always_accepted(call.objective, call.labels, hidden[first])
    for name, values in [*zip(ROWS, rows, strict=True), ("always_accepted", named)]:
        out = values.new_full(span.shape, 1.0 if name == "unverified" else 0.0)
        if name in ("divergence", "weight", "kl"):
            out[first] = values
        else:
            out[inside] = values[span[inside]]
        columns[name] = out
    return loss, bad, columns


def _check_across(teacher: AlignedRows, objective: Objective, temperature: float) -> None:
    """ConfigError for what no alignment of two vocabularies gives."""
    name = type(objective.verifier).__name__
    if not objective.traits.crosses_vocabularies or objective.ranks_the_batch:
        raise ConfigError(
            f"{name} compares the two distributions token by token, and teacher and student have different tokens. "
            "Use greedy_topk, always or matched_random."
        )
    if teacher.by_index is not None and objective.teacher_tokens != 0 and is_unpaired(objective.divergence):
        raise ConfigError(
            f"{name} cannot verify tokens that are paired by index: they stand at different places of the text. "
            "Use always, or pairing: spans."
        )
    for key, value in (("temperature", temperature), ("verify_temperature", objective.verify_temperature)):
        if value != 1.0:
            raise ConfigError(
                f"{key} = {value} with a teacher of another tokenizer: the probability of a span is a product of "
                "its tokens' at temperature 1. Set it to 1.0."
            )


def _check(hidden: Tensor, student: Head, call: LossCall) -> None:
    """ConfigError where shapes or the teacher do not fit the objective."""
    n, teacher, objective = hidden.shape[0], call.teacher, call.objective
    uniform, need = call.uniform, objective.uniforms_per_token
    if uniform.ndim != 2 or uniform.shape[0] != n or uniform.shape[1] < need:
        raise ConfigError(
            f"uniform has shape {tuple(uniform.shape)}; {type(objective.verifier).__name__} reads {need} numbers "
            f"for each of {n} rows. Pass selectkd.uniforms(n, {need}, seed=..., step=...)."
        )
    if hidden.ndim != 2 or student.weight.ndim != 2 or hidden.shape[1] != student.inputs:
        raise ConfigError(
            f"hidden is {tuple(hidden.shape)} and the head {tuple(student.weight.shape)}; they must be [n, d], [v, d]."
        )
    if student.weight.dtype == torch.float16:
        raise ConfigError(
            "the student's head is float16, whose range ends above the gradient of a row, some row_scale / v an entry. "
            "Give it in float32 or bfloat16; the hidden states may be float16, and a loss scaler's factor reaches them."
        )
    if teacher.count != n:
        raise ConfigError(f"the student has {n} rows and the teacher {teacher.count}; they must be the same.")
    for name in ("row_scale", "labels", "sequence", "acceptance"):
        value = vars(call)[name]
        if value is not None and tuple(value.shape) != (n,):
            raise ConfigError(
                f"{name} has shape {tuple(value.shape)}, but there are {n} rows; it must be [n]."
            )
    if isinstance(teacher, AlignedRows):
        _check_across(teacher, objective, call.options.temperature)
    if call.options.compiled is True:
        check_compiled(objective.divergence, whole=isinstance(teacher, LiveRows))
    _check_support(teacher, objective, student.width)


def _check_support(teacher: TeacherRows, objective: Objective, width: int) -> None:
    """ConfigError where a verifier needs more of the teacher's best tokens than its rows hold."""
    held = teacher.ids.shape[1] if isinstance(teacher, CachedRows) else teacher.shared_width(width)
    for gate in objective.gates:
        need = traits_of(gate).teacher_tokens
        if need is not None and need > held:
            what = "cached rows hold" if isinstance(teacher, CachedRows) else "shared vocabulary has"
            key = "objective.verifier.k" if gate is objective.verifier else "the k of that route's gate"
            raise ConfigError(
                f"{type(gate).__name__} needs the teacher's {need} best tokens; the {what} {held}. "
                f"Set {key} to {held} or less."
            )
