"""Coordinate-wise clipping: Pan & Li 2023, "Toward Understanding Why Adam Converges Faster Than SGD for Transformers",
arXiv:2306.00204. A wrapper around any submission; the gradient is clipped per coordinate:

    g ← clip(g, -c, c),   c = the 1 - `clipped_share` quantile of |g| over each tensor

No state. Default (paper): the largest 10% of the coordinates are clipped.
"""

from __future__ import annotations

from typing import Annotated, cast

from annotated_types import Interval
from torch import Tensor
from typing_extensions import override

from harness.interface import Setup, StepContext, Submission, WrappedContext, Wrapper


class CoordinateClipping(Wrapper):
    """Coordinate-wise clipping. clipped_share: share of the coordinates of each tensor that are clipped."""

    def __init__(
        self, setup: Setup, inner: Submission, *, clipped_share: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    ) -> None:
        super().__init__(setup, inner)
        self.share = clipped_share

    @override
    def step(self, ctx: StepContext) -> None:
        self.inner.step(cast(StepContext, _ClippedContext(ctx, self.share)))


class _ClippedContext(WrappedContext):
    """A step context whose gradient is clipped as in the module docstring."""

    def __init__(self, ctx: StepContext, share: float) -> None:
        super().__init__(ctx)
        self.share = share

    @override
    def backward(self) -> Tensor:
        loss = self.ctx.backward()
        for parameter in self.ctx.parameters:
            g = parameter.grad
            if g is not None and g.numel():
                # topk, as torch.quantile refuses large tensors, and kthvalue is not deterministic on a GPU.
                rank = max(1, round((1 - self.share) * g.numel()))
                bound = g.abs().flatten().topk(g.numel() - rank + 1, sorted=False).values.amin()
                g.clamp_(min=-bound, max=bound)
        return loss
