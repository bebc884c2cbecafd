"""Ids and log-probabilities as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import CachedRows
from selectkd.teachers.cache.codec import (
    decode_ids,
    decode_log_probs,
    encode_ids,
    encode_log_probs,
    id_bytes,
    log_prob_bytes,
)
from selectkd.teachers.cache.payloads import TopKPayload


@pytest.mark.parametrize(
    ("k", "v"), [(1, 2), (1, 49152), (8, 64), (32, 49152), (64, 64), (128, 151936), (7, 9)]
)
def test_ids_come_back_from_the_bytes_that_were_promised(k: int, v: int) -> None:
    generator = np.random.default_rng(0)
    ids = np.sort(np.stack([generator.choice(v, k, replace=False) for _ in range(50)]), 1).astype(np.int64)
    ids[0], ids[1] = 0, v - 1  # repeats, at both ends
    packed = encode_ids(ids, v)
    assert packed.shape == (50, id_bytes(k, v))
    assert (decode_ids(packed, k, v) == ids).all()


@pytest.mark.parametrize("k", [1, 8, 32, 128])
def test_log_probabilities_come_back_within_a_step_and_in_the_same_order(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(200, 5000, generator=generator) * torch.logspace(-1, 1, 200)[:, None]
    logp = torch.log_softmax(logits, -1).topk(k).values
    logp[3, k // 2 :] = logp[3, k // 2]  # ties
    logp = logp[:, torch.randperm(k, generator=generator)].contiguous()
    packed = encode_log_probs(logp.numpy())
    assert packed.shape == (200, log_prob_bytes(k))
    back = torch.from_numpy(decode_log_probs(packed, k))
    signs = [torch.sign(x[:, :, None] - x[:, None, :]) for x in (logp, back)]
    assert torch.equal(*signs)
    error, reach = (back - logp).abs().amax(-1), logp.amax(-1) - logp.amin(-1)
    assert (error <= 0.01 * reach + 1e-4).all(), "pushed at most some 40 of 4,094 steps where values crowd"
    assert float(error.median()) < 0.005
    assert float((back - logp).max()) <= 1e-5, "never upwards"


def test_what_is_no_probability_stays_none() -> None:
    logp = np.array([[-0.5, -np.inf, -3.0], [np.nan, -1.0, -2.0], [-np.inf] * 3], np.float32)
    back = decode_log_probs(encode_log_probs(logp), 3)
    np.testing.assert_allclose(back[0], logp[0], atol=1e-3)
    assert np.isneginf(back[0, 1]) and np.isnan(back[1]).all() and np.isnan(back[2]).all()


def test_stored_tokens_are_the_teachers_best() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(20, 6, generator=generator), Head(torch.randn(500, 6, generator=generator))
    payload = TopKPayload(16, 500)
    rows = payload.decode(payload.encode(hidden, head, 0))
    assert isinstance(rows, CachedRows)
    best = torch.log_softmax(head.logits(hidden), -1).topk(16)
    order = rows.logp.argsort(-1, descending=True)
    assert torch.equal(rows.ids.gather(-1, order), best.indices)
    assert float((rows.logp.gather(-1, order) - best.values).abs().max()) < 0.01
