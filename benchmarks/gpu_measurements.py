"""What benchmarks/gpu.py measures: each part is a function of `Options` that returns its figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from bare_loop import BareLoop, PlainGPT, text_batches
from comparison import (
    MINI,
    Figures,
    Options,
    alternate,
    bare_loop_for,
    make_training,
    milliseconds,
    peak_flops,
    train,
)
from gpu_proofs import Failed
from synthetic import TOKENS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config.compose import load_run
from harness.config.hyperparameters import import_algorithm, select_arguments
from harness.trial.clock import synchronize
from harness.trial.energy import make_meter
from harness.trial.environment import select_device
from harness.trial.hardware import code_version, describe_machine, package_versions
from harness.trial.training import Training
from submissions.rule import Rule

COMPILED_RULES = ("lion", "ademamix", "adan")
"""Of which the compiled update is measured too; compiling all takes too long."""


def mini(options: Options) -> Figures:
    """Steps per second of the three mini workloads, and the harness's time over a bare loop's."""
    figures = {}
    for name in MINI:
        for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
            # Compiling on a CPU shows nothing of a GPU, and takes longest.
            if compiled and options.tiny:
                continue
            training = make_training(
                options, f"workload={name}", "optimizer=adamw", f"precision={precision}", f"compile={compiled}",
                f"deterministic={not compiled}",
            )  # fmt: skip
            bare = bare_loop_for(training, precision, compiled)
            seconds = alternate(training, bare, steps=2 if options.tiny else 100, rounds=3)
            figures[f"{name} {precision}{' compiled' if compiled else ''}"] = seconds
    return figures


def updates(options: Options) -> Figures:
    """Milliseconds of the elementwise update rules against torch's fused AdamW and the time that memory needs."""
    device = select_device(load_run(["workload=gpt2", "optimizer=adamw", f"device={options.device}"]))
    sizes = {"10.8M": _gpt_shapes(8, 332, 512), "124M": _gpt_shapes(12, 768, 50304)}
    if options.tiny:
        sizes = {"tiny": _gpt_shapes(1, 16, 32, 8)}
    bandwidth = _bandwidth(device, 2**20 if options.tiny else 2**28)
    figures: Figures = {"bandwidth in GB/s": bandwidth / 1e9}
    steps = 2 if options.tiny else 20
    for size, shapes in sizes.items():
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        fused = _update_time(lambda parameters: torch.optim.AdamW(parameters, fused=True), shapes, device, steps)
        # AdamW reads and writes weights and two moments, and reads gradients.
        bound = 28 * elements / bandwidth * 1e3
        figures[f"{size} torch AdamW, fused"] = {"ms": fused, "bound of AdamW in ms": bound}
        for name in options.submissions:
            make = _elementwise_rule(name)
            if make is None:
                continue
            eager = _update_time(make, shapes, device, steps)
            row: Figures = {"ms": eager, "of fused AdamW": eager / fused}
            if size == "124M" and name in COMPILED_RULES:
                compiled = _update_time(lambda parameters, make=make: _compile(make(parameters)), shapes, device, steps)  # type: ignore[misc]
                row |= {"compiled ms": compiled, "compiled of fused AdamW": compiled / fused}
            figures[f"{size} {name}"] = row
    return figures


def gpt2(options: Options) -> Figures:
    """GPT-2 124M on random tokens, bf16, compiled: tokens per second, utilisation, memory, against a bare loop."""
    compiled = not options.tiny
    training = make_training(
        options, "workload=gpt2", "scale=full", "optimizer=adamw", "precision=bf16", f"compile={compiled}",
        "deterministic=false",
    )  # fmt: skip
    model = training.workload.model_options
    torch.manual_seed(0)
    plain = PlainGPT(model.vocabulary, model.context, model.layers, model.width, model.heads).to(training.device)
    tokens = torch.randint(model.vocabulary, (TOKENS,), device=training.device)
    bare = BareLoop(
        plain, list(plain.parameters()), text_batches(tokens, model.context, training.spec.nominal_batch),
        micro_batch=training.spec.micro_batch, steps=training.spec.max_steps, precision="bf16", compiled=compiled,
    )  # fmt: skip
    figures = alternate(training, bare, steps=1 if options.tiny else 4, rounds=3)
    per_step = training.spec.nominal_batch * model.context
    parameters = sum(parameter.numel() for parameter in training.runner.parameters)
    # 6 N for the matrices and 12 L T w for attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    flops = per_step * (6 * parameters + 12 * model.layers * model.context * model.width)
    return figures | _rates(figures, "tokens", per_step, flops, training.device)


