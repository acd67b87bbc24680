"""What happens to a weight besides the step of its rule, around any submission. After the step of the wrapped one has
moved W by Δ, with its learning rate η (of the weight's group, schedule included):

    CautiousDecay     W ← W + Δ - η λ W where -Δ W ≥ 0, else W + Δ         Chen et al. 2025, arXiv:2510.12402
    CorrectedDecay    W ← W + Δ - (η²/η_max) λ W                           AdamC: Defazio 2025, arXiv:2506.02285
    Hyperball         W ← R unit(W + η R unit(Δ)), R = ‖W₀‖                Wen et al. 2026, arXiv:2606.16899
    RadialBrake       W + Δ, scaled so that ‖W‖ changes by s times as much modded-nanogpt track 3, result 29
    UpdateFloor       W + Δ max(1, η r ‖W‖ / ‖Δ‖)                          same, result 9
    SpectralSphere    (W + Δ) σ / ‖W + Δ‖₂, σ = ‖W₀‖₂                      after Xie et al. 2026, arXiv:2601.08393

where ‖·‖ is the Frobenius norm, ‖·‖₂ the largest singular value, unit(A) = A/‖A‖, and η_max the learning rate before
the schedule. The first two act on all weights that decay (`no_decay`), the others on hidden matrices and convolutions,
which must not start at zero. AdamC's factor η/η_max is for weights before a normalisation, here the hidden matrices and
convolutions; the others decay as ever. The sphere keeps the initial spectral norm, and only by the retraction: the
paper's radius is √(rows / columns), and its step has no component along the singular vectors of the norm.

These replace weight decay: the wrapped submission's must be 0 for the weights that they act on. A step needs a copy of
these weights, which is not kept. State: R, or the singular vectors of the largest singular value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Interval
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from typing_extensions import override

from harness.interface import MATRIX_ROLES, Need, OptimizerSubmission, Role, Setup, StepContext, Submission, Wrapper
from submissions.matrices import as_matrix

TINY = 1e-30


class Move(NamedTuple):
    """A weight and the step that it has made."""

    number: int
    """Its place in `WeightHook.weights`."""
    weight: Tensor
    """W + Δ, to be changed in place."""
    before: Tensor
    """W."""
    rate: float
    """η."""
    factor: float
    """η / η_max."""

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖W‖, ‖W + Δ‖ and ‖Δ‖, scalars."""
        old, new, step = torch._foreach_norm([self.before, self.weight, self.weight - self.before])
        return old, new, step


class WeightHook(Wrapper):
    """The base: it hands a subclass each weight before and after the step of the wrapped submission."""

    needs = frozenset({Need.PARAMETER_ROLES})
    on_matrices = True
    """Whether the hook acts on hidden matrices and convolutions, or on all weights that decay."""
    replaces_decay = True

    def __init__(self, setup: Setup, inner: Submission) -> None:
        super().__init__(setup, inner)
        self.names = [
            name
            for name, parameter in setup.named_parameters.items()
            if parameter.numel() and self._acts_on(setup, setup.roles[name])
        ]
        self.weights: list[nn.Parameter] = [setup.named_parameters[name] for name in self.names]
        groups = _groups_by_weight(inner)
        for name, weight in zip(self.names, self.weights, strict=True):
            group = groups.get(weight.data_ptr())
            if group is None or "lr" not in group:
                raise ValueError(
                    f"{type(self).__name__} needs the learning rate of `{name}`, and {type(inner).__name__} has no "
                    "parameter group with an `lr` for it; wrap a submission that is made of torch optimizers"
                )
            if self.replaces_decay and group.get("weight_decay"):
                raise ValueError(
                    f"{type(self).__name__} takes the place of weight decay, and {type(inner).__name__} decays "
                    f"`{name}` by {group['weight_decay']}; set its weight_decay to 0"
                )

    @classmethod
    def _acts_on(cls, setup: Setup, role: Role) -> bool:
        return role in MATRIX_ROLES if cls.on_matrices else role not in setup.no_decay

    @override
    def step(self, ctx: StepContext) -> None:
        before = [weight.detach().clone() for weight in self.weights]
        super().step(ctx)
        groups, factor = _groups_by_weight(self.inner), self.setup.learning_rate_factor(ctx.step)
        moved = [
            Move(k, weight.detach(), old, groups[weight.data_ptr()]["lr"], factor)
            for k, (weight, old) in enumerate(zip(self.weights, before, strict=True))
            # A weight without a gradient was not stepped, and is left alone.
            if weight.grad is not None
        ]
        with torch.no_grad():
            for move in moved:
                self.adjust(move)

    def adjust(self, move: Move) -> None:
        """Change a weight in place after the step."""
        raise NotImplementedError


class CautiousDecay(WeightHook):
    """Decay of the coordinates that the step brings nearer to zero. cautious_decay: λ."""

    on_matrices = False

    def __init__(self, setup: Setup, inner: Submission, *, cautious_decay: NonNegativeFloat = 0.1) -> None:
        super().__init__(setup, inner)
        self.decay = cautious_decay

    @override
    def adjust(self, move: Move) -> None:
        shrinks = (move.before - move.weight) * move.before >= 0
        move.weight.sub_(torch.where(shrinks, move.before, 0.0), alpha=move.rate * self.decay)


