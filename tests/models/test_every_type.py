"""Each causal model type of transformers: what is read, cut, adapted and written is the model's own, or a refusal.

The gate tries a sample; ``EVERY_TYPE=1 pytest tests/models/test_every_type.py`` tries all.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import pytest
import torch

from selectkd.data.collate import collate, collate_packed
from selectkd.data.example import Example
from selectkd.errors import ConfigError
from selectkd.evals.speculative.decode import decode, decode_alone
from selectkd.models.check import check_head
from selectkd.models.cut import cut_student
from selectkd.models.forward import last_hidden
from selectkd.models.head import backbone, head_of
from selectkd.models.layers import layers_of
from selectkd.models.lora import add_lora, linear_layers
from selectkd.models.packing import problem
from selectkd.models.shape import check_weights, shape_of
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.training.preflight.estimate import activations

from .every_type import TYPES, VOCABULARY, tiny_model

MINDED = (
    "bart", "bert", "cohere2", "cpmant", "deepseek_v3", "doge", "emu3", "falcon", "falcon_h1", "falcon_mamba", "gemma2",
    "git", "gpt2",
    "granitemoehybrid", "hyperclovax", "inkling_text", "jamba", "kimi_linear", "lfm2", "llama4_text", "mamba", "mamba2",
    "minimax", "modernbert-decoder", "mpt", "nemotron_h", "openai-gpt", "opt", "phimoe", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma", "rwkv", "smollm3", "xlm", "xlnet", "xlstm",
)  # fmt: skip
"""Each stands for a kind: a scale, a cache, a pattern of layers, a wrapper."""
TRIED = TYPES if os.environ.get("EVERY_TYPE") else sorted({*MINDED, *TYPES[::40]})
IDS = torch.tensor([[5, 9, 33, 60, 2, 17]])
UNBUILT = 40
"""At most so many types have sizes that the tiny configurations do not know."""


@functools.cache
def built(model_type: str) -> Any:
    """The tiny model of a type, or None where none can be built or run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(model_type)
            own_logits(model)
        except Exception:
            return None
    return model


@pytest.fixture(params=TRIED)
def model(request):
    made = built(request.param)
    if made is None:
        pytest.skip("transformers' defaults made small do not run")
    warnings.simplefilter("ignore")  # what transformers says of odd sizes
    return made


def own_logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def known(model):
    """Skips the rest for a type whose head is refused, by name."""
    try:
        check_head(model)
    except ConfigError as error:
        assert type(model).__name__ in str(error)
        pytest.skip("refused by name")


def test_most_types_are_built():
    assert sum(built(one) is None for one in TRIED) <= UNBUILT * len(TRIED) / len(TYPES) + 2


def test_the_head_on_the_backbone_gives_the_model_s_own_logits_or_is_refused(model):
    known(model)
    with torch.no_grad():
        ours = head_of(model).logits(backbone(model)(input_ids=IDS))
    torch.testing.assert_close(ours, own_logits(model), rtol=0, atol=1e-4)


def test_a_saved_model_is_found_whole_from_its_headers(model, tmp_path):
    model.save_pretrained(tmp_path)
    try:
        shape_of(tmp_path)
    except ConfigError as error:
        assert str(tmp_path) in str(error)
    else:
        check_weights(tmp_path)


def test_text_is_that_of_a_full_pass_over_each_prompt_alone_or_refused(model):
    known(model)
    prompts = [[9, 33, 60, 2, 17, 4, 8], [5, 11], [44, 7, 21, 30]]
    limits = [5, 7, 2]
    try:
        asked = [Request(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
        greedy = Draw(Sampling(temperature=0.0))
        texts = generate([model], asked, greedy, ends=(), width=VOCABULARY)
    except ConfigError as error:
        assert type(model).__name__ in str(error)
        return
    for prompt, text, limit in zip(prompts, texts, limits, strict=True):
        ids = list(prompt)
        for _ in range(limit):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1, :VOCABULARY].argmax()))
        assert text.ids == ids[len(prompt) :]


def test_a_cut_keeps_the_kinds_of_its_layers_or_is_refused(model):
    known(model)
    before = own_logits(model)
    try:
        total = len(layers_of(model))
        whole, _, _ = cut_student(model, total, "even")
        student, _, _ = cut_student(model, 2, "even")
    except ConfigError:
        return
    torch.testing.assert_close(own_logits(whole.eval()), before, rtol=0, atol=1e-4)
    assert len(layers_of(student)) == 2 and own_logits(student.eval()).isfinite().all()


def test_every_name_that_is_offered_takes_an_adapter(model, tmp_path):
    known(model)
    model.save_pretrained(tmp_path)  # a copy, since peft changes the model
    copy = type(model).from_pretrained(tmp_path).eval()
    names = linear_layers(copy)
    if not names:
        return
    adapted = add_lora(copy, r=2, dropout=0.0, target_modules=names)
    torch.testing.assert_close(own_logits(adapted), own_logits(model), rtol=0, atol=1e-4)


def test_samples_in_one_row_are_read_as_they_are_alone_or_packing_is_refused(model):
    known(model)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 60, (length,), generator=draw).tolist() for length in (23, 27)]
    samples = [Example(each, [False, *[True] * (len(each) - 1)]) for each in ids]
    if problem(model.config, 50) is not None:
        return
    with torch.no_grad():
        packed = last_hidden(model, collate_packed([samples], pad_id=0))[0]
        alone = [last_hidden(model, collate([each], pad_id=0))[0, : len(each)] for each in samples]
    torch.testing.assert_close(packed[:50], torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_activations_are_counted_for_every_type_that_trains(model, tmp_path):
    known(model)
    model.save_pretrained(tmp_path)
    try:
        whole = activations(shape_of(tmp_path), 2, 8)
    except ConfigError as error:
        assert str(tmp_path) in str(error)
        return
    assert whole > 0 and activations(shape_of(tmp_path), 2, 8, recomputed=True) > 0
    assert activations(shape_of(tmp_path), 4, 8) > whole


def test_speculation_gives_the_target_s_own_text_or_is_refused(model):
    known(model)
    prompt = torch.tensor([9, 33, 60, 2])
    try:
        drafted = decode(model, model, prompt, draft_length=3, max_new_tokens=6)
    except ConfigError as error:
        assert type(model).__name__ in str(error)
        return
    assert drafted.tokens == decode_alone(model, prompt, max_new_tokens=6).tokens
    ids = prompt.tolist()
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert drafted.tokens == ids[4:]
