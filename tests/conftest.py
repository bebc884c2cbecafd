"""Shapes in signatures are checked while the tests run: jaxtyping's annotations, by beartype. Without a GPU the Triton
kernels run in Triton's interpreter, which must be known before Triton is imported.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config, install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "SELECTKD_CACHE" not in os.environ:  # of all workers of pytest, and of the programs that tests start
    os.environ["SELECTKD_CACHE"] = tempfile.mkdtemp(prefix="selectkd-text-")
    atexit.register(shutil.rmtree, os.environ["SELECTKD_CACHE"], ignore_errors=True)

MATHEMATICS = (
    *(f"selectkd.objective.{name}" for name in (
        "pair", "divergences", "verifiers", "selectors", "objective", "uniforms", "contract",
    )),
    *(f"selectkd.loss.{name}" for name in (
        "teacher_rows", "aligned_rows", "token_log_probs", "terms", "plan", "ranking", "extras",
    )),
    *(("selectkd.loss.distillation",) if sys.version_info >= (3, 11) else ()),  # beartype knows no Unpack on 3.10
)  # fmt: skip

# beartype checks one item of a list, drawn at random: from a generator of its own, so that a run under test draws what
# it draws elsewhere.
shared, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
import beartype  # noqa: E402, F401

random.getrandbits = shared

install_import_hook(list(MATHEMATICS), "beartype.beartype")


def pytest_collection_finish() -> None:
    """Takes what the imports left out of garbage collection: each run of a Trainer asks for a full one, which would
    look through 700,000 objects for half a second of a processor."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape checks off: for the tests that pass wrong shapes and types, and expect our own message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
