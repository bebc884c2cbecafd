"""A run from a cache against the same run with the teacher in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import CacheError, ConfigError
from selectkd.loss.head import Head
from selectkd.teachers.cache import open_cache, verify
from selectkd.teachers.cache.payloads import SampledPayload, empirical_rows
from selectkd.training.run import train
from training.tiny import VOCABULARY, tiny_tokenizer

Made = Callable[..., str]


def losses(path: str) -> list[float]:
    folder = train(load_recipe(path, [])).run_dir
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("evaluation" in line for line in lines)
    return [line["loss"] for line in lines if "loss" in line] + [
        line["evaluation"]["kl"] for line in lines if "evaluation" in line
    ]


@pytest.mark.parametrize(
    "stored",
    [
        {"payload": "hidden", "precision": "float32"},
        {"payload": "top_k", "k": VOCABULARY, "precision": "float32"},
    ],
    ids=["hidden", "top_k with K = V"],
)
def test_a_run_from_an_exact_cache_has_the_losses_of_a_live_teacher(
    recipe: Made, pair: Path, tmp_path: Path, stored: dict[str, Any]
) -> None:
    model = str(pair / "teacher")
    live = losses(recipe({"model": model}, run="live"))
    path = recipe({"cache": str(tmp_path / "cache"), "model": model, **stored}, run="build")
    assert main(["cache", "build", path]) == 0
    assert main(["cache", "verify", path]) == 0
    cached = losses(recipe({"cache": str(tmp_path / "cache")}, run="cached"))
    torch.testing.assert_close(cached, live, rtol=0, atol=1e-5)


def test_padded_heads_of_both_models_change_nothing_of_a_run_from_a_cache(
    recipe: Made, pair: Path, tmp_path: Path
) -> None:
    """Each head has eight rows more than the tokenizer has ids, as likely as tokens."""
    models = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[VOCABULARY:].normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        models[name] = str(tmp_path / name)

    def numbers(teacher: dict[str, Any], run: str) -> list[float]:
        path = recipe(teacher, run=run, objective={"divergence": "forward_kl", "language_model": 0.5})
        content = load_recipe(path, [f"student.model={models['student']}"])
        if run == "build":
            assert main(["cache", "build", path, "--set", f"student.model={models['student']}"]) == 0
            return []
        lines = (train(content).run_dir / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    live = numbers({"model": models["teacher"]}, "live")
    stored = {"payload": "top_k", "k": VOCABULARY + 8, "precision": "float32"}
    numbers({"cache": str(tmp_path / "cache"), "model": models["teacher"], **stored}, "build")
    torch.testing.assert_close(numbers({"cache": str(tmp_path / "cache")}, "cached"), live, rtol=0, atol=1e-5)


def test_a_finished_cache_says_what_it_holds(recipe: Made, pair: Path, tmp_path: Path, capsys: Any) -> None:
    path = recipe({"cache": str(tmp_path / "cache"), "model": str(pair / "teacher")})
    assert main(["cache", "build", path, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert main(["cache", "verify", path, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["sound"] is True
    assert main(["cache", "repair", path, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shards": [], "files": []}
    assert main(["cache", "info", str(tmp_path / "cache"), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["payload"], told["precision"], told["row_bytes"], told["records"]) == (
        "hidden",
        "bfloat16",
        96,
        24,
    )


def test_a_student_can_be_cut_from_the_teacher_of_a_cache(recipe: Made, pair: Path, tmp_path: Path) -> None:
    teacher = {"cache": str(tmp_path / "cache"), "model": str(pair / "teacher")}
    assert main(["cache", "build", recipe(teacher)]) == 0
    cut = ["student.model=null", "student.from_teacher={layers: 2}"]
    assert len(train(load_recipe(recipe(teacher), cut)).kept or ()) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "elsewhere"), ("revision", "f" * 40), ("dtype", "bfloat16"), ("payload", "top_k"), ("k", 3),
     ("precision", "float32")],
)  # fmt: skip
def test_a_cache_of_another_teacher_or_setting_is_refused_with_the_difference(
    recipe: Made, pair: Path, tmp_path: Path, key: str, value: Any
) -> None:
    teacher = {"cache": str(tmp_path / "cache"), "model": str(pair / "teacher")}
    assert main(["cache", "build", recipe(teacher)]) == 0
    with pytest.raises(CacheError, match=rf"{key}: .* in the cache, {value} wanted"):
        train(load_recipe(recipe({**teacher, key: value}), []))


def test_text_that_the_cache_lacks_is_refused_and_less_text_is_fine(
    recipe: Made, pair: Path, tmp_path: Path
) -> None:
    path = recipe({"cache": str(tmp_path / "cache"), "model": str(pair / "teacher")})
    assert main(["cache", "build", path]) == 0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "w1 w2", "completion": " w3"}) + "\n")
    with pytest.raises(CacheError, match="does not hold sample 0"):
        train(load_recipe(path, [f"data.sources.0.path={other}", "data.evaluation=null",
                                 "training.evaluate_every=null"]))  # fmt: skip
    with pytest.raises(CacheError, match="other tokens of it are trained"):
        train(load_recipe(path, ["data.train_on=all"]))
    train(load_recipe(path, ["data.sources.0.limit=12"]))


@pytest.mark.parametrize(
    ("teacher", "objective", "told"),
    [
        ({"payload": "top_k", "k": 9}, {"verifier": {"name": "greedy_topk", "k": 5}}, "needs 10 stored"),
        ({"payload": "sampled", "k": 9}, {"verifier": {"name": "greedy_topk", "k": 5}}, "drawn ids"),
        ({"payload": "sampled", "k": 9}, {"divergence": "reverse_kl", "verifier": "always"}, "drawn ids"),
        ({"payload": "top_k", "k": 20}, {"temperature": 2.0}, "at another temperature"),
        ({"payload": "top_k"}, {}, "need teacher.k"),
        ({"payload": "sampled", "k": 40}, {"verifier": "always", "beta": 1.0}, "set k to 32 or less"),
    ],
)  # fmt: skip
def test_a_cache_that_could_not_carry_the_objective_is_not_built(
    recipe: Made,
    pair: Path,
    tmp_path: Path,
    teacher: dict[str, Any],
    objective: dict[str, Any],
    told: str,
    capsys: Any,
) -> None:
    path = recipe({"cache": str(tmp_path / "cache"), "model": str(pair / "teacher"), **teacher}, objective)
    assert main(["cache", "build", path]) == ConfigError.exit_code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "cache" / "index.json").exists()


def test_what_a_stream_asks_of_a_cache_is_checked_before_the_build_and_before_the_run(
    recipe: Made, pair: Path, tmp_path: Path, capsys: Any
) -> None:
    best = {"cache": str(tmp_path / "cache"), "model": str(pair / "teacher"), "payload": "top_k", "k": 9}
    path = recipe(best, {"verifier": {"name": "greedy_topk", "k": 4}})
    assert main(["cache", "build", path]) == 0
    of_stream = "data.sources.0.objective={verifier: {name: greedy_topk, k: 5}}"
    with pytest.raises(ConfigError, match=r"text of .*: greedy_topk reads .* needs 10 stored"):
        train(load_recipe(path, [of_stream]))
    for change, told in ((of_stream, "needs 10 stored"), ("objective.extras=[atkd]", "extras atkd")):
        capsys.readouterr()
        again = ["--set", f"teacher.cache={tmp_path / 'other'}", "--set", change]
        assert main(["cache", "build", path, *again]) == ConfigError.exit_code
        assert told in capsys.readouterr().err
    assert not (tmp_path / "other" / "index.json").exists()


def test_a_run_from_drawn_ids_trains(recipe: Made, pair: Path, tmp_path: Path) -> None:
    teacher = {
        "cache": str(tmp_path / "cache"),
        "model": str(pair / "teacher"),
        "payload": "sampled",
        "k": 20,
    }
    path = recipe(teacher, {"verifier": "always", "beta": 1.0})
    assert main(["cache", "build", path]) == 0
    assert all(loss > 0 for loss in losses(path))


def test_drawn_ids_give_the_teachers_probabilities_within_4_sigma() -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(40, 6, generator=generator))
    hidden = torch.randn(1, 6, generator=generator)
    payload, builds = SampledPayload(8, 40), 4000
    mean = torch.zeros(40, dtype=torch.float64)
    for seed in range(builds):
        rows = payload.decode(payload.encode(hidden, head, seed))
        mean[rows.ids[0]] += rows.logp[0].double().exp() / builds
    p = torch.softmax(head.logits(hidden)[0].double(), -1)
    sigma = (p * (1 - p) / (8 * builds)).sqrt()
    assert ((mean - p).abs() <= 4 * sigma + 1e-9).all()


def test_repeated_draws_become_distinct_ids_with_their_share() -> None:
    rows = empirical_rows(torch.tensor([[0, 0, 0, 9], [1, 2, 3, 4], [7, 7, 7, 7]]))
    assert all(len(set(ids)) == 4 for ids in rows.ids.tolist())
    shares = [
        dict(zip(i, p, strict=True)) for i, p in zip(rows.ids.tolist(), rows.logp.exp().tolist(), strict=True)
    ]
    assert shares[0][0] == 0.75 and shares[0][9] == 0.25 and shares[2][7] == 1.0


def test_two_builders_leave_the_bytes_of_one(recipe: Made, pair: Path, tmp_path: Path) -> None:
    one = recipe(
        {"cache": str(tmp_path / "one"), "model": str(pair / "teacher"), "shard_rows": 30}, run="one"
    )
    two = recipe(
        {"cache": str(tmp_path / "two"), "model": str(pair / "teacher"), "shard_rows": 30}, run="two"
    )
    assert main(["cache", "build", one]) == 0
    assert main(["cache", "build", two, "--rank", "1", "--ranks", "2"]) == 0
    assert verify(tmp_path / "two")  # not finished
    assert main(["cache", "build", two, "--rank", "0", "--ranks", "2"]) == 0
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(names) > 8
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    assert open_cache(tmp_path / "two").index["rows"] > 100
