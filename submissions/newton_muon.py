"""Newton-Muon: Du & Su 2026, "The Newton-Muon Optimizer", arXiv:2604.01472. Muon whose gradients are first multiplied
by the inverse of the second moment of their layer's inputs Z [positions, columns]:

    every f steps: K ← β2 K + (1 - β2) Zᵀ Z / positions,   P = (K + γ mean(diag K) I)^-1
    G ← G P,   then as Muon (submissions/spectral.py)

Z are the inputs of the step that refreshes P; for a convolution the patches that its filters see. Before the first
refresh, at step f, P is the identity. Hidden matrices outside linear layers and convolutions, and grouped ones, have
P = I; AdamW trains the rest. State: Muon's, and K and P for each layer. Defaults: modded-nanogpt track 3, result 15
(f = 64, β2 = 0.95, γ = 0.2; K starts at 0.001 I).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from harness.interface import MATRIX_ROLES, Need, Setup, StepContext
from submissions.layer_inputs import has_patches, patches
from submissions.matrices import MatrixSubmission
from submissions.rule import upcast
from submissions.spectral import SpectralRule


class NewtonMuon(MatrixSubmission):
    """Newton-Muon as in the module docstring, with AdamW for the rest.

    refresh_every: f. input_beta: β2. input_damping: γ. The others as of `submissions.spectral.Spectral`. Raises
    ValueError where the model has no layer whose inputs can be collected.
    """

    needs = MatrixSubmission.needs | {Need.LAYERS}

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        polar: str = "quintic",
        scale: str = "original",
        polar_steps: PositiveInt = 5,
        refresh_every: PositiveInt = 64,
        input_beta: float = 0.95,
        input_damping: PositiveFloat = 0.2,
        adamw_lr: PositiveFloat | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: NonNegativeFloat | None = None,
    ) -> None:
        self.refresh_every, self.beta, self.damping = refresh_every, input_beta, input_damping
        self.count, self._collecting = 0, False
        names: dict[Tensor, str] = {
            p: name for name, p in setup.named_parameters.items() if setup.roles[name] in MATRIX_ROLES
        }
        # By the name of each layer's weight: K, P, and the sums of the present step.
        self.moments: dict[str, Tensor] = {}
        self.inverses: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        for layer in setup.model.modules():
            if not has_patches(layer):
                continue
            weight: Any = layer.weight
            name = names.get(weight)
            if name is not None and name not in self.moments:
                identity = torch.eye(weight[0].numel(), device=weight.device, dtype=upcast(weight).dtype)
                self.moments[name], self.inverses[name] = identity * 1e-3, identity
                layer.register_forward_hook(partial(self._collect, name))
        if not self.moments:
            raise ValueError(
                "Newton-Muon multiplies gradients by the second moment of their layer's inputs, and the model has no "
                "linear layer or convolution of its own; use submissions.spectral.Spectral"
            )
        rule: dict[str, Any] = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "polar": polar,
            "scale": scale, "polar_steps": polar_steps,
        }  # fmt: skip
        adamw = {
            "lr": lr if adamw_lr is None else adamw_lr, "betas": adamw_betas, "eps": adamw_eps,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
        }  # fmt: skip
        super().__init__(setup, lambda groups: SpectralRule(groups, **rule), adamw)

    @override
    def step(self, ctx: StepContext) -> None:
        self.count += 1
        self._collecting = self.count % self.refresh_every == 0
        self._gradient(ctx)
        if self._collecting:
            # Before the update and the evaluation, whose forward passes must not be collected.
            self._collecting = False
            self._refresh()
        if self.count >= self.refresh_every:
            for name, inverse in self.inverses.items():
                gradient = self.setup.named_parameters[name].grad
                if gradient is not None:
                    gradient.copy_((upcast(gradient).flatten(1) @ inverse).view(gradient.shape))
        self.update(ctx)

    def _collect(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook of a layer: add its inputs' products to the sums of the step."""
        if self._collecting and output.requires_grad:
            z = patches(upcast(inputs[0].detach()), layer)
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + z.mT @ z, count + len(z)

    def _refresh(self) -> None:
        """K and P from the sums of this step."""
        for name, (total, count) in self._sums.items():
            moment = self.moments[name]
            moment.lerp_(total / count, 1 - self.beta)
            damped = moment + torch.eye(len(moment), device=moment.device) * (self.damping * moment.diagonal().mean())
            # Not checked on the host; a factor of a matrix that is not finite is not finite, and the trial diverges.
            factor, _ = torch.linalg.cholesky_ex(damped)
            self.inverses[name].copy_(torch.cholesky_inverse(factor))
        self._sums = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        further = {"moments": self.moments, "inverses": self.inverses, "count": self.count}
        return super().state_dict() | further

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.moments, self.inverses, self.count = state["moments"], state["inverses"], state["count"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return [*super().state_tensors(), *self.moments.values(), *self.inverses.values()]
