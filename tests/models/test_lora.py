from __future__ import annotations

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.models.lora import add_lora, linear_layers, merge

from .every_type import tiny_model

IDS = torch.tensor([[5, 9, 7]])


def test_fresh_adapters_change_nothing_and_only_they_train(llama):
    before = llama(IDS).logits
    wrapped = add_lora(llama, r=4).eval()
    assert torch.equal(wrapped(IDS).logits, before)
    assert {n.split(".")[-3] for n, p in wrapped.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_merging_gives_a_plain_model_with_the_same_logits(llama):
    wrapped = add_lora(llama, r=4, dropout=0.0).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = wrapped(IDS).logits
    merged = merge(wrapped)
    assert type(merged) is type(llama) and merge(merged) is merged
    # W x + B (A x) and (W + B A) x round differently in fp32
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_module_is_answered_with_the_linear_layers_there_are(llama):
    with pytest.raises(
        ConfigError, match=r"'query'.*q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ):
        add_lora(llama, target_modules=["q_proj", "query"])
    with pytest.raises(ConfigError, match="lm_head"):
        add_lora(llama, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="is empty"):
        add_lora(llama, target_modules=[])
    with pytest.raises(ConfigError, match="r = 0"):
        add_lora(llama, r=0)


def test_all_linear_names_every_linear_layer_but_the_head(llama):
    named = add_lora(tiny_model("llama"), target_modules=linear_layers(llama))
    every = add_lora(tiny_model("llama"), target_modules="all-linear")
    assert [n for n, _ in every.named_parameters()] == [n for n, _ in named.named_parameters()]
    assert not any("lm_head.lora" in n for n, _ in every.named_parameters())


@pytest.mark.parametrize(
    "model_type, wrong",
    [("mamba2", "out_proj"), ("falcon_h1", "out_proj"), ("bamba", "out_proj"), ("phimoe", "router")],
)
def test_a_layer_whose_product_an_adapter_cannot_reach_is_not_offered(model_type, wrong):
    model = tiny_model(model_type)
    offered = linear_layers(model)
    assert (
        offered and wrong not in offered and wrong in {n.rpartition(".")[2] for n, _ in model.named_modules()}
    )
    with pytest.raises(ConfigError, match=wrong):
        add_lora(model, target_modules=[offered[0], wrong])


def test_what_peft_refuses_is_a_config_error(llama):
    llama.model.layers[0].mlp.act_fn = torch.nn.Linear(3, 3)
    llama.model.layers[1].mlp.act_fn = torch.nn.Bilinear(3, 3, 3)
    with pytest.raises(ConfigError, match="peft cannot put adapters on act_fn of LlamaForCausalLM"):
        add_lora(llama, target_modules=["act_fn"])
