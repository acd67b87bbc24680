"""Optimizers as other libraries write them, one for each convention."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class _Descends(torch.optim.Optimizer):
    """Gradient descent with the group's `lr`."""

    def __init__(self, params: Any, lr: float = 0.1, **keys: Any) -> None:
        super().__init__(params, {"lr": lr, **keys})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"])


class Switches(_Descends):
    """Starts in eval mode, as schedulefree does; the weights of an evaluation are others."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, train_mode=False)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("not in train mode when step is called")
        super().step()

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        self.state[p].setdefault("z", p.clone()).sub_(p.grad, alpha=group["lr"])
        p.lerp_(self.state[p]["z"], 0.3)

    def train(self) -> None:
        self._switch(True, -1.0)

    def eval(self) -> None:
        self._switch(False, 0.5)

    @torch.no_grad()
    def _switch(self, train_mode: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train_mode:
                group["train_mode"] = train_mode
                for p in group["params"]:
                    if p in self.state:
                        p.lerp_(self.state[p]["z"], weight)


class Closure(_Descends):
    """Calls its closure without switching gradients on, and takes the loss as a tensor."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        assert loss.detach().ndim == 0
        super().step()
        return loss.mul_(0)


class Loss(_Descends):
    """A step size from the value of the loss."""

    def step(self, closure: Callable[[], Any] | None = None, loss: Tensor | None = None) -> None:
        assert loss is not None
        for group in self.param_groups:
            group["size"] = float(loss)
        super().step()

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] * min(1.0, group["size"]))


class Ascends(torch.optim.Optimizer):
    """SAM as libraries write it: around a class, and with the gradient there when `step` is called."""

    def __init__(self, params: Any, base_optimizer: type[torch.optim.Optimizer], rho: float = 0.05, **kwargs: Any):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is None:
            raise ValueError("a closure is required")
        moved = [(p, p.grad * self.param_groups[0]["rho"]) for p in _trained(self)]
        for p, ascent in moved:
            p.add_(ascent)
        with torch.enable_grad():
            closure()
        for p, ascent in moved:
            p.sub_(ascent)
        self.base_optimizer.step()


class Around(torch.optim.Optimizer):
    """Around an instance, whose groups it shares."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.count += 1
        if self.count % self.k:
            self.optimizer.step()


class SecondDerivatives(_Descends):
    """Steps scaled by the derivative of the gradient's norm."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        trained = [p for p in _trained(self) if p.grad.requires_grad]
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum()
        curvature = torch.autograd.grad(norm, trained, materialize_grads=True)
        for p, c in zip(trained, curvature, strict=True):
            p.grad = (p.grad / (1 + c.abs())).detach()
        super().step()


class TakesModel(_Descends):
    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], lr)


class TakesNames(_Descends):
    """Biases move at half the rate."""

    def __init__(self, params: Iterable[tuple[str, nn.Parameter]], lr: float = 0.1) -> None:
        pairs = list(params)
        self.names = [name for name, _ in pairs]
        super().__init__([p for _, p in pairs], lr)


class Flags(_Descends):
    """One rule for the groups with `use_sign`, another one for the others."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        for group in params:
            if "use_sign" not in group:
                raise ValueError("`use_sign` must be set")
        super().__init__(params, lr)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad.sign() if group["use_sign"] else p.grad, alpha=group["lr"])


class MatricesOnly(_Descends):
    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        if p.ndim != 2:
            raise ValueError("only matrices")
        super().move(p, group)


class TwoRates(_Descends):
    def __init__(self, params: Any, lr: float = 0.1, bias_lr: float = 0.2, final_lr: float = 0.3) -> None:
        super().__init__(params, lr, bias_lr=bias_lr, final_lr=final_lr)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["bias_lr" if p.ndim < 2 else "lr"])


class NoRate(_Descends):
    def __init__(self, params: Any, size: float = 0.1) -> None:
        torch.optim.Optimizer.__init__(self, params, {"size": size})

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["size"])


class _Memory:
    def __init__(self) -> None:
        self.sizes: deque[float] = deque(maxlen=3)


class KeepsMuch(_Descends):
    """State of many kinds, and a counter beside it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.count += 1
        super().step()

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        memory = state.setdefault("memory", _Memory())
        memory.sizes.append(float(p.grad.abs().sum()))
        state["norm"] = np.float64(state.get("norm", 0.0)) + memory.sizes[-1]
        state.setdefault("by_name", {})["ages"] = np.arange(3) * self.count
        p.sub_(p.grad, alpha=group["lr"] / (1 + float(state["norm"]) * sum(memory.sizes) + self.count))


class KeepsFunction(_Descends):
    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        self.state[p]["projection"] = lambda x: x
        super().move(p, group)


class Forgets(_Descends):
    """A counter that nothing can see."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        steps = iter(range(10**6))
        self.next_rate = lambda: 1 / (1 + next(steps))

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(p.grad, alpha=group["lr"] * self.next_rate())


class LowRank(torch.optim.AdamW):
    """Set `rank` in a parameter group to project its gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "rank" in group:
                for p in group["params"]:
                    p.grad[group["rank"] :] = 0
        super().step()


class WaitsForHessian(_Descends):
    def update_hessian(self) -> None:
        for p in _trained(self):
            self.state[p]["hessian"] = p.grad.square()


class WithinBackward(_Descends):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self._move_now)

    @torch.no_grad()
    def _move_now(self, p: Tensor) -> None:
        self.move(p, self.param_groups[0])
        p.grad = None


class Unusual(_Descends):
    """Its defaults are outside of what their names suggest."""

    def __init__(self, params: Any, lr: float = -0.1, beta: float = 10.0, growth_rate: float = float("inf")) -> None:
        super().__init__(params, lr, beta=beta, growth_rate=growth_rate)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.add_(p.grad, alpha=group["lr"])


class Compiles(_Descends):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.halve = torch.compile(lambda x: x / 2)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        p.sub_(self.halve(p.grad), alpha=group["lr"])


def _trained(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
