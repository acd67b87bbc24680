"""PowerSGD: Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727, Algorithms 1 and 2. Around any submission, which gets
a compressed average of the ranks' gradients. Per matrix M (gradient plus the error left over, e):

    P = orthogonalised mean of M Q over the ranks,   Q = mean of Mᵀ P,   ĝ = P Qᵀ,   e = M - ĝ

Q starts from the step before. Vectors, and matrices that the compression would not at least halve, are averaged as they
are. The rule is torch's own DDP hook; this is also the example of a submission that owns the communication. On one
process it compresses and leaves nothing to send. Default (paper): rank 2 for image, 4 for language models. The first
two steps are not compressed, as torch's hook wants it.
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

MEMORY = ("error_dict", "p_memory_dict", "q_memory_dict")


class PowerSGD(Wrapper):
    needs = frozenset({Need.COMMUNICATION})

    def __init__(self, setup: Setup, inner: Submission, *, powersgd_rank: PositiveInt = 2) -> None:
        super().__init__(setup, inner)
        self.hook = powerSGD_hook.PowerSGDState(
            setup.ranks.process_group, powersgd_rank, start_powerSGD_iter=2, orthogonalization_epsilon=1e-8
        )

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(cast(StepContext, _Compressed(ctx, self)))

    def average(self, gradients: list[Tensor]) -> None:
        """Replace each rank's gradients by their compressed mean, in place."""
        gradients = [gradient for gradient in gradients if gradient.numel()]
        flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
        pieces = flat.split([gradient.numel() for gradient in gradients])
        shaped = [piece.view(g.shape if g.ndim else (1,)) for piece, g in zip(pieces, gradients, strict=True)]
        result = powerSGD_hook.powerSGD_hook(self.hook, cast(Any, _Bucket(flat, shaped))).wait()
        averaged = result.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [a.view_as(g) for a, g in zip(averaged, gradients, strict=True)])

    @override
    def state_dict(self) -> dict[str, Any]:
        memory = {name: dict(getattr(self.hook, name)) for name in MEMORY}
        return super().state_dict() | memory | {"iter": self.hook.iter}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in (*MEMORY, "iter"):
            setattr(self.hook, name, state[name])


class _Compressed(WrappedContext):
    def __init__(self, ctx: StepContext, owner: PowerSGD) -> None:
        super().__init__(ctx)
        self.owner = owner

    @override
    def backward(self) -> Tensor:
        loss = self.ctx.backward()
        self.owner.average([p.grad for p in self.ctx.parameters if p.grad is not None])
        return loss


@dataclass
class _Bucket:
    """All gradients, as torch's hook asks for them."""

    flat: Tensor
    shaped: list[Tensor]
    """Views of `flat`."""

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.shaped

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True