class CorrectedDecay(WeightHook):
    """Decay that falls with the square of the schedule for hidden matrices and convolutions. corrected_decay: λ."""

    on_matrices = False

    def __init__(self, setup: Setup, inner: Submission, *, corrected_decay: NonNegativeFloat = 0.1) -> None:
        super().__init__(setup, inner)
        self.decay = corrected_decay
        self.normalised = [setup.roles[name] in MATRIX_ROLES for name in self.names]

    @override
    def adjust(self, move: Move) -> None:
        share = move.factor if self.normalised[move.number] else 1.0
        move.weight.sub_(move.before, alpha=move.rate * self.decay * share)


class Hyperball(WeightHook):
    """Weights on the sphere of their initial norm; the learning rate is the relative length of a step."""

    def __init__(self, setup: Setup, inner: Submission) -> None:
        super().__init__(setup, inner)
        self.radii = torch.stack(torch._foreach_norm([weight.detach() for weight in self.weights]))
        _check_not_zero(type(self).__name__, self.names, self.radii)

    @override
    def adjust(self, move: Move) -> None:
        radius, (_, _, length) = self.radii[move.number], move.norms()
        step = (move.weight - move.before) * (radius / length.clamp_min(TINY))
        torch.add(move.before, step, alpha=move.rate, out=move.weight)
        move.weight.mul_(radius / torch.linalg.vector_norm(move.weight).clamp_min(TINY))

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"radii": self.radii}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.radii = state["radii"]


class RadialBrake(WeightHook):
    """Growth of the norm, and less often its fall, is slowed down. brake_outward, brake_inward: s for the two."""

    replaces_decay = False

    def __init__(
        self,
        setup: Setup,
        inner: Submission,
        *,
        brake_outward: Annotated[float, Interval(ge=0, le=1)] = 0.5,
        brake_inward: Annotated[float, Interval(ge=0, le=1)] = 1.0,
    ) -> None:
        super().__init__(setup, inner)
        self.outward, self.inward = brake_outward, brake_inward

    @override
    def adjust(self, move: Move) -> None:
        old, new, _ = move.norms()
        change = new - old
        kept = torch.where(change > 0, self.outward * change, self.inward * change)
        move.weight.mul_((old + kept) / new.clamp_min(TINY))


class UpdateFloor(WeightHook):
    """Steps of at least a share of the weight's norm. floor_ratio: r."""

    replaces_decay = False

    def __init__(self, setup: Setup, inner: Submission, *, floor_ratio: PositiveFloat = 0.35) -> None:
        super().__init__(setup, inner)
        self.ratio = floor_ratio

    @override
    def adjust(self, move: Move) -> None:
        norm, _, length = move.norms()
        scale = (move.rate * self.ratio * norm / length.clamp_min(TINY)).clamp_min(1.0)
        move.weight.copy_(move.before + (move.weight - move.before) * scale)


class SpectralSphere(WeightHook):
    """Weights of their initial spectral norm. sphere_steps: steps of power iteration from the last singular vectors."""

    def __init__(
        self, setup: Setup, inner: Submission, *, sphere_steps: Annotated[int, Interval(ge=1, le=100)] = 2
    ) -> None:
        super().__init__(setup, inner)
        self.steps = sphere_steps
        matrices = [as_matrix(weight.detach(), like=weight) for weight in self.weights]
        self.vectors = [torch.ones_like(matrix[0]) / matrix.shape[1] ** 0.5 for matrix in matrices]
        # The vectors are first found as exactly as the radius, which stays.
        norms = [self._norm_of(k, matrix, 100) for k, matrix in enumerate(matrices)]
        self.radii = torch.stack(norms) if norms else torch.zeros(0)
        _check_not_zero(type(self).__name__, self.names, self.radii)

    @override
    def adjust(self, move: Move) -> None:
        norm = self._norm_of(move.number, as_matrix(move.weight, like=self.weights[move.number]), self.steps)
        move.weight.mul_(self.radii[move.number] / norm.clamp_min(TINY))

    def _norm_of(self, k: int, matrix: Tensor, steps: int) -> Tensor:
        """The largest singular value of a weight, by power iteration on its right singular vector."""
        vector = self.vectors[k]
        for _ in range(steps):
            product = matrix.mT @ (matrix @ vector)
            vector = product / torch.linalg.vector_norm(product).clamp_min(TINY)
        self.vectors[k] = vector
        return torch.linalg.vector_norm(matrix @ vector)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"vectors": self.vectors, "radii": self.radii}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.vectors, self.radii = state["vectors"], state["radii"]


def _groups_by_weight(submission: Submission) -> dict[int, dict[str, Any]]:
    """By the address of each weight the parameter group that holds it, or its first block, in a chain of wrappers."""
    return {
        parameter.data_ptr(): group
        for optimizer in _optimizers(submission)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _optimizers(submission: Submission) -> Iterator[torch.optim.Optimizer]:
    while isinstance(submission, Wrapper):
        submission = submission.inner
    if isinstance(submission, OptimizerSubmission):
        yield from submission.optimizers


def _check_not_zero(hook: str, names: list[str], norms: Tensor) -> None:
    """Raise ValueError where a weight starts at zero."""
    for name, norm in zip(names, norms.tolist(), strict=True):
        if norm == 0:
            raise ValueError(
                f"{hook} keeps the norm of `{name}`, which starts at zero; a workload that fills it with numbers, or a "
                "hook without a sphere, would do"
            )
