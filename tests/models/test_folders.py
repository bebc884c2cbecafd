"""Model folders that are not what they say, and folders made to run something."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from selectkd.errors import ConfigError, IntegrityError
from selectkd.models import shape
from selectkd.models.load import check_local, load_model, load_shape, load_tokenizer

from .conftest import SIZES


def rewritten(folder, change):
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def untied(tokenizer, tmp_path):
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


OTHER_TENSORS = {
    "torch.compile's prefix": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "model.layers.0"),
    "another wrapper's prefix": (lambda w: {f"module.{k}": v for k, v in w.items()}, "module.lm_head"),
    "no head": (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, "lm_head.weight"),
    "no last layer": (lambda w: {k: v for k, v in w.items() if "layers.3." not in k}, "model.layers.3.input"),
    "one norm missing": (lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"}, "model.norm"),
    "one tensor too many": (lambda w: w | {"model.layers.4.mlp.up_proj.weight": torch.ones(48, 32)}, "layers.4"),
    "one tensor transposed": (
        lambda w: w | {"model.layers.1.mlp.up_proj.weight": w["model.layers.1.mlp.up_proj.weight"].t()},
        r"layers.1.mlp.up_proj.weight: \(32, 48\)",
    ),
    "whole numbers without scales": (
        lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)},
        "stored as I8",
    ),
    "eight bits without scales": (
        lambda w: w | {"lm_head.weight": torch.ones(64, 32).to(torch.float8_e4m3fn)},
        "stored as F8_E4M3",
    ),
}  # fmt: skip


def test_a_folder_that_was_sound_is_built_again_only_where_it_differs(untied, monkeypatch):
    """What was refused is looked at each time: somebody may have mended it."""
    check_local(untied)
    built, plain = [], shape.shape_of
    monkeypatch.setattr(shape, "shape_of", lambda folder: built.append(folder) or plain(folder))
    check_local(untied)
    assert built == []
    configured(untied, intermediate_size=56)
    for times in (1, 2):
        with pytest.raises(IntegrityError, match="of another shape"):
            check_local(untied)
        assert len(built) == times
    configured(untied, intermediate_size=SIZES["intermediate_size"])
    rewritten(untied, lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"})
    with pytest.raises(IntegrityError, match=r"model\.norm"):
        check_local(untied)


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_a_file_without_the_model_s_tensors_is_refused_by_their_names_before_a_weight_loads(
    kind, untied, monkeypatch
):
    change, named = OTHER_TENSORS[kind]
    rewritten(untied, change)
    monkeypatch.setattr(
        hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
    )
    for load in (load_model, check_local):
        with pytest.raises(IntegrityError, match=named):
            load(untied)


LIES = {
    "a wider vocabulary": {"vocab_size": 80},
    "a narrower vocabulary": {"vocab_size": 48},
    "another width": {"hidden_size": 48},
    "more layers": {"num_hidden_layers": 5},
    "fewer layers": {"num_hidden_layers": 3},
    "a billion layers": {"num_hidden_layers": 10**9},
    "more key heads": {"num_key_value_heads": 4},
    "another head width": {"head_dim": 16},
    "another type, with biases": {"model_type": "qwen2"},
    "another type, with other norms": {"model_type": "gemma2"},
    "biases": {"attention_bias": True},
    "tied, with another head in the file": {"intermediate_size": 64, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_configuration_that_lies_is_refused_from_the_headers(lie, untied, monkeypatch):
    configured(untied, **LIES[lie])
    monkeypatch.setattr(
        hf.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
    )
    for load in (load_model, check_local):
        with pytest.raises(IntegrityError, match="untied"):
            load(untied)


IMPOSSIBLE = {
    "heads that do not divide the width": {"num_attention_heads": 5, "head_dim": None},
    "a type of a newer transformers": {"model_type": "brandnew"},
    "a type that is a path": {"model_type": "../evil"},
    "a type that is a number": {"model_type": 3},
    "an activation nobody knows": {"hidden_act": "os.system"},
    "a text for a number": {"hidden_size": "wide"},
    "no heads": {"num_attention_heads": 0, "head_dim": None},
    "a negative vocabulary": {"vocab_size": -1},
    "weights of GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "weights of AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "weights of bitsandbytes": {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    },
    "weights of a method nobody knows": {"quantization_config": {"quant_method": "evil"}},
    "weights of no method": {"quantization_config": [1]},
    "an encoder-decoder": {"model_type": "t5"},
    "an image model": {"model_type": "vit"},
}


@pytest.mark.skipif("bitsandbytes" in sys.modules, reason="bitsandbytes is installed")
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_folder_that_transformers_cannot_make_a_model_of_is_refused_with_the_reason(kind, untied):
    configured(untied, **IMPOSSIBLE[kind])
    for load in (load_model, check_local, load_shape):
        with pytest.raises((ConfigError, IntegrityError), match="untied") as told:
            load(untied)
        assert len(str(told.value)) < 900 and str(told.value).count("\n") < 6


def deep(**inner):
    return {"text_config": {"vision_config": [inner]}}


AUTO = {
    "AutoModelForCausalLM": "evil.Model",
    "AutoConfig": "evil.Config",
    "AutoTokenizer": ["evil.T", "evil.T"],
}
ESCAPES = {
    "code for the configuration": ("config.json", {"auto_map": AUTO}),
    "code of another repository": ("config.json", {"auto_map": {"AutoConfig": "org/evil--evil.Config"}}),
    "code for a part": ("config.json", deep(auto_map=AUTO)),
    "code for a tokenizer": ("tokenizer_config.json", {"auto_map": AUTO}),
    "code for a tokenizer, as a list": ("tokenizer_config.json", {"auto_map": ["evil.T", None]}),
    "code for generation": ("generation_config.json", {"auto_map": AUTO}),
    "code for a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}),
    "a kernel": ("config.json", {"attn_implementation": "org/kernel"}),
    "a kernel by its private name": ("config.json", {"_attn_implementation": "org/kernel"}),
    "a kernel by its internal name": ("config.json", {"_attn_implementation_internal": "org/kernel"}),
    "a function of a kernel": ("config.json", {"attn_implementation": "org/kernel@main:forward"}),
    "a paged kernel": ("config.json", {"attn_implementation": "paged|org/kernel"}),
    "kernels by part of a part": ("config.json", {"attn_implementation": {"a": {"": "org/kernel"}}}),
    "kernels by part": ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "org/kernel"}}),
    "a kernel of a part": ("config.json", deep(attn_implementation="org/kernel")),
    "a kernel for experts": ("config.json", {"experts_implementation": "org/kernel"}),
    "a kernel for experts by its private name": ("config.json", {"_experts_implementation": "org/kernel"}),
    "kernels for layers": ("config.json", {"kernel_config": {"kernel_mapping": {"RMSNorm": "org/kernel:Norm"}}}),
    "fusions": ("config.json", {"fusion_config": {"patch_embeddings": True}}),
    "weights of another name": ("config.json", {"transformers_weights": "evil.bin"}),
    "a generation function": ("generation_config.json", {"custom_generate": "org/evil"}),
    "an image model from the hub": ("config.json", deep(architecture="hf-hub:org/evil")),
    "a backbone from the hub": ("config.json", deep(backbone="hf_hub:org/evil")),
    "an adapter's base": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/evil"}),
    "an adapter's module": ("adapter_config.json", {"peft_type": "LORA", "megatron_core": "evil"}),
    "an index out of the folder": ("model.safetensors.index.json", {"weight_map": {"a": "../evil.safetensors"}}),
    "an index to a pickle": ("model.safetensors.index.json", {"weight_map": {"a": "evil.bin"}}),
}  # fmt: skip


@pytest.mark.parametrize("way", ESCAPES)
def test_a_folder_made_to_run_something_is_refused(way, folder, tmp_path, monkeypatch):
    name, content = ESCAPES[way]
    canary = tmp_path / "canary"
    for script in (
        "evil.py",
        "custom_generate/generate.py",
        "kernel/build/torch-universal/kernel/__init__.py",
    ):
        (folder / script).parent.mkdir(parents=True, exist_ok=True)
        (folder / script).write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "evil.bin").write_bytes(f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode())
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    monkeypatch.chdir(folder)  # where a relative name would be found
    for load in (load_model, check_local):
        with pytest.raises((ConfigError, IntegrityError), match=name):
            load(folder)
    if name == "config.json":
        with pytest.raises(ConfigError, match=name):
            load_shape(folder)
    if name in ("config.json", "tokenizer_config.json"):
        with pytest.raises(ConfigError, match=name):
            load_tokenizer(folder)
    assert not canary.exists() and "evil" not in sys.modules


def test_code_that_nothing_names_stays_unread(folder, llama, tmp_path):
    """A custom_generate folder and scripts lie in many repositories; without a key that names them they are files."""
    canary = tmp_path / "canary"
    (folder / "custom_generate").mkdir()
    for script in ("custom_generate/generate.py", "modeling_llama.py", "configuration_llama.py"):
        (folder / script).write_text(f"open({str(canary)!r}, 'w')\n")
    ids = torch.tensor([[5, 9]])
    assert torch.equal(load_model(folder).model(ids).logits, llama(ids).logits) and not canary.exists()


def test_an_adapter_without_its_model_says_what_would_work(folder):
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "org/evil"}'
    )
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="merge_and_unload"):
        load_model(folder)


TOKENIZERS = {
    "no JSON": ("tokenizer.json", lambda _: "{"),
    "another thing than an object": ("tokenizer.json", lambda _: [1]),
    "nothing in it": ("tokenizer.json", lambda _: {}),
    "a model of a newer version": ("tokenizer.json", lambda own: own | {"model": {"type": "Brandnew"}}),
    "a part of a newer version": (
        "tokenizer.json",
        lambda own: own | {"pre_tokenizer": {"type": "Brandnew"}},
    ),
    "a token whose id is an object": (
        "tokenizer.json",
        lambda own: own | {"added_tokens": [own["added_tokens"][0] | {"id": {}}]},
    ),
    "an end that is a number": ("tokenizer_config.json", lambda own: own | {"eos_token": 3}),
    "tokens that are a number": ("tokenizer_config.json", lambda own: own | {"extra_special_tokens": 0}),
    "a length that is an object": ("tokenizer_config.json", lambda own: own | {"model_max_length": {}}),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_files_that_make_no_tokenizer_are_refused(kind, folder):
    name, change = TOKENIZERS[kind]
    path = folder / name
    made = change(json.loads(path.read_text()))
    path.write_text(made if isinstance(made, str) else json.dumps(made))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match=r"no tokenizer that can be read|not valid JSON"):
            load(folder)
