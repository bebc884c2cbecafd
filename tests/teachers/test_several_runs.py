"""`selectkd train` with a list of teachers: averaged, routed by stream, routed by a field of the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from selectkd import Objective, distillation_loss
from selectkd.cli import main
from selectkd.data.collate import collate, collate_packed
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, DataError
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.several import SeveralPlan, SeveralTeacher
from training.tiny import VOCABULARY, WORDS, texts, tiny_llama, write_pair

TOPICS = ("maths", "code")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    write_pair(root, tiny_llama(1, layers=3, hidden=48))
    tiny_llama(5, hidden=16).save_pretrained(root / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "other" / name).write_bytes((root / "teacher" / name).read_bytes())
    generator = torch.Generator().manual_seed(4)
    lines = []
    for i in range(16):
        words = [WORDS[j] for j in torch.randint(len(WORDS), (10,), generator=generator).tolist()]
        row = {
            "prompt": " ".join(words[:4]),
            "completion": " " + " ".join(words[4:]),
            "topic": TOPICS[i % 2],
            "level": i % 3,
        }
        lines.append(json.dumps(row))
    (root / "mixed.jsonl").write_text("\n".join(lines), "utf-8")
    for k, topic in enumerate(TOPICS):
        (root / f"{topic}.jsonl").write_text("\n".join(lines[k::2]), "utf-8")
    return root


def run(
    root: Path, out: Path, teacher: Any, files: tuple[str, ...] = ("mixed",), **data: Any
) -> tuple[int, list[Any]]:
    """(exit code, metrics lines with a loss)."""
    content = {
        "teacher": teacher,
        "student": {"model": str(root / "student")},
        "data": {"sources": [{"path": str(root / f"{name}.jsonl"), "name": name} for name in files], **data},
        "objective": {"verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.1},
        "training": {
            "output_dir": str(out / "run"), "max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32,
            "max_prompt_length": 16, "probe_samples": 0,
        },
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    code = main(["train", str(path)])
    metrics = out / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()] if metrics.exists() else []
    return code, [line for line in lines if "loss" in line]


def losses(lines: list[Any]) -> list[float]:
    return [line["loss"] for line in lines]


def test_one_teacher_listed_twice_trains_as_that_teacher_alone_whichever_way_it_is_listed(root, tmp_path):
    one = {"model": str(root / "teacher")}
    code, alone = run(root, tmp_path / "one", one)
    assert code == 0 and len(alone) == 4
    ways = {
        "weight": [{**one, "weight": 0.3}, {**one, "weight": 0.7}],
        "when": [{**one, "when": {"topic": "maths"}}, {**one, "when": {"topic": "code", "level": [0, 1, 2]}}],
    }
    for name, teacher in ways.items():
        code, lines = run(root, tmp_path / name, teacher)
        # the mean of two equal logs, or rows laid out anew, in fp32: the last digit may differ and grows by training
        assert code == 0 and losses(lines) == pytest.approx(losses(alone), rel=1e-4), name


def test_a_field_routes_as_streams_of_the_same_records_do(root, tmp_path):
    """Where each topic is a file of its own, a run by the field and a run by the streams see the same teachers."""
    a, b = str(root / "teacher"), str(root / "other")
    by_field = [{"model": a, "when": {"topic": "maths"}}, {"model": b, "when": {"topic": "code"}}]
    by_stream = [{"model": a, "streams": ["maths"]}, {"model": b, "streams": ["code"]}]
    swapped = [{"model": b, "when": {"topic": "maths"}}, {"model": a, "when": {"topic": "code"}}]
    got = {
        name: run(root, tmp_path / name, teacher, TOPICS, evaluation=0.25)
        for name, teacher in (("field", by_field), ("stream", by_stream), ("swapped", swapped))
    }
    assert [code for code, _ in got.values()] == [0, 0, 0]
    assert losses(got["field"][1]) == losses(got["stream"][1])
    assert losses(got["field"][1])[0] != pytest.approx(losses(got["swapped"][1])[0], rel=1e-2)


def test_text_that_the_student_writes_keeps_the_teacher_of_its_record(root, tmp_path):
    """As above where a policy writes half of the text: by the field and by the streams, the same teachers."""
    a, b = str(root / "teacher"), str(root / "other")
    by_field = [{"model": a, "when": {"topic": "maths"}}, {"model": b, "when": {"topic": "code"}}]
    by_stream = [{"model": a, "streams": ["maths"]}, {"model": b, "streams": ["code"]}]
    policy = {"name": "student", "probability": 0.5, "max_new_tokens": 6}
    field, stream = (
        run(root, tmp_path / name, teacher, TOPICS, policy=policy)
        for name, teacher in (("field", by_field), ("stream", by_stream))
    )
    assert field[0] == stream[0] == 0 and len(field[1]) == 4
    assert losses(field[1]) == losses(stream[1])
    assert sum(line["written"]["texts"] for line in field[1]) > 0


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"topic": "chat"}, "topic = 'code' meets no teacher's `when`"),
        ({"topic": ["code", "maths"]}, "topic = 'maths' meets the `when` of two teachers"),
        ({"subject": "code"}, "meets no teacher's `when`"),
    ],
)
def test_a_record_without_one_teacher_ends_the_run_before_weights_load(root, tmp_path, capsys, second, told):
    teacher = [
        {"model": str(root / "teacher"), "when": {"topic": "maths"}},
        {"model": str(root / "other"), "when": second},
    ]
    assert run(root, tmp_path / "bad", teacher)[0] == 3
    err = capsys.readouterr().err
    assert told in err and "mixed.jsonl:" in err and "loading" not in err
    if "no teacher" in told:
        assert run(root, tmp_path / "skip", teacher, on_bad_record="skip")[0] == 0


def test_a_value_of_another_type_is_another_value():
    plan = SeveralPlan.__new__(SeveralPlan)
    plan.when = [{"level": 1}, {"level": [True, "1"]}]
    assert [plan.routes({"level": value}, "x") for value in (1, True, "1")] == [0, 1, 1]
    with pytest.raises(DataError, match=r"x: level = 1\.0 meets no"):
        plan.routes({"level": 1.0}, "x")


@pytest.mark.parametrize("packed", [False, True])
def test_a_routed_sample_gets_the_teacher_its_record_names(packed):
    models = [tiny_llama(1, layers=3, hidden=48), tiny_llama(5, layers=2, hidden=32)]
    examples = [type(e)(e.input_ids, e.completion, 0, route=i % 2) for i, e in enumerate(texts(6))]
    batch = collate_packed([examples[:3], examples[3:]], pad_id=0) if packed else collate(examples, pad_id=0)
    seen = supervised(batch)
    objective = Objective("forward_kl", "always")
    hidden, head = torch.randn(len(seen), 8), torch.randn(VOCABULARY, 8)

    def divergence(teacher):
        return distillation_loss(hidden, head, teacher(batch, seen.position), objective)[1]["row_divergence"]

    got = divergence(SeveralTeacher([LiveTeacher(model) for model in models]))
    for number, model in enumerate(models):
        assert batch.route is not None
        mine = batch.route[seen.sequence] == number
        torch.testing.assert_close(got[mine], divergence(LiveTeacher(model))[mine], rtol=1e-4, atol=1e-5)
    made_up = collate([type(e)(e.input_ids, e.completion) for e in examples], pad_id=0)
    with pytest.raises(ConfigError, match="names none"):
        SeveralTeacher([LiveTeacher(model) for model in models])(made_up, seen.position[:3])
