"""What the benchmarks of the harness share: trainings on random data, and their time against a loop written by hand.

The loops (benchmarks/bare_loop.py) share nothing with the harness. Both alternate in one process, and the figure is the
median of the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from bare_loop import BareLoop, Examples, fixed_batch, image_batches, text_batches
from synthetic import TOKENS, examples, load_synthetic
from torch import Tensor, nn

from harness.config.choices import list_choices
from harness.config.compose import load_run
from harness.trial.clock import synchronize
from harness.trial.environment import configure_torch, select_device
from harness.trial.hardware import PeakMemory
from harness.trial.training import Training

Figures = dict[str, Any]
MINI = ("gpt2", "resnet", "vit")
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s by part of the GPU's name (NVIDIA's data sheets; H100: the SXM form)."""
TINY = {
    "gpt2": [
        "workload.model={vocabulary: 256, context: 16, layers: 1, width: 16, heads: 2, dropout: 0.0}",
        "workload.nominal_batch=8", "workload.micro_batch=4", "workload.data.evaluation_examples=8",
    ],
    "resnet": [
        "workload.nominal_batch=8", "workload.micro_batch=4", "workload.model.width=4",
        "workload.data.validation_size=59000",
    ],
    "vit": [
        "workload.nominal_batch=8", "workload.micro_batch=4", "workload.model.width=16", "workload.model.heads=2",
        "workload.model.layers=1", "workload.data.validation_size=59000",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """device: cuda, or cpu for a dry run. tiny: sizes with which a part takes a second, to see that it runs."""

    device: str
    tiny: bool

    @property
    def submissions(self) -> list[str]:
        """The submissions that proofs cover."""
        return ["adamw", "lion", "swats"] if self.tiny else [n for n in list_choices("optimizer") if n != "any"]


def make_training(options: Options, *arguments: str) -> Training:
    """A training that is built, on random data; arguments as for run.py."""
    tiny = TINY[_workload_of(arguments)] if options.tiny else []
    run = load_run([*arguments, f"device={options.device}", *tiny])
    device = select_device(run)
    configure_torch(run, device)
    training = Training(run, load_synthetic(run, device), device)
    training.build()
    return training


def train(training: Training, steps: int) -> None:
    """Make `steps` nominal steps more."""
    goal = training.runner.counters.examples + steps * training.spec.nominal_batch
    training.segment(goal, charge_compile=False)


def alternate(
    training: Training, bare: BareLoop, steps: int, rounds: int, clock: Callable[[], float] = perf_counter
) -> Figures:
    """Train with the harness and with the bare loop in turn, `rounds` times `steps` steps after one that is not
    counted: seconds per step of both, their ratio (medians), the peak memory of both above what was there before."""
    device = training.device
    seconds: dict[str, list[float]] = {"harness": [], "bare": []}
    memory = {kind: PeakMemory(device) for kind in seconds}
    work = {"harness": lambda: train(training, steps), "bare": lambda: bare.train(steps)}
    for number in range(rounds + 1):
        # The order alternates, so that a drift of the machine's speed favours neither.
        for kind in ("harness", "bare") if number % 2 else ("bare", "harness"):
            synchronize(device)
            start = clock()
            with memory[kind].measure("training"):
                work[kind]()
                synchronize(device)
            if number:
                seconds[kind].append((clock() - start) / steps)
    ratios = [a / b for a, b in zip(seconds["harness"], seconds["bare"], strict=True)]
    return {
        "seconds per step": statistics.median(seconds["harness"]),
        "bare loop": statistics.median(seconds["bare"]),
        "harness / bare loop": statistics.median(ratios),
        "ratios": ratios,
        "peak memory in GiB": memory["harness"].peaks["training"] / 2**30,
        "bare loop's in GiB": memory["bare"].peaks["training"] / 2**30,
    }


def bare_loop_for(training: Training, precision: str, compiled: bool) -> BareLoop:
    """A bare loop on the same kind of model, with batches of its own."""
    workload, spec, device = training.workload, training.spec, training.device
    torch.manual_seed(0)
    model = workload.build_model().to(device)
    if spec.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    next_batch: Callable[[], Examples]
    if spec.name == "gpt2":
        tokens = torch.randint(workload.model_options.vocabulary, (TOKENS,), device=device)
        next_batch = text_batches(tokens, workload.model_options.context, spec.nominal_batch)
    elif spec.data.get("dataset", "fashion-mnist") == "fashion-mnist":
        options = workload.data_options
        pictures = torch.randn(60_000 - options.validation_size, 1, 28, 28, device=device)
        labels = torch.randint(workload.model_options.classes, (len(pictures),), device=device)
        next_batch = image_batches(pictures, labels, spec.nominal_batch, options.pad, options.flip)
    else:
        stream = training.stream.peek(0, spec.nominal_batch)
        next_batch = fixed_batch(examples(workload.batch(stream.indices, stream.keys)))

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(inputs).float()
        # Text has a prediction for every token.
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten() if logits.ndim == 3 else labels)

    return BareLoop(
        loss, [p for p in model.parameters() if p.requires_grad], next_batch, micro_batch=spec.micro_batch,
        steps=spec.max_steps, precision=precision, compiled=compiled,
    )  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU by its name; None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((value for part, value in PEAKS.items() if part in words), None)


def milliseconds(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Median milliseconds of three rounds of `steps` steps, after some that are not counted."""
    for _ in range(3):
        step()
    rounds = []
    for _ in range(3):
        synchronize(device)
        start = perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        rounds.append((perf_counter() - start) / steps * 1e3)
    return statistics.median(rounds)


def _workload_of(arguments: tuple[str, ...]) -> str:
    return next(a.removeprefix("workload=") for a in arguments if a.startswith("workload="))
