"""AdaFisherW: Gomes, Zhang, Belilovsky, Wolf & Hosseini 2025, "AdaFisher: Adaptive Second Order Optimization via Fisher
Information", arXiv:2405.16397. Momentum over a diagonal Fisher matrix that is a Kronecker product of two vectors per
layer, from the layer's inputs h (with a 1 for the bias) and the gradients s with respect to its outputs:

    every T steps: H ← (1 - γ1) H + γ2 N(mean h²),   S ← (1 - γ1) S + γ2 N(mean s²)
    with N(x) = (x - min x) / (max x - min x)
    F̃ = S Hᵀ + ε,   m ← β m + (1 - β) g,   θ ← θ - η (m / ((1 - β^t) F̃) + λ θ)          (no square root)

Convolutions are linear layers on patches. A normalisation layer has one H for its scale and one for its shift; its S is
the square of the summed s, as in the authors' code. (For a LayerNorm that code sums over other dimensions; here the
features are the normalised ones.) AdamW trains embeddings and all other parameters outside such layers. The authors'
code sets F̃ = 1 for them, which makes their steps about 1/ε = 1000 times smaller than those of the other layers. State:
m, H and S. Defaults: the authors' code (η = 1e-3, β = 0.9, γ = (0.92, 0.008), ε = 1e-3, T = 100).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors, average_, upcast

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, *_BATCH_NORMS)
"""Types of layers that can have Kronecker factors, see `_has_factors`."""


class AdaFisher(OptimizerSubmission):
    """AdaFisherW as in the module docstring, with AdamW for the parameters that have no factors.

    beta: β. gammas: (γ1, γ2), the share of the old factor that is dropped and the weight of the new one. damping: ε.
    update_every: T.
    """

    needs = frozenset({Need.LAYERS})

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        beta: float = 0.9,
        gammas: tuple[float, float] = (0.92, 0.008),
        damping: PositiveFloat = 1e-3,
        update_every: PositiveInt = 100,
        weight_decay: float = 0.0,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        if not all(0 < gamma <= 1 for gamma in gammas):
            raise ValueError(
                f"gammas={gammas}: must lie in (0, 1], the share of the old factor that is dropped and the weight of "
                "the new one"
            )
        self.gammas, self.update_every, self.updates = gammas, update_every, 0
        names: dict[Tensor, str] = {parameter: name for name, parameter in setup.named_parameters.items()}
        # [H, S] of each layer, by the name of its weight.
        self.factors: dict[str, list[Tensor]] = {}
        # For each weight and bias the name under which its layer's factors are stored, and whether it is a bias.
        self._owners: dict[Tensor, tuple[str, bool]] = {}
        # Not None during a step that updates the factors.
        self._collected: dict[str, _LayerStatistics] | None = None
        for layer in setup.model.modules():
            if not isinstance(layer, LAYERS) or not _has_factors(layer) or layer.weight not in names:
                continue
            weight = layer.weight
            owner = names[weight]
            columns = (1 if weight.ndim == 1 else weight[0].numel()) + (layer.bias is not None)
            self.factors[owner] = [upcast(weight.detach()).new_ones(n) for n in (columns, len(weight))]
            self._owners[weight] = (owner, False)
            if layer.bias is not None:
                self._owners[layer.bias] = (owner, True)
            layer.register_forward_hook(partial(self._collect, owner))
        covered = [name for parameter, name in names.items() if parameter in self._owners]
        rest = [name for name in names.values() if name not in covered]
        optimizers: list[torch.optim.Optimizer] = []
        if covered:
            fisher = {"lr": lr, "beta": beta, "damping": damping, "weight_decay": weight_decay}
            optimizers.append(FisherRule(setup.decay_groups(covered), fisher, self.parameter_factors))
        if rest:
            adamw: dict[str, Any] = {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay}
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)

    @override
    def step(self, ctx: StepContext) -> None:
        if self.updates % self.update_every == 0:
            self._collected = {}
        self.updates += 1
        self._gradient(ctx)
        for owner, statistics in (self._collected or {}).items():
            for factor, new in zip(self.factors[owner], statistics.means(), strict=True):
                factor.mul_(1 - self.gammas[0]).add_(_min_max_normalise(new), alpha=self.gammas[1])
        # Before the update and the evaluation, whose forward passes must not be collected.
        self._collected = None
        self.update(ctx)

    def parameter_factors(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """H [columns] and S [rows] of a weight or bias; its F̃ - ε is their outer product in the parameter's shape."""
        owner, is_bias = self._owners[parameter]
        columns, rows = self.factors[owner]
        size = parameter.numel() // len(rows)
        return (columns[-1:] if is_bias else columns[:size]), rows

    def _collect(self, owner: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook of a layer: collect its inputs, and the gradients of its outputs once they are known."""
        if self._collected is not None and output.requires_grad:
            statistics = self._collected.setdefault(owner, _LayerStatistics(layer))
            statistics.add_inputs(upcast(inputs[0].detach()))
            output.register_hook(lambda gradient: statistics.add_output_gradients(upcast(gradient.detach())))

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"factors": self.factors, "updates": self.updates}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.factors, self.updates = state["factors"], state["updates"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + [factor for factors in self.factors.values() for factor in factors]


class FisherRule(Rule):
    """The last line of the module docstring's equations.

    factors_of: returns H and S of a parameter, see `AdaFisher.parameter_factors`.
    """

    buffers = ("momentum",)

    def __init__(
        self,
        params: ParamsT,
        hyperparameters: dict[str, Any],
        factors_of: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(params, hyperparameters)
        self.factors_of = factors_of

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        momentum = bucket.state("momentum")
        average_(momentum, bucket.g, bucket["beta"])
        fisher = []
        for parameter in bucket.parameters:
            columns, rows = self.factors_of(parameter)
            fisher.append(torch.outer(rows, columns).view(parameter.shape))
        torch._foreach_add_(fisher, bucket["damping"])
        torch._foreach_mul_(fisher, 1 - bucket["beta"] ** bucket.t)
        return torch._foreach_div(momentum, fisher)


class _LayerStatistics:
    """Sums of the inputs h and of the output gradients s of one layer over the micro-batches of one step.

    Squares are summed for linear layers and convolutions, plain values for normalisation layers.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.is_norm = not isinstance(layer, nn.Linear | nn.Conv2d)
        self.input_sums: Tensor | float = 0.0
        self.output_sums: Tensor | float = 0.0
        self.examples = self.positions = 0

    def add_inputs(self, h: Tensor) -> None:
        """Add the inputs of one micro-batch, [examples, ...]."""
        self.examples += len(h)
        if isinstance(self.layer, nn.Conv2d):
            layer = self.layer
            # Squares summed over the examples before unfolding: the patches of a sum are the sums of patches, and one
            # image is unfolded in place of a batch.
            squares = h.square().sum(0, keepdim=True)
            patches = F.unfold(squares, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
            self.positions, new = patches.shape[2], patches.sum((0, 2))
        else:
            h = _features_last(h, self.layer)
            self.positions = h[0].numel() // h.shape[-1]
            h = h.reshape(-1, h.shape[-1])
            new = h.sum(0) if self.is_norm else h.square().sum(0)
        self.input_sums = self.input_sums + new

    def add_output_gradients(self, s: Tensor) -> None:
        """Add the gradients with respect to the outputs of one micro-batch, [examples, ...]."""
        s = _features_last(s, self.layer)
        s = s.reshape(-1, s.shape[-1])
        self.output_sums = self.output_sums + (s.sum(0) if self.is_norm else s.square().sum(0))

    def means(self) -> tuple[Tensor, Tensor]:
        """New values of H [columns] and S [rows] before normalisation; the entry of a bias is the last of H."""
        assert isinstance(self.input_sums, Tensor) and isinstance(self.output_sums, Tensor)
        bias_entry = self.input_sums.new_ones(1)
        if self.is_norm:
            features = len(self.input_sums)
            columns = (self.input_sums / self.positions**2).square().sum().reshape(1) / self.examples**2
            rows = self.output_sums.square() / self.examples
            bias_entry = bias_entry * (features / self.examples**2)
        else:
            count = self.examples * self.positions
            columns, rows = self.input_sums / count, self.output_sums / count
        return (torch.cat([columns, bias_entry]) if self.layer.bias is not None else columns), rows


def _has_factors(layer: nn.Module) -> bool:
    """Whether the Kronecker factors of a layer are defined: no grouped convolution, no norm without a scale."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str)
    if isinstance(layer, nn.LayerNorm):
        return layer.elementwise_affine and len(layer.normalized_shape) == 1
    return isinstance(layer, nn.Linear) or getattr(layer, "affine", False)


def _features_last(x: Tensor, layer: nn.Module) -> Tensor:
    """Inputs or outputs of a layer with the features in the last dimension."""
    return x.movedim(1, -1) if isinstance(layer, (nn.Conv2d, *_BATCH_NORMS)) else x


def _min_max_normalise(x: Tensor) -> Tensor:
    """N(x) of the module docstring: into [0, 1]; zeros where all elements are equal."""
    smallest = x.min()
    return (x - smallest) / (x.max() - smallest + 1e-12)
