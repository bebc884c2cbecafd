"""Several teachers: the average of their probabilities, and each stream with its own, equal to the plain program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selectkd import LiveRows, Objective, distillation_loss
from selectkd.config import recipe_from
from selectkd.data.collate import collate, collate_packed
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.loss.teacher_rows import CachedRows
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.several import SeveralPlan, SeveralRows, SeveralTeacher
from training.tiny import VOCABULARY, texts, tiny_llama


@pytest.fixture(scope="module")
def models():
    return [tiny_llama(1, layers=3, hidden=48), tiny_llama(5, layers=2, hidden=32)]


def logp_of(model, batch, position):
    with torch.no_grad():
        logits = model(**batch.model_inputs()).logits
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1])[position].double(), -1)


class Plain:
    """A plan without a model behind it."""

    def __init__(self, source, payload="live", k=None):
        self.source, self.payload, self.k, self.revision, self.model = source, payload, k, None, None


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "taid"])
@pytest.mark.parametrize("verifier", ["greedy_topk", "expected_spec_k"])
def test_the_average_equals_the_plain_program_on_loss_and_gradient(models, divergence, verifier):
    batch = collate(texts(5), pad_id=0)
    at = supervised(batch).position
    teacher = SeveralTeacher([LiveTeacher(model) for model in models], [3.0, 1.0], None)
    objective = Objective(divergence, verifier, beta=0.2)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(at.shape[0], 16, generator=generator, requires_grad=True)
    head = torch.randn(VOCABULARY, 16, generator=generator, requires_grad=True)
    loss, _ = distillation_loss(hidden, head, teacher(batch, at), objective, chunk=7)
    got = torch.autograd.grad(loss, (hidden, head))

    p = 0.75 * logp_of(models[0], batch, at).exp() + 0.25 * logp_of(models[1], batch, at).exp()
    one = LiveRows(p.log().float(), torch.eye(VOCABULARY))
    expected, _ = distillation_loss(hidden, head, one, objective)
    wanted = torch.autograd.grad(expected, (hidden, head))
    # both are fp32 sums of the same numbers in another order
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_teacher_twice_is_that_teacher(models):
    batch = collate(texts(4), pad_id=0)
    at = supervised(batch).position
    live = LiveTeacher(models[0])
    rows = SeveralTeacher([live, live], [0.3, 0.7], None)(batch, at)
    hidden, head = torch.randn(at.shape[0], 8), torch.randn(VOCABULARY, 8)
    twice = distillation_loss(hidden, head, rows, Objective())[0]
    assert twice.item() == pytest.approx(
        distillation_loss(hidden, head, live(batch, at), Objective())[0].item(), rel=1e-5
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_routed_row_gets_the_teacher_of_its_stream(models, packed):
    examples = texts(6)  # streams 0 and 1 in turn
    batch = collate_packed([examples[:3], examples[3:]], pad_id=0) if packed else collate(examples, pad_id=0)
    seen = supervised(batch)
    rows = SeveralTeacher([LiveTeacher(model) for model in models], None, [1, 0])(batch, seen.position)
    hidden, head = torch.randn(len(seen), 8), torch.randn(VOCABULARY, 8)
    got = distillation_loss(hidden, head, rows, Objective("forward_kl", "always"), chunk=5)[1][
        "row_divergence"
    ]
    for stream, model in ((0, models[1]), (1, models[0])):
        mine = seen.stream == stream
        alone = LiveTeacher(model)(batch, seen.position)
        wanted = distillation_loss(hidden, head, alone, Objective("forward_kl", "always"))[1][
            "row_divergence"
        ]
        torch.testing.assert_close(got[mine], wanted[mine], rtol=1e-4, atol=1e-5)


def test_a_routed_teacher_is_shown_its_own_rows_alone(models):
    batch = collate(texts(6), pad_id=0)
    shown = []

    def watching(index):
        def teacher(batch, position):
            shown.append((index, [sample.tolist() for sample in batch.samples()]))
            return LiveTeacher(models[index])(batch, position)

        return teacher

    SeveralTeacher([watching(0), watching(1)], None, [0, 1])(batch, supervised(batch).position)
    samples = [sample.tolist() for sample in batch.samples()]
    assert shown == [(0, samples[0::2]), (1, samples[1::2])]


def test_routed_top_k_teachers_keep_their_order_and_the_smaller_k():
    batch = collate(texts(4), pad_id=0)
    seen = supervised(batch)

    def stored(k, first):
        def teacher(batch, position):
            ids = torch.arange(first, first + k).expand(position.shape[0], k)
            return CachedRows(
                ids, torch.log_softmax(-torch.arange(float(k + 1)), 0)[:k].expand(position.shape[0], k)
            )

        return teacher

    rows = SeveralTeacher([stored(6, 0), stored(4, 20)], None, [0, 1])(batch, seen.position)
    assert isinstance(rows, CachedRows) and rows.ids.shape == (len(seen), 4)
    assert rows.ids[seen.stream == 0].unique().tolist() == [0, 1, 2, 3]
    assert rows.ids[seen.stream == 1].unique().tolist() == [20, 21, 22, 23]


def test_ids_one_teacher_lacks_are_left_out_of_the_average():
    generator = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(shape, generator=generator) for shape in ((3, 8), (12, 8)))
    shared = torch.ones(12, dtype=torch.bool)
    shared[4] = False
    share = torch.full((2, 3), 0.5)
    rows = SeveralRows([LiveRows(hidden, head), LiveRows(hidden, head, shared=shared)], share)
    got = distillation_loss(hidden, head, rows, Objective("forward_kl", "always"))[1]["row_divergence"]
    assert got.abs().max() < 1e-5  # the same model: equal on what is shared


@pytest.mark.parametrize("how", [{"weights": [1.0, 1.0]}, {"streams": [["a"], ["b"]]}])
def test_a_top_k_teacher_beside_hidden_states_is_refused(how):
    with pytest.raises(ConfigError, match="cache/x gives its best tokens"):
        SeveralPlan([Plain("m"), Plain("cache/x", "top_k", 32)], **how)


@pytest.mark.parametrize("beside", ["sampled", "top_k", "hidden"])
@pytest.mark.parametrize("how", [{"weights": [1.0, 1.0]}, {"streams": [["a"], ["b"]]}])
def test_a_teacher_known_by_drawn_ids_stands_beside_no_other(how, beside):
    with pytest.raises(ConfigError, match="cache/x gives ids drawn from it"):
        SeveralPlan([Plain("cache/x", "sampled", 32), Plain("m", beside, 32)], **how)


def test_a_stream_without_a_teacher_and_a_teacher_without_its_stream_are_refused():
    plan = SeveralPlan([Plain("a"), Plain("b")], streams=[["maths"], ["code"]])
    plan.check_streams(["code", "maths"])
    with pytest.raises(ConfigError, match="the stream chat has no teacher"):
        plan.check_streams(["code", "maths", "chat"])
    with pytest.raises(ConfigError, match="the stream code is no source"):
        plan.check_streams(["maths"])


def recipe(tmp_path: Path, teacher, **data):
    return recipe_from(
        {
            "teacher": teacher,
            "student": {"model": "s"},
            "data": {"sources": [{"path": "x.jsonl", "name": "x"}], **data},
            "training": {"output_dir": str(tmp_path / "r"), "max_steps": 1, "batch_size": 1},
        }
    )


def test_a_recipe_lists_teachers_with_weights_or_with_streams(tmp_path):
    weighed = recipe(
        tmp_path, [{"model": "a", "weight": 0.7, "dtype": "float32"}, {"model": "b", "weight": 1}]
    )
    assert [(one.teacher.model, one.weight) for one in weighed.teacher] == [("a", 0.7), ("b", 1.0)]
    routed = recipe(tmp_path, [{"model": "a", "streams": ["x"]}, {"cache": "c", "streams": ["y"]}])
    assert routed.teacher[1].teacher.cache == "c"


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ([{"model": "a"}, {"model": "b"}], "give all of them a weight, streams, or a condition"),
        ([{"model": "a", "weight": 1.0}, {"model": "b", "streams": ["x"]}], "combined in one way"),
        ([{"model": "a", "streams": ["x"]}, {"model": "b", "streams": ["x"]}], "stream x has two teachers"),
        ([{"model": "a", "weight": 0.0}, {"model": "b", "weight": 1.0}], "weight"),
        ([{"model": "a", "weight": 1.0}], "teacher"),
    ],
)
def test_a_list_that_says_no_one_way_is_refused(tmp_path, teacher, told):
    with pytest.raises(ConfigError, match=told):
        recipe(tmp_path, teacher)


def test_routing_needs_held_out_text_with_a_stream(tmp_path):
    with pytest.raises(ConfigError, match="belongs to none"):
        recipe(
            tmp_path,
            [{"model": "a", "streams": ["x"]}, {"model": "b", "streams": ["y"]}],
            evaluation={"path": "e.jsonl"},
        )
