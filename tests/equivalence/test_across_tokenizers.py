"""The loss beside a teacher of another tokenizer equals a plain program written span by span, in fp64."""

from __future__ import annotations

import pytest
import torch

from selectkd import Objective, distillation_loss
from selectkd.data.collate import collate, collate_packed
from selectkd.data.crossing import cross
from selectkd.data.formats import to_sample
from selectkd.data.render import TextRules, render
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import Scratch, TeacherRows
from selectkd.loss.token_log_probs import token_log_probs
from selectkd.models.forward import last_hidden
from selectkd.objective.divergences import DIVERGENCES
from selectkd.teachers.aligned import AlignedTeacher
from selectkd.teachers.live import LiveTeacher
from teachers.tokens import TEXT, byte_level, model_for

OTHER = "students of spans propose and verify what teachers verified: proposals, spans, students, teachers. "
ROWS = 310
"""Rows of the student's head: ten more than its tokens."""


@pytest.fixture(scope="module")
def world():
    student, teacher = byte_level(300, text=(*TEXT[1:], OTHER)), byte_level(330, end="<|stop|>")
    models = model_for(student, 1, rows=ROWS), model_for(teacher, 2, rows=340)
    return student, teacher, cross(student, teacher), *models


def batch_of(tokenizer, packed=False):
    records = [{"prompt": TEXT[0], "completion": TEXT[i]} for i in (1, 2, 0)]
    made = [
        render(to_sample(r, "prompt_completion", origin="made"), tokenizer, TextRules(180))[0]
        for r in records
    ]
    return collate_packed([made[:2], made[2:]]) if packed else collate(made, pad_id=0)


def hidden_of(model, batch, position):
    with torch.no_grad():
        hidden = last_hidden(model, batch)
    return hidden.reshape(-1, hidden.shape[-1])[position]


