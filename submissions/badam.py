"""BAdam: Luo, Yu & Li 2024, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
NeurIPS 2024, arXiv:2404.02827, Algorithm 1. Adam on one block of the parameters at a time; the others rest:

    every K steps: the next block of a random order of all blocks (a new order once each had its turn), with m = v = 0
    AdamW on the parameters of the block

Blocks are the model's numbered layers (all parameters whose names begin with the same "layers.3."), and one of what is
left. The gradients of all parameters are computed; the paper saves those of the others, which the clock of this harness
charges for. State: two tensors per parameter of the active block. Defaults (paper): K = 100; AdamW's are torch's.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import PositiveInt
from typing_extensions import override

from harness.interface import OptimizerSubmission, Setup, StepContext


class BAdam(OptimizerSubmission):
    """BAdam as in the module docstring. switch_every: K."""

    def __init__(
        self,
        setup: Setup,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        switch_every: PositiveInt = 100,
    ) -> None:
        blocks: dict[str, list[str]] = {}
        for name in setup.named_parameters:
            numbered = re.match(r"(.*?\.\d+)\.", name)
            blocks.setdefault(numbered[1] if numbered else "", []).append(name)
        self.blocks = list(blocks.values())
        self.switch_every, self.count, self.order = switch_every, 0, list(range(len(self.blocks)))
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(setup, [torch.optim.AdamW(setup.decay_groups(n), fused=True, **options) for n in self.blocks])

    @override
    def update(self, ctx: StepContext) -> None:
        turn = self.count // self.switch_every % len(self.blocks)
        if self.count % self.switch_every == 0:
            if turn == 0:
                self.order = torch.randperm(len(self.blocks), generator=self.setup.generator).tolist()
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.count += 1
        self.apply_schedule(ctx)
        self.optimizers[self.order[turn]].step()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count, "order": self.order}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count, self.order = state["count"], state["order"]
