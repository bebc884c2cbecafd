"""A quadratic's curvature is recovered, a real model's weights come back untouched, and the verb reports both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selectkd.cli import main
from selectkd.evals.heldout import divergence_loss, text_loss
from selectkd.evals.landscape import (
    KRYLOV,
    filter_normalised,
    landscape,
    moved,
    sharpness,
    top_eigenvalue,
    value,
)
from training.tiny import padded, texts, tiny_llama


def quadratic(eigenvalues: list[float], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weights as a matrix, A) of 1/2 w^T A w, A of these eigenvalues."""
    n = len(eigenvalues)
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.normal(size=(n, n)))[0]
    matrix = torch.tensor(turned @ np.diag(eigenvalues) @ turned.T)
    return torch.tensor(rng.normal(size=(2, n // 2))), matrix


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "eigenvalues", [np.linspace(0.1, 7.0, 60).tolist(), [-9.0, *[0.5] * 37, 3.0, 4.2], [1.0, 2.0, -3.0, 2.5]]
)
def test_the_top_eigenvalue_of_a_quadratic_is_recovered_to_one_percent(
    eigenvalues: list[float], dtype: torch.dtype
) -> None:
    weights, matrix = (one.to(dtype) for one in quadratic(eigenvalues))
    assert len(eigenvalues) > KRYLOV or len(eigenvalues) == 4
    seen = top_eigenvalue([weights], lambda: 0.5 * weights.reshape(-1) @ matrix @ weights.reshape(-1))
    assert seen == pytest.approx(max(eigenvalues), rel=1e-2)
    assert not weights.requires_grad


def test_several_parameters_are_one_vector() -> None:
    one, two = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    unused = torch.randn(2, 2, dtype=torch.float64)
    seen = top_eigenvalue([one, unused, two], lambda: one.square().sum() + 3 * two.square().sum())
    assert seen == pytest.approx(6.0, rel=1e-2)


def test_a_line_through_a_quadratic_is_its_parabola() -> None:
    weights, matrix = quadratic(np.linspace(0.5, 4, 20).tolist())
    direction = filter_normalised([weights], seed=0)[0].reshape(-1)
    start = weights.clone()
    seen = landscape(
        [weights], lambda: 0.5 * weights.reshape(-1) @ matrix @ weights.reshape(-1), points=5, grid=3, kicks=4
    )
    flat = start.reshape(-1)
    for a, loss in zip(seen.at, seen.line, strict=True):
        there = flat + a * direction
        assert loss == pytest.approx(float(0.5 * there @ matrix @ there), rel=1e-12)
    assert seen.line[2] == seen.loss == seen.grid[1][1] and torch.equal(weights, start)
    assert seen.grid_at == [-1.0, 0.0, 1.0] and seen.grid[2][1] == pytest.approx(seen.line[4], rel=1e-12)
    assert seen.top_eigenvalue == pytest.approx(4.0, rel=1e-2)


def test_sharpness_grows_with_curvature_and_with_the_square_of_the_radius() -> None:
    # at the minimum of curvature c / 2 |w - w0|^2 a kick r d costs c r^2 |d|^2 / 2, and |d| = |w0| for every direction
    weights = torch.randn(6, 5, dtype=torch.float64)
    kept = weights.clone()
    for c, radius in ((1.0, 0.1), (4.0, 0.1), (4.0, 0.2)):
        seen = sharpness(
            [weights], lambda c=c: c / 2 * (weights - kept).square().sum(), kicks=3, radius=radius
        )
        assert seen.value == pytest.approx(c / 2 * radius**2 * float(kept.square().sum()), rel=1e-9)


def test_a_direction_has_each_rows_norm_and_leaves_vectors_alone() -> None:
    model = tiny_llama(0)
    parameters = list(model.parameters())
    for parameter, piece in zip(parameters, filter_normalised(parameters, seed=1), strict=True):
        if parameter.ndim == 1:
            assert not piece.any()
        else:
            torch.testing.assert_close(piece.norm(dim=1), parameter.detach().norm(dim=1))


def test_the_eigenvalue_of_a_model_is_its_curvature_along_the_steepest_direction() -> None:
    model = tiny_llama(0, layers=1, hidden=8).double()
    batch = padded(texts(4), 4)[0]
    seen = top_eigenvalue(list(model.parameters()), text_loss(model, batch))
    parameters = [one for one in model.parameters() if one.requires_grad]
    slopes = torch.autograd.grad(_eager(model, batch)(), parameters, create_graph=True)
    flat = torch.cat([one.reshape(-1) for one in slopes])
    parts = torch.autograd.grad(
        flat, parameters, torch.eye(len(flat), dtype=flat.dtype), is_grads_batched=True
    )
    hessian = torch.cat([part.reshape(len(flat), -1) for part in parts], 1)
    assert seen == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-2)


def _eager(model: Any, batch: Any) -> Any:
    model.set_attn_implementation("eager")
    return text_loss(model, batch)


def test_weights_come_back_to_the_last_bit_even_where_the_loss_fails() -> None:
    weight = torch.randn(3, 3)
    kept = weight.clone()

    def fails() -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        moved([weight], fails, [(0.3, filter_normalised([weight], seed=0))])
    assert torch.equal(weight, kept)


def test_the_divergence_from_itself_is_a_minimum() -> None:
    model = tiny_llama(0)
    loss = divergence_loss(model, model, padded(texts(3), 3)[0])
    parameters = list(model.parameters())
    assert value(loss) == pytest.approx(0.0, abs=1e-6)  # fp32 logits of some nats: 1e-7 a term
    assert sharpness(parameters, loss, kicks=3).value > 1e-3


def test_the_divergence_of_heads_of_two_widths_counts_shared_ids_alone() -> None:
    narrow = tiny_llama(0)
    wide = copy.deepcopy(narrow)
    wide.resize_token_embeddings(narrow.config.vocab_size + 16, mean_resizing=False)
    batch = padded(texts(3), 3)[0]
    for student, teacher in ((narrow, wide), (wide, narrow)):
        assert divergence_loss(student, teacher, batch)().item() == pytest.approx(0.0, abs=1e-6)


def test_landscape_of_a_run_and_of_its_student_before(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, picture = tmp_path / "l.json", tmp_path / "l.png"
    common = ["--samples", "3", "--points", "5", "--grid", "3", "--kicks", "3", "--json", str(answer)]
    assert main(["study", "landscape", str(tiny_run), "--before", *common, "--figure", str(picture)]) == 0
    students = json.loads(answer.read_text())["students"]
    assert [one["student"] for one in students] == [str(tiny_run), f"{tiny_run} before"]
    assert students[0]["loss"] != students[1]["loss"]
    assert all(one["top_eigenvalue"] > 0 and len(one["grid"]) == 3 for one in students)
    assert picture.read_bytes()[:4] == b"\x89PNG" and "top eigenvalue" in capsys.readouterr().out
    teacher = str(tiny_run.parent / "teacher")
    assert (
        main(
            [
                "study",
                "landscape",
                str(tiny_run),
                "--loss",
                "kl",
                "--compare",
                teacher,
                "--no-hessian",
                *common[:-1],
                "-",
            ]
        )
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    students = shown["students"]
    assert students[1]["loss"] == pytest.approx(0.0, abs=1e-6) and students[1]["top_eigenvalue"] is None
    seen = shown["settings"]
    assert (seen["loss"], seen["samples"], seen["kicks"], seen["reach"], seen["held_out"]) == (
        "kl",
        3,
        3,
        1.0,
        True,
    )
    assert main(["study", "landscape", str(tmp_path)]) == 2
    assert main(["study", "landscape", str(tiny_run), "--reach", "0"]) == 2


@pytest.mark.parametrize("name", ["runs/a$x_1", "$\\frac{$", "a\\$b$c", "_hidden", "$$", "runs/{a}^b"])
def test_a_path_with_signs_of_a_formula_breaks_no_figure(name: str, tmp_path: Path) -> None:
    from selectkd.evals.figures import _figure, _save, _shown

    figure = _figure(4, 3)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=_shown(name))
    axes.set_title(_shown(name))
    assert len(axes.legend().get_texts()) == 1
    _save(figure, tmp_path / "$a_b$.svg")
    assert (tmp_path / "$a_b$.svg").stat().st_size > 1000


def test_a_figure_that_is_drawn_again_is_the_same_file(tmp_path: Path) -> None:
    from selectkd.evals.figures import _figure, _save

    files = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for file in files:
        figure = _figure(4, 3)
        figure.subplots().errorbar([0, 1], [0, 1], xerr=[[1, 1], [1, 1]], fmt="s")
        _save(figure, file)
    assert files[0].read_bytes() == files[1].read_bytes()
