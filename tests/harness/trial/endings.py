"""Submissions that end their process, or leave others behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from harness.interface.data_order import ExampleStream, Selection
from harness.interface.step import StepContext
from harness.interface.submission import OptimizerSubmission, Setup


class _Sgd(OptimizerSubmission):
    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, [torch.optim.SGD(setup.parameters, lr=lr)])


class LeavesWell(_Sgd):
    """Ends as if all were done."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        if ctx.step >= 4:
            os._exit(0)


class Raises(_Sgd):
    """An error of its own."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        1 / (4 - ctx.step)


class Exits(_Sgd):
    """SystemExit, which is no Exception."""

    def step(self, ctx: StepContext) -> None:
        sys.exit(0)


class NeedsMemory(_Sgd):
    """More than there is."""

    def step(self, ctx: StepContext) -> None:
        torch.empty(2**60)


class OtherShapes(_Sgd):
    """Another architecture in the place of the workload's."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self.setup._model.extra = torch.nn.Linear(2, 2)


class Undeclared(_Sgd):
    """Overrides what takes a need."""

    def select(self, stream: ExampleStream) -> Selection:
        return super().select(stream)


class Aborts(_Sgd):
    """Ends as after a violated assertion of a library."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        if ctx.step >= 4:
            os.abort()


class IsKilled(_Sgd):
    """Is killed once, at the step that PACEMARK_TEST_STEP says."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self._kill_at(0)

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self._kill_at(ctx.step)

    def _kill_at(self, step: int) -> None:
        if step >= int(os.environ["PACEMARK_TEST_STEP"]) and not (_folder() / "killed.txt").exists():
            _note("killed.txt", str(step))
            os.kill(os.getpid(), signal.SIGKILL)


class KillsJudge(_Sgd):
    """Kills its parent, once."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        if (_folder() / "pids.txt").exists():
            return
        _note("pids.txt", str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)


_TICKER = """
import sys, time
while True:
    with open(sys.argv[1], "a") as file:
        file.write(f"{sys.argv[2]} {time.monotonic()}\\n")
    time.sleep(0.01)
"""


class Busy(_Sgd):
    """Works on in a thread, in a child, and in a process whose parent has ended, whether the clock runs or not."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        path = str(_folder() / "ticks.txt")
        child = subprocess.Popen([sys.executable, "-c", _TICKER, path, "child"])
        _note("pids.txt", f"{child.pid}\n")
        if os.fork() == 0:
            if os.fork() == 0:
                _note("pids.txt", f"{os.getpid()}\n")
                os.execv(sys.executable, [sys.executable, "-c", _TICKER, path, "orphan"])
            os._exit(0)
        threading.Thread(target=self._tick, args=(path,), daemon=True).start()

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        time.sleep(0.3)

    @staticmethod
    def _tick(path: str) -> None:
        while True:
            with Path(path).open("a") as file:
                file.write(f"thread {time.monotonic()}\n")
            time.sleep(0.01)


def _folder() -> Path:
    return next(Path(os.environ["PACEMARK_TEST_FOLDER"]).rglob("trial_1"))


def _note(name: str, text: str) -> None:
    with (_folder() / name).open("a") as file:
        file.write(text)
