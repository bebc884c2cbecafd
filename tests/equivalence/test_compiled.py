"""The compiled way through a block of rows gives what the plain one gives."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from faults.forked import run_forked
from numerics.test_oracle import STATED
from selectkd import LiveRows, Objective
from selectkd.errors import ConfigError
from selectkd.loss import block_compiled
from selectkd.loss.block_compiled import PROGRAMS, plan_of, program
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import CachedRows

CASES = Path(__file__).with_name("compiled_cases.py")
N, V = 6, 40
COMPILER = shutil.which("g++") or shutil.which("clang++")


def run_cases(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The cases in a process of its own, nothing compiled before."""
    return run_forked(str(CASES), TORCHINDUCTOR_CACHE_DIR=str(cache), **environment)


@pytest.mark.skipif(
    COMPILER is None,
    reason="torch.compile makes C++ on a processor, and there is no compiler; the next test is for that case",
)
def test_compiled_equals_plain(tmp_path):
    """The C++ is translated without optimization, sooner: its arithmetic is written out in it."""
    quick = tmp_path / Path(str(COMPILER)).name
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    quick.chmod(0o755)
    done = run_cases(tmp_path / "cache", CXX=str(quick))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("can compile: True\n")
    assert done.stdout.count("equal:") == 6
    assert done.stdout.count("oracle:") == len(STATED)


def test_without_a_compiler_a_trial_says_so_and_the_error_names_the_key(tmp_path):
    done = run_cases(tmp_path, CXX="/no/such/compiler")
    assert done.returncode != 0 and done.stdout == "can compile: False\n", done.stdout
    assert "ConfigError: training.compile_loss = true, but" in done.stderr, done.stderr[-3000:]


def test_equal_divergences_share_a_program_and_others_do_not():
    head = Head(torch.zeros(V, 8))

    def plan(alpha, reads=("token_rank",)):
        divergence = Objective({"name": "skew_kl", "alpha": alpha}).divergence
        return plan_of(divergence, head, head, 1.0, reads, kl=False)

    assert plan(0.1) == plan(0.1) and hash(plan(0.1)) == hash(plan(0.1))
    assert plan(0.1) != plan(0.2) and plan(0.1) != plan(0.1, ("overlap",))
    assert program.cache_info().maxsize == PROGRAMS


@pytest.mark.parametrize(
    ("divergence", "teacher", "why"),
    [
        ("kl_tv_hybrid", "live", "this divergence has none"),
        ("forward_kl", "cached", "this teacher gives another"),
    ],
)
def test_what_cannot_be_compiled_is_refused(divergence, teacher, why):
    hidden, head = torch.randn(N, 8), torch.randn(V, 8)
    rows = LiveRows(torch.randn(N, 12), torch.randn(V, 12))
    if teacher == "cached":
        rows = CachedRows(torch.arange(3).expand(N, 3), torch.full((N, 3), -2.0))
    with pytest.raises(ConfigError, match=f"compile_loss.*{why}"):
        distillation_loss(hidden, head, rows, Objective(divergence, "always"), compiled=True)


@pytest.mark.parametrize(
    ("steps", "kind", "compiler", "expected"),
    [
        (200, "cpu", True, True),
        (199, "cpu", True, False),
        (200, "cuda", True, False),
        (200, "cpu", False, False),
    ],
)
def test_a_run_compiles_where_that_pays(monkeypatch, steps, kind, compiler, expected):
    monkeypatch.setattr(block_compiled, "can_compile", lambda: compiler)
    assert block_compiled.pays(steps, torch.device(kind)) is expected


def test_auto_computes_what_has_no_closed_form_as_ever():
    hidden, head = torch.randn(N, 8), torch.randn(V, 8)
    rows = LiveRows(torch.randn(N, 12), torch.randn(V, 12))
    objective = Objective("kl_tv_hybrid", "always")
    plain, _ = distillation_loss(hidden, head, rows, objective)
    auto, _ = distillation_loss(hidden, head, rows, objective, compiled="auto")
    assert torch.equal(auto, plain)
