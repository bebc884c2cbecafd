"""What is trained on under each policy, and what it is divided by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from selectkd.config.rollouts import (
    AdaptivePolicy,
    DatasetPolicy,
    InterleavedPolicy,
    PairsPolicy,
    StudentPolicy,
    TeacherMixedPolicy,
    TeacherPolicy,
)
from selectkd.data.collate import Batch, collate
from selectkd.data.rewrite import examples_of, last_turns
from selectkd.errors import ConfigError
from selectkd.objective.objective import Objective
from selectkd.rollouts.adaptive import AdaptiveScheduler
from selectkd.rollouts.streams import streams_of
from selectkd.rollouts.writer import RolloutWriter
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.step import DistillationModel
from training.tiny import VOCABULARY, padded, texts, tiny_llama

PLAIN = Objective("forward_kl", "always", beta=1.0)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_llama(1, layers=3)


@pytest.fixture
def student() -> Any:
    return tiny_llama(2)


def writer(policy: Any, student: Any, teacher: Any, **changed: Any) -> RolloutWriter:
    given: dict[str, Any] = {
        "ends": frozenset({2}),
        "width": VOCABULARY,
        "pad_id": 0,
        "max_length": 40,
        "steps": 10,
    }
    return RolloutWriter([policy], streams_of(["made"], [policy]), student, teacher, **{**given, **changed})


def batch(count: int = 6) -> Batch:
    return padded(texts(count, streams=1), count)[0]


def test_a_batch_comes_apart_into_prompts_and_answers_and_together_again() -> None:
    examples = texts(5, streams=2)
    made = collate(examples, pad_id=0)
    assert [one.input_ids for one in examples_of(made)] == [one.input_ids for one in examples]
    for turn, example in zip(last_turns(made), examples, strict=True):
        assert turn.example.input_ids == example.input_ids and turn.example.completion == example.completion
        assert turn.stream == example.stream


def test_a_conversation_goes_on_at_its_last_trained_turn() -> None:
    example = texts(1)[0]
    trained = [False, False, True, True, False, True, True] + [False] * (len(example) - 7)
    several = replace(example, completion=trained)
    (turn,) = last_turns(collate([several], pad_id=0))
    assert turn.prompt == example.input_ids[:5] and turn.completion == example.input_ids[5:7]


def test_the_dataset_policy_leaves_the_batch_alone(student: Any, teacher: Any) -> None:
    given = batch()
    assert writer(DatasetPolicy(name="dataset"), student, None)(given, 0) is given


def test_student_text_is_what_the_student_writes_now_and_differs_from_step_to_step(
    student: Any, teacher: Any
) -> None:
    write = writer(StudentPolicy(name="student", temperature=0.9), student, None)
    first, again, later = write(batch(), 0), write(batch(), 0), write(batch(), 1)
    assert (
        torch.equal(first.input_ids, again.input_ids) and first.input_ids.tolist() != later.input_ids.tolist()
    )
    for old, new in zip(last_turns(batch()), last_turns(first), strict=True):
        assert new.prompt == old.prompt and new.completion != old.completion
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05)
    assert write(batch(), 0).input_ids.tolist() != first.input_ids.tolist()


def test_a_mixture_decides_for_each_sequence_with_its_probability(student: Any, teacher: Any) -> None:
    policy = StudentPolicy(name="student", probability=0.3, max_new_tokens=1)
    write = writer(policy, student, None)
    assert [stream.name for stream in write.streams] == ["made", "made.student"]
    drawn = [write(batch(20), step).stream for step in range(20)]
    share = float(torch.cat(drawn).double().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5  # 4 sigma of 400 draws
    assert 0 < float(drawn[0].sum()) < 20  # a batch holds both


def test_the_teachers_text_of_a_prompt_is_written_once_and_stays(student: Any, teacher: Any) -> None:
    write = writer(TeacherPolicy(name="teacher"), student, teacher)
    first = write(batch(), 0)
    assert torch.equal(write(batch(), 5).input_ids, first.input_ids)
    assert torch.equal(
        writer(TeacherPolicy(name="teacher"), student, teacher)(batch(), 3).input_ids, first.input_ids
    )


def test_a_prompt_in_two_sources_has_the_teachers_text_of_each_ones_sampling_and_limit(
    student: Any, teacher: Any
) -> None:
    policies = [TeacherPolicy(name="teacher", max_new_tokens=limit) for limit in (3, 9)]
    example = texts(1, streams=1)[0]
    given = collate([example, replace(example, stream=1)], pad_id=0)
    both = RolloutWriter(
        policies, streams_of(["a", "b"], policies), student, teacher, ends=frozenset(), width=VOCABULARY, pad_id=0,
        max_length=40,
    )  # fmt: skip
    lengths = [sum(one.completion) for one in examples_of(both(given, 1))]
    assert lengths == [3, 9]


def test_pairs_are_two_texts_of_each_prompt_in_streams_of_their_own(student: Any, teacher: Any) -> None:
    write = writer(PairsPolicy(name="pairs"), student, teacher)
    streams = [(stream.name, stream.writer) for stream in write.streams]
    assert streams == [("made", "teacher"), ("made.student", "student")]
    made = write(batch(), 0)
    assert made.stream.tolist() == [0, 1] * 6
    turns = last_turns(made)
    assert [turn.prompt for turn in turns[::2]] == [turn.prompt for turn in turns[1::2]]
    stored = writer(PairsPolicy(name="pairs", teacher_text="source"), student, None)(batch(), 0)
    assert [t.completion for t in last_turns(stored)[::2]] == [t.completion for t in last_turns(batch())]


def test_mixed_text_can_stand_beside_the_sources_own(student: Any, teacher: Any) -> None:
    write = writer(TeacherMixedPolicy(name="teacher_mixed", with_source=True), student, teacher)
    assert [stream.writer for stream in write.streams] == ["dataset", "both"]
    assert write(batch(), 0).stream.tolist() == [0, 1] * 6


def test_a_policy_that_needs_the_teacher_as_a_model_says_so(student: Any) -> None:
    for policy in (TeacherPolicy(name="teacher"), InterleavedPolicy(name="interleaved")):
        with pytest.raises(ConfigError, match="one whole model in memory"):
            writer(policy, student, None)


def test_a_prompt_without_room_keeps_its_text_and_is_counted(student: Any, teacher: Any) -> None:
    write = writer(StudentPolicy(name="student"), student, None, max_length=5)
    made = write(batch(), 0)
    kept = [old == new for old, new in zip(last_turns(batch()), last_turns(made), strict=True)]
    assert any(kept) and write.log_fields()["written"]["no_room"] == sum(kept)


def test_imitkd_trains_on_draws_from_its_buffer(student: Any, teacher: Any) -> None:
    write = writer(StudentPolicy(name="student", replay=8, max_new_tokens=4), student, None)
    known = set()
    for step in range(4):
        made = write(batch(), step)
        stored = [(tuple(one.prompt), tuple(one.completion)) for one in write.buffers[0].texts]
        assert len(stored) <= 8
        known |= set(stored)
        assert {(tuple(t.prompt), tuple(t.completion)) for t in last_turns(made)} <= set(stored)
    assert len(known) > 8  # older ones made room


@pytest.mark.parametrize(
    "policy",
    [
        StudentPolicy(name="student", probability=0.5, replay=8, max_new_tokens=4),
        AdaptivePolicy(name="adaptive", start=1.0, capacity=8, max_new_tokens=4),
        PairsPolicy(name="pairs", max_new_tokens=4),
    ],
)
def test_a_text_goes_to_the_teacher_of_the_record_its_prompt_is_of(
    student: Any, teacher: Any, policy: Any
) -> None:
    write = writer(policy, student, teacher)
    plain = batch(12)
    routed = replace(plain, route=torch.arange(12) % 3)
    of_prompt = {tuple(turn.prompt): turn.route for turn in last_turns(routed)}
    assert len(of_prompt) == 12 and set(of_prompt.values()) == {0, 1, 2}
    for step in range(4):
        turns = last_turns(write(routed, step))
        assert [turn.route for turn in turns] == [of_prompt[tuple(turn.prompt)] for turn in turns]
    other = writer(policy, student, teacher)
    other.load_state_dict(write.state_dict())
    assert other.buffers == write.buffers


def test_distillms_scheduler_rises_with_the_loss_and_chooses_by_its_rule() -> None:
    scheduler = AdaptiveScheduler(fill_first=True)
    for loss in (1.0, 1.09, 1.10, 1.15, 1.25):
        scheduler.evaluated(loss)
    assert scheduler.phi == pytest.approx(0.2)
    assert scheduler.source(0.05, 0, 10, stored=0, full=False) == "fresh"
    assert (
        scheduler.source(0.15, 5, 10, stored=3, full=False) == "fresh"
    )  # 0.15 >= 0.2 * 0.5, but it is not full
    assert scheduler.source(0.15, 5, 10, stored=3, full=True) == "replay"
    assert scheduler.source(0.25, 5, 10, stored=3, full=True) == "dataset"


@pytest.mark.parametrize(
    "policy",
    [
        AdaptivePolicy(name="adaptive", start=0.8, capacity=7, max_new_tokens=4),
        StudentPolicy(name="student", probability=0.5, replay=5, max_new_tokens=4),
        PairsPolicy(name="pairs", max_new_tokens=4),
        InterleavedPolicy(name="interleaved", max_new_tokens=4),
    ],
    ids=lambda policy: policy.name,
)
def test_a_run_taken_up_again_reaches_the_weights_of_one_that_was_not_interrupted(
    policy: Any, teacher: Any
) -> None:
    start = tiny_llama(2)

    def run(model: Any, write: RolloutWriter, first: int, last: int, optimizer: Any) -> None:
        distilled = DistillationModel(model, LiveTeacher(copy.deepcopy(teacher))).train()
        ledger = Ledger(PLAIN, streams=[one.name for one in write.streams], write=write)
        for ledger.step in range(first, last):
            for micro_batch in ledger.begin([batch(4 + ledger.step % 2)]):
                loss, _ = distilled(
                    micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.plan
                )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, cut = copy.deepcopy(start), copy.deepcopy(start)
    at_once = writer(policy, whole, teacher)
    run(whole, at_once, 0, 6, torch.optim.SGD(whole.parameters(), lr=0.5))
    before = writer(policy, cut, teacher)
    run(cut, before, 0, 3, torch.optim.SGD(cut.parameters(), lr=0.5))
    after = writer(policy, cut, teacher)
    after.load_state_dict(before.state_dict())
    run(cut, after, 3, 6, torch.optim.SGD(cut.parameters(), lr=0.5))
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), start.parameters(), strict=True))
    assert at_once.state_dict() == after.state_dict()


@pytest.mark.parametrize("length", [16, 67])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_loss_is_divided_by_the_tokens_that_were_written_not_by_the_labels_of_the_data_set(
    length: int, reduction: str, teacher: Any
) -> None:
    """The fault of TRL's GKD: 8 labels of the data set with 16 or 67 tokens of the student give another loss."""
    from selectkd.data.example import Example

    model = tiny_llama(2)
    model.config.max_position_embeddings = 128
    eight = Example([5, 6, 7, *range(10, 18)], [False] * 3 + [True] * 8)
    policy = StudentPolicy(name="student", max_new_tokens=length)
    write = writer(policy, model, None, max_length=128, ends=frozenset())
    seen: list[Any] = []

    def written(given: Batch, step: int) -> Batch:
        seen.append(write(given, step))
        return seen[-1]

    ledger = Ledger(PLAIN, reduction, write=written)
    feed = BatchFeed(lambda epoch: [collate([eight], pad_id=0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    (line,) = train_loop(DistillationModel(model, LiveTeacher(teacher)), feed, ledger, optimizer, steps=1)
    ids = torch.tensor([last_turns(seen[0])[0].example.input_ids])
    with torch.no_grad():
        logp, logq = (m(ids).logits[0, 2:-1].double().log_softmax(-1) for m in (teacher, model))
    each = (logp.exp() * (logp - logq)).sum(-1)
    assert each.shape[0] == length
    assert line["loss"] == pytest.approx(float(each.mean()), rel=1e-4)  # fp32 against fp64
    assert line["tokens"] == length


def test_streams_that_would_share_a_name_are_refused(recipe: Callable[..., Any]) -> None:
    policy = StudentPolicy(name="student", probability=0.5)
    with pytest.raises(ConfigError, match=r"two streams are called a\.student"):
        streams_of(["a", "a.student"], [policy, DatasetPolicy(name="dataset")])
