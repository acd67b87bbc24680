"""The cost of an update: milliseconds per step and bytes of state of every submission, with fixed gradients.

    python benchmarks/optimizer_step.py [--names NAME ...] [--set mini | gpt | large ...] [--rounds 5] [--steps 10]
                                        [--threads 2] [--seconds 20] [--clock wall | cpu] [--compile] [--out CSV]

Sets of parameters: `mini` is the model of the workload gpt2; `gpt` is a GPT-2 of 8 layers and width 332, 10.8M
parameters in 100 tensors; `large` is GPT-2 with 124M parameters in 148 tensors. A step is the submission's step without
the model's passes: its context returns fixed gradients, Hessian-vector products and micro-batch gradients. So the
additional forward and backward passes of an algorithm are not measured; nor is clipping, which is switched off.

These alternate: the submission, torch's fused AdamW, and every library's implementation of the same rule
(benchmarks/library_rules.py), with the submission's weight decay and with momentum if it has one. The fastest library
is named. --compile adds the submission with its update compiled, if its rule is elementwise.

Each makes `--steps` steps per round, after two that are not counted. The time of a round is a mean, so that work of
every tenth step counts by its share, and the figure is the median of the rounds. A contestant stops early when it has
used `--seconds`. On a shared machine, use `--clock cpu --threads 1`, which measures processor time and not wall-clock
time. `--out` also writes the table to a file, which scripts/algorithms.py reads.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from library_rules import Make, Optimizer, rules_of
from torch import Tensor, nn
from typing_extensions import override

from harness.config.choices import list_choices
from harness.config.compose import load_run
from harness.config.hyperparameters import import_class
from harness.interface.submission import collect_tensors
from harness.interface.workload import Workload
from harness.trial.training import Training
from submissions.matrices import MATRIX_ROLES, MatrixSubmission
from submissions.rule import Rule

SETS = {
    "mini": [],
    "gpt": ["workload.model.layers=8", "workload.model.width=332", "workload.model.vocabulary=512"],
    "large": [
        "workload.model.layers=12", "workload.model.width=768", "workload.model.heads=12",
        "workload.model.vocabulary=50304", "workload.model.context=1024",
    ],
}  # fmt: skip
START_IMMEDIATELY = {"shampoo": ["optimizer.hyperparameters.start_step=0"]}
"""Settings with which the costly part of an update begins at the first step."""
MICRO_BATCHES = 8
CLOCKS = {"wall": perf_counter, "cpu": process_time}


class FixedContext:
    """A step context that returns fixed values; stands for harness.interface.StepContext.

    gradients: returned by `backward`. others: returned by all other methods.
    """

    batch_size = label_count = 32

    def __init__(self, parameters: list[nn.Parameter], gradients: list[Tensor], others: list[Tensor], step: int):
        self.parameters, self.step, self._others = parameters, step % 1000, others
        # Copies, since clipping or a wrapper may change gradients in place.
        self._gradients = [gradient.clone() for gradient in gradients]
        self.first_loss = torch.tensor(1.0)

    def backward(self) -> Tensor:
        """As `StepContext.backward`."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self.first_loss

    def loss(self, **options: Any) -> Tensor:
        """As `StepContext.loss`."""
        return self.first_loss

    def gradients(self, **options: Any) -> list[Tensor]:
        """As `StepContext.gradients`."""
        return self._others

    def loss_and_gradients(self, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """As `StepContext.loss_and_gradients`."""
        return self.first_loss, self._others

    def hessian_vector_product(self, vectors: Sequence[Tensor], **options: Any) -> list[Tensor]:
        """As `StepContext.hessian_vector_product`."""
        return self._others

    def micro_batch_gradients(self, at_least: int = 1) -> list[list[Tensor]]:
        """As `StepContext.micro_batch_gradients`."""
        self.backward()
        return [self._gradients if k % 2 else self._others for k in range(MICRO_BATCHES)]


class Contestant:
    """An optimizer with its own copy of the parameters.

    gradients: lists parallel to the parameters, taken in turn. rounds: the mean seconds of a step, by round.
    """

    def __init__(self, model: nn.Module, gradients: list[list[Tensor]]) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = gradients
        self.count = 0
        self.rounds: list[float] = []

    def prepare_step(self, gradients: list[Tensor], others: list[Tensor]) -> Callable[[], object]:
        """A function that makes a step on these gradients; only its call is timed."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Bytes of state besides the parameters."""
        raise NotImplementedError

    def run(self, steps: int, clock: Callable[[], float]) -> Iterator[float]:
        """Make so many steps; yields the seconds of each."""
        for _ in range(steps):
            step = self.prepare_step(self.gradients[self.count % 3], self.gradients[(self.count + 1) % 3])
            self.count += 1
            start = clock()
            step()
            yield clock() - start


class Ours(Contestant):
    """A submission, built by the harness."""

    def __init__(self, training: Training, gradients: list[list[Tensor]]) -> None:
        super().__init__(training.runner.model, gradients)
        self.training = training

    @override
    def prepare_step(self, gradients: list[Tensor], others: list[Tensor]) -> Callable[[], object]:
        context: Any = FixedContext(self.parameters, gradients, others, self.count)
        return lambda: self.training.submission.step(context)

    @override
    def state_bytes(self) -> int:
        return self.training.submission.state_bytes()


class Theirs(Contestant):
    """Another optimizer for the parameters `names`, with torch's fused AdamW for the rest.

    decay: weight decay of all its groups (default: the optimizer's own).
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: list[list[Tensor]],
        make: Make,
        names: set[str],
        decay: float | None = None,
    ) -> None:
        super().__init__(model, gradients)
        named = [p for name, p in model.named_parameters() if name in names]
        rest = [p for name, p in model.named_parameters() if name not in names]
        self.optimizers = [make(named)] + ([torch.optim.AdamW(rest, fused=True)] if rest else [])
        if decay is not None:
            for group in self.optimizers[0].param_groups:
                group["weight_decay"] = decay

    @override
    def prepare_step(self, gradients: list[Tensor], others: list[Tensor]) -> Callable[[], object]:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        return lambda: [optimizer.step() for optimizer in self.optimizers]

    @override
    def state_bytes(self) -> int:
        return sum(t.nbytes for optimizer in self.optimizers for t in collect_tensors(dict(optimizer.state)))


def make_gradients(model: nn.Module) -> list[list[Tensor]]:
    """Three sets of gradients for all contestants."""
    generator = torch.Generator().manual_seed(0)
    # About as large as those of a trained model, and not so small that denormal numbers slow down the arithmetic.
    return [[torch.randn(p.shape, generator=generator) * 1e-2 for p in model.parameters()] for _ in range(3)]


def copy_model(model: nn.Module) -> nn.Module:
    """A copy without hooks, which hold the training that set them."""
    hooks = [
        (module, attribute, getattr(module, attribute))
        for module in model.modules()
        for attribute in ("_forward_hooks", "_forward_pre_hooks")
    ]
    for module, attribute, registered in hooks:
        setattr(module, attribute, type(registered)())
    copied = copy.deepcopy(model)
    for module, attribute, registered in hooks:
        setattr(module, attribute, registered)
    return copied


def make_training(name: str, set_: str) -> Training:
    """A training with the submission `name` and the parameters of a set."""
    settings = ["optimizer.clip_norm=null", *SETS[set_], *START_IMMEDIATELY.get(name, [])]
    # `build` warms up with one batch, which takes long with the large models.
    small_batch = ["workload.nominal_batch=1", "workload.micro_batch=1"] if set_ != "mini" else []
    run = load_run(["workload=gpt2", f"optimizer={name}", *settings, *small_batch])
    workload: Workload = import_class(run.spec.class_path, "workload.class_path")(run.spec)
    workload.load("auto", torch.device("cpu"))
    training = Training(run, workload, torch.device("cpu"))
    training.build()
    return training


def compile_updates(training: Training) -> bool:
    """Let the elementwise rules of the submission compile their update; whether there is one."""
    optimizers: list[Optimizer] = getattr(training.submission, "optimizers", [])
    rules = [optimizer for optimizer in optimizers if isinstance(optimizer, Rule) and optimizer.elementwise]
    for rule in rules:
        rule.compile_update()
    return bool(rules)


def make_contestants(name: str, set_: str, *, compiled: bool) -> dict[str, Contestant]:
    """The contestants for the submission `name`: ours, AdamW, the libraries, and with `compiled` ours compiled."""
    training = make_training(name, set_)
    model = training.runner.model
    gradients = make_gradients(model)
    all_names = {name for name, _ in model.named_parameters()}
    contestants: dict[str, Contestant] = {}
    contestants["AdamW"] = Theirs(copy_model(model), gradients, lambda p: torch.optim.AdamW(p, fused=True), all_names)
    names = all_names
    if issubclass(training.cls, MatrixSubmission):
        roles = training.submission.setup._roles
        names = {name for name in all_names if roles[name] in MATRIX_ROLES}
    optimizers: list[Optimizer] = getattr(training.submission, "optimizers", [])
    groups = optimizers[0].param_groups if optimizers else []
    decay = max((group.get("weight_decay", 0.0) for group in groups), default=0.0)
    for library, make in rules_of(name).items():
        contestants[library] = Theirs(copy_model(model), gradients, make, names, decay)
    contestants = {"ours": Ours(training, gradients)} | contestants
    if compiled:
        training = make_training(name, set_)
        if compile_updates(training):
            contestants["compiled"] = Ours(training, gradients)
    return contestants


def measure(
    contestants: dict[str, Contestant], clock: Callable[[], float], *, rounds: int, steps: int, seconds: float
) -> None:
    """Let the contestants alternate and record their times; seconds: limit for each. Libraries that fail are left
    out."""
    # Two steps that are not counted create the state.
    for name, contestant in list(contestants.items()):
        try:
            list(contestant.run(2, clock))
        except Exception as error:
            # Libraries fail with some parameters, or with this version of torch.
            if name in ("ours", "AdamW", "compiled"):
                raise
            print(f"without {name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            del contestants[name]
    used = dict.fromkeys(contestants, 0.0)
    for round_ in range(rounds):
        # The first one rotates, so that a drift of the machine's speed favours none.
        order = list(contestants)[round_ % len(contestants) :] + list(contestants)[: round_ % len(contestants)]
        for name in order:
            if used[name] >= seconds:
                continue
            try:
                times = list(contestants[name].run(steps, clock))
            except RuntimeError:
                # Step sizes that grow with fixed gradients overflow in the end.
                if not contestants[name].rounds:
                    raise
                used[name] = seconds
                continue
            contestants[name].rounds.append(statistics.mean(times))
            used[name] += sum(times)


def main() -> None:
    """Parse the command line, measure the submissions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    submissions = [name for name in list_choices("optimizer") if name != "any"]
    parser.add_argument("--names", nargs="+", choices=submissions, default=submissions, metavar="NAME")
    parser.add_argument("--set", nargs="+", choices=SETS, default=["gpt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, metavar="CSV")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for set_ in options.set:
        print(f"{set_}, {options.threads} threads, {options.clock} time")
        heads = f"{'submission':22}{'ms/step':>9}{'fused AdamW':>13}{'ratio':>7}{'compiled':>10}{'ratio':>7}"
        print(f"{heads}{'library':>9}{'ratio':>7}{'bytes/parameter':>17}  fastest library")
        for name in options.names:
            torch.set_num_threads(options.threads)
            contestants = make_contestants(name, set_, compiled=options.compile)
            # Again: building the training has set the run's own number.
            torch.set_num_threads(options.threads)
            limits = {"rounds": options.rounds, "steps": options.steps, "seconds": options.seconds}
            measure(contestants, CLOCKS[options.clock], **limits)
            median = {key: 1000 * statistics.median(contestant.rounds) for key, contestant in contestants.items()}
            ours, adamw, compiled = median["ours"], median["AdamW"], median.get("compiled")
            libraries = {key: median[key] for key in median if key not in ("ours", "AdamW", "compiled")}
            best = min(libraries, key=lambda key: libraries[key], default=None)
            size = sum(p.numel() for p in contestants["ours"].parameters)
            print(
                f"{name:22}{ours:9.2f}{adamw:13.2f}{ours / adamw:7.2f}"
                + (f"{compiled:10.2f}{compiled / adamw:7.2f}" if compiled else " " * 17)
                + (f"{libraries[best]:9.2f}{ours / libraries[best]:7.2f}" if best else " " * 16)
                + f"{contestants['ours'].state_bytes() / size:17.2f}"
                + (f"  {best} ({_others(libraries, best)})" if best else ""),
                flush=True,
            )
            rows.append(
                {"submission": name, "set": set_, "clock": options.clock, "threads": options.threads}
                | {"milliseconds": f"{ours:.4g}", "fused_adamw": f"{adamw:.4g}"}
                | {"compiled": f"{compiled:.4g}" if compiled else ""}
                | {"library": f"{libraries[best]:.4g}" if best else "", "library_name": best or ""}
            )
    if options.out:
        with options.out.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def _others(libraries: dict[str, float], best: str) -> str:
    """The milliseconds of the libraries that are not the fastest."""
    others = sorted((milliseconds, name) for name, milliseconds in libraries.items() if name != best)
    return ", ".join(f"{name} {milliseconds:.2f}" for milliseconds, name in others) or "the only one"


if __name__ == "__main__":
    main()
