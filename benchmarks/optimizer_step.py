"""The cost of an update: milliseconds per step and bytes of state of every submission, with fixed gradients.

    python benchmarks/optimizer_step.py [--names NAME ...] [--set gpt | mini | both] [--rounds 5] [--steps 10]
                                        [--threads 2] [--seconds 20] [--clock wall | cpu] [--out CSV]

Sets of parameters: `gpt` is a GPT-2 of 8 layers and width 332, 10.8M parameters in 100 tensors; `mini` is the model of
the workload gpt2. A step is the submission's step without the model's passes: its context returns fixed gradients,
Hessian-vector products and micro-batch gradients. So the additional forward and backward passes of an algorithm are not
measured; nor is clipping, which is switched off.

Three contestants alternate: the submission, torch's fused AdamW, and the best library's implementation of the same rule
where there is one, with the submission's weight decay and with momentum if it has one. Each makes `--steps` steps per
round, after two that are not counted. Means are over all rounds, so that work of every tenth or fiftieth step counts by
its share. A contestant stops early when it has used `--seconds`. On a shared machine, use `--clock cpu --threads 1`,
which measures processor time instead of wall-clock time. The library's PSGD-Kron is included if the package opt_einsum
is installed. `--out` also writes the table to a file, which scripts/algorithms.py reads.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pytorch_optimizer as library
import torch
from torch import Tensor, nn
from typing_extensions import override

from harness.config.choices import list_choices
from harness.config.compose import load_run
from harness.config.hyperparameters import import_class
from harness.interface.submission import collect_tensors
from harness.interface.workload import Workload
from harness.trial.training import Training
from submissions.matrices import MATRIX_ROLES, MatrixSubmission

SETS = {
    "gpt": ["workload.model.layers=8", "workload.model.width=332", "workload.model.vocabulary=512"],
    "mini": [],
}
START_IMMEDIATELY = {"shampoo": ["optimizer.hyperparameters.start_step=0"]}
"""Settings with which the costly part of an update begins at the first step."""
MICRO_BATCHES = 8
CLOCKS = {"wall": perf_counter, "cpu": process_time}

Optimizer = torch.optim.Optimizer
LIBRARY: dict[str, Callable[[Sequence[nn.Parameter]], Optimizer]] = {
    "adabelief": lambda p: library.AdaBelief(p, rectify=False),
    "adafactor": lambda p: library.AdaFactor(p, lr=1e-3),
    "adamp": library.AdamP,
    "adamw_sn": lambda p: library.AdamWSN([{"params": p, "sn": True}]),
    "adan": library.Adan,
    "ademamix": library.AdEMAMix,
    "adopt": library.ADOPT,
    "diffgrad": library.DiffGrad,
    "galore": lambda p: library.GaLore(
        [{"params": p, "rank": 16, "update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}]
    ),
    "grams": library.Grams,
    "gravity": library.Gravity,
    "lamb": library.Lamb,
    "lion": library.Lion,
    "mars_adamw": library.MARS,
    "mars_lion": lambda p: library.MARS(p, mars_type="lion"),
    "mars_shampoo": lambda p: library.MARS(p, mars_type="shampoo"),
    "muon": lambda p: library.Muon([{"params": p, "use_muon": True}]),
    "novograd": library.NovoGrad,
    "prodigy": library.Prodigy,
    "schedule_free_adamw": library.ScheduleFreeAdamW,
    "schedule_free_sgd": library.ScheduleFreeSGD,
    "sgd_sai": library.SGDSaI,
    "sgdp": library.SGDP,
    "sgdw": lambda p: library.SGDW(p, momentum=0.9),
    "shampoo": lambda p: library.Shampoo(p, preconditioning_compute_steps=10),
    "soap": lambda p: library.SOAP(p, precondition_frequency=10),
}
# Without it the library's products need terabytes.
if torch.backends.opt_einsum.is_available():
    LIBRARY["psgd_kron"] = library.Kron


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
    """An optimizer with its own copy of the parameters. times: seconds of each step that counts."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        # About as large as those of a trained model, and not so small that denormal numbers slow down the arithmetic.
        self.gradients = [[torch.randn(p.shape, generator=generator) * 1e-2 for p in self.parameters] for _ in range(3)]
        self.count = 0
        self.times: list[float] = []

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

    def __init__(self, training: Training) -> None:
        super().__init__(training.runner.model)
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
        make: Callable[[Sequence[nn.Parameter]], Optimizer],
        names: set[str],
        decay: float | None = None,
    ) -> None:
        super().__init__(model)
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


