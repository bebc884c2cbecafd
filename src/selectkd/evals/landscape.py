"""The loss around a student's weights: along random directions, its sharpest curvature, and under random kicks.

A direction is filter-normalised: each row of a weight matrix gets the norm of the row it is added to, so that a student
cannot look flat by having large weights. Vectors of one number (norms, biases) stay where they are. Everything is a
function of the parameters and a closure ``loss``, whatever the model. w weights in all.
Source: Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectkd.errors import NumericsError
from selectkd.evals.statistics import Interval, bootstrap_mean

RADIUS = 0.1
"""A kick of a tenth of each row's norm: small beside the weights, and its effect on a loss large beside rounding."""
KRYLOV = 8
"""Lanczos vectors held at once: of 100 million weights in fp32, 3 GB."""
MOST_PRODUCTS = 60
EIGENVALUE_TOLERANCE = 1e-2

Loss = Callable[[], Tensor]
Direction = list[Tensor]


@dataclass(frozen=True)
class Landscape:
    """The loss at the weights; along one direction (at, loss); over two (at, loss[i][j] at (at[i], at[j])).

    top_eigenvalue: the largest of the Hessian. sharpness: the mean rise of the loss under kicks of RADIUS in random
    filter-normalised directions, with its bootstrap over them. None for what was not asked for.
    """

    loss: float
    at: list[float]
    line: list[float]
    grid_at: list[float]
    grid: list[list[float]]
    top_eigenvalue: float | None
    sharpness: Interval | None


def landscape(
    parameters: Sequence[Tensor],
    loss: Loss,
    *,
    points: int = 21,
    grid: int = 0,
    reach: float = 1.0,
    kicks: int = 8,
    hessian: bool = True,
    seed: int = 0,
) -> Landscape:
    """Everything about ``loss`` around ``parameters``, which are put back to the last bit afterwards.

    points: how many on the line from -reach to reach; grid: how many on each side of the square, 0 for none.
    """
    first, second = (filter_normalised(parameters, seed=seed + i) for i in range(2))
    at, grid_at = np.linspace(-reach, reach, points).tolist(), np.linspace(-reach, reach, grid).tolist()
    here = value(loss)
    return Landscape(
        loss=here,
        at=at,
        line=[moved(parameters, loss, [(a, first)]) for a in at],
        grid_at=grid_at,
        grid=[[moved(parameters, loss, [(a, first), (b, second)]) for b in grid_at] for a in grid_at],
        top_eigenvalue=top_eigenvalue(parameters, loss, seed=seed) if hessian else None,
        sharpness=sharpness(parameters, loss, kicks=kicks, seed=seed + 2) if kicks else None,
    )


def filter_normalised(parameters: Sequence[Tensor], *, seed: int) -> Direction:
    """A Gaussian direction, each row scaled to the norm of the parameter's own row; 0 for parameters of one axis.

    >>> weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> filter_normalised([weight, torch.ones(2)], seed=0)[0].norm(dim=1).tolist()
    [5.0, 0.0]
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = []
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.ndim < 2:
            scaled.append(torch.zeros_like(drawn))
            continue
        rows, own = drawn.flatten(1), parameter.detach().flatten(1)
        scale = own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        scaled.append((rows * scale).view_as(drawn))
    return scaled


def sharpness(
    parameters: Sequence[Tensor], loss: Loss, *, kicks: int = 8, radius: float = RADIUS, seed: int = 0
) -> Interval:
    """The mean of loss(w + radius d) - loss(w) over ``kicks`` filter-normalised directions d."""
    here = value(loss)
    rises = [
        moved(parameters, loss, [(radius, filter_normalised(parameters, seed=seed + i))]) - here
        for i in range(kicks)
    ]
    return bootstrap_mean(rises, seed=seed)


def top_eigenvalue(parameters: Sequence[Tensor], loss: Loss, *, seed: int = 0) -> float:
    """The largest eigenvalue of the Hessian of ``loss``, by Lanczos iteration on Hessian-vector products, to 1%.

    NumericsError where MOST_PRODUCTS restarts do not settle it.
    """
    size = sum(one.numel() for one in parameters)
    with (
        _wanting_gradients(parameters),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the fused kernels have no second derivative
        slopes = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)

        def product(vector: Any) -> Any:
            """H v, from the gradient of slope . v."""
            like = torch.from_numpy(np.asarray(vector).reshape(-1).copy()).to(slopes[0])
            pieces = [
                piece.view_as(one)
                for piece, one in zip(
                    like.split([one.numel() for one in parameters]), parameters, strict=True
                )
            ]
            with_graph = [i for i, one in enumerate(slopes) if one.requires_grad]
            seconds = torch.autograd.grad(
                [slopes[i] for i in with_graph], parameters, [pieces[i] for i in with_graph],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            return torch.cat([one.reshape(-1) for one in seconds]).to("cpu", slopes[0].dtype).numpy()

        dtype = np.float64 if slopes[0].dtype == torch.float64 else np.float32
        if size <= KRYLOV:  # ARPACK wants more weights than vectors; so few are looked at whole
            columns = np.stack([product(row) for row in np.eye(size, dtype=dtype)])
            return float(np.linalg.eigvalsh((columns + columns.T) / 2)[-1])
        start = torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy().astype(dtype)
        linear: Any = LinearOperator  # its stubs know the subclass alone
        operator = linear((size, size), matvec=product, dtype=dtype)
        lanczos: Any = eigsh
        try:
            found = lanczos(
                operator, k=1, which="LA", v0=start, ncv=KRYLOV, tol=EIGENVALUE_TOLERANCE, maxiter=MOST_PRODUCTS,
                return_eigenvectors=False,
            )  # fmt: skip
        except ArpackNoConvergence as error:
            raise NumericsError(
                f"the Hessian's largest eigenvalue did not settle in {MOST_PRODUCTS} restarts. Leave it out with "
                "--no-hessian, or give more text with --samples."
            ) from error
    return float(found[0])


@torch.no_grad()
def value(loss: Loss) -> float:
    """The loss as a number, without a graph."""
    return float(loss())


@torch.no_grad()
def moved(parameters: Sequence[Tensor], loss: Loss, steps: Sequence[tuple[float, Direction]]) -> float:
    """The loss at w + sum a d; w is put back to the last bit."""
    kept = [one.detach().clone() for one in parameters]
    try:
        for a, direction in steps:
            for parameter, piece in zip(parameters, direction, strict=True):
                parameter.add_(piece, alpha=a)
        return value(loss)
    finally:
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)


@contextlib.contextmanager
def _wanting_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    wanted = [one.requires_grad for one in parameters]
    try:
        for one in parameters:
            one.requires_grad_(True)
        yield
    finally:
        for one, before in zip(parameters, wanted, strict=True):
            one.requires_grad_(before)
