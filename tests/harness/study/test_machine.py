"""The machine of a command, with GPUs that are simulated: this process must not touch them."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.config.compose import load_run
from harness.errors import UserError
from harness.study import executors, machine
from harness.trial.environment import resolve_device, select_device
from scripts import run as command
from tests.conftest import TINY_GPT2

KINDS = ["NVIDIA H100", "NVIDIA H100", "Tesla T4"]


class FakeGpus:
    """GPUs of KINDS, in a process that describes them and in its parent, which may only count them."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        """Calls of the parent that open a CUDA context."""
        self._in_child = False

    def open(self, name: str, result: Any = None) -> Any:
        """A call that opens a CUDA context."""
        if not self._in_child:
            self.opened.append(name)
        return result

    def run_child(self, *_: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """In place of subprocess.run, the child in this process."""
        former, sys.stdin = sys.stdin, io.StringIO(options["input"])
        self._in_child = True
        try:
            with redirect_stdout(io.StringIO()) as output:
                status = machine.main()
        finally:
            sys.stdin, self._in_child = former, False
        return subprocess.CompletedProcess([], status, "a library prints something\n" + output.getvalue(), "")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    fake = FakeGpus()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: len(KINDS))
    monkeypatch.setattr(cuda, "set_device", lambda _: fake.open("set_device"))
    monkeypatch.setattr(
        cuda, "get_device_properties",
        lambda device: fake.open("properties", SimpleNamespace(name=KINDS[device.index or 0], total_memory=1, uuid="")),
    )  # fmt: skip
    monkeypatch.setattr(machine, "subprocess", SimpleNamespace(run=fake.run_child, TimeoutExpired=TimeoutError))
    yield fake


def test_a_pool_plans_on_a_gpu_without_a_context(
    gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(executors, "execute", lambda *_: None)
    arguments = [*TINY_GPT2, "optimizer=sgd,lion", f"records={tmp_path}", "executor.workers=2"]
    for device in ("auto", "cuda"):
        assert command.main(["-m", *arguments, f"device={device}", f"label={device}-${{optimizer.name}}"]) == 1
        assert gpus.opened == []
    # The name that a trial finds for itself.
    run = load_run([*TINY_GPT2, "optimizer=sgd", "device=cuda"])
    assert {path.parent.parent.name for path in tmp_path.rglob("plan_*.json")} == {"1x-nvidia-h100"}
    assert machine.find_machine_folder(run, 1) == "1x-nvidia-h100" and gpus.opened == []
    select_device(run)
    assert gpus.opened == ["set_device"]


def test_gpus_of_two_kinds_are_refused_before_anything_is_planned(gpus: FakeGpus) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd"])
    assert machine.find_machine_folder(run, 2) == "1x-nvidia-h100"
    with pytest.raises(
        UserError, match=r"executor.workers=3: the GPUs are of different kinds \(1x-nvidia-h100, 1x-tes"
    ):
        machine.find_machine_folder(run, 3)
    assert machine.find_machine_folder(run.model_copy(update={"device": "cuda:2"}), 3) == "1x-tesla-t4"
    assert machine.find_machine_folder(run.model_copy(update={"machine": "mine"}), 3) == "mine"
    assert gpus.opened == []


def test_a_gpu_that_cannot_be_described_is_one_sentence(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd", "device=cuda"])

    def fail(status: int, errors: str) -> str:
        done = subprocess.CompletedProcess([], status, "", errors)
        monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: done)
        with pytest.raises(UserError) as caught:
            machine.find_machine_folder(run, 1)
        return str(caught.value)

    assert fail(2, "warning\nerror: device=cuda: GPU 0 is busy\n") == "device=cuda: GPU 0 is busy"
    text = fail(1, "Traceback ...\nRuntimeError: CUDA error: unknown error\n")
    assert text.startswith("device=cuda: the GPU cannot be described (RuntimeError: CUDA error: unknown error); use ")


def test_the_child_is_a_program(tmp_path: Path) -> None:
    run = load_run([*TINY_GPT2, "optimizer=sgd", "device=cpu", "machine=auto"])
    (description,) = machine._describe_in_child(run, 1)
    assert machine.machine_folder_name(description) == machine.find_machine_folder(run, 1)


def test_a_login_node_without_a_gpu_plans_for_a_cluster_that_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(executors, "execute", lambda *_: None)
    arguments = [*TINY_GPT2, "optimizer=sgd", f"records={tmp_path}", "executor=slurm", "machine=cluster"]
    assert command.main([*arguments, "device=cuda"]) == 1
    assert [path.parent.parent.name for path in tmp_path.rglob("plan_*.json")] == ["cluster"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["executor=ray", "machine=cluster", "device=cuda:1"], "names a GPU of one machine"),
        (["threads=1,2"], "device, threads: one for all runs of a sweep"),
    ],
)
def test_what_no_pool_can_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command.main(["-m", *TINY_GPT2, "optimizer=sgd", f"records={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update"), "too old"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check"), "Found no NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
    ],
)
def test_why_there_is_no_gpu_is_told(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    run = load_run([*TINY_GPT2, "optimizer=sgd", "device=cuda"])
    with pytest.raises(UserError, match=rf"device=cuda: torch .* sees no GPU here \(.*{reason}.*=-1\); use device=cpu"):
        resolve_device(run)


def test_a_gpu_that_another_process_has_for_itself_is_one_sentence(
    gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(UserError, match=r"device=cuda: cuda:0 cannot be used \(CUDA error: .*unavailable\)$"):
        select_device(load_run([*TINY_GPT2, "optimizer=sgd", "device=cuda"]))


def test_the_visible_gpus_are_those_that_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ["0", " 1", "2gpu", "-1", "", "x", "GPU-8f", "GPU-b3", "MIG-a", "MIG-b", "1"]
    texts = ["", *(",".join(some) for number in (1, 2, 3) for some in itertools.product(entries, repeat=number))]
    for text in texts:
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", text)
        theirs = [str(entry) for entry in torch.cuda._parse_visible_devices()]
        assert machine.parse_visible_devices(text) == theirs, text
    assert machine.parse_visible_devices(None) is None
