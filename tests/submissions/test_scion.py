from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Role
from submissions.scion import Scion, ScionRule
from tests.submissions.parity import assert_parity, make_setup, transcription

KINDS = {"spectral": (4, 6), "sign": (5, 3), "rows": (7, 3), "rms": (5,)}


def lmo(kind: str, M: Tensor) -> Tensor:
    if kind == "spectral":
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        x = S / S.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        return (len(M) / len(M.T)) ** 0.5 * U @ torch.diag(x) @ Vh
    if kind == "sign":
        return torch.sign(M) / M.shape[1]
    return M / M.pow(2).mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_role_has_its_direction(kind: str, constrained: bool) -> None:
    def scion(W: Tensor, G: Tensor, t: int, memory: dict[str, Any]) -> Tensor:
        M = memory["M"] = 0.9 * memory.get("M", 0) + 0.1 * G
        return W * (1 - 0.01 * constrained) - 0.01 * 3 * lmo(kind, M)

    shared = {"lr": 0.01, "momentum": 0.9, "constrained": constrained, "polar_steps": 5}
    assert_parity(
        lambda p: ScionRule([{"params": p, "kind": kind, "radius": 3.0}], shared), transcription(scion), torch.float64,
        shapes=(KINDS[kind],), tolerance=1e-8,
    )  # fmt: skip


def test_roles_and_radii() -> None:
    shapes = {"embedding": (5, 3), "stem": (4, 1, 3, 3), "matrix": (3, 3), "norm": (3,), "bias": (3,), "head": (5, 3)}
    roles = {name: Role(name) for name in ("embedding", "stem", "norm", "bias", "head")} | {
        "matrix": Role.HIDDEN_MATRIX
    }
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    scion = Scion(make_setup(named, roles, needs=Scion.needs), radius=2.0, head_radius=7.0)
    (rule,) = scion.optimizers
    groups = {g["kind"]: (g["radius"], [tuple(p.shape) for p in g["params"]]) for g in rule.param_groups}
    assert groups == {
        "rows": (2.0, [(5, 3)]), "spectral": (2.0, [(4, 1, 3, 3), (3, 3)]), "rms": (2.0, [(3,), (3,)]),
        "sign": (7.0, [(5, 3)]),
    }  # fmt: skip