def plain(world, batch, hidden, head, divergence, k, beta, *, matched_weight=None, unverified_weight=None):
    """(loss, {row of the span's first token: (divergence, weight, acceptance)}) by the definition, span by span.

    Texts and tokens come as dictionaries {bytes: probability}; nothing of the library's mathematics is used but the
    divergence of two vectors.
    """
    _, _, crossing, _, teacher_model = world
    seen = supervised(batch)
    row_at = {
        (int(batch.sequence.flatten()[p]), int(batch.position_ids.flatten()[p]) + 1): row
        for row, p in enumerate(seen.position.tolist())
    }
    student_words = {i: b"<end>" if t is None else t for i, t in crossing.student_bytes.items()}
    teacher_words = {i: b"<end>" if t is None else t for i, t in crossing.teacher_bytes.items()}
    common = sorted(set(student_words.values()) & set(teacher_words.values()))
    share = len(common) / len(teacher_words) if matched_weight is None else matched_weight
    q = torch.softmax((hidden @ head.T)[:, : len(student_words)], -1)  # dead rows of the head left out
    loss, told = torch.zeros((), dtype=torch.float64), {}
    for sample, ids in enumerate(s.tolist() for s in batch.samples()):
        reading = crossing.read(ids)
        with torch.no_grad():
            logits = teacher_model(torch.tensor([reading.teacher_ids])).logits[0]
            p = torch.softmax(logits[:, : len(teacher_words)], -1)
        for span in reading.spans:
            rows = [row_at.get((sample, i)) for i in range(span.student_start, span.student_stop)]
            if None in rows or span.teacher_start == 0:
                continue
            ours = {student_words[i]: q[rows[0], i] for i in student_words}
            theirs = {teacher_words[i]: p[span.teacher_start - 1, i] for i in teacher_words}
            a, b = (
                student_words[ids[span.student_start]],
                teacher_words[reading.teacher_ids[span.teacher_start]],
            )
            text = span.text or b"<end>"
            if not (span.single and a == b):
                chain = torch.ones((), dtype=torch.float64)
                for row, i in zip(rows[1:], range(span.student_start + 1, span.student_stop), strict=True):
                    chain = chain * q[row, ids[i]]
                other = torch.ones((), dtype=torch.float64)
                for j in range(span.teacher_start + 1, span.teacher_stop):
                    other = other * p[j - 1, reading.teacher_ids[j]]
                for side, word, rest, tokens in (
                    (ours, a, chain, span.student_stop - span.student_start),
                    (theirs, b, other, span.teacher_stop - span.teacher_start),
                ):
                    if tokens > 1:
                        written = side[word] * rest
                        side[word] = side[word] * (1 - rest)
                        side[b"text"] = written + side.pop(text, 0.0)
                    else:
                        side[b"text"] = side.pop(word)
            if divergence == "uld":
                p_, q_ = (
                    torch.stack(list(side.values())).sort(descending=True).values for side in (theirs, ours)
                )
                q_ = torch.cat([q_, q_.new_zeros(len(p_) - len(q_))])
                value = (p_ - q_).abs().sum()
            else:
                zero = torch.zeros((), dtype=torch.float64)
                kept = [w for w in (*common, b"text") if w in ours or w in theirs]
                unlike = [[side[w] for w in side if w not in kept] for side in (ours, theirs)]
                q_ = torch.stack([ours.get(w, zero) for w in kept] + [sum(unlike[0], zero)])
                p_ = torch.stack([theirs.get(w, zero) for w in kept] + [sum(unlike[1], zero)])
                value = share * DIVERGENCES[divergence](p_.log()[None], q_.log()[None])[0]
                own = [torch.stack([*side, zero]).sort(descending=True).values for side in unlike]
                short = min(map(len, own))
                value = value + (1 - share) * (
                    (own[0][:short] - own[1][:short]).abs().sum()
                    + own[0][short:].sum()
                    + own[1][short:].sum()
                )
            best = max(ours, key=lambda w: float(ours[w].detach()))
            known = best in theirs
            accepted = float(known and sum(float(x) > float(theirs[best]) for x in theirs.values()) < k)
            weight = beta + (1 - beta) * accepted
            if not known and unverified_weight is not None:
                weight = unverified_weight
            told[rows[0]] = (float(value.detach()), weight, accepted, float(not known))
            loss = loss + weight * value / len(seen)
    return loss, told


@pytest.mark.parametrize(
    ("divergence", "packed"), [("forward_kl", True), ("generalized_jsd", False), ("uld", False)]
)
def test_the_loss_and_its_gradients_equal_the_plain_program(world, divergence, packed):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student, packed)
    seen = supervised(batch)
    hidden = hidden_of(student_model, batch, seen.position).requires_grad_()
    head = student_model.lm_head.weight.detach().clone().requires_grad_()
    teacher = AlignedTeacher(teacher_model, crossing, student_width=ROWS, unverified_weight=0.3)
    rows = teacher(batch, seen.position)
    assert bool(rows.merged.any()) and rows.later.numel() > 5
    objective = Objective(divergence, {"name": "greedy_topk", "k": 20}, beta=0.1)
    scale = torch.full((len(seen),), 1.0 / len(seen), dtype=torch.float64)
    loss, sums = distillation_loss(hidden, head, rows, objective, row_scale=scale, chunk=16)
    got = torch.autograd.grad(loss, (hidden, head))
    expected, told = plain(world, batch, hidden, head, divergence, 20, 0.1, unverified_weight=0.3)
    wanted = torch.autograd.grad(expected, (hidden, head))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for row, (value, weight, accepted, unverified) in told.items():
        assert sums["row_divergence"][row].item() == pytest.approx(value, rel=1e-9)
        assert sums["row_weight"][row].item() == pytest.approx(weight)
        assert sums["row_acceptance"][row].item() == accepted
        assert sums["row_unverified"][row].item() == unverified
    assert set(rows.first.tolist()) == set(told)
    assert 0 < sums["accepted"] < sums["n"]


