"""Checks that a model's logits are those of its head on its backbone, each from earlier tokens alone."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from selectkd.errors import ConfigError
from selectkd.models.attention import plain_attention
from selectkd.models.forward import evaluating
from selectkd.models.head import backbone, head_of, unwrapped
from selectkd.models.sharded import inside
from selectkd.models.vision import answer_types

PROBE_IDS = 8
"""Token ids that ``check_head`` reads, spread evenly over the vocabulary."""


def check_head(model: nn.Module) -> None:
    """Run a few tokens through the model and through backbone and head; ConfigError where their logits differ, and
    where a logit depends on a later token.

    The guard for architectures this module has not met: a scale it does not know would train on wrong logits.
    Attention is computed the plain way meanwhile: a fresh model lies on the CPU, which flash attention cannot use
    and where flex attention compiles a kernel that is wrong for narrow heads (torch 2.13 on AVX2: NaN at 16 channels).
    """
    head = head_of(model)
    ids = torch.linspace(1, head.width - 1, PROBE_IDS, device=head.weight.device).long()[None]
    with evaluating(model), torch.no_grad(), plain_attention(unwrapped(model)), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of transformers' own calls of torch
        types = answer_types(unwrapped(model).config, ids)
        theirs = model(input_ids=ids, use_cache=False, **types).logits.float()
        other = torch.cat([ids[:, :-1], ids[:, :1]], 1)
        before = model(input_ids=other, use_cache=False, **types).logits.float()
        # last: it takes a sharded model apart again, and who freezes a weight must find its parts
        ours = inside(model, lambda: head_of(model).logits(backbone(model)(input_ids=ids, **types))).float()
    # a missed scale or cap is off by far more than a rounding of the dtype the logits were computed in
    finite = theirs.isfinite()  # logits that are not finite are another fault, found elsewhere
    largest = theirs[finite].abs().max().item() if finite.any() else 0.0
    tolerance = 8 * torch.finfo(head.weight.dtype).eps * max(1.0, largest)
    same_width = ours.shape == theirs.shape
    error = float("inf")
    if same_width:
        error = torch.where(finite, ours - theirs, 0.0).abs().max().item()
    if not error <= tolerance:
        differ = (
            f"they differ by {error:.3g}"
            if same_width
            else f"there are {theirs.shape[-1]} of them, and {ours.shape[-1]} rows in the head"
        )
        raise ConfigError(
            f"the head of {type(unwrapped(model)).__name__} computes its logits in a way that selectkd does not "
            f"support: {differ}. Use a Llama, Qwen, Gemma, Granite, Cohere or similar model."
        )
    change = torch.where(finite, before - theirs, 0.0)[:, :-1].abs().max().item()
    # eight-bit products differ a little with what stands beside a row
    if change > max(tolerance, largest / 100):
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} reads later tokens: its logits change by {change:.3g} with the last "
            "token. Set is_decoder in its config.json where it has that key, or use a model that writes from left to "
            "right."
        )
