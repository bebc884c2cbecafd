"""Triton's kernels on a pretended GPU: launched as CUDA would, computed in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from gpu.pretended import Gpu, Refused, as_it_is, pretended
from selectkd.loss.block_triton import launch, passes

NAMES = ("statistics", "gradient")


class Launched:
    """Stands in for a kernel: checks what a launch needs, counts it, and runs the interpreter."""

    def __init__(self, gpu: Gpu, kernel: Any) -> None:
        self.gpu, self.kernel, self.count = gpu, kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            gpu, here = self.gpu, torch.device("cuda", self.gpu.current)
            for x in args:
                if isinstance(x, torch.Tensor) and gpu.of(x) != here:
                    raise Refused(f"a kernel launched on {here} is given a tensor on {gpu.of(x)}")
                if isinstance(x, torch.Tensor) and x.ndim and x.stride(-1) != 1:
                    raise Refused(f"a kernel is given a tensor of strides {x.stride()}")
            self.count += 1
            gpu.launch(self.kernel.fn.__name__, here)
            with as_it_is():
                self.kernel[grid](*args, **options)

        return launch


@contextlib.contextmanager
def pretended_with_kernels(devices: int = 1, *, tile: int = 64) -> Iterator[Gpu]:
    """``pretended``, the kernels with it; ``gpu.statistics`` and ``gpu.gradient`` count their launches."""
    with pretended(devices) as gpu, mock.patch.object(launch, "TILE", tile), contextlib.ExitStack() as stack:
        for name in NAMES:
            launched = Launched(gpu, getattr(passes, name))
            setattr(gpu, name, launched)
            stack.enter_context(mock.patch.object(passes, name, launched))
        yield gpu
