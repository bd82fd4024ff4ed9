"""The random matrices of a reservoir and their spectral radii, computed once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_finite

TOPOLOGIES = ("random", "ring", "diagonal")
_DENSE_EIGENVALUES = 400
_KRYLOV = 300


def spectral_radius(matrix: Tensor) -> float:
    """The largest modulus of the eigenvalues of a matrix (n, n), dense or sparse COO, or of the
    diagonal matrix of (n,).

    Computed from all eigenvalues up to n = 400, and above from the Ritz values of 300 Arnoldi
    steps. Unlike power iteration these also find a complex pair; at n = 1000 they take a fifth of
    the time of all eigenvalues and agree to nine digits.
    """
    matrix = matrix.double()
    check_finite("matrix", matrix.coalesce().values() if matrix.is_sparse else matrix)
    if matrix.dim() == 1:
        return float(matrix.abs().max())
    if matrix.shape[0] > _DENSE_EIGENVALUES:
        matrix = _hessenberg(matrix, _KRYLOV)
    dense = matrix.to_dense() if matrix.is_sparse else matrix
    return float(torch.linalg.eigvals(dense).abs().max())


def scaled(matrix: Tensor, radius: float, without_cycles: str) -> float:
    """The factor that gives `matrix` the spectral radius `radius`.

    Raises:
        ValueError: `without_cycles`, where its spectral radius is 0 and `radius` is not.
    """
    found = spectral_radius(matrix)
    if found < 1e-9 and radius:
        raise ValueError(without_cycles)
    return radius / max(found, 1e-9)


def _hessenberg(matrix: Tensor, steps: int) -> Tensor:
    """The Arnoldi projection (steps, steps) of matrix onto a random vector's Krylov space."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[0], generator=generator, dtype=matrix.dtype)
    start = start.to(matrix.device)
    basis = start.new_zeros((steps + 1, matrix.shape[0]))
    basis[0] = start / start.norm()
    projected = start.new_zeros((steps + 1, steps))
    for k in range(steps):
        vector = matrix @ basis[k]
        # One pass loses orthogonality as the Ritz values converge; two are enough (Kahan).
        for _ in range(2):
            overlap = basis[: k + 1] @ vector
            vector = vector - overlap @ basis[: k + 1]
            projected[: k + 1, k] += overlap
        norm = vector.norm()
        if norm <= 1e-12 * projected[: k + 1, k].abs().max():
            return projected[: k + 1, : k + 1]
        projected[k + 1, k] = norm
        basis[k + 1] = vector / norm
    return projected[:steps]


def draw_weight(
    topology: str, units: int, connectivity: float, radii: list[float], generator: torch.Generator
) -> Tensor:
    """W of a topology in float64: (N,) for a ring or a diagonal, (N, N), or (G, n, n) for the G
    blocks that several `radii` ask for.

    Entries of a block are normal, and nonzero with probability `connectivity`.

    Raises:
        ValueError: a block has no cycle, so its spectral radius is 0 and cannot be scaled.
    """
    if topology == "ring":
        return torch.full((units,), radii[0], dtype=torch.float64)
    if topology == "diagonal":
        return radii[0] * (torch.rand(units, generator=generator, dtype=torch.float64) * 2 - 1)
    size = units // len(radii)
    shape = (len(radii), size, size)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    present = torch.rand(shape, generator=generator, dtype=torch.float64) < connectivity
    weight = weight.where(present, 0)
    for block, radius in zip(weight, radii, strict=True):
        block *= scaled(
            block,
            radius,
            f"rc_connectivity {connectivity} leaves a reservoir of {size} units without cycles: "
            "raise rc_connectivity or units, or take another seed",
        )
    return weight if len(radii) > 1 else weight[0]


def draw_inputs(
    units: int, inputs: int, connectivity: float, scaling: list[float], generator: torch.Generator
) -> Tensor:
    """Input weights (units, inputs), float64: ±scaling, nonzero with probability `connectivity`."""
    shape = (units, inputs)
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    present = torch.rand(shape, generator=generator, dtype=torch.float64) < connectivity
    return (signs * torch.tensor(scaling, dtype=torch.float64)).where(present, 0)
