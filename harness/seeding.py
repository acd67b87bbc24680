"""All randomness of a trial: a pure function of the trial's seed and of its purpose.

Nothing in a trial draws from a generator whose state depends on earlier work. Each purpose has its own key, derived
from the trial's seed by a stable hash. So two submissions with one seed see the same initial weights, the same examples
in the same order, the same augmentation and the same dropout masks; and a resumed trial needs no generator state but
the submission's own.
"""

from __future__ import annotations

import numpy as np
import torch

from harness.hashing import stable_hash, trial_seed

_MASK64 = 2**64 - 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Vectorised 64-bit mixer (Steele, Lea & Flood 2014, SplitMix); uint64 in, uint64 out, shape kept."""
    # Arrays of uint64 wrap around silently, as the algorithm needs; NumPy scalars would warn of an overflow.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """`splitmix64` of one number, ten times as fast as that of an array of one."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


class TrialSeeds:
    """The seeds of one trial, one for each purpose; a function of its study seed and trial number."""

    def __init__(self, study_seed: int, trial: int) -> None:
        self.base = trial_seed(study_seed, trial)

    def key(self, purpose: str, *position: int) -> int:
        """The seed in [0, 2**63) for `purpose` at `position` (an epoch, a step and micro-batch, ...)."""
        return stable_hash(self.base, purpose, *position)

    def seed_model_randomness(self, step: int, micro_batch: int) -> None:
        """Seed torch's global generators, which dropout draws from, for one forward pass."""
        # A cheap mixer instead of the hash, since this is called for every micro-batch on the clock.
        # step * 65_537 keeps (step, micro_batch) apart for up to 65_537 micro-batches a step.
        seed = _mix(self._dropout_base ^ (step * 65_537 + micro_batch)) >> 1
        # torch.manual_seed would visit every kind of accelerator: 0.1 ms, on the clock of every step.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)

    def seed_labels(self, generator: torch.Generator, step: int, forward: int, micro_batch: int) -> None:
        """Seed `generator` for labels drawn from the model's predictions in the `forward`-th pass of a step."""
        generator.manual_seed(self.key("labels", step, forward, micro_batch))

    @property
    def _dropout_base(self) -> int:
        # Hashed once, since it is used for every micro-batch on the clock.
        if not hasattr(self, "_dropout"):
            self._dropout = self.key("dropout")
        return self._dropout
