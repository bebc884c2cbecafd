from __future__ import annotations

import importlib.util
import json
import socket
import struct

import pytest
import torch

from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.load import PACKAGED, load_model, load_tokenizer, packaged_teacher


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local load opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_local_folder_loads_without_the_network(folder, llama, no_network):
    loaded = load_model(str(folder))
    assert loaded.source == str(folder) and loaded.revision is None and not loaded.model.training
    ids = torch.tensor([[5, 9]])
    assert torch.equal(loaded.model(ids).logits, llama(ids).logits)
    assert loaded.tokenizer.eos_token == "</s>" and loaded.tokenizer.chat_template
    assert load_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16


def test_the_tokenizer_alone_needs_no_weights(folder, no_network):
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(str(folder)).eos_token_id == 2
    with pytest.raises(ConfigError, match="no weights"):
        load_model(folder)


@pytest.mark.parametrize(
    "spec", ["./nowhere", "/no/such/model", "runs/../x", "nowhere.gguf", "a/b/c", "a/b;rm", "../x"]
)
def test_a_path_that_does_not_exist_is_said_to_be_missing_and_never_looked_up(
    spec, tmp_path, monkeypatch, no_network
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # what lies beside the repository is not this test's business
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="does not exist"):
            load(spec)


def test_a_missing_folder_inside_an_existing_one_is_a_path_not_a_hub_name(tmp_path, monkeypatch, no_network):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_model("runs/student")


def test_a_hub_name_that_cannot_be_had_offline_is_a_config_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="it cannot be loaded from the hub: it is not in the local cache"):
        load_model("nobody/no-such-model-here")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused_before_it_could_run(folder, name, tmp_path):
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((folder / name).read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / name).write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"never read")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="auto_map"):
            load(folder)
    assert not canary.exists()


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    # a protocol-0 pickle that calls open(canary, "w") when it is loaded
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode())
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model.bin\)"):
        load_model(folder)
    assert not canary.exists()


def header(entries: object, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def test_a_damaged_safetensors_file_is_refused_by_its_header(folder):
    path = folder / "model.safetensors"
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    broken = [
        header({}, 200 * 2**20) + b" " * 100,
        header({"a": one, "b": one | {"data_offsets": [4, 12]}}) + bytes(12),
        path.read_bytes()[:-4],
        b"",
    ]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="not a sound safetensors file"):
            load_model(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="00002-of-00002"):
        load_model(folder)


def test_arguments_that_cannot_work_say_what_would(folder):
    with pytest.raises(ConfigError, match="float32, bfloat16"):
        load_model(folder, dtype="float16")
    with pytest.raises(ConfigError, match="bitsandbytes-4bit, bitsandbytes-8bit"):
        load_model(folder, quantization="gptq")
    with pytest.raises(ConfigError, match="Leave it out"):
        load_model(folder, revision="main")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_model(folder)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantised_loading_without_its_package_says_what_to_install(folder):
    for name in ("bitsandbytes-4bit", "bitsandbytes-8bit"):
        with pytest.raises(ConfigError, match=r"pip install .bitsandbytes>="):
            load_model(folder, quantization=name)


def test_a_file_that_only_ends_in_gguf_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(IntegrityError, match="GGUF"):
        load_model(path, gguf_cache=tmp_path / "cache")
    with pytest.raises(IntegrityError, match="GGUF"):
        load_tokenizer(path, gguf_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(importlib.util.find_spec(PACKAGED) is None, reason="the demo teacher is not installed")
def test_the_packaged_teacher_is_the_known_file_and_its_tokenizer_ends_turns():
    assert packaged_teacher().name.endswith(".gguf")
    tokenizer = load_tokenizer(PACKAGED)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