def test_the_gradient_equals_the_numerical_one(world):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    position = supervised(batch).position[:24]
    hidden = hidden_of(student_model, batch, position).requires_grad_()
    head = student_model.lm_head.weight.detach().clone()
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS)(batch, position)
    assert rows.later.numel() and bool(rows.merged.any())
    generator = torch.Generator().manual_seed(0)
    for objective in (Objective("forward_kl", "always"), Objective("uld", "always")):

        def loss(h, w, of=objective):
            return distillation_loss(h, w, rows, of, chunk=8)[0]

        head.requires_grad_()
        gradients = torch.autograd.grad(loss(hidden, head), (hidden, head))
        for _ in range(3):  # along random directions: the gradient is taken forward and is there only once
            along = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (hidden, head)]
            with torch.no_grad():
                up, down = (loss(hidden + e * along[0], head + e * along[1]) for e in (1e-6, -1e-6))
            slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
            assert (up - down).item() / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_a_teacher_of_the_same_tokenizer_gives_the_loss_it_gives_alone(world):
    student, _, _, student_model, _ = world
    whole = [render(to_sample({"text": t}, "text", origin="made"), student, TextRules(180))[0] for t in TEXT]
    batch = collate(
        whole, pad_id=0
    )  # prompt and completion, tokenised apart, are not how the teacher reads them
    position = supervised(batch).position
    hidden = hidden_of(student_model, batch, position)
    other = model_for(student, 5)
    aligned = AlignedTeacher(other, cross(student, student), student_width=ROWS)(batch, position)
    assert aligned.matched_weight == 1.0 and not aligned.merged.any()
    head = student_model.lm_head.weight.detach()
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 20}, beta=0.1)
    got = distillation_loss(hidden, head, aligned, objective)[1]
    wanted = distillation_loss(hidden, head, LiveTeacher(other)(batch, position), objective)[1]
    for name in ("row_divergence", "row_weight", "row_acceptance", "row_overlap"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12)
    assert got["unverified"] == 0


def test_tokens_paired_by_index_are_those_of_the_ulds_paper(world):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    seen = supervised(batch)
    hidden = hidden_of(student_model, batch, seen.position)
    head = student_model.lm_head.weight.detach()
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS, pairing="index")(batch, seen.position)
    got = distillation_loss(hidden, head, rows, Objective("uld", "always"))[1]["row_divergence"]
    q = torch.softmax((hidden @ head.T)[:, : len(student)], -1)
    wanted = torch.zeros(len(seen), dtype=torch.float64)
    for sample, ids in enumerate(s.tolist() for s in batch.samples()):
        reading = crossing.read(ids)
        with torch.no_grad():
            p = torch.softmax(
                teacher_model(torch.tensor([reading.teacher_ids])).logits[0][
                    :, : len(crossing.teacher_bytes)
                ],
                -1,
            )
        mine = (seen.sequence == sample).nonzero()[:, 0].tolist()
        start = len(ids) - len(mine)
        begin = min(s.teacher_start for s in reading.spans if s.student_start >= start)
        for i, row in enumerate(mine[: len(reading.teacher_ids) - begin]):
            a, b = q[row].sort(descending=True).values, p[begin + i - 1].sort(descending=True).values
            wanted[row] = (b[: len(a)] - a).abs().sum() + b[len(a) :].sum()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="paired by index"):
        distillation_loss(hidden, head, rows, Objective("uld", "greedy_topk"))


