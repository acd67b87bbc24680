from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pytorch_optimizer import MARS as LibraryMARS
from torch import Tensor, nn

from submissions.mars import KINDS, Mars, MarsExact, MarsRule
from submissions.polar import orthogonalise
from tests.submissions.parity import (
    assert_parity,
    both_decays,
    compute_gradients,
    make_setup,
    submission_optimizer,
    transcription,
)

SHAPES = ((4, 6), (6, 4), (4, 6), (2, 3, 3, 3), (0, 3))
MATRICES = tuple(shape for shape in SHAPES if len(shape) == 2)
"""The tensors that the submissions give to the rule, which takes any."""
LR, GAMMA, BETAS = 0.01, 0.2, (0.9, 0.95)
# Shampoo's step is in bfloat16 where the weights are float32, so it is compared in float64.
DTYPES = {
    "adamw": (torch.float64, torch.float32, torch.bfloat16),
    "lion": (torch.float64, torch.float32, torch.bfloat16),
}
kinds_and_dtypes = pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in KINDS for dtype in DTYPES.get(kind, (torch.float64,))], ids=str
)


def polar(m: Tensor) -> Tensor:
    """Newton-Schulz changes only the singular values, so it is applied to those."""
    U, S, Vh = torch.linalg.svd(m.flatten(1), full_matrices=False)
    S = S / S.norm()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    rows, columns = len(U), Vh.shape[1]
    return max(1.0, rows / columns) ** 0.5 * (U @ torch.diag(S) @ Vh).view_as(m)


def mars(
    theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], kind: str, decay: float, previous: Tensor | None = None
) -> Tensor:
    """Algorithms 2 to 4 of the paper. `previous`: the exact gradient at the previous weights."""
    if not theta.numel():
        return theta
    last = memory.get("g", g) if previous is None else previous
    c = g + GAMMA * BETAS[0] / (1 - BETAS[0]) * (g - last)
    c = c / max(1.0, float(c.norm()))
    m = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * c
    v = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * c**2
    memory |= {"g": g, "m": m, "v": v}
    if kind == "adamw":
        update = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
    else:
        update = torch.sign(m) if kind == "lion" else polar(m)
    return theta - LR * (update + decay * theta)


def mars_hyperparameters(kind: str, decay: float) -> dict[str, Any]:
    return {"lr": LR, "kind": kind, "gamma": GAMMA, "betas": BETAS, "eps": 1e-8, "weight_decay": decay}


@kinds_and_dtypes
@both_decays
def test_mars(kind: str, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        lambda p: MarsRule(p, mars_hyperparameters(kind, decay)),
        transcription(mars, kind=kind, decay=decay),
        dtype,
        shapes=SHAPES,
    )


class ExactReference:
    """MARS with the exact correction; gradients are rounded to `dtype`."""

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, decay: float, dtype: torch.dtype) -> None:
        self.parameters, self.kind, self.decay, self.dtype, self.count = list(parameters), kind, decay, dtype, 0
        self.previous = [p.detach().clone() for p in parameters]
        self.memories: list[dict[str, Any]] = [{} for _ in parameters]

    def step(self) -> None:
        previous_gradients = [g.to(self.dtype).double() for g in compute_gradients(self.previous, self.count)]
        self.previous = [p.detach().clone() for p in self.parameters]
        self.count += 1
        for p, memory, previous in zip(self.parameters, self.memories, previous_gradients, strict=True):
            assert p.grad is not None
            p.data = mars(p.detach(), p.grad.clone(), self.count, memory, self.kind, self.decay, previous)


@kinds_and_dtypes
@both_decays
def test_mars_exact(kind: str, decay: float, dtype: torch.dtype) -> None:
    assert_parity(
        submission_optimizer(MarsExact, needs=MarsExact.needs, **mars_hyperparameters(kind, decay)),
        lambda p: ExactReference(p, kind, decay, dtype),  # type: ignore[arg-type, return-value]
        dtype,
        shapes=MATRICES,
    )


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_mars_is_the_librarys_after_the_first_step(kind: str) -> None:
    """The library starts with g_0 = 0; the paper has θ_0 = θ_1, so no correction at the first step. With a first
    gradient of 0 the two agree."""
    ours, theirs = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    rule = MarsRule([ours], mars_hyperparameters(kind, 0.1))
    library = LibraryMARS([theirs], lr=LR, betas=BETAS, gamma=GAMMA, mars_type=kind, weight_decay=0.1)
    for step in range(25):
        g = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) * (step > 0)
        ours.grad, theirs.grad = g.clone(), g.clone()
        rule.step()
        library.step()
        assert torch.allclose(ours, theirs, atol=1e-5), step


def test_shampoos_step_in_bfloat16_is_close() -> None:
    m = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([polar(x) / (8 / 5) ** 0.5 for x in m.double()])
    for factor, expected in ((orthogonalise(m), exact), (orthogonalise(m.mT), exact.mT)):
        assert factor.dtype == torch.float32
        torch.testing.assert_close(factor.double(), expected, rtol=0, atol=0.08)


def test_vectors_and_filters_are_trained_by_adamw() -> None:
    """As in the authors' code, whose condition is a tensor of two dimensions."""
    matrix, vector, filters = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,), (2, 3, 3, 3)))
    submission = Mars(make_setup({"matrix": matrix, "vector": vector, "filters": filters}), adamw_lr=0.5)
    rule, adamw = submission.optimizers
    assert isinstance(rule, MarsRule) and rule.param_groups[0]["params"] == [matrix]
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["lr"] == 0.5
    assert all(p is q for p, q in zip(adamw.param_groups[0]["params"], (vector, filters), strict=True))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind=sgd: must be one of adamw, lion, shampoo"):
        MarsRule([nn.Parameter(torch.ones(2))], mars_hyperparameters("sgd", 0.0))
