from __future__ import annotations

import pytest
import torch
import transformers as hf

from selectkd.errors import ConfigError
from selectkd.models.check import check_head
from selectkd.models.head import backbone, head_of
from selectkd.models.load import load_model
from selectkd.models.lora import add_lora

from .conftest import SIZES
from .every_type import tiny_config, tiny_model

GEMMA = SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
ARCHITECTURES = {
    "llama": hf.LlamaConfig(**SIZES),
    "qwen2": hf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2": hf.Gemma2Config(**GEMMA, final_logit_softcapping=3.0),
    "gemma3": hf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=2.0),
    "granite": hf.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": hf.CohereConfig(**SIZES, logit_scale=0.0625),
    "phi": hf.PhiConfig(**SIZES),  # its head has a bias
}


def tiny(name):
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    for parameter in model.parameters():  # large weights, so that a missing cap or scale shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits_both_ways(model):
    ids = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return head_of(model).logits(backbone(model)(input_ids=ids)), model(input_ids=ids).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_head_on_the_backbone_gives_the_model_s_own_logits(name):
    ours, theirs = logits_both_ways(tiny(name))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
def test_a_peft_wrapped_model_keeps_its_adapter_in_the_backbone_and_its_head(name):
    model = tiny(name)
    plain, _ = logits_both_ways(model)
    model = add_lora(model, r=2, dropout=0.0).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    ours, theirs = logits_both_ways(model)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_the_head_is_the_parameter_itself_and_takes_its_gradient():
    model = tiny("llama")
    head = head_of(model)
    assert head.weight is model.lm_head.weight
    head.logits(backbone(model)(input_ids=torch.tensor([[5, 6]]))).sum().backward()
    assert model.lm_head.weight.grad is not None and model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_check_head_refuses_an_architecture_with_an_unknown_scale():
    check_head(tiny("granite"))
    model = tiny("granite")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ConfigError, match="in a way that selectkd does not support"):
        check_head(model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ConfigError, match="no language-model head"):
        head_of(hf.AutoModel.from_config(ARCHITECTURES["llama"]))


SCALED = {
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "mpt": {"logit_scale": 0.25},  # in its configuration, and unused by its forward pass
    "xlstm": {"output_logit_soft_cap": 3.0},
    "inkling_text": {"logits_mup_width_multiplier": 4.0, "unpadded_vocab_size": None},
}


@pytest.mark.parametrize("model_type", SCALED)
def test_a_scale_is_read_as_the_architecture_reads_it(model_type):
    model = tiny_model(model_type)
    for name, value in SCALED[model_type].items():
        assert hasattr(model.config, name)
        setattr(model.config, name, value)
    check_head(model)


def test_a_head_with_more_rows_than_there_are_logits_is_refused():
    model = tiny_model("inkling_text")
    model.config.unpadded_vocab_size = 60
    with pytest.raises(ConfigError, match="60 of them, and 64 rows"):
        check_head(model)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "prophetnet", "modernbert-decoder"])
def test_a_head_with_a_transform_before_its_matrix_is_refused_at_every_load(model_type, tokenizer, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="in a way that selectkd does not support"):
        load_model(tmp_path)


def test_the_backbone_of_llama_4_is_found_where_it_has_another_name():
    ours, theirs = logits_both_ways(tiny_model("llama4_text"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_model_that_gives_no_numbers_is_not_taken_for_one_with_another_head(llama):
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    check_head(llama)


@pytest.mark.parametrize("model_type", ["bert-generation", "xlnet", "cpmant"])
def test_a_model_that_reads_later_tokens_is_refused(model_type):
    with pytest.raises(ConfigError, match="reads later tokens"):
        check_head(tiny_model(model_type))


def test_the_same_model_as_a_decoder_is_taken():
    config = tiny_config("bert-generation")
    config.is_decoder = True
    torch.manual_seed(0)
    check_head(hf.AutoModelForCausalLM.from_config(config).eval())
