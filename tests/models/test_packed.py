"""Samples that share a row are read as each is alone: loss and gradient, for every way to compute attention."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash

from selectkd.data.collate import collate_packed, pack
from selectkd.data.example import Example
from selectkd.errors import ConfigError
from selectkd.models.attention import BY_SAMPLE, kind_of
from selectkd.models.forward import flash_inputs, last_hidden
from selectkd.models.packing import problem
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.activations import checkpoint_activations
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from training.tiny import padded

WINDOW = 6
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": hf.LlamaConfig(**SIZES),
    "mistral, a window": hf.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2, windows and soft-caps": hf.Gemma2Config(**SIZES, sliding_window=WINDOW, layer_types=MIXED),
    "gemma3, windows": hf.Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=MIXED),
    "qwen3": hf.Qwen3Config(**SIZES),
}
WAYS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
LENGTHS = (23, 5, 17, 11, 1, 9, 14)


def samples() -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (length,), generator=draw).tolist() for length in LENGTHS]
    return [Example(each, [False, *[True] * (len(each) - 1)]) for each in ids]


def model_of(config: Any, seed: int, way: str) -> Any:
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config._attn_implementation = way  # flash attention is not installed where these tests run
    return model


def loss_and_gradient(config: Any, way: str, batches: list[Any], *, recomputed: bool = False) -> Any:
    student, teacher = (model_of(config, seed, way) for seed in (1, 2))
    if recomputed:
        checkpoint_activations(student)
    model = DistillationModel(student, LiveTeacher(teacher)).train()
    ledger = Ledger(Objective("forward_kl", {"name": "greedy_topk", "k": 9}, beta=0.1), "sequence_mean")
    for part in ledger.begin(batches):
        loss, sums = model(part.batch, part.row_scale, part.uniform, ledger.now)
        loss.backward()
        ledger.add(part, loss, sums)
    total = float(ledger.reduce(student.parameters()))
    return total, {name: p.grad for name, p in student.named_parameters()}


@functools.cache
def padded_ones(family: str) -> Any:
    """Read by eager attention."""
    return loss_and_gradient(FAMILIES[family], "eager", padded(samples(), 3))


def same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)  # fp32 sums in another order
    for name, gradient in one[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=2e-6, msg=name)


CALLS: list[dict[str, Any]] = []


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """What flash-attn 2 documents of its function for ragged samples, [total, h, d], as a plain program."""
    CALLS.append({"cu": cu_seqlens_q, "longest": max_seqlen_q, "window": window_size})
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.equal(cu_seqlens_k) and causal
    starts, found = cu_seqlens_q.tolist(), []
    assert max(end - start for start, end in itertools.pairwise(starts)) == max_seqlen_q
    for start, end in itertools.pairwise(starts):
        a, b, c = (x[start:end].transpose(0, 1) for x in (q, k, v))  # [h, length, d]
        b, c = (x.repeat_interleave(a.shape[0] // x.shape[0], 0) for x in (b, c))
        scores = a @ b.transpose(1, 2) * softmax_scale
        scores = scores if not softcap else softcap * torch.tanh(scores / softcap)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (back < 0) | ((back > window_size[0]) if window_size[0] >= 0 else False)
        found.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(found)


@contextlib.contextmanager
def runnable(way: str, monkeypatch: Any) -> Iterator[None]:
    """flex attention without a compiler; flash attention by the plain program above."""
    if way == "flash_attention_2":
        functions = (None, flash_attn_varlen_func, None, None, None)
        options = flash._lazy_define_process_function(flash_attn_varlen_func)
        monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (functions, (options, None)))
    if (
        way == "flex_attention"
    ):  # torch refuses its gradient on a processor, where only the uncompiled one is right
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager" if way == "flex_attention" else "default"):
        yield


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_have_the_loss_and_gradient_of_padded_ones(family, way, monkeypatch):
    """Windows are shorter than a row and than most samples; padded rows are read by eager attention."""
    config = FAMILIES[family]
    if way == "sdpa" and config.model_type == "gemma2":
        pytest.skip("transformers' sdpa refuses soft-caps")
    assert problem(config, 40) is None
    packed = [collate_packed(pack(samples(), 40), pad_id=0)]
    assert packed[0].input_ids.shape == (2, 40)
    CALLS.clear()
    with runnable(way, monkeypatch):
        ours = loss_and_gradient(config, way, packed)
    same(ours, padded_ones(family))
    assert bool(CALLS) == (way == "flash_attention_2")


def test_samples_are_read_alone_again_where_activations_are_recomputed():
    packed = [collate_packed(pack(samples(), 40), pad_id=0)]
    ours = loss_and_gradient(FAMILIES["mistral, a window"], "sdpa", packed, recomputed=True)
    same(ours, padded_ones("mistral, a window"))


def test_flash_attention_is_given_where_each_sample_begins():
    batch = collate_packed([samples()[:2], samples()[2:3]], pad_id=0)
    inputs = flash_inputs(batch)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 64)
    # 23 and 5 tokens and 4 of padding in the first row, 17 and 15 of padding in the second
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 23, 28, 32, 49, 64]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 23
    first = (inputs["position_ids"] == 0).flatten().nonzero().flatten().tolist()
    assert {0, 23, 32} <= set(first)


def test_a_model_that_mixes_samples_is_refused_at_its_first_packed_batch():
    """Its configuration is not known to: falcon makes its mask without looking at places."""
    sizes = {
        name: SIZES[name]
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    model = hf.FalconForCausalLM(hf.FalconConfig(**sizes)).train()
    with pytest.raises(
        ConfigError, match=r"FalconForCausalLM with attn_implementation sdpa does not read samples"
    ):
        last_hidden(model, collate_packed([samples()[:2]]))
    assert model.training


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that any operation inside gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.mark.parametrize("family", ["llama", "mistral, a window", "qwen3"])
def test_no_tensor_of_a_packed_row_has_a_number_for_every_pair_of_its_tokens(family):
    length, each = 1024, 32
    row = [Example([5] * each, [True] * each)] * (length // each)
    model = model_of(FAMILIES[family], 0, "sdpa")
    with Largest() as seen, torch.no_grad():
        last_hidden(model, collate_packed([row], pad_id=0))
    assert kind_of(model) == BY_SAMPLE
    assert seen.numbers == length * 64 < length * length  # hidden states alone


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (hf.Qwen3NextConfig(num_hidden_layers=4), "linear_attention in layers 0, 1, 2"),
        (hf.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv in layer 0"),
        (hf.Qwen3NextConfig(num_hidden_layers=8), "linear_attention in layers 0, 1, 2 and 3 more"),
    ],
    ids=["qwen3_next", "lfm2", "many layers"],
)
def test_a_hybrid_is_refused_by_the_layers_that_carry_a_state(config, layers):
    assert layers in problem(config, 64)
