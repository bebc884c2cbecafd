"""Cuts of architectures whose layers differ by their number: the kinds stay, or the cut is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from selectkd.errors import ConfigError
from selectkd.models.cut import cut_shape, cut_student
from selectkd.models.layers import layers_of

from .every_type import tiny_model


def changed(model_type, **values):
    """A tiny model of a type, these values of its configuration changed."""
    config = tiny_model(model_type).config.to_dict() | values
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_cut_of_every_name_for_the_number_of_layers():
    for model_type in ("gpt2", "mpt", "opt", "bloom", "gpt_neox", "falcon"):
        teacher = tiny_model(model_type)
        student, kept, _ = cut_student(teacher, 2, "even")
        assert kept == [0, 3] and len(layers_of(student)) == 2 == student.config.num_hidden_layers
        assert logits(student) != logits(teacher)
        assert logits(cut_student(teacher, 4, "even")[0]) == logits(teacher)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 33]]), use_cache=False).logits.tolist()


CUTS = {
    "dense layers first": ("deepseek_v3", {"first_k_dense_replace": 2}, [1, 2], {"first_k_dense_replace": 1}),
    "no dense layer left": ("deepseek_v3", {"first_k_dense_replace": 1}, [2, 3], {"first_k_dense_replace": 0}),
    "a pattern of kinds": ("nemotron_h", {}, [1, 3], {}),
    "a cycle of kinds": (
        "recurrent_gemma", {"block_types": ["recurrent", "recurrent", "attention"]}, [1, 2],
        {"block_types": ["recurrent", "attention"]},
    ),
    "a period of kinds": ("jamba", {}, [0, 3], {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "one kind of a period": ("jamba", {}, [0, 2], {}),
    "numbers of layers": ("qwen3_moe", {"mlp_only_layers": [0, 2]}, [1, 2], {"mlp_only_layers": [1]}),
    "kinds by name": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}, [1, 2],
                      {"layer_types": ["full_attention", "conv"]}),
    "layers without rotation": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, [1, 2], {"no_rope_layers": [0, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CUTS)
def test_the_kept_pattern_is_written_into_the_configuration(kind, tmp_path):
    model_type, values, kept, written = CUTS[kind]
    teacher = changed(model_type, **values)
    logits(teacher)  # some keep what they read last
    student, _, _ = cut_student(teacher, len(kept), kept)
    for name, value in written.items():
        assert getattr(student.config, name) == value
    ours, theirs = layers_of(student), layers_of(teacher)
    for new, old in enumerate(kept):
        assert [type(m) for m in ours[new].modules()] == [type(m) for m in theirs[old].modules()]
        for name, value in ours[new].state_dict().items():
            assert torch.equal(value, theirs[old].state_dict()[name])
    student.save_pretrained(tmp_path)  # and the configuration gives the same model back
    assert logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)) == logits(student)
    assert len(layers_of(cut_shape(teacher, len(kept), kept))) == len(kept)


REFUSED = {
    "no period places the kinds": ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 1}, [0, 1, 3]),
    "a weight that follows from the number": ("diffllama", {}, [1, 3]),
    "a scale that follows from the number": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [1, 3]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cut_whose_layers_would_be_of_another_kind_is_refused(kind):
    model_type, values, kept = REFUSED[kind]
    teacher = changed(model_type, **values)
    for cut in (cut_student, cut_shape):
        with pytest.raises(ConfigError, match="Keep"):
            cut(teacher, len(kept), kept)


def test_a_measured_cut_of_a_model_that_projects_behind_its_last_norm():
    teacher = changed("opt", word_embed_proj_dim=16)
    text = {"input_ids": torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))}
    student, _, report = cut_student(teacher, 3, "measured", [(text, None)])
    with torch.no_grad():
        p, q = (model(**text).logits.log_softmax(-1) for model in (teacher, student.eval()))
    assert report.kl[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
