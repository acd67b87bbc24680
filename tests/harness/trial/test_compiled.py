"""The compiled model: what is compiled, when, and who pays. With dynamo's eager backend, which captures and does not
compile, so that a test takes a second; tests/harness/trial/test_trial.py runs Inductor once."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InductorError

from harness.config.compose import load_run
from harness.records.status import Status
from harness.trial.record import Record
from harness.trial.training import Training
from harness.trial.trial import load_workload
from tests.conftest import TINY_GPT2

Trial = Callable[..., Record]
CPU = torch.device("cpu")
SEAM = ("schedule.shape=constant", "schedule.warmup_fraction=0", "optimizer=any")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs that are captured."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    # Tests before this one may have captured the same code.
    torch._dynamo.reset()
    return counter


def make_training(*arguments: str) -> Training:
    run = load_run([*TINY_GPT2, "compile=true", "device=cpu", *arguments])
    return Training(run, load_workload(run, CPU), CPU)


def test_model_and_loss_are_one_graph_that_the_next_training_finds(graphs: CompileCounterWithBackend) -> None:
    make_training("optimizer=adamw").build()
    assert graphs.frame_count == 1
    operations = [node.target for node in graphs.graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.nn.functional.cross_entropy in operations and torch.nn.functional.linear in operations
    make_training("optimizer=lion").build()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("seam", ["ZerothOrder", "SampledFisher", "GrowingBatch", "Sam"])
def test_what_the_needs_announce_is_captured_before_the_clock_starts(
    graphs: CompileCounterWithBackend, seam: str
) -> None:
    training = make_training(*SEAM, f"optimizer.class_path=tests.harness.seams.{seam}")
    training.build()
    before = graphs.frame_count
    training.segment(80, charge_compile=True)
    assert graphs.frame_count == before
    assert training.clock.elapsed.compile == 0


def test_a_graph_of_the_model_that_nothing_announced_is_charged_to_nobody(graphs: CompileCounterWithBackend) -> None:
    # Micro-batches of single examples are a graph of their own.
    training = make_training("optimizer=vr_adam", "optimizer.hyperparameters.pieces=8")
    training.build()
    before = graphs.frame_count
    compiled_before = training.clock._compile.seconds
    training.segment(8, charge_compile=True)
    assert graphs.frame_count > before and training.clock._compile.seconds > compiled_before
    assert training.clock.elapsed.compile == 0


def test_a_damaged_compiler_cache_does_not_fail_a_trial(
    graphs: CompileCounterWithBackend, trial: Trial, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    folders: list[str | None] = []
    warm_up = Training._warm_up

    def damaged_once(training: Training) -> None:
        folders.append(os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
        if len(folders) == 1:
            raise InductorError(ImportError("invalid ELF header"), None)
        warm_up(training)

    # Restored after the test, for the ones that follow.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))
    monkeypatch.setattr(Training, "_warm_up", damaged_once)
    record = trial("compile=true", "workload.max_steps=3")
    assert record.status is Status.EXHAUSTED, record.manifest.final.traceback
    assert folders[0] == str(shared) and folders[1] not in (None, folders[0])


def test_an_error_of_the_model_is_not_tried_twice(
    graphs: CompileCounterWithBackend, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(training: Training) -> None:
        calls.append(1)
        raise RuntimeError("wrong shape")

    monkeypatch.setattr(Training, "_warm_up", broken)
    assert trial("compile=true").status is Status.FAILED
    assert len(calls) == 1