def make_contestants(name: str, set_: str) -> dict[str, Contestant]:
    """The contestants for the submission `name`: ours, AdamW, and library if there is one."""
    settings = ["optimizer.clip_norm=null", *SETS[set_], *START_IMMEDIATELY.get(name, [])]
    # `build` warms up with one batch, which takes long with the large model.
    small_batch = ["workload.nominal_batch=1", "workload.micro_batch=1"] if set_ == "gpt" else []
    run = load_run(["workload=gpt2", f"optimizer={name}", *settings, *small_batch])
    spec = run.spec
    workload: Workload = import_class(spec.class_path, "workload.class_path")(spec)
    workload.load("auto", torch.device("cpu"))
    training = Training(run, workload, torch.device("cpu"))
    training.build()
    model = training.runner.model
    all_names = {name for name, _ in model.named_parameters()}
    references: dict[str, Contestant] = {}
    references["AdamW"] = Theirs(copy.deepcopy(model), lambda p: torch.optim.AdamW(p, fused=True), all_names)
    if name in LIBRARY:
        names = all_names
        if issubclass(training.cls, MatrixSubmission):
            roles = training.submission.setup._roles
            names = {name for name in all_names if roles[name] in MATRIX_ROLES}
        optimizers: list[Optimizer] = getattr(training.submission, "optimizers", [])
        groups = optimizers[0].param_groups if optimizers else []
        decay = max((group.get("weight_decay", 0.0) for group in groups), default=0.0)
        references["library"] = Theirs(copy.deepcopy(model), LIBRARY[name], names, decay)
    return {"ours": Ours(training)} | references


def measure(
    contestants: dict[str, Contestant], clock: Callable[[], float], *, rounds: int, steps: int, seconds: float
) -> None:
    """Let the contestants alternate and record their times; seconds: limit for each."""
    # Two steps that are not counted create the state.
    for contestant in contestants.values():
        for _ in contestant.run(2, clock):
            pass
    for round_ in range(rounds):
        # The first one rotates, so that a drift of the machine's speed favours none.
        rotated = itertools.islice(itertools.cycle(contestants.values()), round_, round_ + len(contestants))
        for contestant in rotated:
            for time in contestant.run(steps, clock):
                contestant.times.append(time)
                if sum(contestant.times) > seconds:
                    break


def main() -> None:
    """Parse the command line, measure the submissions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    submissions = [name for name in list_choices("optimizer") if name != "any"]
    parser.add_argument("--names", nargs="+", choices=submissions, default=submissions, metavar="NAME")
    parser.add_argument("--set", choices=[*SETS, "both"], default="gpt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, metavar="CSV")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for set_ in SETS if options.set == "both" else [options.set]:
        print(f"{set_}, {options.threads} threads, {options.clock} time")
        heads = f"{'submission':22}{'ms/step':>9}{'fused AdamW':>13}{'ratio':>7}{'library':>9}{'ratio':>7}"
        print(f"{heads}{'bytes/parameter':>17}")
        for name in options.names:
            torch.set_num_threads(options.threads)
            contestants = make_contestants(name, set_)
            # Again: building the training has set the run's own number.
            torch.set_num_threads(options.threads)
            limits = {"rounds": options.rounds, "steps": options.steps, "seconds": options.seconds}
            measure(contestants, CLOCKS[options.clock], **limits)
            mean = {key: 1000 * statistics.mean(contestant.times) for key, contestant in contestants.items()}
            size = sum(p.numel() for p in contestants["ours"].parameters)
            theirs = f"{mean['library']:9.2f}{mean['ours'] / mean['library']:7.2f}" if "library" in mean else " " * 16
            print(
                f"{name:22}{mean['ours']:9.2f}{mean['AdamW']:13.2f}{mean['ours'] / mean['AdamW']:7.2f}{theirs}"
                f"{contestants['ours'].state_bytes() / size:17.2f}",
                flush=True,
            )
            columns = {"ours": "milliseconds", "AdamW": "fused_adamw", "library": "library"}
            rows.append(
                {"submission": name, "set": set_, "clock": options.clock, "threads": options.threads}
                | {column: f"{mean[key]:.4g}" if key in mean else "" for key, column in columns.items()}
            )
    if options.out:
        with options.out.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
