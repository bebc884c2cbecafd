"""The last hidden states of a batch. Samples that share a row are read as each is alone.

Where a model takes transformers' attention functions, no mask [t, t] of a packed row of t tokens exists: flash
attention takes where samples begin (cu_seqlens), flex attention a mask of blocks, and sdpa reads each sample by itself
(``sample_attention``). Elsewhere transformers makes the mask of a row from its position ids.
b rows, t tokens, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from selectkd.data.collate import Batch, collate_packed
from selectkd.data.example import Example
from selectkd.errors import ConfigError
from selectkd.models.attention import BY_SAMPLE, kind_of
from selectkd.models.devices import out_of_memory
from selectkd.models.head import backbone, unwrapped

Lengths = tuple[tuple[int, ...], ...]
"""The tokens of each sample of each row, in order; the padding of a row is one sample at its end."""
PROBES = ((3, 5), (11, 4))
"""First id and length of the two samples that a model is tried on."""
PROBE_ERROR = 0.05
"""Largest difference, of the largest number: rounding in bf16 is a fifth of it, and a sample that is seen is 1."""
_tried: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_LENGTHS: ContextVar[Lengths | None] = ContextVar("lengths of packed samples", default=None)


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """What the model's head multiplies, [b, t, d], for a padded or packed batch; no cache is built.

    A model that computes attention by sdpa does it by ``sample_attention`` from its first packed batch on, which is
    sdpa for every other input. Positions of padding hold finite numbers without a meaning.
    ConfigError at a model's first packed batch where two short samples in a row are not read as they are alone, and
    where a model cannot join a batch's images with its tokens.
    """
    if batch.images:
        return _seen(model, batch)
    if not batch.packed:
        return backbone(model)(**batch.model_inputs())
    by_sample = _by_sample(unwrapped(model))
    _try(model)
    return _packed_hidden(model, batch, by_sample)


def _seen(model: nn.Module, batch: Batch) -> Tensor:
    """The hidden states of a batch with images, through tower, projector and language model."""
    try:
        return backbone(model)(**batch.model_inputs())
    except (ValueError, RuntimeError, IndexError) as error:
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} cannot join the images of a batch with their tokens: "
            f"{' '.join(str(error).split())[:160]}. Look at the processor's files: they are another model's, or a "
            "placeholder is widened twice."
        ) from error


def hidden_rows(model: nn.Module, batch: Batch, position: Tensor) -> Tensor:
    """The last hidden states [n, d] of a batch at ``position`` [n], flat indices into its b * t places."""
    hidden = last_hidden(model, batch)  # [b, t, d]
    return hidden.reshape(-1, hidden.shape[-1])[position]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode while the context lasts: dropout off, and gradient checkpointing with it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _packed_hidden(model: nn.Module, batch: Batch, by_sample: bool) -> Tensor:
    inputs, read, plain = batch.model_inputs(), backbone(model), unwrapped(model)
    if by_sample:
        with _packed(sample_lengths(batch)):
            return read(**inputs)
    del inputs["attention_mask"]  # without one transformers finds the samples by their position ids
    if not kind_of(plain).startswith("flash"):
        return read(**inputs)
    hidden = read(**inputs | flash_inputs(batch))
    return hidden.reshape(*batch.input_ids.shape, hidden.shape[-1])


@torch.no_grad()
def _try(model: nn.Module) -> None:
    """ConfigError where a model's way to compute attention mixes two samples of a row; each way is tried once."""
    plain = unwrapped(model)
    kind = kind_of(plain)
    if _tried.get(plain) == kind:
        return
    width, device = plain.config.get_text_config().vocab_size, next(plain.parameters()).device
    samples = [Example([(start + i) % width for i in range(n)], [True] * n) for start, n in PROBES]
    rows = [samples, *([one] for one in samples)]
    batches = [collate_packed([row], pad_to_multiple_of=1).to(device) for row in rows]
    with evaluating(plain):
        together, *alone = (_packed_hidden(model, one, kind == BY_SAMPLE)[0] for one in batches)
    apart = torch.cat(alone)  # [t, d]
    if not bool((together - apart).abs().max() <= PROBE_ERROR * apart.abs().max()):
        raise ConfigError(
            f"{type(plain).__name__} with attn_implementation {kind.replace(BY_SAMPLE, 'sdpa')} does not read samples "
            "of a packed row as it reads them alone. Set data.packing to false; data.bucket: true saves padding too."
        )
    _tried[plain] = kind


