"""Rules of little memory against float64 transcriptions of their papers, and Subset-Norm against pytorch_optimizer.

pytorch_optimizer's GaLore is plain AdamW without keys in the parameter groups that its documentation omits, and the
authors' package needs a GPU library to import; so GaLore has a transcription too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from pytorch_optimizer import AdamWSN
from torch import Tensor

from harness.roles import Role
from submissions.adam_mini import AdamMini
from submissions.adamw_8bit import AdamW8bit, code
from submissions.low_rank import DCTAdamW, Frugal, GaLore, dct_basis
from submissions.subset_norm import AdamWSubsetNorm, SubsetNormRule
from tests.submissions.mixed import AdamW, MixedTraining, assert_close, decays
from tests.submissions.test_preconditioned import MATRICES, as_matrix, from_matrix

NO_DECAY = (Role.NORM, Role.BIAS)
STEPS = 25
LR, BETAS = 0.01, (0.9, 0.95)


class Reference:
    """AdamW for what is no matrix, and for matrices θ ← (1 - ηλ) θ - η `direction(name, G)` with G of tall shape."""

    def __init__(self, cls: Any, weight_decay: float, direction: Any, tall: bool = True, **arguments: Any) -> None:
        shared = dict(lr=LR, betas=BETAS, weight_decay=weight_decay) | arguments
        self.training = MixedTraining(cls, shared, no_decay=NO_DECAY)
        self.theta = self.training.parameters()
        self.decay = decays(self.training, weight_decay, NO_DECAY)
        self.adam: Any = defaultdict(lambda: AdamW(LR, BETAS))
        self.direction, self.tall = direction, tall

    def follow(self, steps: int = STEPS, tolerance: float = 1e-6) -> None:
        for t in range(1, steps + 1):
            for name, g in self.training.step().gradients.items():
                if self.training.roles[name] not in MATRICES:
                    self.theta[name] = self.adam[name](self.theta[name], g, self.decay[name])
                    continue
                G = as_matrix(g)
                flipped = self.tall and G.shape[0] < G.shape[1]
                update = self.direction(self, t, name, G.T if flipped else G)
                update = from_matrix(update.T.contiguous() if flipped else update, self.theta[name])
                self.theta[name] = self.theta[name] - LR * (update + self.decay[name] * self.theta[name])
            assert_close(self.training, self.theta, t, tolerance)

    def held(self, name: str) -> dict[str, Tensor]:
        """Our state of a matrix."""
        parameter = self.training.names[name]
        submission: Any = self.training.submission
        view = next(view for view, owner, _ in submission._views if owner is parameter)
        return submission.optimizers[0].state[view]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_galore(weight_decay: float) -> None:
    rank, gap, scale = 3, 6, 0.5
    Q: dict[str, Tensor] = {}

    def direction(reference: Reference, t: int, name: str, G: Tensor) -> Tensor:
        if (t - 1) % gap == 0:
            Q[name] = torch.linalg.svd(G).Vh[:rank].T
        return scale * reference.adam[name].direction(G @ Q[name]) @ Q[name].T

    Reference(GaLore, weight_decay, direction, rank=rank, refresh_every=gap, scale=scale).follow()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_frugal(weight_decay: float) -> None:
    """The random columns are ours; they have to be as many as asked for, and others after `refresh_every` steps."""
    density, gap, scale = 0.3, 6, 0.5
    columns: Any = defaultdict(list)

    def direction(reference: Reference, t: int, name: str, G: Tensor) -> Tensor:
        if (t - 1) % gap == 0:
            columns[name].append(reference.held(name)["columns"].tolist())
            reference.adam[name] = AdamW(LR, BETAS)
        chosen = columns[name][-1]
        assert reference.held(name)["columns"].tolist() == chosen
        assert len(set(chosen)) == max(1, round(density * G.shape[1])) and max(chosen) < G.shape[1]
        update = scale * torch.sign(G)
        update[:, chosen] = reference.adam[name].direction(G[:, chosen])
        return update

    Reference(
        Frugal, weight_decay, direction, tall=False, density=density, refresh_every=gap, sign_scale=scale
    ).follow()
    assert len({tuple(x) for x in columns["first.weight"]}) == 5


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("error_feedback", [False, True])
def test_dct_adamw(error_feedback: bool, weight_decay: float) -> None:
    """The moments of the reference are rotated by the matrix Q_prevᵀ Q_new."""
    rank = 3
    state: Any = defaultdict(dict)

    def direction(reference: Reference, t: int, name: str, G: Tensor) -> Tensor:
        s, D = state[name], dct_basis(G.shape[1], G)
        A = G + s.get("error", 0)
        columns = (A @ D).abs().sum(0).argsort(descending=True)[:rank].sort().values
        Q, adam = D[:, columns], reference.adam[name]
        if "Q" in s:
            adam.m, adam.v = adam.m @ (s["Q"].T @ Q), (adam.v @ (s["Q"].T @ Q)).abs()
        s["Q"] = Q
        if error_feedback:
            s["error"] = A - A @ Q @ Q.T
        return adam.direction(A @ Q) @ Q.T

    Reference(DCTAdamW, weight_decay, direction, rank=rank, error_feedback=error_feedback).follow()


def test_the_dct_basis_is_orthonormal() -> None:
    basis = dct_basis(7, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(basis.T @ basis, torch.eye(7, dtype=torch.float64))
    assert torch.allclose(basis[:, 0], torch.full((7,), 7**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("rank", [0, 3])
def test_subset_norm_and_subspace_momentum(rank: int, weight_decay: float) -> None:
    gap, eps = 6, 1e-6
    state: Any = defaultdict(dict)

    def direction(reference: Reference, t: int, name: str, G: Tensor) -> Tensor:
        s = state[name]
        s["v"] = BETAS[1] * s.get("v", 0) + (1 - BETAS[1]) * torch.stack([(row**2).sum() for row in G])
        if rank and (t - 1) % gap == 0:
            s["Q"], s["m"] = torch.linalg.svd(G).Vh[:rank].T, 0.0
        Q = s["Q"] if rank else torch.eye(G.shape[1], dtype=G.dtype)
        s["m"] = BETAS[0] * s.get("m", 0.0) + (1 - BETAS[0]) * G @ Q
        U = s["m"] @ Q.T + (G - G @ Q @ Q.T)
        return (1 - BETAS[1] ** t) ** 0.5 / (1 - BETAS[0] ** t) * U / (s["v"].sqrt() + eps)[:, None]

    arguments = dict(rank=rank, refresh_every=gap, adamw_lr=LR, adamw_weight_decay=weight_decay)
    Reference(AdamWSubsetNorm, weight_decay, direction, **arguments).follow()


def test_subset_norm_is_the_librarys_where_the_subsets_are_rows() -> None:
    """The library cuts the flattened tensor into subsets of a given size instead, and decays weights after the step."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 4)) for _ in range(2))
    own = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, rank=0, refresh_every=1)
    rule = SubsetNormRule([ours], own)
    library = AdamWSN([{"params": [theirs], "sn": True}], lr=0.1, betas=(0.9, 0.99), subset_size=4, eps=1e-8)
    for _ in range(25):
        g = torch.randn(6, 4)
        ours.grad, theirs.grad = g.clone(), g.clone()
        rule.step()
        library.step()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_mini(weight_decay: float) -> None:
    training = MixedTraining(AdamMini, dict(lr=LR, betas=BETAS, weight_decay=weight_decay), no_decay=NO_DECAY)
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    m, v = defaultdict(float), defaultdict(float)
    for t in range(1, STEPS + 1):
        for name, g in training.step().gradients.items():
            by_row = g.ndim >= 2
            rows = g.reshape(len(g), -1) if by_row else g.reshape(1, -1)
            for i, row in enumerate(rows):
                m[name, i] = BETAS[0] * m[name, i] + (1 - BETAS[0]) * row
                v[name, i] = BETAS[1] * v[name, i] + (1 - BETAS[1]) * float((row**2).mean())
            update = torch.stack(
                [m[name, i] / (1 - BETAS[0] ** t) / ((v[name, i] / (1 - BETAS[1] ** t)) ** 0.5 + 1e-8)
                 for i in range(len(rows))]
            ).view(g.shape)  # fmt: skip
            theta[name] = theta[name] - LR * (update + decay[name] * theta[name])
        assert_close(training, theta, t, 1e-7)
    rule = training.submission.optimizers[0]
    assert rule.state[training.names["hidden.weight"]]["block_sq"].numel() == 8


