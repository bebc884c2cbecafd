"""GGUF files: each family comes back with the same logits, each kind of tokenizer with the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from export.pairs import CONFIGS, byte_level, sentencepiece, student, tiny_model
from selectkd.data.alignment import PROBES
from selectkd.errors import ConfigError
from selectkd.evals.exported import answers_of, fidelity, id_texts
from selectkd.models.export.exported import encoder, model_logits
from selectkd.models.export.gguf import file as gguf_file
from selectkd.models.export.gguf import tensors
from selectkd.models.export.gguf.families import family_of
from selectkd.models.export.gguf.file import write_gguf
from selectkd.models.export.gguf.reading import READ_BY_TRANSFORMERS, _separated, read_gguf
from selectkd.models.export.gguf.vocabulary import SPLITS, vocabulary_of
from selectkd.models.load import Loaded

HALF = 2.0**-11
"""The largest relative error of a number in f16."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level()


def back(model: Any, tokenizer: Any, folder: Path, kind: str = "f32") -> Any:
    path = folder / "tiny.gguf"
    write_gguf(model, tokenizer, path, kind=kind, ends={2, 4}, name="tiny")
    return read_gguf(path, Loaded(model, tokenizer, "tiny", None))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_comes_back_with_the_same_logits_and_settings(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model(name)
    found = back(model, tokenizer, tmp_path)
    ids = torch.randint(320, (40,), generator=torch.Generator().manual_seed(1))
    ours = model_logits(model)(ids)
    # norms of Gemma are stored with 1 added, which rounds their last bits
    assert torch.allclose(found.logits(ids), ours, rtol=0, atol=2e-5 * float(ours.abs().max()))
    assert found.differences == [] and found.ends == {2, 4} and found.template == tokenizer.chat_template
    assert found.read_by == (
        "transformers" if model.config.model_type in READ_BY_TRANSFORMERS else "selectkd"
    )


def test_f16_rounds_each_weight_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = back(model, tokenizer, tmp_path, "f16").model
    for name, weight in model.named_parameters():
        apart = (found.get_parameter(name) - weight).abs()
        assert (apart <= (HALF * weight.abs() + 2.0**-25 if weight.ndim > 1 else 0.0)).all(), name


def test_rows_are_interleaved_as_llama_cpp_rotates_them() -> None:
    rows = torch.arange(2 * 8.0)[:, None]  # two heads of eight channels
    assert tensors.interleaved(rows, 2).flatten().tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(_separated(tensors.interleaved(rows, 2), 2), rows)


@pytest.mark.parametrize(("kind", "most"), [("q8_0", 5e-3), ("q5_1", 5e-2), ("q4_0", 1.5)])
def test_blocks_of_fewer_bits_keep_vectors_and_say_how_many_tensors_they_hold(
    kind: str, most: float, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    path = tmp_path / "tiny.gguf"
    _, formats = write_gguf(model, tokenizer, path, kind=kind, ends={2}, name="tiny")
    ends = 2 if kind != "q8_0" else 0  # embedding and head
    assert formats == {"f32": 11, kind: 16 - ends, **({"q8_0": ends} if ends else {})}
    found = read_gguf(path, Loaded(model, tokenizer, "tiny", None))
    one = student(model, tokenizer)
    seen = fidelity(one, found, answers_of(one, [[5, 6, 7, 8]] * 2, 4), [])
    assert 0 < seen.kl.value < most


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "qwen2", "sentencepiece"])
def test_a_tokenizer_comes_back_with_the_same_ids(kind: str, tmp_path: Path) -> None:
    made = sentencepiece() if kind == "sentencepiece" else byte_level(kind)
    model = tiny_model("llama")
    found = back(model, made, tmp_path)
    ours = encoder(made)
    texts = id_texts(made, ["<|im_end|>\n 12345 <think>x"])
    assert len(texts) > 20
    wrong = [text for text, special in texts if found.encode(text, special) != ours(text, special)]
    assert wrong == []
    fields = GGUFReader(tmp_path / "tiny.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == {"sentencepiece": "default"}.get(kind, kind)


def test_a_text_that_the_tokenizer_composes_is_compared_composed_and_noted() -> None:
    made = byte_level("qwen2")
    assert not any("e\u0301" in text for text, _ in id_texts(made, [])) and any(
        "e\u0301" in text for text in PROBES
    )
    assert "NFC" in vocabulary_of(made, 320, {2}).notes[0]


def test_every_way_to_cut_text_is_one_that_transformers_reads_alike() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for regex, name in SPLITS.items():
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == regex, name


def test_what_gguf_has_no_place_for_is_refused_by_its_name(tokenizer: Any, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        model = tiny_model(changes.pop("family", "llama"))
        for key, value in changes.items():
            setattr(model.config, key, value)
        with pytest.raises(ConfigError) as error:
            write_gguf(model, tokenizer, tmp_path / "x.gguf", kind="f16", ends={2}, name="x")
        assert not (tmp_path / "x.gguf").exists()
        return str(error.value)

    assert "GGUF files of falcon" in refused(model_type="falcon") and "qwen3" in refused(model_type="falcon")
    assert "rope_type = 'dynamic'" in refused(rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert "mscale" in refused(rope_parameters={"rope_type": "yarn", "factor": 2.0, "mscale": 1.0})
    assert "the activation 'relu'" in refused(hidden_act="relu")
    assert "layer_types" in refused(family="gemma2", layer_types=["full_attention"] * 6)
    assert "query_pre_attn_scalar" in refused(family="gemma3", query_pre_attn_scalar=64)
    assert "no_rope_layers" in refused(family="smollm3", no_rope_layers=[0, 1])
    assert "sliding_attention" in refused(family="qwen2", layer_types=["sliding_attention"] * 2)


def test_a_tokenizer_that_gguf_has_no_place_for_is_refused_by_its_kind() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ConfigError, match="WordLevel"):
        vocabulary_of(words, 4, set())
    made = byte_level()
    with pytest.raises(ConfigError, match="the head has 100 rows"):
        vocabulary_of(made, 100, {2})
    with pytest.raises(ConfigError, match="can name three"):
        vocabulary_of(made, 320, {2, 3, 4, 5})
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="Lowercase"):
        vocabulary_of(made, 320, {2})
    made.backend_tokenizer.normalizer = normalizers.NFC()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="Whitespace"):
        vocabulary_of(made, 320, {2})


def test_a_weight_that_no_half_holds_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match="too large for f16"):
        write_gguf(model, tokenizer, tmp_path / "x.gguf", kind="f16", ends={2}, name="x")


def test_a_name_does_not_make_llama_cpp_strip_spaces(tokenizer: Any) -> None:
    assert "phi-3" not in gguf_file._name("My Phi-3 student", tokenizer).lower()
    assert family_of(CONFIGS["phi3"]()).arch == "phi3"
