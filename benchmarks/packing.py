"""What keeps the samples of a packed row apart: bytes of it, and the seconds of a forward and backward pass.

    python benchmarks/packing.py [--length 8192] [--sample 512] [--layers 2] [--record]

One row of random ids, samples of equal length, a Llama of SmolLM2's width and heads in fp32. mask bytes: every tensor
that reaches the attention of a layer beside queries, keys and values (flex attention's mask of blocks, flash
attention's cu_seqlens). dense mask: one additive [1, 1, t, t] mask in fp32, given to sdpa. by position ids:
transformers' own mask of a packed row, [1, 1, t, t] in bool, for sdpa. by sample: ``models.forward``. The seconds are
processor time, medians of passes in turns; flash attention has none without its package, nor does flex attention,
which has no gradient on a processor.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from record import Row, record
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import flex_attention_mask, packed_sequence_mask_function

from selectkd.data.collate import Batch, collate_packed
from selectkd.data.example import Example
from selectkd.models.forward import flash_inputs, last_hidden
from selectkd.models.head import backbone

REPEATS = 3


def model_of(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dense_mask(batch: Batch) -> torch.Tensor:
    t = batch.sequence.shape[1]
    allowed = (batch.sequence[:, :, None] == batch.sequence[:, None, :]) & torch.ones(
        t, t, dtype=torch.bool
    ).tril()
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]


class Masks:
    """The bytes of the mask that the first layer of a model is given."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        model.model.layers[0].register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: Any, args: Any, given: Any) -> None:
        mask = given.get("attention_mask")
        held = getattr(mask, "masks", None)
        tensors = [mask] if isinstance(mask, torch.Tensor) else list((held or {}).values())
        self.bytes = sum(one.numel() * one.element_size() for one in tensors if one is not None)


def timed(ways: dict[str, Any], model: Any, masks: Masks) -> dict[str, tuple[list[float], int]]:
    """Of each way the processor seconds of REPEATS passes, taken in turns, and the bytes of its mask."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for _ in range(REPEATS):
        for name, run in ways.items():
            model.zero_grad(set_to_none=True)
            masks.bytes = 0
            start = time.process_time()
            run().square().mean().backward()
            seconds[name].append(time.process_time() - start)
            sizes[name] = masks.bytes
    return {name: (seconds[name], sizes[name]) for name in ways}


def measured(length: int, sample: int, layers: int) -> list[Row]:
    model = model_of(layers)
    masks = Masks(model)
    row = [Example([7] * sample, [True] * sample)] * (length // sample)
    batch = collate_packed([row])
    inputs = batch.model_inputs()
    read = backbone(model)
    ways = {
        "dense mask": lambda: read(**inputs | {"attention_mask": dense_mask(batch)}),
        "by position ids": lambda: read(**{k: v for k, v in inputs.items() if k != "attention_mask"}),
        "by sample": lambda: last_hidden(model, batch),
    }
    case = f"t {length}, samples of {sample}, {layers} layers"
    rows: list[Row] = []
    for name, (seconds, size) in timed(ways, model, masks).items():
        spread = (max(seconds) - min(seconds)) / 2
        rows += [
            (case, name, "mask bytes", size, "", 1),
            (case, name, "seconds", median(seconds), spread, REPEATS),
        ]
    blocks = flex_attention_mask(
        1,
        length,
        length,
        mask_function=lambda b, h, q, k: (q >= k) & packed_sequence_mask_function(batch.sequence)(b, h, q, k),
    )
    kept = [one for one in vars(blocks).values() if isinstance(one, torch.Tensor)]
    rows.append(
        (case, "flex attention", "mask bytes", sum(x.numel() * x.element_size() for x in kept), "", 1)
    )
    starts = flash_inputs(batch)["cu_seq_lens_q"]
    rows.append((case, "flash attention", "mask bytes", starts.numel() * starts.element_size(), "", 1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--sample", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    rows = measured(asked.length, asked.sample, asked.layers)
    for case, name, metric, value, *_ in rows:
        print(f"{case:40} {name:16} {metric:12} {value:,.6g}")
    if asked.record:
        record("packing", rows)


if __name__ == "__main__":
    main()
