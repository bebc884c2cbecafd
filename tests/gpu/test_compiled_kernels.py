"""Every kernel compiles for GPUs that are not there, by the launch itself, and takes what a launch can give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from triton.backends.amd.compiler import HIPBackend

from selectkd.loss import block_triton as kernels
from selectkd.loss.block_triton.launch import FLAGS
from selectkd.objective.verifiers import VERIFIERS, traits_of

REGISTERS = 128
"""Of a thread at most: half of the threads an SM can hold, 16 warps, run at once."""
SECONDS = 1.5
"""Of a processor for one kernel at most; the first step waits for two."""
OTHERS = [
    {"verifier": "label_top_k"},
    {"verifier": "teacher_entropy"},
    {"verifier": "hellinger"},
    {"also_kl": True, "temperature": 2.0},  # the verifier and the KL at temperature 1, by one launch
    {"bias": True, "softcap": 30.0, "unshared": True, "dtype": "float32", "also_kl": True},
    {"bias": True, "unshared": True, "verifier": "label_top_k"},
    {"softcap": 30.0, "dtype": "float16"},
    {"dtype": "float32"},
]
# Triton 3.4 takes ROCm's own linker
AMD = (
    ("gfx942",)
    if not hasattr(HIPBackend, "path_to_rocm_lld") or Path("/opt/rocm/llvm/bin/ld.lld").exists()
    else ()
)
TARGETS = [
    {"target": target, "divergence": name}
    for target in ("sm_80", "sm_100", *AMD)
    for name in ("forward_kl", "generalized_jsd")
]

CHUNKS = [{"rows": count} for count in (1, 7, 16, 48)]


def compile_all(cases: list[dict[str, Any]], cache: Path) -> list[dict[str, Any]]:
    """What each case's kernels take, compiled in a process without the interpreter."""
    here, source = Path(__file__).parent, Path(kernels.__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join((str(source), str(here.parent))),
    }
    command = [sys.executable, str(here / "compile_kernels.py"), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cases = [{"divergence": name} for name in kernels.TERMS] + OTHERS + TARGETS + CHUNKS
    return compile_all(cases, tmp_path_factory.mktemp("triton"))


def of(rows: list[dict[str, Any]], case: dict[str, Any]) -> list[dict[str, Any]]:
    told = ("kernel", "registers", "stack", "seconds", "variant")
    return [row for row in rows if {k: v for k, v in row.items() if k not in told} == case]


@pytest.mark.parametrize("name", kernels.TERMS)
def test_every_divergence_compiles_for_sm_90_in_bf16(name, compiled):
    rows = of(compiled, {"divergence": name})
    assert [row["kernel"] for row in rows] == ["statistics", "gradient"]
    assert all(row["registers"] <= REGISTERS and row["stack"] == 0 for row in rows), rows


@pytest.mark.parametrize("case", OTHERS + TARGETS, ids=str)
def test_every_kind_of_head_verifier_dtype_and_target_compiles(case, compiled):
    rows = of(compiled, case)
    assert [row["kernel"] for row in rows][-1] == "gradient"
    assert len(rows) == (3 if "temperature" in case else 2)
    assert all(row["registers"] <= REGISTERS and row["stack"] == 0 for row in rows), rows


def test_a_kernel_compiles_in_little_time(compiled):
    fresh = compiled[2:]  # the first one also loads the compiler
    assert max(row["seconds"] for row in fresh) <= SECONDS, fresh


def test_other_chunks_of_the_same_run_need_no_other_kernel(compiled):
    rows = [row for chunk in CHUNKS for row in of(compiled, chunk)]
    assert len(rows) == 2 * len(CHUNKS) and len({row["variant"] for row in rows}) == 2


def test_every_statistic_that_a_verifier_reads_has_its_part_of_the_kernel():
    for name, factory in VERIFIERS.items():
        assert set(traits_of(factory()).reads or ()) <= {"overlap", *FLAGS}, name
