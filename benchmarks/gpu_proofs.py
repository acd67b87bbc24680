"""What benchmarks/gpu.py proves: each part is a function of `Options` that returns its counts, or raises `Failed`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from comparison import MINI, Figures, Options, make_training, train

from harness.config.compose import load_run
from harness.config.declared_needs import host_waits
from harness.trial.conformance import make_subject, run_checks
from harness.trial.training import Training

ROOT = Path(__file__).parents[1]


class Failed(Exception):
    """A proof that did not hold; the message says what was found."""


def waits(options: Options) -> Figures:
    """No step makes the host wait for the GPU, before and after a resume: torch raises an error where one would."""
    problems: dict[str, str] = {}

    def check(name: str, training: Training, steps: int) -> None:
        with _waiting_is_an_error(options):
            problems.update(_error_of(name, lambda: train(training, steps)))

    for name in MINI:
        training = make_training(options, f"workload={name}", "optimizer=adamw")
        train(training, 2)
        check(f"workload {name}", training, 5)
    free = [name for name in options.submissions if not host_waits(load_run(["workload=gpt2", f"optimizer={name}"]))]
    for name in free:
        subject = make_subject(name, f"device={options.device}")
        training, resumed = subject.build(), subject.build()
        train(training, 2)
        check(name, training, 10)
        _resume(training, resumed)
        train(resumed, 1)
        check(f"{name}, resumed", resumed, 10)
    if problems:
        raise Failed(json.dumps(problems, indent=1))
    return {
        "workloads": len(MINI),
        "submissions": len(free),
        "submissions that say that they wait": len(options.submissions) - len(free),
    }


def resume(options: Options) -> Figures:
    """In deterministic mode a training that goes on from its checkpoint ends with the bits of an uninterrupted one."""
    steps = 2 if options.tiny else 20
    for name in MINI:
        for precision in ("fp32", "bf16"):
            arguments = (f"workload={name}", "optimizer=adamw", f"precision={precision}", "deterministic=true")
            whole, first, second = (make_training(options, *arguments) for _ in range(3))
            train(whole, 2 * steps)
            train(first, steps)
            _resume(first, second)
            train(second, steps)
            if not _equal_bits(whole, second):
                raise Failed(f"workload={name} precision={precision}: other weights after a resume")
            repeated = make_training(options, *arguments)
            train(repeated, 2 * steps)
            if not _equal_bits(whole, repeated):
                raise Failed(f"workload={name} precision={precision}: other weights in a second run")
    return {"workloads": len(MINI), "precisions": 2, "steps": 2 * steps}


def conformance(options: Options) -> Figures:
    """Every submission passes the conformance checks on the device."""
    failures = {}
    for name in options.submissions:
        if failed := run_checks(make_subject(name, f"device={options.device}")):
            failures[name] = failed
    if failures:
        raise Failed(json.dumps(failures, indent=1))
    return {"submissions": len(options.submissions)}


def torchrun(options: Options) -> Figures:
    """A trial of one process under torchrun trains to its end, through torch.distributed's start and end."""
    with tempfile.TemporaryDirectory() as folder:
        trial = [
            "workload=gpt2", "optimizer=adamw", "workload.max_steps=20", "workload.eval_every=10",
            "workload.target=0.001", f"device={options.device}", f"records={folder}", "machine=here",
        ]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        done = subprocess.run([*command, "run.py", *trial], cwd=ROOT, capture_output=True, text=True, timeout=240)
        manifests = [json.loads(path.read_text()) for path in Path(folder).rglob("manifest.json")]
    if done.returncode or [manifest["status"] for manifest in manifests] != ["exhausted"]:
        raise Failed(f"status {done.returncode}: {done.stderr[-3000:]}")
    final = manifests[0]["final"]
    return {"steps": final["global_step"], "seconds per step": final["submission_seconds"] / final["global_step"]}


@contextmanager
def _waiting_is_an_error(options: Options) -> Iterator[None]:
    """Within the steps of the body torch raises an error where the host would wait for the GPU."""
    step = Training._step

    def checked_step(training: Training) -> Any:
        # Within the step alone: a segment waits for the device at both its ends.
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if options.device == "cuda":
        Training._step = checked_step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Training._step = step  # type: ignore[method-assign]


def _error_of(name: str, action: Callable[[], object]) -> dict[str, str]:
    """The error that `action` raises, by `name`; empty if none."""
    try:
        action()
    # Whatever it is, it is reported, and the others still run.
    except Exception as error:
        return {name: f"{type(error).__name__}: {error}"}
    return {}


def _resume(first: Training, second: Training) -> None:
    """Continue `first` in `second`, through a checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))


def _equal_bits(first: Training, second: Training) -> bool:
    states = first.runner.model.state_dict(), second.runner.model.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])