def flash_inputs(batch: Batch) -> dict[str, Any]:
    """A packed batch as flash attention takes it: all rows one after the other, and where each sample begins.

    ids and positions are [1, b * t]; cu_seq_lens_q and cu_seq_lens_k hold the first place of every sample and the end,
    int32; max_length_q and max_length_k are the tokens of the longest sample.
    """
    lengths = [length for row in sample_lengths(batch) for length in row]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts, longest = starts.to(batch.input_ids.device), max(lengths)
    return {
        "input_ids": batch.input_ids.reshape(1, -1),
        "position_ids": batch.position_ids.reshape(1, -1),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def sample_lengths(batch: Batch) -> Lengths:
    """The tokens of each sample of a batch's rows, read where the batch lies in main memory."""
    rows = batch.in_memory.sequence
    return tuple(tuple(torch.unique_consecutive(row, return_counts=True)[1].tolist()) for row in rows)


@dataclass(frozen=True)
class SampleMasks:
    """The mask of every sample of a packed batch. ``masks`` has one for each length, None where it is causal alone."""

    lengths: Lengths
    masks: Mapping[int, Tensor | None]  # [1, 1, length, length]


def sample_masks(**asked: Any) -> Any:
    """transformers' mask function of ``sample_attention``: within a packed batch the mask that each sample has alone.

    asked: what transformers gives ``sdpa_mask``, which makes them and leaves out a mask that is causal alone.
    """
    lengths = _LENGTHS.get()
    if lengths is None:
        return sdpa_mask(**asked)
    found = {length for row in lengths for length in row}
    return SampleMasks(lengths, {length: _mask_alone(asked, length) for length in found})


def _mask_alone(asked: Mapping[str, Any], length: int) -> Any:
    one: Any = {"batch_size": 1, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
    return sdpa_mask(**asked | one | {"attention_mask": None})


def sample_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """sdpa on each sample of a packed batch by itself; plain sdpa where the mask is a tensor or none.

    query [b, h, t, d], key and value with as many heads or fewer; the result is [b, t, h, d].
    """
    if not isinstance(attention_mask, SampleMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("position_bias") is not None:
        raise ConfigError(
            f"{type(module).__name__} adds a bias by position, which packed rows do not have. "
            "Set data.packing to false."
        )
    rows = []
    for row, lengths in enumerate(attention_mask.lengths):
        samples = zip(lengths, *(_cut(states, row, lengths) for states in (query, key, value)), strict=True)
        read = [
            sdpa_attention_forward(module, q, k, v, attention_mask.masks[length], **options)[0]
            for length, q, k, v in samples
        ]
        rows.append(torch.cat(read, dim=1))
    return torch.cat(rows), None


def _cut(states: Tensor, row: int, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """The states of each sample of a row, [1, h, length, d]."""
    return states[row : row + 1].split(list(lengths), dim=2)


@contextmanager
def _packed(lengths: Lengths) -> Iterator[None]:
    """``sample_masks`` inside is asked for the masks of samples of these lengths."""
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def _by_sample(model: Any) -> bool:
    """Whether a model reads samples by ``sample_attention``, which it does from now on where it can."""
    if kind_of(model) == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(BY_SAMPLE)
    return kind_of(model) == BY_SAMPLE


AttentionInterface.register(BY_SAMPLE, sample_attention)
AttentionMaskInterface.register(BY_SAMPLE, sample_masks)
