"""The small problem on which the probe of foreign optimizers trains: parameters like those of the workload's model, and
a smooth loss of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.config import hyperparameters
from harness.config.schema import Optimizer, Run
from harness.interface.any_optimizer import AnyOptimizer, Assembly
from harness.interface.needs import Need
from harness.interface.roles import Role, parameter_roles
from harness.interface.schedules import Schedule
from harness.interface.submission import Setup

LARGEST = 64
"""Dimensions of parameters above it are cut to little more: quantised state begins at 4,096 elements."""


@dataclass(frozen=True)
class Problem:
    """What is trained: parameters like those of a workload's model."""

    parameters: dict[str, tuple[tuple[int, ...], Role]]
    """Shape and role by name."""
    schedule: Schedule
    max_steps: int
    workload: str

    def build(self, options: Optimizer, assembly: Assembly, needs: frozenset[Need]) -> AnyOptimizer:
        """The submission on new parameters, the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        model = nn.Module()
        for name, (shape, _) in self.parameters.items():
            owner, _, leaf = name.rpartition(".")
            # Apart from 0, since some rules are relative to the norm of a parameter.
            value = torch.randn(shape, generator=generator) * 0.5 + 0.1
            _submodule(model, owner).register_parameter(leaf, nn.Parameter(value))
        roles = {name: role for name, (_, role) in self.parameters.items()}
        setup = Setup(
            named_parameters=dict(model.named_parameters()),
            nominal_batch=1,
            schedule=self.schedule,
            generator=generator,
            device_generator=generator,
            clip_norm=options.clip_norm,
            no_decay=frozenset(Role(role) for role in options.no_decay),
            needs=needs,
            _roles=roles,
            _max_steps=self.max_steps,
            _model=model,
        )
        return AnyOptimizer(setup, assembly)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    return model


def lay_out(run: Run) -> dict[str, tuple[tuple[int, ...], Role]]:
    """Clipped shapes and roles of the trainable parameters of the workload's model."""
    workload = hyperparameters.import_class(run.workload["class_path"], "workload.class_path")(run.spec)
    # Without memory: a model of billions of parameters is laid out in milliseconds.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = workload.build_model()
    roles = parameter_roles(model, workload.role_patterns())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    large = sorted({size for parameter in trained.values() for size in parameter.shape if size > LARGEST})
    # Different sizes stay different: some classes take only square matrices.
    clipped = {size: LARGEST + 16 * number for number, size in enumerate(large, 1)}
    return {
        name: (tuple(clipped.get(size, size) for size in parameter.shape), roles[name])
        for name, parameter in trained.items()
    }


class ProblemContext:
    """Stands in for a step's context: a smooth loss of the parameters, with noise that depends on the step."""

    def __init__(self, parameters: list[nn.Parameter], step: float) -> None:
        self.parameters, self.step = parameters, step
        self.first_loss: Tensor | None = None
        self.moved_within = False

    def backward(self) -> Tensor:
        """As `harness.interface.StepContext.backward`."""
        for parameter in self.parameters:
            parameter.grad = None
        before = [parameter.detach().clone() for parameter in self.parameters]
        loss = self._loss()
        loss.backward()
        # A hook that updates within the pass would see a part of the gradient where a step has several micro-batches.
        self.moved_within = self.moved_within or not are_equal(before, self.parameters)
        return loss.detach()

    def loss_and_gradients(self, *, create_graph: bool = False) -> tuple[Tensor, list[Tensor]]:
        """As `harness.interface.StepContext.loss_and_gradients`."""
        loss = self._loss()
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters, create_graph=create_graph))

    def _loss(self) -> Tensor:
        noise = torch.Generator().manual_seed(int(self.step))
        targets = [torch.randn(p.shape, generator=noise) for p in self.parameters]
        squares = [(p - target).square().sum() for p, target in zip(self.parameters, targets, strict=True)]
        quartics = [p.pow(4).sum() for p in self.parameters]
        # Sums, so that the gradient of an element is far above any epsilon, whatever the size of its parameter.
        return 0.1 * torch.stack(squares).sum() + 0.01 * torch.stack(quartics).sum()


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are the same to the bit."""
    # A rate that diverges makes NaN, which is different from itself.
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
