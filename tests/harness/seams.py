"""One small submission per capability: they prove the seams, they are not the algorithms of the board."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.interface.data_order import ExampleStream, Selection
from harness.interface.needs import Need
from harness.interface.step import StepContext, swapped
from harness.interface.submission import OptimizerSubmission, Setup, Submission
from tests.forked import PARENT_VARIABLE


class _Sgd(OptimizerSubmission):
    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, [torch.optim.SGD(setup.parameters, lr=lr)])


class PolyakStep(Submission):
    """Loss value at the step: a Polyak step size min(lr, loss / |g|²)."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup)
        self.lr = lr

    def step(self, ctx: StepContext) -> None:
        loss, gradients = ctx.loss_and_gradients()
        norm = torch.stack(torch._foreach_norm(gradients)).square().sum()
        size = torch.clamp(loss / norm, max=self.lr)
        with torch.no_grad():
            torch._foreach_sub_(self.setup.parameters, torch._foreach_mul(gradients, size))


class Sam(_Sgd):
    """Same batch again with the same randomness."""

    needs = frozenset({Need.RE_EVALUATE})

    def step(self, ctx: StepContext) -> None:
        gradients = ctx.gradients()
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        ascent = torch._foreach_mul(gradients, 0.05 / norm)
        with swapped(self.setup.parameters, torch._foreach_add([p.detach() for p in self.setup.parameters], ascent)):
            ctx.backward()
        self.update(ctx)


class ZerothOrder(Submission):
    """Forward only: two losses along a random direction of the submission's own generator."""

    needs = frozenset({Need.LOSS, Need.RE_EVALUATE})

    def __init__(self, setup: Setup, *, lr: float = 0.01) -> None:
        super().__init__(setup)
        self.lr = lr

    def step(self, ctx: StepContext) -> None:
        parameters = self.setup.parameters
        z = [torch.randn(p.shape, generator=self.setup.generator) for p in parameters]
        current = [p.detach() for p in parameters]
        slope = ctx.loss(params=torch._foreach_add(current, z, alpha=1e-3)) - ctx.loss(
            params=torch._foreach_sub(current, z, alpha=1e-3)
        )
        with torch.no_grad():
            torch._foreach_sub_(parameters, torch._foreach_mul(z, slope / 2e-3 * self.lr))


class HutchinsonDiagonal(_Sgd):
    """Hessian-vector products: gradients scaled by a running estimate of the Hessian's diagonal."""

    needs = frozenset({Need.SECOND_DERIVATIVES, Need.RE_EVALUATE})

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.diagonal = [torch.zeros_like(p) for p in setup.parameters]

    def step(self, ctx: StepContext) -> None:
        u = [torch.randint(0, 2, p.shape, generator=self.setup.generator) * 2.0 - 1 for p in self.setup.parameters]
        products = ctx.hessian_vector_product(u)
        torch._foreach_lerp_(self.diagonal, [(a * b).abs() for a, b in zip(u, products, strict=True)], 0.1)
        for p, g, d in zip(self.setup.parameters, ctx.gradients(), self.diagonal, strict=True):
            p.grad = g / (1 + d)
        self.update(ctx)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"diagonal": self.diagonal}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.diagonal = state["diagonal"]

    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.diagonal


