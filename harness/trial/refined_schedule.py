"""A learning-rate schedule refined from the gradient norms of a run: Defazio, Cutkosky, Mehta & Mishchenko 2023, "When,
Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arXiv:2310.07831, Algorithm 1. With the norms G_t of
the gradients of all T steps of a run whose schedule was linear decay:

    Ĝ = the median of G over a window of τ T steps, G continued by its first value before and mirrored after the run
    w_t = 1 / Ĝ_t² of ℓ2 norms (SGD),   w_t = 1 / Ĝ_t of ℓ1 norms (Adam)
    η_t ∝ w_t Σ_{p > t} w_p,   the largest 1

Equal norms give linear decay; norms that are large at first give a warm-up, norms that fall at the end a faster decay.
Default: τ = 0.1. Making the norms takes a whole run, which counts as tuning.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from harness.interface.step import StepContext, WrappedContext
from harness.interface.submission import Submission, Wrapper
from harness.trial.training import Training

Kind = Literal["sgd", "adam"]
"""Which of the two weights."""


def gradient_norms(training: Training, kind: Kind) -> list[float]:
    """The norm of the gradient, before clipping, of every step of a run to the end of its budget. Raises ValueError for
    a submission that does not take exactly one plain gradient a step."""
    recorder = _NormRecorder(training.submission, 2 if kind == "sgd" else 1)
    training.submission = recorder
    training.segment(training.spec.max_steps * training.spec.nominal_batch, charge_compile=False)
    steps = training.runner.counters.update_steps
    if len(recorder.norms) != steps:
        raise ValueError(
            f"{training.run.optimizer.name} took {len(recorder.norms)} plain gradients in {steps} steps; the "
            "refinement needs one per step"
        )
    return torch.stack(recorder.norms).tolist()


def refine_schedule(norms: list[float], kind: Kind, smoothing: float = 0.1, points: int = 101) -> list[float]:
    """The refined schedule as factors at `points` equal distances over the run, the last at its end, the largest 1.

    smoothing: τ. Raises ValueError where there are fewer than two norms, or one is not a positive number.
    """
    measured = np.asarray(norms)
    if len(measured) < 2 or not (np.isfinite(measured).all() and (measured > 0).all()):
        raise ValueError(f"{len(measured)} gradient norms, all of which must be positive numbers; did the run diverge?")
    # Half the window: 2 * half + 1 is odd, so that the window is centred on its step.
    half = max(1, round(smoothing * len(measured))) // 2
    padded = np.pad(np.pad(measured, (half, 0), mode="edge"), (0, half), mode="reflect")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    weights = smooth ** (-2.0 if kind == "sgd" else -1.0)
    # The total less the sum up to t is the sum over p > t.
    rate = weights * (weights.sum() - weights.cumsum())
    positions = np.linspace(0, len(rate) - 1, points)
    return [round(float(x), 4) for x in np.interp(positions, np.arange(len(rate)), rate / rate.max())]


class _NormRecorder(Wrapper):
    def __init__(self, inner: Submission, order: int) -> None:
        super().__init__(inner.setup, inner)
        self.order = order
        self.norms: list[Tensor] = []

    def step(self, ctx: StepContext) -> None:
        # Any: a WrappedContext behaves like a StepContext and is no subclass.
        context: Any = _RecordingContext(ctx, self)
        self.inner.step(context)


class _RecordingContext(WrappedContext):
    def __init__(self, ctx: StepContext, recorder: _NormRecorder) -> None:
        super().__init__(ctx)
        self.recorder = recorder

    def backward(self) -> Tensor:
        # Before clipping, which follows backward().
        loss = self.ctx.backward()
        gradients = [p.grad for p in self.ctx.parameters if p.grad is not None]
        # The norm of the vector of norms is the norm of all parameters together.
        norms = torch.stack(torch._foreach_norm(gradients, self.recorder.order)).float()
        self.recorder.norms.append(torch.linalg.vector_norm(norms, self.recorder.order))
        return loss
