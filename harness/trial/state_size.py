"""How much a submission keeps between steps, counted on a few steps of the mini GPT-2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from harness.config.compose import load_run
from harness.config.schema import Run
from harness.trial.training import Training
from harness.trial.trial import load_workload

STEPS = 3
"""Steps after which the state of every submission has its full size."""
# State does not depend on the batch.
_ARGUMENTS = ["workload=gpt2", "workload.nominal_batch=8", "workload.micro_batch=8"]


def count_state(names: Iterable[str]) -> Iterator[tuple[Run, float]]:
    """For each submission of configs/optimizer/ its configuration and the bytes per parameter that it holds."""
    workload = None
    for name in names:
        run = load_run([*_ARGUMENTS, f"optimizer={name}"])
        # Loaded once: the arguments of the workload are the same for all.
        if workload is None:
            workload = load_workload(run, torch.device("cpu"))
        training = Training(run, workload, torch.device("cpu"))
        training.build()
        training.segment(STEPS * training.spec.nominal_batch, charge_compile=False)
        parameters = sum(parameter.numel() for parameter in training.submission.setup.parameters)
        yield run, training.submission.state_bytes() / parameters
