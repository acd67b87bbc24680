"""A submission whose module changes the workload when it is imported."""

from __future__ import annotations

import torch
from torch import nn

import workloads.gpt2
from tests.cheats.cheats import Honest

_build_model = workloads.gpt2.GPT2.build_model


def _better_model(self: workloads.gpt2.GPT2) -> nn.Module:
    model = _build_model(self)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.9
    return model


workloads.gpt2.GPT2.build_model = _better_model


class PatchesAtImport(Honest):
    """Begins with better weights."""
