"""Submissions that cheat: SGD, and one unfair thing each. docs/fair_play.md has the list in words.

Most use what any submission can reach in its own process: private attributes, the garbage collector, the interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.interface.data_order import ExampleStream, Selection
from harness.interface.needs import Need
from harness.interface.step import StepContext
from harness.interface.submission import OptimizerSubmission, Setup

FOLDER_VARIABLE = "PACEMARK_CHEAT_FOLDER"
"""A folder in which a cheat may leave files; in the folders below it lies its record."""
_real_perf_counter = time.perf_counter


class Honest(OptimizerSubmission):
    """SGD, beside which the others are looked at."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, [torch.optim.SGD(setup.parameters, lr=lr)])

    @property
    def network(self) -> nn.Module:
        """The model."""
        return self.setup._model

    def train_in_secret(self, passes: int = 1) -> None:
        """Steps on data of its own, past the harness."""
        for _ in range(passes):
            tokens = torch.randint(0, 255, (8, 17), generator=torch.Generator().manual_seed(1))
            logits = self.network(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, self.setup.parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(self.setup.parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 0.1 * gradient


def _objects(kind: str) -> list[Any]:
    """All objects of this process whose class is called so."""
    return [thing for thing in gc.get_objects() if type(thing).__name__ == kind]


def _folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def _record() -> Path:
    return next(_folder().rglob("trial_1"))


# ---- target, budget, clock, evaluation -----------------------------------------------------------------------------


class EditsTarget(Honest):
    """Lowers the target in its process."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        for spec in _objects("WorkloadSpec"):
            spec.__dict__["target"] = 99.0


class EditsBudget(Honest):
    """Raises the budget in its process."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        for spec in _objects("WorkloadSpec"):
            spec.__dict__["max_steps"] = 10**6


class EditsGrid(Honest):
    """Trains three times as far before it says that the segment is done."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        for counters in _objects("Counters"):
            counters.examples -= 4


class PatchesClock(Honest):
    """Lets time pass ten times as slowly."""

    def step(self, ctx: StepContext) -> None:
        time.perf_counter = lambda: _real_perf_counter() / 10
        time.sleep(0.15)
        super().step(ctx)


class EditsElapsed(Honest):
    """Divides the seconds on the clock."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        time.sleep(0.15)

    def state_tensors(self) -> list[Tensor]:
        for elapsed in _objects("Elapsed"):
            elapsed.submission *= 0.1
        return super().state_tensors()


class PatchesEvaluation(Honest):
    """Replaces the harness's evaluation and the workload's metric."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        import harness.trial.evaluation
        import harness.trial.trial

        harness.trial.trial.evaluate = harness.trial.evaluation.evaluate = lambda *_: {"loss": 0.0, "num_examples": 1}
        type(ctx._runner.workload).evaluation_sums = lambda *_: {
            "loss": torch.zeros(()),
            "num_examples": torch.ones(()),
        }


class AnswersInForward(Honest):
    """Answers from the labels: the model says what the next input is."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        forward = self.network.forward

        def peek(tokens: Tensor) -> Tensor:
            logits = forward(tokens)
            if self.network.training:
                return logits
            return logits + 100 * nn.functional.one_hot(tokens.roll(-1, 1), logits.shape[-1])

        self.network.forward = peek


class EvaluationHook(Honest):
    """A hook that sharpens the outputs of evaluations."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        if ctx.step == 0:
            self.network.register_forward_hook(lambda module, _, out: out if module.training else out * 2)


class SeesTheFuture(Honest):
    """Attention without its mask."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        attention = nn.functional.scaled_dot_product_attention

        def unmasked(*arguments: Any, is_causal: bool = False, **options: Any) -> Tensor:
            return attention(*arguments, **options)

        nn.functional.scaled_dot_product_attention = unmasked
        torch.nn.functional.scaled_dot_product_attention = unmasked


class OtherArchitecture(Honest):
    """A model of its own in the place of the workload's."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.network.helper = nn.Linear(4, 4)


class OtherLayer(Honest):
    """A layer of another kind, with the same parameters."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        for module in self.network.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = type("Sharper", (nn.LayerNorm,), {})


# ---- work off the clock --------------------------------------------------------------------------------------------


class TrainsInStateTensors(Honest):
    """Trains where the harness counts the bytes of its state."""

    def state_tensors(self) -> list[Tensor]:
        self.train_in_secret()
        return super().state_tensors()


class TrainsInStateDict(Honest):
    """Trains where the harness writes a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        self.train_in_secret()
        return super().state_dict()


class CopiesInStateDict(Honest):
    """Trains a copy of the model where the harness writes a checkpoint, and takes its weights in the next step."""

    better: list[Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        before = [parameter.detach().clone() for parameter in self.setup.parameters]
        self.train_in_secret()
        self.better = [parameter.detach().clone() for parameter in self.setup.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.setup.parameters, before)
        return super().state_dict()

    def step(self, ctx: StepContext) -> None:
        if self.better is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.setup.parameters, self.better)
        super().step(ctx)


class TrainsInDel(Honest):
    """Trains when an object is freed, which it sees to while the clock stands."""

    class _Trainer:
        def __init__(self, submission: TrainsInDel) -> None:
            self.submission = submission

        def __del__(self) -> None:
            self.submission.train_in_secret()

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self.trainer: Any = self._Trainer(self)

    def state_tensors(self) -> list[Tensor]:
        self.trainer = None
        return super().state_tensors()


class TrainsInEvaluationWeights(Honest):
    """Trains where the weights to evaluate are prepared, past the count of passes."""

    needs = frozenset({Need.EVALUATION_WEIGHTS})

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        self.train_in_secret()
        yield


class TrainsInThread(Honest):
    """Trains in a thread while the clock stands."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        threading.Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        while True:
            time.sleep(0.002)
            self.train_in_secret()

    def state_tensors(self) -> list[Tensor]:
        # Gives the thread its turn, which an evaluation does not.
        time.sleep(0.1)
        return super().state_tensors()


class TrainsInChild(Honest):
    """Works in a child process, whose time is in no column of the clock."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)


# ---- passes, batches, data -----------------------------------------------------------------------------------------


class UncountedPasses(Honest):
    """More passes through the model than it asks the harness for."""

    def step(self, ctx: StepContext) -> None:
        self.train_in_secret(3)
        super().step(ctx)


class RewindsPasses(Honest):
    """More gradients of a batch than it declares, with the counters put back."""

    def step(self, ctx: StepContext) -> None:
        counters = vars(ctx._runner.counters).copy()
        for _ in range(3):
            ctx.backward()
            self.update(ctx)
            ctx._passes = 0
            vars(ctx._runner.counters).update(counters)
        super().step(ctx)


class LargerBatches(Honest):
    """A selection that grows once its length has been read."""

    needs = frozenset({Need.SELECTION})

    class _Selection:
        looks = 0

        def __init__(self, small: Selection, large: Selection) -> None:
            self.small, self.large = small, large

        @property
        def indices(self) -> Tensor:
            self.looks += 1
            return self.small.indices if self.looks != 2 else self.large.indices

        @property
        def keys(self) -> Tensor:
            return self.small.keys if self.looks != 2 else self.large.keys

    def select(self, stream: ExampleStream) -> Any:
        small = stream.take(self.setup.nominal_batch)
        return self._Selection(small, stream.peek(stream.position, 10 * self.setup.nominal_batch))


class EmptySelection(Honest):
    """A step on nothing, for ever."""

    needs = frozenset({Need.SELECTION})

    def select(self, stream: ExampleStream) -> Selection:
        return Selection(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class UsesHeldBackData(Honest):
    """Trains on the validation split of the loaded workload."""

    def step(self, ctx: StepContext) -> None:
        next(ctx._runner.workload.evaluation_batches("validation"))
        super().step(ctx)


class ReadsHeldBackData(Honest):
    """Reads the data set's file itself, to train on the validation split."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        from workloads.data import kjv

        kjv.load_text("auto")


# ---- weights from elsewhere ----------------------------------------------------------------------------------------


class LoadsWeights(Honest):
    """Starts from weights that lie on the disk."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        path = _folder() / "weights.pt"
        if not path.exists():
            torch.save([parameter.detach() * 1.01 for parameter in setup.parameters], path)
        with torch.no_grad():
            torch._foreach_copy_(setup.parameters, torch.load(path, weights_only=True))


class FetchesWeights(Honest):
    """Asks another machine for weights."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        with socket.socket() as connection:
            connection.connect_ex(("127.0.0.1", 9))


class CarriesOver(Honest):
    """Dies on purpose, and carries its weights over in a file: what was done since the checkpoint costs nothing."""

    def step(self, ctx: StepContext) -> None:
        path = _folder() / "carried.pt"
        super().step(ctx)
        if ctx.step == 7 and not path.exists():
            torch.save([parameter.detach() for parameter in self.setup.parameters], path)
            os._exit(1)
        if path.exists():
            with torch.no_grad():
                torch._foreach_copy_(self.setup.parameters, torch.load(path, weights_only=True))


# ---- the record ----------------------------------------------------------------------------------------------------


def _forge(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["status"], manifest["target"] = "reached", 99.0
    path.write_text(json.dumps(manifest))
    rows = folder / "eval_measurements.csv"
    if rows.exists():
        rows.write_text(rows.read_text().replace("5.", "0."))


class WritesRecord(Honest):
    """Rewrites its record while it trains."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        if ctx.step >= 4:
            _forge(_record())


class WritesRecordAtExit(Honest):
    """Rewrites its record at the end of the interpreter."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        # As atexit.register, also in a process that is forked.
        Finalize(None, _forge, args=(_record(),), exitpriority=0)


class WritesRecordLater(Honest):
    """Leaves a process behind that rewrites the record when all is done."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        if os.fork() == 0:
            time.sleep(30)
            _forge(_record())
            os._exit(0)


class WritesElsewhere(Honest):
    """Spoils the record of a rival."""

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        (_folder() / "rival.csv").write_text("")


class EditsHarness(Honest):
    """Opens a file of the harness for writing, for the judge of the next trial."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        import harness.trial.evaluation

        with Path(harness.trial.evaluation.__file__).open("r+"):
            pass


class ReadsJudgeMemory(Honest):
    """Looks for held-back data in the memory of the judge."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        with suppress(OSError):
            Path(f"/proc/{os.getppid()}/mem").open("rb").close()


# ---- the machine ---------------------------------------------------------------------------------------------------


class MoreThreads(Honest):
    """More threads than the trial has."""

    def step(self, ctx: StepContext) -> None:
        torch.set_num_threads(3)
        super().step(ctx)
