"""Training throughput of a workload, and the utilisation of the machine.

    python benchmarks/throughput.py [--workloads gpt2 resnet vit] [--scale mini] [--variant NAME] [--steps 20]
        [--peak TFLOPS] [KEY=VALUE ...]

Prints for each workload with AdamW: examples and labels (tokens, for a language model) per second of the training
clock, the model's arithmetic as a share of the peak (model FLOP utilisation, MFU), the share of the clock spent waiting
for data, and the peak memory. Two measurements alternate: with the real data, and with one batch that is reused
("held"), so that nothing waits. KEY=VALUE are further arguments of run.py, such as device=cuda precision=bf16
compile=true. Under torchrun, all GPUs together are measured.

FLOPs are those of one forward and backward as torch counts them, which includes only products and convolutions. The
peak is --peak if given, in TFLOP/s; else the data sheet's for dense bf16 if the GPU is known; on a CPU it is measured
with a product of two large matrices.
"""

from __future__ import annotations

import argparse
import math
import sys
from time import perf_counter

import torch
from comparison import peak_flops
from torch.utils.flop_counter import FlopCounterMode

from harness.command_line import run_script
from harness.config.compose import load_run
from harness.config.schema import Run
from harness.interface.data_order import Selection
from harness.interface.model_runner import StepBatch
from harness.interface.ranks import Ranks
from harness.trial.distributed import init_distributed, shutdown
from harness.trial.environment import configure_torch, select_device
from harness.trial.hardware import PeakMemory, machine_folder
from harness.trial.training import Training
from harness.trial.trial import load_workload


def main(arguments: list[str]) -> int:
    """Parse the command line, measure the workloads and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["gpt2", "resnet", "vit"])
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--variant", default="base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=float, help="TFLOP/s of one GPU or CPU process")
    options, further = parser.parse_known_args(arguments)
    further += [argument for argument in options.workloads if "=" in argument]
    ranks = init_distributed()
    for name in (argument for argument in options.workloads if "=" not in argument):
        variant = [] if options.variant == "base" else [f"variant={options.variant}"]
        run = load_run([f"workload={name}", f"scale={options.scale}", "optimizer=adamw", "workload.target=0", *variant,
                    *further])  # fmt: skip
        line = _measure(run, ranks, options.steps, options.rounds, options.peak)
        if ranks.is_main:
            print(line, flush=True)
    return shutdown(0)


def _measure(run: Run, ranks: Ranks, steps: int, rounds: int, peak: float | None) -> str:
    """Train for `rounds` times `steps` steps with each kind of data; returns the line to print."""
    device = select_device(run)
    configure_torch(run, device)
    workload = load_workload(run, device)
    memory = PeakMemory(device)
    training = Training(run, workload, device, ranks)
    training.build()
    runner, nominal = training.runner, workload.spec.nominal_batch
    held = runner.load_batch(training.stream.peek(0, nominal))
    flops = _count_flops(training, held)
    labels = sum(batch["labels"].numel() for batch in held.micro_batches.values()) * ranks.size
    rates: dict[str, list[float]] = {"real": [], "held": []}
    waits: list[float] = []
    load_batch = runner.load_batch

    def keep_batch(_: Selection) -> StepBatch:
        return held

    elapsed = training.clock.elapsed
    for number in range(rounds + 1):
        for kind in ("real", "held") if number % 2 else ("held", "real"):
            runner.load_batch = load_batch if kind == "real" else keep_batch  # type: ignore[method-assign, assignment]
            seconds, waited = elapsed.submission, elapsed.data_wait
            with memory.measure("training"):
                training.segment(runner.counters.examples + steps * nominal, charge_compile=False)
            # The first round warms up.
            if number:
                rates[kind].append((elapsed.submission - seconds) / steps)
                if kind == "real":
                    waits.append((elapsed.data_wait - waited) / (elapsed.submission - seconds))
    # The fastest round is the least disturbed by other processes.
    best = {kind: min(values) for kind, values in rates.items()}
    peak_bytes = memory.peaks["training"]
    total_peak = (peak * 1e12 if peak else _peak_flops(device)) * ranks.size
    utilisation = {kind: f"{100 * flops / value / total_peak:.1f}%" for kind, value in best.items()}
    return (
        f"{workload.spec.full_name:16} {nominal / best['real']:10.0f} examples/s "
        f"{labels / best['real']:12.0f} labels/s   MFU {utilisation['real']} of {total_peak / 1e12:.3g} TFLOP/s, "
        f"held {utilisation['held']}   data wait {100 * min(waits):.2f}%   "
        f"peak memory {peak_bytes / 2**30:.2f} GiB   {machine_folder(device, run.threads)}, {run.precision}"
        f"{', compiled' if run.compile else ''}; slowest round x {max(rates['real']) / best['real']:.2f}"
    )


def _count_flops(training: Training, batch: StepBatch) -> float:
    """FLOPs of one nominal step: forward and backward of all its micro-batches."""
    model, workload = training.runner.model, training.workload
    micro_batch = next(iter(batch.micro_batches.values()))
    with FlopCounterMode(display=False) as counter:
        loss = workload.loss(workload.forward(model, micro_batch), micro_batch)
        torch.autograd.grad(loss, training.runner.parameters, allow_unused=True)
    return counter.get_total_flops() * math.ceil(batch.size / len(micro_batch["labels"]))


def _peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of one GPU, or of this process on a CPU. Exits with a message if the GPU is not known."""
    if device.type == "cuda":
        peak = peak_flops(device)
        if peak is None:
            raise SystemExit(f"the peak of {torch.cuda.get_device_name(device)} is not known; give --peak TFLOPS")
        return peak
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(30):
        start = perf_counter()
        a @ b
        seconds.append(perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