def nearest(x: Tensor, signed: bool, block: int) -> Tensor:
    """Quantised and restored, number by number."""
    values, out = code(signed), torch.zeros_like(x).flatten()
    flat = x.flatten()
    for start in range(0, len(flat), block):
        piece = flat[start : start + block]
        scale = float(piece.abs().max())
        for i, number in enumerate(piece):
            index = int((values - float(number) / scale).abs().argmin()) if scale else int((values == 0).nonzero())
            out[start + i] = values[index] * scale
    return out.view(x.shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_8bit_quantises_its_moments(weight_decay: float) -> None:
    block, smallest = 20, 60
    training = MixedTraining(
        AdamW8bit,
        dict(lr=LR, betas=BETAS, weight_decay=weight_decay, block_size=block, min_8bit_size=smallest),
        no_decay=NO_DECAY,
    )
    theta, decay = training.parameters(), decays(training, weight_decay, NO_DECAY)
    adam: Any = defaultdict(lambda: AdamW(LR, BETAS))
    for t in range(20):
        for name, g in training.step().gradients.items():
            theta[name] = adam[name](theta[name], g, decay[name])
            if g.numel() >= smallest:
                adam[name].m = nearest(adam[name].m, True, block)
                adam[name].v = nearest(adam[name].v, False, block)
        assert_close(training, theta, t, 1e-6)
    held = training.submission.optimizers[0].state[training.names["hidden.weight"]]
    assert {key: value.dtype for key, value in held.items()} == {
        "exp_avg": torch.uint8, "exp_avg_scale": torch.float32,
        "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_has_256_values_dense_near_zero(signed: bool) -> None:
    values = code(signed)
    assert len(values.unique()) == 256 and values.max() == 1 and (values == 0).any()
    assert (values.min() < -0.99) == signed
    magnitudes = values.abs().unique()
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        expected = 2**decade if signed else 2 ** (decade + 1)
        assert ((magnitudes > low) & (magnitudes < high * (1 - 1e-12))).sum() == expected


def test_errors_name_key_value_and_fix() -> None:
    for cls, key, value in (
        (GaLore, "rank", 0), (GaLore, "refresh_every", 0), (Frugal, "density", 0.0), (Frugal, "refresh_every", 0),
        (DCTAdamW, "rank", 0), (AdamWSubsetNorm, "rank", -1), (AdamWSubsetNorm, "refresh_every", 0),
        (AdamW8bit, "block_size", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{key}={value}: must"):
            MixedTraining(cls, {key: value})
