"""The overhead of the harness: the training clock of a trial against a hand-written loop with the same model, data,
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
    """Parse the command line, measure the workloads and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["gpt2", "resnet", "vit"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for name in options.workloads:
        with tempfile.TemporaryDirectory() as folder:
            changes = [f"workload.max_steps={options.steps}", f"workload.eval_every={options.steps}"]
            run = load_run([f"workload={name}", "optimizer=adamw", f"records={folder}", "run_to_end=true", *changes])
            ratios = [_measure_ratio(run, round_) for round_ in range(options.rounds)]
        all_ratios = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"{name:7} harness / bare loop: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f} ({all_ratios})",
            flush=True,
        )


def _measure_ratio(run: Run, round_: int) -> float:
    """Seconds with the harness over seconds of the bare loop."""

    def run_harness() -> float:
        record, _ = run_trial(run.model_copy(update={"seed": round_, "records": Path(run.records)}))
        row = record.rows[-1]
        return row["accumulated_submission_time"] - row["accumulated_build_time"]

    # The order alternates, so that a drift of the machine's speed favours neither.
    if round_ % 2:
        harness, bare = run_harness(), _run_bare_loop(run)
    else:
        bare, harness = _run_bare_loop(run), run_harness()
    return harness / bare


def _run_bare_loop(run: Run) -> float:
    """Seconds of a training loop without the harness."""
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
        indices = order[k * batch : (k + 1) * batch]
        examples = workload.batch(indices, torch.randint(2**62, (len(indices),)))
        optimizer.zero_grad()
        parts = {name: tensor.split(spec.micro_batch) for name, tensor in examples.items()}
        for micro_batch in (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)):
            loss = workload.loss(workload.forward(model, micro_batch), micro_batch)
            (loss * (len(micro_batch["labels"]) / batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm or float("inf"), foreach=True)
        optimizer.step()
        factor.step()

    # A warm-up that is not counted, as in the harness.
    step(spec.max_steps)
    start = perf_counter()
    for k in range(spec.max_steps):
        step(k)
    return perf_counter() - start


if __name__ == "__main__":
    main()
