"""What the harness costs: the training clock of a trial against a bare hand-written loop of the same model, data,
optimizer and steps, alternated in one process.

    python benchmarks/overhead.py [--workloads gpt2 resnet vit] [--steps 100] [--rounds 7]

Prints the ratio of each round, its median and its spread. Goal: a median of at most 1.01.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from harness.config.compose import load_run
from harness.config.hyperparameters import import_class, select_arguments
from harness.config.schema import Run
from harness.interface.workload import Workload
from harness.trial.trial import run_trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["gpt2", "resnet", "vit"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            changes = [f"workload.max_steps={options.steps}", f"workload.eval_every={options.steps}"]
            run = load_run([f"workload={name}", "optimizer=adamw", f"records={folder}", "run_to_end=true", *changes])
            ratios = [_ratio(run, round_) for round_ in range(options.rounds)]
        listed = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"{name:7} harness / bare loop: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f} ({listed})",
            flush=True,
        )


def _ratio(run: Run, round_: int) -> float:
    def harness() -> float:
        record, _ = run_trial(run.model_copy(update={"seed": round_, "records": Path(run.records)}))
        row = record.rows[-1]
        return row["accumulated_submission_time"] - row["accumulated_build_time"]

    # Which goes first alternates too, so that a drift of the machine favours neither.
    first, second = (harness, lambda: _bare_loop(run)) if round_ % 2 else (lambda: _bare_loop(run), harness)
    a, b = first(), second()
    return a / b if round_ % 2 else b / a


def _bare_loop(run: Run) -> float:
    """Seconds of the loop one would write by hand."""
    spec = run.spec
    workload: Workload = import_class(spec.class_path, "workload.class_path")(spec)
    workload.load("auto", torch.device("cpu"))
    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    model = workload.build_model()
    if spec.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, **select_arguments(torch.optim.AdamW, run.optimizer.effective_hyperparameters)
    )
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: run.schedule.factor(step, spec.max_steps))
    order = torch.randperm(workload.train_size)
    batch = spec.nominal_batch

    def step(k: int) -> None:
        chosen = order[k * batch : (k + 1) * batch]
        examples = workload.batch(chosen, torch.randint(2**62, (len(chosen),)))
        optimizer.zero_grad()
        pieces = {name: tensor.split(spec.micro_batch) for name, tensor in examples.items()}
        for part in (dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)):
            loss = workload.loss(workload.forward(model, part), part)
            (loss * (len(part["labels"]) / batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm or float("inf"), foreach=True)
        optimizer.step()
        factor.step()

    step(spec.max_steps)  # warm-up, as in the harness
    start = perf_counter()
    for k in range(spec.max_steps):
        step(k)
    return perf_counter() - start


if __name__ == "__main__":
    main()