class LookAheadGradient(_Sgd):
    """Weights moved before the gradient (Nesterov's own form, weight prediction)."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.velocity = [torch.zeros_like(p) for p in setup.parameters]

    def step(self, ctx: StepContext) -> None:
        parameters = self.setup.parameters
        torch._foreach_mul_(self.velocity, 0.9)
        with swapped(parameters, torch._foreach_add([p.detach() for p in parameters], self.velocity)):
            gradients = ctx.gradients()
        torch._foreach_sub_(self.velocity, gradients, alpha=0.01)
        with torch.no_grad():
            torch._foreach_add_(parameters, self.velocity)

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.velocity = state["velocity"]


class SampledFisher(_Sgd):
    """Sampled labels: gradients scaled by the squared gradient on labels drawn from the model."""

    needs = frozenset({Need.SAMPLED_LABELS, Need.RE_EVALUATE})

    def step(self, ctx: StepContext) -> None:
        fisher = ctx.gradients(labels="sampled")
        ctx.backward()
        for p, f in zip(self.setup.parameters, fisher, strict=True):
            assert p.grad is not None
            p.grad /= 0.1 + f.abs()
        self.update(ctx)


class GrowingBatch(_Sgd):
    """Half the nominal batch, then the whole, then twice, from the position in the stream alone."""

    needs = frozenset({Need.SELECTION})

    def select(self, stream: ExampleStream) -> Selection:
        nominal = self.setup.nominal_batch
        done = stream.position / nominal
        return stream.take(nominal // 2 if done < 3 else nominal if done < 6 else 2 * nominal)


class ExponentialAverage(_Sgd):
    """Evaluation weights that differ from the trained ones."""

    needs = frozenset({Need.EVALUATION_WEIGHTS})

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.average = [p.detach().clone() for p in setup.parameters]

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.setup.parameters], 0.1)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        with swapped(self.setup.parameters, self.average):
            yield

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.average = state["average"]

    def state_tensors(self) -> list[Tensor]:
        return super().state_tensors() + self.average


class LayerInputs(_Sgd):
    """Hooks on the layers: the mean square of every linear layer's input."""

    needs = frozenset({Need.LAYERS})

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.seen = 0
        for module in setup.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen += 1

    def step(self, ctx: StepContext) -> None:
        before = self.seen
        super().step(ctx)
        assert self.seen > before


class Undeclared(_Sgd):
    """Asks for the roles without declaring them."""

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.roles = setup.roles


class Broken(_Sgd):
    """Raises at its third step."""

    def step(self, ctx: StepContext) -> None:
        if ctx.step >= 2:
            raise ArithmeticError("the third step is wrong")
        super().step(ctx)


class Deadly(_Sgd):
    """Takes its process with it at the eighth step."""

    def step(self, ctx: StepContext) -> None:
        if ctx.step >= 7:
            os.abort()
        super().step(ctx)


class Leaving(_Sgd):
    """Ends its process at the third step, with the status that PACEMARK_TEST_STATUS says."""

    def step(self, ctx: StepContext) -> None:
        if ctx.step >= 2:
            os._exit(int(os.environ["PACEMARK_TEST_STATUS"]))
        super().step(ctx)


class Fragile(_Sgd):
    """At the eighth step of rank 1: what PACEMARK_TEST_FAULT says, and nothing if that is not set.

    `... and deaf`: rank 0 waits then as it would for a GPU that waits for rank 1.
    """

    def step(self, ctx: StepContext) -> None:
        fault = os.environ.get("PACEMARK_TEST_FAULT", "")
        if ctx.step >= 7 and os.environ.get("RANK") == "0" and fault.endswith("deaf"):
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            for _ in range(2):  # the second time never returns, whatever signals come
                libc.pthread_mutex_lock(mutex)
        if ctx.step >= 7 and os.environ.get("RANK") == "1":
            if fault.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.startswith("broken"):
                raise ArithmeticError("only here")
        super().step(ctx)


class KilledAtRandom(OptimizerSubmission):
    """AdamW in processes that are killed at random moments, as often as the folder PACEMARK_TEST_KILLS has files.

    A process takes a file by renaming it, so that each kills once. Some steps later a thread sends SIGKILL to this
    process, or to its parent if the file says so, while training, evaluating and writing go on. Training waits for it
    in the end: how many processes are killed does not depend on how busy the machine is.
    """

    def __init__(self, setup: Setup, *, lr: float = 0.01) -> None:
        super().__init__(setup, [torch.optim.AdamW(setup.parameters, lr=lr)])
        self.kill: Path | None = None
        self.steps = 0
        for path in sorted(Path(os.environ.get("PACEMARK_TEST_KILLS", "/nonexistent")).glob("*.to_come")):
            with suppress(FileNotFoundError):
                self.kill = path.rename(path.with_suffix(".taken"))
                self.random = random.Random(path.stem)
                self.kill_step = self.random.randint(5, 15)
                break

    def step(self, ctx: StepContext) -> None:
        super().step(ctx)
        self.steps += 1
        if self.kill is not None and self.steps == self.kill_step:
            threading.Timer(self.random.random() * 0.03, self._kill).start()
        if self.kill is not None and self.steps == self.kill_step + 10:
            time.sleep(60)

    def _kill(self) -> None:
        assert self.kill is not None
        parent = int(os.environ.get(PARENT_VARIABLE) or os.getppid())
        os.kill(parent if self.kill.read_text() == "parent" else os.getpid(), signal.SIGKILL)


