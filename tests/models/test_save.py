from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selectkd.errors import ConfigError, ResourceError
from selectkd.models.lora import add_lora
from selectkd.models.save import save_student

IDS = torch.tensor([[5, 9, 7]])


def test_a_saved_student_comes_back_with_tokenizer_template_and_card(llama, tokenizer, tmp_path):
    folder = save_student(llama, tokenizer, tmp_path / "a" / "student", "# card\n")
    again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert torch.equal(again(IDS).logits, llama(IDS).logits)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    assert (folder / "README.md").read_text() == "# card\n"
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    assert os.listdir(folder.parent) == ["student"]


def test_saving_again_replaces_the_model_and_leaves_nothing_beside_it(folder, llama, tokenizer):
    with torch.no_grad():
        llama.model.norm.weight.mul_(2)
    save_student(llama, tokenizer, folder, "# second\n")
    again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert torch.equal(again(IDS).logits, llama(IDS).logits)
    assert os.listdir(folder.parent) == ["teacher"] and (folder / "README.md").read_text() == "# second\n"


def test_an_adapter_is_merged_in_the_file_and_not_in_memory(llama, tokenizer, tmp_path):
    wrapped = add_lora(llama, r=2, dropout=0.0).eval()
    folder = save_student(wrapped, tokenizer, tmp_path / "student", "")
    assert hasattr(wrapped, "merge_and_unload") and any("lora_A" in n for n, _ in wrapped.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    torch.testing.assert_close(again(IDS).logits, wrapped(IDS).logits)


def test_a_failed_save_leaves_the_old_model_and_no_rubbish(folder, llama, tokenizer, tmp_path):
    before = (folder / "README.md").read_bytes()

    class FullDisk:
        def save_pretrained(self, where):
            raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left.*bytes are free"):
        save_student(llama, FullDisk(), folder, "# new\n")
    assert (folder / "README.md").read_bytes() == before and os.listdir(folder.parent) == ["teacher"]


def test_a_file_or_a_foreign_folder_is_never_overwritten(llama, tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    for name in ("file", "photos"):
        with pytest.raises(ConfigError):
            save_student(llama, tokenizer, tmp_path / name, "")
