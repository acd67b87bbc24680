"""Maps of the singular values of matrices M = U S Vᵀ (singular value decomposition) that keep U and V:

    quintic         about U Vᵀ, the polar factor: k steps X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X with X = M / ‖M‖ at first,
                    whose coefficients bring singular values into (0.7, 1.2) and not to 1 (Jordan et al. 2024,
                    https://kellerjordan.github.io/posts/muon/)
    polar_express   the same with the best coefficients for each step, so that k steps bring them nearest to 1 (Amsel,
                    Persson, Musco & Gower 2025, arXiv:2505.16932, Algorithm 1)
    exact           U Vᵀ, from a singular value decomposition
    power           U Sᵖ Vᵀ, scaled to the norm of U Vᵀ (Freon's family: Shumaylov et al. 2026, arXiv:2605.11181)
    kaon            a scrambled spectrum: steps X ← 4.1 (I - X Xᵀ)² X, which are chaotic, divided by 1.175 (Kaon, same
                    paper: a control that keeps nothing of the singular values but that they are below 1)

All are for matrices [n, rows, columns]. Steps are computed in bfloat16 for float32, as Muon's authors do. The chaotic
ones amplify rounding, so they give other numbers on another processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from submissions.matrices import to_tall


@dataclass(frozen=True)
class Iteration:
    """Steps X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, and what stands before and after them."""

    coefficients: Sequence[tuple[float, float, float]]
    """(a, b, c) of each step; further steps repeat the last."""
    margin: float = 1.0
    """X is first divided by its Frobenius norm times this."""
    divisor: float = 1.0
    """What the result is divided by."""


_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
ITERATIONS = {
    "quintic": Iteration([(3.4445, -4.7750, 2.0315)]),
    # The paper's safety factor 1.01 keeps rounding from carrying a singular value out of the interval; not in the last
    # polynomial, which later steps repeat.
    "polar_express": Iteration(
        [*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375)], margin=1.01
    ),
    "kaon": Iteration([(4.1, -8.2, 4.1)], divisor=1.175),
}
POLAR_METHODS = (*ITERATIONS, "exact", "power")


def map_spectrum(matrix: Tensor, method: str = "quintic", steps: int = 5, power: float = 0.0) -> Tensor:
    """The map `method` of matrices [n, rows, columns], in their dtype.

    steps: of an iteration. power: p of the method power. NaN where matrices are not finite, so that a diverging trial
    ends as diverged.
    """
    if method in ("exact", "power"):
        return _map_exactly(matrix, power if method == "power" else 0.0)
    x = matrix.bfloat16() if matrix.dtype == torch.float32 else matrix
    # A batch saves calls, which matters for small matrices; for large ones single products are faster.
    one_by_one = x[0].numel() >= 2**16
    iteration = ITERATIONS[method]
    return (
        torch.stack([_iterate(m, iteration, steps) for m in x]) if one_by_one else _iterate(x, iteration, steps)
    ).to(matrix)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The polar factor of matrices [n, rows, columns], by five steps of Muon's iteration."""
    return map_spectrum(matrix)


def _iterate(matrix: Tensor, iteration: Iteration, steps: int) -> Tensor:
    """The steps on [rows, columns] or [n, rows, columns]."""
    # The short side as rows, which makes the Gram matrix small.
    x, transposed = to_tall(matrix)
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = x.mT / (norm * iteration.margin if iteration.margin != 1 else norm)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for step in range(steps):
        a, b, c = iteration.coefficients[min(step, len(iteration.coefficients) - 1)]
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if iteration.divisor != 1:
        x = x / iteration.divisor
    return x if transposed else x.mT


def _map_exactly(matrix: Tensor, power: float) -> Tensor:
    """U Sᵖ Vᵀ with the Frobenius norm of U Vᵀ."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix, torch.nan)
    # Directions that the matrix does not have stay without one: of a zero matrix, the map is zero.
    present = s > torch.finfo(s.dtype).eps * max(matrix.shape[-2:]) * s[:, :1]
    spectrum = torch.where(present, s / s[:, :1].clamp_min(torch.finfo(s.dtype).tiny), 1.0) ** power * present
    if power:
        norm = torch.linalg.vector_norm(spectrum, dim=1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        spectrum = spectrum * (present.sum(1, keepdim=True, dtype=s.dtype) ** 0.5 / norm)
    return (u * spectrum.unsqueeze(1)) @ vh