def plan_kills(folder: Path, number: int, victim: str = "trial") -> dict[str, str]:
    """Write down `number` kills for `KilledAtRandom`, of the "trial" or of its "parent"; the environment to run in."""
    folder.mkdir()
    for i in range(number):
        (folder / f"{i}.to_come").write_text(victim)
    return dict(os.environ) | {"PACEMARK_TEST_KILLS": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}


class DeafOnce(_Sgd):
    """Loses the first Ctrl-C of its process, as a destructor that is interrupted does, and creates the file
    PACEMARK_TEST_DEAF then."""

    def step(self, ctx: StepContext) -> None:
        marker = Path(os.environ["PACEMARK_TEST_DEAF"])
        if not marker.exists() and ctx.step == 7:
            former = signal.getsignal(signal.SIGINT)

            def lose(number: int, frame: object) -> None:
                marker.touch()
                signal.signal(signal.SIGINT, former)

            signal.signal(signal.SIGINT, lose)
        super().step(ctx)


class Held(OptimizerSubmission):
    """AdamW that is slow, and stands ten steps before its end, until the file PACEMARK_TEST_RELEASE is there."""

    def __init__(self, setup: Setup, *, lr: float = 0.01) -> None:
        super().__init__(setup, [torch.optim.AdamW(setup.parameters, lr=lr)])
        self.last_step = setup._max_steps - 10

    def step(self, ctx: StepContext) -> None:
        release = Path(os.environ["PACEMARK_TEST_RELEASE"])
        while not release.exists():
            time.sleep(0.04)
            if ctx.step < self.last_step:
                break
        super().step(ctx)


class Hanging(_Sgd):
    """Hangs in foreign code at its eighth step, deaf to signals, and creates the file PACEMARK_TEST_HANG. Where the
    file is there it trains on."""

    def step(self, ctx: StepContext) -> None:
        marker = Path(os.environ["PACEMARK_TEST_HANG"])
        if ctx.step >= 7 and not marker.exists():
            marker.touch()
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            for _ in range(2):
                libc.pthread_mutex_lock(mutex)
        super().step(ctx)


class Nosy(_Sgd):
    """Says where it runs."""

    def step(self, ctx: StepContext) -> None:
        gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()
        raise ArithmeticError(f"cores {os.sched_getaffinity(0)} gpu {gpu} threads {threads}")


class OutOfMemory(_Sgd):
    def step(self, ctx: StepContext) -> None:
        raise torch.OutOfMemoryError("not enough")


class Interrupted(_Sgd):
    """Presses Ctrl-C at its eighth step, once per process and seed."""

    pressed = False

    def step(self, ctx: StepContext) -> None:
        if ctx.step >= 7 and not Interrupted.pressed:
            Interrupted.pressed = True
            raise KeyboardInterrupt
        super().step(ctx)


class OwnCompilation(_Sgd):
    """Compiles its own update."""

    needs = frozenset({Need.OWN_COMPILATION})

    def __init__(self, setup: Setup, *, lr: float = 0.1) -> None:
        super().__init__(setup, lr=lr)
        self.compiled = torch.compile(lambda p, g: p - 0.1 * g, backend="eager")

    def step(self, ctx: StepContext) -> None:
        gradients = ctx.gradients()
        with torch.no_grad():
            self.setup.parameters[0].copy_(self.compiled(self.setup.parameters[0], gradients[0]))
