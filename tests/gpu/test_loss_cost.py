"""`benchmarks/loss_cost.py` counts what the kernels move, and the loss stays near its products on an H200, on paper."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from selectkd import Head, LiveRows, Objective
from selectkd.loss import block_triton as kernels
from selectkd.loss.block_steps import BlockConfig, BlockInputs
from selectkd.loss.block_triton import launch
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import Scratch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loss_cost(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("loss_cost")


@pytest.mark.parametrize(
    ("d", "e", "most"), [(896, 1536, 1.30), (1536, 3584, 1.16)], ids=["0.5b of 1.5b", "1.5b of 7b"]
)
@pytest.mark.parametrize("n", [4096, 8192])
def test_the_estimated_time_is_near_that_of_the_four_products(n, d, e, most, loss_cost):
    assert 1.0 < loss_cost.figures(n, d, e, "selectkd")["estimated_over_products"] <= most


def test_ours_takes_four_products_where_a_loss_without_logits_takes_six_or_eight(loss_cost):
    d, e, v = 896, 1536, loss_cost.V
    unit = 2 * v / 1e9
    for name, units in (("selectkd", 3 * d + e), ("trl", 4 * d + 2 * e), ("trl_jsd", 5 * d + 3 * e)):
        assert loss_cost.figures(4096, d, e, name)["gflop_a_token"] == pytest.approx(unit * units)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts")
def test_the_kernels_move_the_bytes_that_are_counted(loss_cost, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    tile, c, v = 64, 3, 128
    monkeypatch.setattr(launch, "TILE", tile)
    moved: Counter[str] = Counter()

    def counted(name):
        real = getattr(InterpreterBuilder, name)

        def count(self, pointers, *args):
            if np.size(pointers.data) == tile:  # a number of a row is nothing beside its logits
                moved["all"] += tile * pointers.get_element_ty().primitive_bitwidth // 8
            return real(self, pointers, *args)

        return mock.patch.object(InterpreterBuilder, name, count)

    weight = torch.randn(v, 4).bfloat16()
    chunk = LiveRows(torch.randn(c, 4).bfloat16(), weight).open(slice(0, c), v, Scratch())
    at = BlockInputs(torch.empty(c, 0), torch.ones(c), None, None, None)
    with counted("create_masked_load"), counted("create_masked_store"):
        for wants, size in (
            (False, loss_cost.STATISTICS_BYTES),
            (True, loss_cost.STATISTICS_BYTES + loss_cost.GRADIENT_BYTES),
        ):
            settings = BlockConfig(
                Objective("forward_kl", "hellinger", beta=0.1), Head(weight), LossOptions(), wants
            )
            moved.clear()
            kernels.evaluate_chunk(torch.randn(c, v).bfloat16(), chunk, at, settings)
            assert moved["all"] == size * c * v
