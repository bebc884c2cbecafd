"""Compiles the kernels as a launch would, for GPUs that are not there, and says what each takes.

``kernels.evaluate_chunk`` itself launches: the types, divisibilities and constants are those of a real launch. Only the
driver is another, which names a target and launches nothing. Run by test_compiled_kernels.py in a process without
Triton's interpreter: a JSON list of cases in, a JSON line for each kernel out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from selectkd import Head, LiveRows, Objective
from selectkd.loss import block_triton as kernels
from selectkd.loss.block_steps import BlockConfig, BlockInputs
from selectkd.loss.block_triton import passes
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import Scratch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
C, V, D = 16, 4096, 8
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PLAIN = {
    "target": "sm_90", "divergence": "forward_kl", "verifier": "greedy_topk", "dtype": "bfloat16", "bias": False,
    "softcap": None, "unshared": False, "temperature": 1.0, "also_kl": False, "rows": C,
}  # fmt: skip
"""A case; what a case leaves out is this."""


class NamesATarget:
    """A driver of a GPU that is not there."""

    launcher_cls = utils = None

    def __init__(self, target: tuple[Any, ...]) -> None:
        self.target = GPUTarget(*target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles where it would launch, and keeps what came of it."""

    def __init__(self, kernel: Any, found: list[Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            begun = cpu_seconds()
            made = self.kernel.run(*args, grid=grid, warmup=True, **options)
            self.found.append((self.kernel.fn.__name__, made, cpu_seconds() - begun))

        return launch


def cpu_seconds() -> float:
    """Seconds of a processor that this process and its compilers have taken: other work does not count."""
    return sum(os.times()[:4])


def resources(made: Any) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of a compiled kernel."""
    if "cubin" not in made.asm:
        text = made.asm["amdgcn"]
        names = ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names)
        return registers, stack
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told).groups()
    return int(registers), int(stack)


def evaluated(case: dict[str, Any]) -> None:
    """One chunk as ``case`` describes it."""
    dtype, rows = getattr(torch, case["dtype"]), case["rows"]
    bias = torch.zeros(V, dtype=dtype) if case["bias"] else None
    head = Head(torch.randn(V, D).to(dtype), bias, 1.0, case["softcap"])
    shared = torch.arange(V) > 3 if case["unshared"] else None
    chunk = LiveRows(torch.randn(rows, D).to(dtype), head, shared=shared).open(slice(0, rows), V, Scratch())
    at = BlockInputs(torch.rand(rows, 2), torch.ones(rows), torch.arange(rows), None, None)
    objective = Objective(case["divergence"], case["verifier"], beta=0.1)
    settings = BlockConfig(objective, head, LossOptions(case["temperature"], also_kl=case["also_kl"]), True)
    kernels.evaluate_chunk(torch.randn(rows, V).to(dtype), chunk, at, settings)


def main(cases: list[dict[str, Any]]) -> None:
    real = {name: getattr(passes, name) for name in ("statistics", "gradient")}
    for given in cases:
        case = {**PLAIN, **given}
        driver.set_active(NamesATarget(TARGETS[case["target"]]))
        found: list[Any] = []
        for kernel in real.values():
            kernel.device_caches.clear()
        stand_ins = {name: Compiled(kernel, found) for name, kernel in real.items()}
        with mock.patch.multiple(passes, **stand_ins):
            evaluated(case)
        for name, made, seconds in found:
            registers, stack = resources(made)
            row = {"kernel": name, "registers": registers, "stack": stack, "seconds": round(seconds, 3)}
            print(json.dumps({**given, **row, "variant": made.hash}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
