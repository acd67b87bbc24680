"""Rules of matrices, step sizes, variance reduction and little memory as they are shipped: they train, resume to the
same bits, keep 16-bit parameters' states in 32 bits, and count the bytes they hold."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from harness import config, hyperparameters
from harness.roles import Role
from harness.submission import tensors_in
from tests.submissions.mixed import MixedTraining

NAMES = [
    "soap", "shampoo", "psgd_kron", "sophia_g", "sophia_h", "adafisher", "mfac", "dog", "ldog", "momo",
    "momo_adam", "alr_smag", "psps", "psps_hutchinson", "sgd_sai", "mars_adamw", "mars_lion",
    "mars_adamw_exact", "mars_lion_exact", "vr_sgd", "vr_adam", "adadagrad", "adadagrad_norm", "frugal",
    "galore", "dct_adamw", "adamw_sn", "adamw_snsm", "adamw_8bit", "adam_mini",
]  # fmt: skip
# So that what happens seldom happens within a few steps.
OFTEN: dict[str, dict[str, Any]] = {
    "soap": {"precondition_frequency": 2},
    "shampoo": {"precondition_frequency": 2, "start_step": 1, "block_size": 5},
    "sophia_g": {"estimate_every": 2},
    "sophia_h": {"estimate_every": 2},
    "adafisher": {"update_every": 2},
    "mfac": {"gradients": 4},
    "frugal": {"refresh_every": 2},
    "galore": {"refresh_every": 2, "rank": 3},
    "dct_adamw": {"rank": 3},
    "adamw_snsm": {"refresh_every": 2, "rank": 3},
    "adamw_8bit": {"min_8bit_size": 30, "block_size": 32},
    "adadagrad": {"eta": 5.0},
    "adadagrad_norm": {"eta": 5.0},
}


LISTS_OF_GRADIENTS = {"vr_adam"}
"""They have zeros where the loss does not depend on a parameter, so weight decay acts on it."""


@cache
def composed(name: str) -> config.Run:
    return config.load(["workload=gpt2", f"optimizer={name}"])


def shipped(name: str, **options: Any) -> MixedTraining:
    run = composed(name)
    cls = hyperparameters.algorithm_class(run.optimizer.class_path)
    arguments = hyperparameters.as_arguments(run.optimizer.effective_hyperparameters)
    no_decay = [Role(role) for role in run.optimizer.no_decay]
    return MixedTraining(
        cls, arguments | OFTEN.get(name, {}), no_decay=no_decay, clip_norm=run.optimizer.clip_norm,
        schedule=run.schedule, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    whole = shipped(name, dtype=dtype)
    for _ in range(5):
        whole.step()
    saved = whole.save()
    resumed = shipped(name, dtype=dtype)
    resumed.load(saved)
    assert resumed.submission.state_bytes() == whole.submission.state_bytes()
    for _ in range(4):
        whole.step()
        resumed.step()
    for before, after in zip(whole.names.values(), resumed.names.values(), strict=True):
        assert before.dtype == dtype and before.isfinite().all()
        assert torch.equal(before, after)
    assert torch.equal(whole.names["unused"], torch.ones(2, 2)) or name in LISTS_OF_GRADIENTS
    assert whole.loss() == resumed.loss()


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_its_state_is_counted(name: str) -> None:
    training = shipped(name, dtype=torch.float32)
    before = training.loss()
    for _ in range(40):
        training.step()
    assert training.loss() < 0.96 * before
    state = training.submission.state_dict()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(state) if t.numel()}
    assert training.submission.state_bytes() == sum(held.values()) > 0