def test_a_chunk_gives_the_pair_on_what_both_can_say(world):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    position = supervised(batch).position
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS)(batch, position)
    assert isinstance(rows, TeacherRows)
    hidden, weight = hidden_of(student_model, batch, position), student_model.lm_head.weight.detach()
    later = token_log_probs(
        hidden[rows.later], weight, rows.token[rows.later], dead=torch.arange(ROWS) >= 300
    )
    later = later.new_zeros(len(rows.first)).index_add_(0, rows.span[rows.later], later)
    chunk = rows.with_later(later).open(slice(0, len(rows.first)), ROWS, Scratch())
    pair = chunk.pair(slice(0, 40), (hidden @ weight.T)[rows.first[:40]], 1.0)
    for logs in (pair.logp, pair.logq):
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(40, dtype=torch.float64))
    assert pair.logp.shape[1] == len(crossing.image) + 2 and pair.tail
    inside = pair.student_top >= 0
    assert inside.any() and not inside.all()
    assert (pair.logq[inside, pair.student_top[inside]] == pair.logq[inside, :-1].amax(-1)).all()
    with pytest.raises(ConfigError, match="temperature = 2"):
        chunk.pair(slice(0, 2), torch.zeros(2, ROWS), 2.0)


def test_a_part_of_the_rows_has_the_loss_they_have_in_the_whole(world):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    seen = supervised(batch)
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS, pairing="index")(batch, seen.position)
    hidden, head = hidden_of(student_model, batch, seen.position), student_model.lm_head.weight.detach()
    for objective in (Objective("forward_kl", {"name": "greedy_topk", "k": 20}), Objective("uld", "always")):
        whole = distillation_loss(hidden, head, rows, objective)[1]
        index = (seen.sequence != 1).nonzero()[:, 0]
        part = distillation_loss(hidden[index], head, rows.take(index), objective)[1]
        for name in ("row_divergence", "row_weight", "row_acceptance", "row_unverified"):
            torch.testing.assert_close(part[name], whole[name][index])


def test_rows_that_cut_a_span_of_text_are_refused(world):
    student, _, crossing, _, teacher_model = world
    batch = batch_of(student)
    seen = supervised(batch)
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS)(batch, seen.position)
    several = int(rows.student.several.nonzero()[0])
    members = (rows.span == several).nonzero()[:, 0]
    others = (rows.span != several).nonzero()[:, 0]
    assert len(members) > 1
    for part in (members[1:], members[:-1]):  # without its first token, and without its last
        with pytest.raises(ConfigError, match="hold 1 spans of text in part"):
            rows.take(torch.cat([others, part]))
    assert len(rows.take(others).first) == len(rows.first) - 1
    assert len(rows.take(members).first) == 1


def test_a_teacher_row_that_is_not_finite_teaches_nothing(world):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    position = supervised(batch).position
    hidden = hidden_of(student_model, batch, position).requires_grad_()
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS)(batch, position)
    rows.teacher.hidden[3] = torch.nan
    loss, sums = distillation_loss(
        hidden, student_model.lm_head.weight.detach(), rows, Objective("forward_kl", "always")
    )
    assert sums["teacher_nonfinite"] == 1 and loss.isfinite()
    assert sums["row_weight"][rows.first[3]] == 0
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


@pytest.mark.parametrize(
    "verifier", ["spec_k", "expected_spec_k", "hellinger", "label_top_k", "prefix_gate", "tip"]
)
def test_a_verifier_that_compares_tokens_is_refused(world, verifier):
    student, _, crossing, student_model, teacher_model = world
    batch = batch_of(student)
    position = supervised(batch).position
    rows = AlignedTeacher(teacher_model, crossing, student_width=ROWS)(batch, position)
    hidden = hidden_of(student_model, batch, position)
    with pytest.raises(ConfigError, match="different tokens"):
        distillation_loss(
            hidden, student_model.lm_head.weight.detach(), rows, Objective("forward_kl", verifier),
            torch.rand(len(position), 2),
        )  # fmt: skip


@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"softcap": 3.0}])
def test_log_probs_of_tokens_equal_the_plain_program(head):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((9, 5), (12, 5))
    )
    bias = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)
    token = torch.randint(0, 10, (9,), generator=generator)
    dead = torch.arange(12) >= 10
    of = Head(weight, bias, **head)
    got = token_log_probs(hidden, of, token, dead=dead, chunk=4)
    logits = of.logits(hidden).masked_fill(dead, -torch.inf)
    wanted = torch.log_softmax(logits, -1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (hidden, weight, bias)) for x in (got, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
