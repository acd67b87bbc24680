"""PowerSGD: Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, Algorithms 1 and 2. A wrapper around any submission;
the ranks' gradients are averaged in compressed form. For each matrix M, the gradient plus the last error e:

    P = orthogonalised mean of M Q over the ranks,   Q = mean of Mᵀ P,   ĝ = P Qᵀ,   e = M - ĝ

Q starts at its value of the previous step. Vectors are averaged uncompressed, and so are matrices that the compression
would not at least halve. The implementation is torch's DDP hook; this file is also the example of a submission that
does its own communication. In a single process it compresses but sends nothing. State: e, P and Q. Default (paper):
rank 2 for image, 4 for language models. The first two steps are uncompressed, since torch's hook requires it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from typing_extensions import override

from harness.interface import Need, Setup, StepContext, Submission, WrappedContext, Wrapper

HOOK_STATE = ("error_dict", "p_memory_dict", "q_memory_dict")
"""Attributes of torch's PowerSGDState that hold e, P and Q."""


class PowerSGD(Wrapper):
    """PowerSGD. powersgd_rank: columns of P and Q."""

    needs = frozenset({Need.COMMUNICATION})
    host_waits = "each step, several times: torch's hook draws its matrices on the host"

    def __init__(self, setup: Setup, inner: Submission, *, powersgd_rank: PositiveInt = 2) -> None:
        super().__init__(setup, inner)
        self.hook = powerSGD_hook.PowerSGDState(
            setup.ranks.process_group, powersgd_rank, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
        )

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(cast(StepContext, _CompressedContext(ctx, self)))

    def average_gradients(self, gradients: list[Tensor]) -> None:
        """Replace each rank's gradients by their compressed mean over the ranks, in place."""
        gradients = [gradient for gradient in gradients if gradient.numel()]
        sizes = [gradient.numel() for gradient in gradients]
        # In float32: narrow gradients are not accurate enough for error feedback and orthogonalisation.
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        # The hook reads the first dimension of every tensor, so a scalar gets one.
        views = [view.view(g.shape if g.ndim else (1,)) for view, g in zip(flat.split(sizes), gradients, strict=True)]
        result = powerSGD_hook.powerSGD_hook(self.hook, cast(Any, _GradBucket(flat, views))).wait()
        averaged = result.split(sizes)
        torch._foreach_copy_(gradients, [a.view_as(g) for a, g in zip(averaged, gradients, strict=True)])

    @override
    def state_dict(self) -> dict[str, Any]:
        # Copies of the dicts, in which the hook replaces entries.
        hook_state = {name: dict(getattr(self.hook, name)) for name in HOOK_STATE}
        return super().state_dict() | hook_state | {"iter": self.hook.iter}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in (*HOOK_STATE, "iter"):
            setattr(self.hook, name, state[name])


class _CompressedContext(WrappedContext):
    """A step context whose gradient is the compressed mean over the ranks."""

    def __init__(self, ctx: StepContext, wrapper: PowerSGD) -> None:
        super().__init__(ctx)
        self.wrapper = wrapper

    @override
    def backward(self) -> Tensor:
        loss = self.ctx.backward()
        self.wrapper.average_gradients([p.grad for p in self.ctx.parameters if p.grad is not None])
        return loss


@dataclass
class _GradBucket:
    """All gradients in one bucket; stands for torch.distributed.GradBucket, which only DDP can make."""

    flat: Tensor
    views: list[Tensor]
    """Views of `flat` in the shapes of the gradients."""

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.views

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True
