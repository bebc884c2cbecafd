"""The command line: exit codes, messages, and what it does not load or print."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from selectkd.cli import main
from selectkd.cli.terminal import clean
from selectkd.errors import (
    CacheError,
    ConfigError,
    DataError,
    IntegrityError,
    NumericsError,
    ResourceError,
    SelectKDError,
    TeacherError,
)

RECIPE = """\
teacher: {model: no/such/folder}
student: {from_teacher: {layers: 2}}
data: {sources: [{path: train.jsonl}]}
training: {output_dir: runs/x, max_steps: 2, batch_size: 2}
"""


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from selectkd.cli import main; codes = [main([*verb.split(), '--help']) for verb in "
        "('', 'train', 'demo', 'show', 'data', 'data check', 'data show', 'study', 'study dynamics', 'env', "
        "'eval', 'init', 'study landscape', 'study speculate')]; "
        "print(codes, [m for m in ('torch', 'transformers', 'numpy', 'datasets', 'scipy') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == f"{[0] * 14} []"


def test_python_dash_m_is_the_command_line() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "selectkd", "--version"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0.1.0\n", "")


def test_an_unknown_verb_or_flag_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2 and main(["show", "--jsn"]) == 2 and main([]) == 2 and main(["train"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "train" in told


def test_a_wrong_recipe_is_exit_2_with_all_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + "objektive: {}\n")
    assert main(["train", str(file), "--set", "training.batch_size=x"]) == 2
    told = capsys.readouterr().err
    assert "Did you mean 'objective'?" in told and "--set training.batch_size" in told
    assert "Traceback" not in told and len(told.splitlines()) <= 6


def test_a_wrong_recipe_loads_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + "objektive: {}\n")
    code = (
        "import sys; from selectkd.cli import main; code = main(['train', sys.argv[1]]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert ran.returncode == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (TeacherError("x"), 4),
        (IntegrityError("x"), 5),
        (CacheError("x"), 5),
        (NumericsError("x"), 6),
        (ResourceError("x"), 7),
        (SelectKDError("x"), 1),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 7),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2),
    ],
)
def test_each_error_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("selectkd.cli.env.environment", fail)
    assert main(["env"]) == code
    told = capsys.readouterr()
    assert "Traceback" not in told.err and told.err.strip() and not told.out


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selectkd", "train", str(tmp_path / "none.yaml")]
    quiet = subprocess.run(command, capture_output=True, text=True, check=False)
    loud = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert quiet.returncode == 2 and "Traceback" not in quiet.stderr
    assert loud.returncode != 0 and "Traceback" in loud.stderr and "there is no recipe" in loud.stderr


def test_a_long_message_is_cut_to_six_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DataError("\n".join(map(str, range(40))))

    monkeypatch.setattr("selectkd.cli.env.environment", fail)
    assert main(["env"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and "35 more lines" in lines[-1]


def test_control_characters_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "a\x1b]0;title\x07\x1b[2J", "completion": "b\u202ec\u2028d\x9b31m"}
    file.write_text(json.dumps(row) + "\n")
    assert main(["data", "show", str(file)]) == 0
    assert main(["train", "x\x1b[31m.yaml"]) == 2
    told = capsys.readouterr()
    for letter in "\x1b\x07\u202e\u2028\x9b":
        assert letter not in told.out + told.err
    assert clean("a\nb\tc") == "a\nb\\tc" and clean("\ud800") == "\\ud800"


def test_show_lists_every_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from selectkd.objective.divergences import DIVERGENCES
    from selectkd.objective.selectors import SELECTORS
    from selectkd.objective.verifiers import VERIFIERS

    assert main(["show", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    kinds = ["divergences", "label_losses", "verifiers", "selectors", "extras", "policies", "methods"]
    assert list(told) == kinds
    for kind, table in (("divergences", DIVERGENCES), ("verifiers", VERIFIERS), ("selectors", SELECTORS)):
        assert [row["name"] for row in told[kind]] == list(table)
        assert all(row["doc"] for row in told[kind])
    assert {row["name"]: row["parameters"] for row in told["verifiers"]}["greedy_topk"] == {"k": 5}


def test_show_methods_is_a_list_of_presets_with_parts_defaults_and_sources(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from selectkd.config.methods import METHODS

    assert main(["show", "methods", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told] == list(METHODS)
    for row in told:
        assert row["doc"] and row["source"] and row["parts"]
        assert row["defaults"] and all(one["key"] and one["source"] for one in row["defaults"])
        keys = {one["key"] for one in row["defaults"]}
        assert set(METHODS[row["name"]].cites) <= keys | {key.rpartition(".")[0] for key in keys}


def test_show_method_prints_its_parts_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "method", "distillm2"]) == 0
    told = capsys.readouterr().out
    assert "data.policy.top_p: 0.95   # " in told and "{name: distillm2, gradual: true}" in told
    assert (
        main(["show", "method", "distilm2"]) == 2 and "Did you mean 'distillm2'?" in capsys.readouterr().err
    )
    assert main(["show", "policy", "interleaved"]) == 0 and "window=25" in capsys.readouterr().out


def test_show_one_by_kind_or_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "verifier", "spec_k"]) == 0 and "Source:" in capsys.readouterr().out
    assert main(["show", "skew_kl"]) == 0 and "alpha=0.1" in capsys.readouterr().out
    assert main(["show", "spec_kk"]) == 2 and "Did you mean 'spec_k'?" in capsys.readouterr().err
    assert main(["show", "verifiers", "speck"]) == 2 and "Did you mean 'spec_k'?" in capsys.readouterr().err


def test_env_says_versions_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert main(["env", "--json", "-"]) == 0
    told = capsys.readouterr().out
    found = json.loads(told)
    assert found["selectkd"] == "0.1.0" and found["packages"]["torch"] and found["cores"] >= 1
    assert "hf_canary" not in told
    assert main(["env"]) == 0 and "torch" in capsys.readouterr().out


def test_init_writes_a_recipe_that_loads_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from selectkd.config import load_recipe

    file = tmp_path / "new.yaml"
    assert main(["init", str(file)]) == 0
    before = file.read_bytes()
    assert load_recipe(file).teacher.model and main(["init", str(file)]) == 2
    assert file.read_bytes() == before and "exists" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "no" / "such" / "r.yaml")]) == 2
    assert main(["init", str(tmp_path / ("x" * 300))]) == 2


def test_data_check_counts_records_and_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "c", "completion": "d"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(file)]) == 0
    assert "records 4, duplicates 2" in capsys.readouterr().out


def test_data_that_cannot_be_read_is_exit_3_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert main(["data", "check", str(file)]) == 3
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert main(["data", "check", str(file), "--on-bad-record", "skip"]) == 0
    assert main(["data", "check", str(file), "--on-bad-record", "maybe"]) == 2


def test_data_check_skips_records_that_cannot_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "a?", "answer": "b"}, {"question": "a?", "answer": "c", "video": "a.mp4"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "check", str(file)]) == 3
    assert "rows.jsonl:2: has the field 'video'" in capsys.readouterr().err
    assert main(["data", "check", str(file), "--on-bad-record", "skip"]) == 0
    out = capsys.readouterr().out
    assert "records 1, duplicates 0" in out and "bad: " in out and "1 bad records skipped" in out


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A tokenizer of words, without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "one", "two", "three", "four"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


def test_data_show_marks_what_is_trained_on(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "one two", "completion": " three four"}) + "\n")
    assert main(["data", "show", str(file), "--tokenizer", str(tokenizer_folder)]) == 0
    assert "[[three four</s>]]" in capsys.readouterr().out.replace("[[ ", "[[").replace(" </s>", "</s>")
    assert main(["data", "check", str(file), "--tokenizer", str(tokenizer_folder)]) == 0
    assert "examples 1, tokens 5, trained on 3" in capsys.readouterr().out


def test_data_check_reads_a_recipe(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "one two", "completion": " three four"}) + "\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        RECIPE.replace("no/such/folder", str(tokenizer_folder)).replace(
            "[{path: train.jsonl}]", f"[{{path: {rows}}}], evaluation: {{path: {rows}}}"
        )
    )
    assert main(["data", "check", str(recipe)]) == 0
    assert "in held-out text too 1, with its prompts 1, with nearly its prompts 1" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "one two", "completion": " four three"}) + "\n")
    recipe.write_text(
        recipe.read_text().replace(f"evaluation: {{path: {rows}}}", f"evaluation: {{path: {other}}}")
    )
    assert main(["data", "check", str(recipe)]) == 0
    assert "in held-out text too 0, with its prompts 1" in capsys.readouterr().out
    recipe.write_text(recipe.read_text().replace(f", evaluation: {{path: {other}}}", ""))
    assert main(["data", "check", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert "no held-out text" in told and "overlap" not in told  # nothing was compared
    as_json = tmp_path / "r.json"
    as_json.write_text(json.dumps(yaml.safe_load(recipe.read_text())))
    assert main(["data", "check", str(as_json)]) == 0
    assert capsys.readouterr().out == told
