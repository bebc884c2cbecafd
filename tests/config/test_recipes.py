"""Recipes: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selectkd.cli.init import starter
from selectkd.config import Recipe, load_recipe, recipe_from
from selectkd.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = """\
teacher: {model: teacher}
student: {model: student}
data:
  sources:
    - path: data.jsonl
objective:
  verifier: {name: spec_k, k: 3}
training:
  output_dir: runs/x
  max_steps: 10
  batch_size: 4
"""


def written(folder: Path, text: str | bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    told = str(caught.value)
    assert len(told.splitlines()) <= 6
    return told


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_of_the_repository_loads(file: Path) -> None:
    assert isinstance(load_recipe(file), Recipe)


def test_there_is_a_recipe_for_each_pair_of_the_paper() -> None:
    pairs = {
        (recipe.teacher.model, recipe.student.model)
        for recipe in map(load_recipe, RECIPES.glob("*-to-*.yaml"))
    }
    assert {student for _, student in pairs} == {
        "Qwen/Qwen2-1.5B",
        "h2oai/h2o-danube2-1.8b-base",
        "google/gemma-2-2b",
        "Qwen/Qwen2-Math-1.5B",
        "deepseek-ai/deepseek-coder-1.3b-base",
        "models/InternVL2-2B-hf",
    }


def test_full_size_recipes_carry_the_papers_numbers() -> None:
    for path in RECIPES.glob("*-to-*.yaml"):
        recipe = load_recipe(path)
        training, lora = recipe.training, recipe.training.lora
        assert (training.learning_rate, training.seed) == (5e-5, 42)
        # an image of a few patches is more than the paper's 1,024 tokens
        lengths = (4096, None) if path.stem.startswith("internvl") else (1024, 512)
        assert (training.max_length, training.max_prompt_length) == lengths
        assert lora is not None and (lora.r, lora.alpha, lora.dropout) == (16, 128, 0.05)
        assert training.batch_size * training.gradient_accumulation in (32, 128)
        assert recipe.objective.beta == 0.01 and recipe.objective.gate == {"name": "greedy_topk", "k": 5}


@pytest.mark.parametrize("layers", [None, 24])
def test_the_starter_recipe_loads(tmp_path: Path, layers: int | None) -> None:
    text = starter("a/big", "a/small", layers, "chats.jsonl")
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.training.output_dir == "runs/first" and (recipe.student.model is None) == (
        layers is not None
    )
    assert recipe.objective.gate == {"name": "always"}  # plain distillation, as the studies have it ahead
    gated = load_recipe(written(tmp_path, text.replace("# selection:", "selection:"))).objective
    assert gated.gate == {"name": "greedy_topk", "k": 5} and gated.beta != 1.0


def test_without_an_objective_the_papers_is_used(tmp_path: Path) -> None:
    text = SMALL.replace("objective:\n  verifier: {name: spec_k, k: 3}\n", "")
    objective = load_recipe(written(tmp_path, text)).objective
    assert objective.divergence == {"name": "forward_kl"}
    assert objective.verifier == {"name": "greedy_topk", "k": 5} and objective.beta == 0.01


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, number: str) -> None:
    assert (
        load_recipe(written(tmp_path, SMALL + f"  learning_rate: {number}\n")).training.learning_rate == 1e-4
    )
    assert (
        load_recipe(written(tmp_path, SMALL), [f"training.learning_rate={number}"]).training.learning_rate
        == 1e-4
    )


def test_1e3_is_a_whole_number_of_steps(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, SMALL), ["training.max_steps=1e3"]).training.max_steps == 1000


def test_yaml_1_1_booleans_are_words(tmp_path: Path) -> None:
    assert "must be true or false" in message(written(tmp_path, SMALL), "data.packing=yes")


@pytest.mark.parametrize(
    ("broken", "right"),
    [
        ("teecher: {model: t}\n", "teacher"),
        ("  lerning_rate: 1e-4\n", "learning_rate"),
        ("  lora: {rr: 4}\n", "r"),
        ("  early_stopping: {patiance: 4}\n", "patience"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(
    tmp_path: Path, broken: str, right: str
) -> None:
    told = message(written(tmp_path, SMALL + broken))
    assert f"Did you mean {right!r}?" in told and "recipe.yaml:12" in told


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    text = """\
teacher: {modle: t}
student: {from_teacher: {layers: 0, choose: best}}
data: {sources: [{path: x, wieght: 2}], evaluation: 3}
objective: {beta: 1.5, reduction: mean}
training: {output_dir: r, batch_size: four, dtype: float16, learning_rate: -1}
"""
    told = message(written(tmp_path, text))
    for key in (
        "teacher.modle",
        "teacher.model",
        "student.from_teacher.layers",
        "student.from_teacher.choose",
        "data.sources.0.wieght",
        "data.evaluation",
        "objective.beta",
        "objective.reduction",
        "training.batch_size",
        "training.dtype",
        "training.learning_rate",
    ):
        assert key in told, key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "training={output_dir: x, batch_size: 1, max_steps: 9, epochs: 1}",
            "exactly one of max_steps and epochs",
        ),
        ("training.max_steps=null", "exactly one of max_steps and epochs"),
        ("student={model: s, from_teacher: {layers: 4}}", "exactly one of model and from_teacher"),
        ("objective.by_writer={nobody: {beta: 0}}", "must be"),
        ("objective.beta={start: 1, end: 0}", "exactly one of steps and until_tar"),
        ("objective.beta=1.01", "at most 1"),
        ("objective.beta=.nan", "objective.beta"),
        ("objective.temperature=0", "above 0"),
        ("data={sources: [{path: a.jsonl}], packing: true, bucket: true}", "no padding for bucket to save"),
        ("training.gradient_filter=1", "below 1"),
        ("objective.divergence={alpha: 1}", "needs a name"),
        ("training.evaluate_every=5", "data.evaluation"),
        ("training.early_stopping={patience: 1}", "evaluate_every"),
        ("training.max_prompt_length=1024", "max_length = 1024"),
        ("training.batch_size=true", "must be an integer"),
        ("training.batch_size=0", "at least 1"),
        ("training.batch_size='4'", "must be an integer"),
        ('training.output_dir="a\\0b"', "control characters"),
        ("training.seed=-1", "at least 0"),
        ("data.sources=[]", "must not be empty"),
        ("data.sources.0.name=../../x", "letters, digits"),
        ("data.sources.1.name=x", "the list has 1 items"),
        ("data.evaluation=1.0", "below 1"),
        (
            "data.evaluation={path: h.jsonl, weight: 2}",
            "data.evaluation.weight has no effect on held-out text",
        ),
        ("data.evaluation={path: h.jsonl, policy: dataset}", "data.evaluation.policy has no effect"),
        ("training.lerning_rate=1", "Did you mean 'learning_rate'"),
        ("trainning.seed=1", "Did you mean 'training'"),
        ("training.seed.x=1", "there is no training.seed.x"),
        ("training.seed", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("training.seed=[", "not YAML"),
        ("training.seed=!!python/object/apply:os.system [ls]", "tag"),
        ("teacher=null", "teacher"),
    ],
)
def test_what_cannot_work_is_refused_in_words(tmp_path: Path, change: str, words: str) -> None:
    assert words in message(written(tmp_path, SMALL), change)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = recipe_from(
        {
            "teacher": {"model": "t"},
            "student": {"from_teacher": {"layers": 2, "choose": [0, 3]}},
            "data": {"sources": [{"path": "x"}], "evaluation": 0.1},
            "training": {"output_dir": "r", "epochs": 1, "batch_size": 1},
        }
    )
    with pytest.raises(ValueError, match="frozen"):
        recipe.teacher.model = "other"  # type: ignore[misc]
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {seed: 1}\ntraining: {seed: 2}\n", "twice (first on line 1)"),
        ("teacher:\n\tmodel: t\n", "a tab"),
        ("a: &a [1,1]\nb: &b [*a,*a]\n" + "c: [" + "*b," * 70 + "]\n", "aliases"),
        ("a: &a\n  b: *a\n", "contains itself"),
        ("x: !!python/object/apply:os.system ['touch canary']\n", "tag"),
        ("x: !!binary aGk=\n", "tag"),
        ("---\na: 1\n---\nb: 2\n", "one YAML document"),
        ("[" * 5000, "nested deeper"),
        ("- 1\n- 2\n", "mapping"),
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("1: x\n", "a key must be a word"),
        ("a: [1, 2\n", "not YAML"),
        ("a: " + "9" * 5000 + "\n", "not a number"),
        ("a: 'x\n", "not YAML"),
        (b"\xff\xfea\x00", "not UTF-8"),
        (b"teacher: caf\xe9\n", "offset 12"),
        ("x" * 5_000_000, "at most"),
        ("a: b: c\n", "not YAML"),
        ("a: \x07\n", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_quickly(tmp_path: Path, text: str | bytes, words: str) -> None:
    started = time.process_time()
    assert words in message(written(tmp_path, text))
    assert time.process_time() - started < 1.0  # the promise for hostile files


def test_nested_aliases_cannot_multiply(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 7)}]" for i in range(1, 9)]
    started = time.process_time()
    assert "values" in message(written(tmp_path, "\n".join(rows)))
    assert time.process_time() - started < 1.0


def test_a_few_aliases_and_a_merge_are_fine(tmp_path: Path) -> None:
    text = SMALL.replace("path: data.jsonl", "&one {path: a, limit: 3}\n    - {<<: *one, path: b}")
    sources = load_recipe(written(tmp_path, text)).data.sources
    assert [(source.path, source.limit) for source in sources] == [("a", 3), ("b", 3)]


def test_a_byte_order_mark_and_crlf_are_fine(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode()
    assert load_recipe(written(tmp_path, text)).training.max_steps == 10


@pytest.mark.parametrize("name", ["a b.yaml", "\N{SNOWMAN}.yaml", "x" * 200 + ".yaml"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(SMALL)
    assert load_recipe(tmp_path / name).training.batch_size == 4


def test_a_missing_recipe_names_a_near_one(tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    assert "Did you mean 'recipe.yaml'" in message(tmp_path / "recpe.yaml")
    assert "folder" in message(tmp_path)
    assert "cannot be read" in message(tmp_path / ("x" * 5000)) or "there is no recipe" in message(
        tmp_path / "y"
    )


def test_checking_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from selectkd import load_recipe; load_recipe(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(written(tmp_path, SMALL))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("rate", [1.25, -0.1])
@pytest.mark.parametrize(
    "part",
    [
        {"objective": {"verifier": {"name": "matched_random", "rate": "RATE"}}},
        {"selection": {"verifier": "matched_random", "rate": "RATE"}},
        {
            "objective": {
                "verifier": {"name": "matched_shuffle", "of": {"name": "matched_random", "rate": "RATE"}}
            }
        },
        {"objective": {"by_writer": {"dataset": {"verifier": {"name": "matched_random", "rate": "RATE"}}}}},
    ],
)
def test_random_tokens_at_a_rate_that_is_no_share_are_refused_with_the_recipe(part, rate: float) -> None:
    def values(rate: float) -> dict:
        return {
            "teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"sources": [{"path": "x"}]},
            "training": {"output_dir": "o", "max_steps": 1, "batch_size": 1},
            **json.loads(json.dumps(part).replace('"RATE"', str(rate))),
        }  # fmt: skip

    with pytest.raises(ConfigError, match=rf"rate = {rate}.*rate lies in \[0, 1\]"):
        recipe_from(values(rate))
    for share in (0.0, 1.0, 1):
        recipe_from(values(share))
