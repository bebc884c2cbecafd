"""What the loss does otherwise on each kind of device: how many rows it takes at a time, and whether Triton's kernels
do their work. Nothing else in the loss asks where it runs, but for the sum of the head's gradient (``products``).

A processor likes what its caches hold, an accelerator few launches: there a block costs some forty to eighty, whatever
its size. n rows, v vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selectkd.loss.aligned_rows import AlignedChunk
from selectkd.loss.block_eager import block_rows
from selectkd.loss.block_steps import BlockConfig
from selectkd.loss.teacher_rows import CachedChunk, LiveChunk

CHUNK_ROW_BYTES = 1024
"""Rows of a chunk times the bytes of a logit, on a processor: 256 rows in fp32, 512 in bf16. Each chunk costs the
head's gradient one pass over [v, d]; so many rows make that small (measured: 128 rows in fp32 cost 7% more time)."""
CHUNK_BYTES = 1 << 28
"""Bytes of a chunk's logits, [c, v], at most, for each model, on a processor."""
TOP_K_ENTRIES = 3 << 19
"""Entries of a processor's block of a top-K teacher, whose small autograd graph costs one row and many the same."""
AUTOGRAD_ENTRIES = 1 << 17
"""Entries of a processor's block where autograd keeps some forty temporaries of it."""

ACCELERATOR_ROWS = 4096
"""Rows of a chunk on an accelerator at most: the pass over [v, d] takes a quarter of the products' time at 512 rows and
some 3% at 4,096 (estimated by benchmarks/loss_cost.py)."""
ACCELERATOR_LEAST_ROWS = 256
"""Rows of a chunk there at least: fewer leave most of it idle."""
ACCELERATOR_ENTRIES = 1 << 24
"""Entries of a block there: some forty temporaries of it are 2.7 GiB in fp32."""
MEMORY_SHARE = 8
"""One part in so many of an accelerator's free memory is for the logits of both models, and so much for a block."""
ASSUMED_FREE = 8 << 30
"""Free bytes of an accelerator that does not say."""
TEMPORARIES = 40
"""What autograd keeps of a block, in tensors of its size."""
OLDEST_TRITON = (3, 3)
"""Older ones do not compile the kernels."""

_OBSTACLES: dict[str, str] = {}
"""Why a kind of device has no kernels in this process, once that has been found out."""


def chunk_rows(
    n: int,
    width: int,
    chunk: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> int:
    """Rows of a chunk: the caller's number, else as many as the products like and memory has room for.

    On an accelerator a power of two, so that the order of a sum does not follow every byte of free memory.

    >>> chunk_rows(10_000, 151_936, None, torch.bfloat16)
    512
    """
    device = torch.device(device)
    if chunk is None and device.type in ("cpu", "meta"):
        chunk = max(32, min(CHUNK_ROW_BYTES, CHUNK_BYTES // width) // dtype.itemsize)
    elif chunk is None:
        room = 0 if n <= ACCELERATOR_LEAST_ROWS else free_bytes(device) // MEMORY_SHARE
        fit = power_of_two(room // (2 * width * dtype.itemsize))
        chunk = min(ACCELERATOR_ROWS, max(ACCELERATOR_LEAST_ROWS, fit))
    return max(1, min(n, chunk))


def power_of_two(number: int) -> int:
    """The largest power of two up to ``number``; 0 below 1."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def free_bytes(device: torch.device) -> int:
    """Memory of an accelerator that a call can have: the device's free memory and what torch holds without using it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_FREE
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def rows_of_block(raw: Tensor, teacher: Any, config: BlockConfig) -> int:
    """Rows of a chunk ``raw`` [c, v] that are worked on at a time, where no kernel takes the whole chunk."""
    width = raw.shape[1]
    widest = max(width, teacher.width) if isinstance(teacher, AlignedChunk) else width
    if raw.device.type != "cpu":
        size = accelerator_entries(raw.device) // widest
    elif isinstance(teacher, CachedChunk):
        size = TOP_K_ENTRIES // width
    elif isinstance(teacher, LiveChunk) and config.has_closed_form:
        size = block_rows(width)
    else:
        size = AUTOGRAD_ENTRIES // widest
    return max(1, size)


def scored_rows(width: int, device: torch.device) -> int:
    """Rows that a selector scores at a time."""
    entries = AUTOGRAD_ENTRIES if device.type == "cpu" else accelerator_entries(device)
    return max(1, entries // width)


def accelerator_entries(device: torch.device) -> int:
    """Entries of a block on an accelerator."""
    room = free_bytes(device) // MEMORY_SHARE // (TEMPORARIES * torch.float32.itemsize)
    return min(ACCELERATOR_ENTRIES, max(1 << 20, power_of_two(room)))


def kernels_for(raw: Tensor, teacher: Any, config: BlockConfig, *, ranked: bool = False) -> Any:
    """The package of kernels where they do this work, None for ``evaluate_block``. ranked: a first pass has given the
    verdicts."""
    if raw.device.type in ("cpu", "meta"):
        return None
    kernels = kernels_on(raw.device.type)
    return kernels if kernels is not None and kernels.claims(config, teacher, ranked=ranked) else None


def by_kernels(kernels: Any, raw: Tensor, teacher: Any, rows: Any, config: BlockConfig) -> Any:
    """What the kernels make of a chunk; None, with one warning, where their first launch shows that they cannot run."""
    try:
        return kernels.evaluate_chunk(raw, teacher, rows, config)
    except kernels.CannotLaunch as error:  # nothing has been written yet
        do_without_kernels(raw.device.type, str(error))
    return None


def kernels_on(kind: str) -> Any:
    """The package of kernels for a kind of device; None, with one warning, where it cannot be used."""
    if kind in _OBSTACLES:
        return None
    obstacle = obstacle_to_kernels(kind)
    if obstacle is None:
        try:
            return importlib.import_module("selectkd.loss.block_triton")
        except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
            obstacle = f"{type(error).__name__}: {error}"
    do_without_kernels(kind, obstacle)
    return None


@cache
def obstacle_to_kernels(kind: str) -> str | None:
    """What can be known without a launch to keep the kernels from running on a kind of device."""
    if kind != "cuda":
        return f"they are for CUDA and ROCm, and the tensors are on {kind}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def do_without_kernels(kind: str, obstacle: str) -> None:
    """Torch's operations do the work on a kind of device from now on; one warning says so."""
    _OBSTACLES[kind] = obstacle
    warnings.warn(
        f"The loss's Triton kernels cannot be used: {obstacle}. Torch's own operations do their work, with the same "
        "result in more time. On CUDA and ROCm they need Triton 3.3 or newer and a C compiler.",
        stacklevel=2,
    )