def images(options: Options) -> Figures:
    """ResNet-50 and ViT-S/16 on random pictures of ImageNet's size, bf16: images per second, utilisation, memory."""
    figures = {}
    models = {"ResNet-50": ("workload=resnet", "variant=imagenet"), "ViT-S/16": ("workload=vit",)}
    for name, arguments in models.items():
        training = make_training(
            options, *arguments, "scale=full", "optimizer=adamw", "precision=bf16", "deterministic=false"
        )
        measured = alternate(training, bare_loop_for(training, "bf16", False), 1 if options.tiny else 5, rounds=3)
        nominal = training.spec.nominal_batch
        rates = _rates(measured, "images", nominal, _count_flops(training), training.device)
        figures[name] = measured | rates
    return figures


def energy(options: Options) -> Figures:
    """Joules and watts of GPT-2 mini's training, by the counters that a trial records."""
    training = make_training(options, "workload=gpt2", "optimizer=adamw")
    meter = make_meter(training.device)
    if meter is None:
        if options.device == "cuda":
            raise Failed("no energy counter can be read; pip install nvidia-ml-py")
        return {"joules per step": None}
    train(training, 2)
    steps = 2 if options.tiny else 500
    meter.start()
    synchronize(training.device)
    start = perf_counter()
    train(training, steps)
    synchronize(training.device)
    seconds, joules = perf_counter() - start, meter.stop()
    if not joules > 0:
        raise Failed(f"{joules} joules in {seconds:.1f} s")
    return {"joules per step": joules / steps, "watts": joules / seconds, "counter": meter.source}


def describe(options: Options) -> Figures:
    """The card, the packages and the commit, for the report."""
    run = load_run(["workload=gpt2", "optimizer=adamw", f"device={options.device}"])
    machine = describe_machine(select_device(run), run.threads)
    return {"machine": machine, "packages": package_versions(), "code": code_version()}


def _rates(figures: Figures, unit: str, per_step: int, flops: float, device: torch.device) -> Figures:
    """`unit` per second and the share of the GPU's peak FLOP/s, of the harness and of the bare loop."""
    rates: Figures = {}
    peak = peak_flops(device)
    for prefix, key in (("", "seconds per step"), ("bare loop's ", "bare loop")):
        rates[f"{prefix}{unit} per second"] = per_step / figures[key]
        rates[f"{prefix}utilisation"] = None if peak is None else flops / figures[key] / peak
    return rates


def _count_flops(training: Training) -> float:
    """FLOPs of one nominal step, forward and backward."""
    batch = training.runner.load_batch(training.stream.peek(0, training.spec.nominal_batch))
    micro_batch = batch.micro_batches[0]
    workload, model = training.workload, training.runner.model
    with FlopCounterMode(display=False) as counter:
        loss = workload.loss(workload.forward(model, micro_batch), micro_batch)
        torch.autograd.grad(loss, training.runner.parameters, allow_unused=True)
    return counter.get_total_flops() * batch.size / len(micro_batch["labels"])


def _elementwise_rule(name: str) -> Callable[[list[nn.Parameter]], Any] | None:
    """Makes the update rule of a submission; None if it is no elementwise rule."""
    options = load_run(["workload=gpt2", f"optimizer={name}"]).optimizer
    rule = import_algorithm(options.class_path)
    if options.wrappers or not issubclass(rule, Rule) or not rule.elementwise:
        return None
    return partial(rule, **select_arguments(rule, options.effective_hyperparameters))


def _compile(rule: Any) -> Any:
    rule.compile_update()
    return rule


def _update_time(
    make: Callable[[list[nn.Parameter]], Any], shapes: list[tuple[int, ...]], device: torch.device, steps: int
) -> float:
    """Milliseconds of a step of the optimizer that `make` makes, on parameters of these shapes."""
    parameters = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return milliseconds(make(parameters).step, device, steps)


def _bandwidth(device: torch.device, elements: int) -> float:
    """Bytes per second of a copy from memory to memory, read and written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), device, 10) / 1e3)


def _gpt_shapes(layers: int, width: int, vocabulary: int, context: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2's parameters."""
    of_layer: list[tuple[int, ...]] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *of_layer * layers, (width,), (width,)]
