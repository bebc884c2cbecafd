from __future__ import annotations

import pytest
import torch

from selectkd.errors import ConfigError
from selectkd.models.lora import add_lora, merge

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
