"""K-FAC: Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
arXiv:1503.05671, and for convolutions Grosse & Martens 2016, arXiv:1602.01573; amortised, damped and with AdamW for
what has no factors. For a layer with inputs a [positions, columns] (with a 1 for its bias), and gradients s [positions,
rows] of its outputs for labels that are drawn from the model's own predictions:

    every T steps: A ← β2 A + (1 - β2) aᵀ a / positions,   S ← β2 S + (1 - β2) B sᵀ s
    every T_inv steps: Ā = (A + π √γ I)⁻¹,   S̄ = (S + √γ/π I)⁻¹,   π = √(mean diag A / mean diag S)
    U = S̄ G Ā,   U ← U min(1, √(κ / (η² Σ ⟨U, G⟩)))          Σ over all layers; G with the bias as its last column
    M ← β1 M + η U,   W ← W - M - η λ W

B is the number of labels, since s belongs to the mean loss; the first averages are the first values. The positions of a
convolution are examples times places. AdamW trains embeddings, norms and all other parameters. Every T steps take one
more forward and backward, for the drawn labels. State: M; A, S, Ā and S̄ of each layer. Defaults: common in public code
(η = 0.1, β1 = 0.9, β2 = 0.95, γ = 1e-3, κ = 1e-3, T = 10, T_inv = 100).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Role, Setup, StepContext
from submissions.layer_inputs import has_patches, outputs_by_position, patches
from submissions.rule import upcast
from submissions.sgdw import SGDW

TINY = 1e-30


class KFAC(OptimizerSubmission):
    """K-FAC as in the module docstring, with AdamW for the rest.

    momentum: β1. factor_beta: β2. damping: γ. norm_limit: κ. factors_every: T. inverses_every: T_inv.
    """

    needs = frozenset({Need.LAYERS, Need.PARAMETER_ROLES, Need.SAMPLED_LABELS, Need.RE_EVALUATE})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_beta: float = 0.95,
        damping: PositiveFloat = 1e-3,
        norm_limit: PositiveFloat = 1e-3,
        factors_every: PositiveInt = 10,
        inverses_every: PositiveInt = 100,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        self.beta, self.damping, self.limit = factor_beta, damping, norm_limit
        self.factors_every, self.inverses_every, self.count = factors_every, inverses_every, 0
        names: dict[Tensor, str] = {parameter: name for name, parameter in setup.named_parameters.items()}
        # [A, S] and [Ā, S̄] of each layer, by the name of its weight; and that of its bias, if it has one.
        self.factors: dict[str, list[Tensor]] = {}
        self.inverses: dict[str, list[Tensor]] = {}
        self._biases: dict[str, str | None] = {}
        # Of one collecting pass, and whether it is on.
        self._sums: dict[str, _Sums] = {}
        self._collecting = False
        for layer in setup.model.modules():
            weight: Any = getattr(layer, "weight", None)
            if not has_patches(layer) or weight not in names or names[weight] in self.factors:
                continue
            # A weight that is an embedding's too has other gradients than those of this layer.
            if setup.roles[names[weight]] is Role.EMBEDDING:
                continue
            bias: Any = layer.bias
            self._biases[names[weight]] = None if bias is None else names[bias]
            sizes = (weight[0].numel() + (bias is not None), len(weight))
            value = upcast(weight.detach())
            self.factors[names[weight]] = [value.new_zeros(size, size) for size in sizes]
            self.inverses[names[weight]] = [torch.eye(size, device=value.device, dtype=value.dtype) for size in sizes]
            layer.register_forward_hook(partial(self._collect, names[weight]))
        if not self.factors:
            raise ValueError(
                "K-FAC has factors of linear layers and convolutions, and the model has none of its own; use another "
                "submission"
            )
        biases = {bias for bias in self._biases.values() if bias is not None}
        covered = [name for name in setup.named_parameters if name in self.factors or name in biases]
        rest = [name for name in setup.named_parameters if name not in covered]
        groups = setup.decay_groups(covered)
        optimizers: list[torch.optim.Optimizer] = [
            SGDW(groups, lr=lr, momentum=momentum, weight_decay=lr * weight_decay)
        ]
        if rest:
            adamw: dict[str, Any] = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)

    @override
    def step(self, ctx: StepContext) -> None:
        # First, since only the first pass of a step updates BatchNorm's statistics.
        self._gradient(ctx)
        if self.count % self.factors_every == 0:
            self._average_factors(ctx)
        if self.count % self.inverses_every == 0:
            self._invert_factors()
        self.count += 1
        self.apply_schedule(ctx)
        self._precondition(self.optimizers[0].param_groups[0]["lr"])
        self.update(ctx)

    def _average_factors(self, ctx: StepContext) -> None:
        """A and S with those of the present batch, on drawn labels."""
        self._collecting = True
        ctx.gradients(labels="sampled")
        self._collecting = False
        for name, statistics in self._sums.items():
            new: tuple[Any, Any] = (statistics.inputs / statistics.positions, statistics.gradients * ctx.label_count)
            for factor, value in zip(self.factors[name], new, strict=True):
                if self.count:
                    factor.lerp_(value, 1 - self.beta)
                else:
                    factor.copy_(value)
        self._sums = {}

    def _invert_factors(self) -> None:
        for name, (a, s) in self.factors.items():
            pi = (a.diagonal().mean() / s.diagonal().mean().clamp_min(TINY)).clamp_min(TINY).sqrt()
            for inverse, factor, share in zip(self.inverses[name], (a, s), (pi, 1 / pi), strict=True):
                damped = factor + torch.eye(len(factor), device=factor.device) * (share * self.damping**0.5)
                # Not checked on the host; the factor of a matrix that is not finite makes the trial diverge.
                inverse.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(damped)[0]))

    def _precondition(self, lr: float) -> None:
        """U in place of the gradients."""
        named, updates, products = self.setup.named_parameters, [], []
        for name, (a, s) in self.inverses.items():
            weight, bias_name = named[name].grad, self._biases[name]
            if weight is None:
                continue
            gradient = upcast(weight).flatten(1)
            bias = None if bias_name is None else named[bias_name].grad
            if bias is not None:
                gradient = torch.cat([gradient, upcast(bias).unsqueeze(1)], 1)
            columns = gradient.shape[1]
            update = s @ gradient @ a[:columns, :columns]
            products.append((update * gradient).sum())
            updates.append((weight, bias, update))
        if not updates:
            return
        total = lr**2 * torch.stack(products).sum()
        factor = (self.limit / total.clamp_min(TINY)).sqrt().clamp_max(1.0)
        for weight, bias, update in updates:
            weight.copy_((update[:, : weight[0].numel()] * factor).view(weight.shape))
            if bias is not None:
                bias.copy_(update[:, -1] * factor)

    def _collect(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook of a layer: its inputs, and the gradients of its outputs once they are known."""
        if not (self._collecting and output.requires_grad):
            return
        statistics = self._sums.setdefault(name, _Sums())
        a = patches(upcast(inputs[0].detach()), layer)
        if self._biases[name] is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        statistics.inputs = statistics.inputs + a.mT @ a
        statistics.positions += len(a)

        def add_gradients(gradient: Tensor) -> None:
            s = outputs_by_position(upcast(gradient.detach()), layer)
            statistics.gradients = statistics.gradients + s.mT @ s

        output.register_hook(add_gradients)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"factors": self.factors, "inverses": self.inverses, "count": self.count}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.factors, self.inverses, self.count = state["factors"], state["inverses"], state["count"]

    @override
    def state_tensors(self) -> list[Tensor]:
        held = [tensor for pair in (*self.factors.values(), *self.inverses.values()) for tensor in pair]
        return super().state_tensors() + held


@dataclass
class _Sums:
    """aᵀ a and sᵀ s of one layer, and the number of positions of a, over the micro-batches of a collecting pass."""

    inputs: Tensor | float = 0.0
    gradients: Tensor | float = 0.0
    positions: int = 0
