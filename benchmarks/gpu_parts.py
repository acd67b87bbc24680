"""The parts of benchmarks/gpu.py: each is a function of `Options` that returns its figures, or raises.

Proofs raise `Failed` with what is wrong. Measurements compare with code that shares nothing with the harness
(benchmarks/bare_loop.py), alternately in one process, and return the median of the rounds.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bare_loop import BareLoop, Examples, PlainGPT, fixed_batch, image_batches, text_batches
from synthetic import TOKENS, examples, load_synthetic
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config.choices import list_choices
from harness.config.compose import load_run
from harness.config.declared_needs import host_waits
from harness.config.hyperparameters import import_algorithm, select_arguments
from harness.trial.clock import synchronize
from harness.trial.conformance import make_subject, run_checks
from harness.trial.energy import make_meter
from harness.trial.environment import configure_torch, select_device
from harness.trial.hardware import PeakMemory, code_version, describe_machine, package_versions
from harness.trial.training import Training
from submissions.rule import Rule

Figures = dict[str, Any]
ROOT = Path(__file__).parents[1]
MINI = ("gpt2", "resnet", "vit")
COMPILED_RULES = ("lion", "ademamix", "adan")
"""Of which the compiled update is measured too; compiling all takes too long."""
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 FLOP/s by part of the GPU's name (NVIDIA's data sheets; H100: the SXM form)."""


class Failed(Exception):
    """A proof that did not hold; the message says what was found."""


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


# ---- proofs --------------------------------------------------------------------------------------------------------


def waits(options: Options) -> Figures:
    """No step makes the host wait for the GPU, before and after a resume: torch raises an error where one would."""
    problems: dict[str, str] = {}

    def check(name: str, training: Training, steps: int) -> None:
        with _waiting_is_an_error(options):
            problems.update(_error_of(name, lambda: train(training, steps)))

    for name in MINI:
        training = make_training(options, f"workload={name}", "optimizer=adamw")
        train(training, 2)
        check(f"workload {name}", training, 5)
    free = [name for name in options.submissions if not host_waits(load_run(["workload=gpt2", f"optimizer={name}"]))]
    for name in free:
        subject = make_subject(name, f"device={options.device}")
        training, resumed = subject.build(), subject.build()
        train(training, 2)
        check(name, training, 10)
        _resume(training, resumed)
        train(resumed, 1)
        check(f"{name}, resumed", resumed, 10)
    if problems:
        raise Failed(json.dumps(problems, indent=1))
    return {
        "workloads": len(MINI),
        "submissions": len(free),
        "submissions that say that they wait": len(options.submissions) - len(free),
    }


def resume(options: Options) -> Figures:
    """In deterministic mode a training that goes on from its checkpoint ends with the bits of an uninterrupted one."""
    steps = 2 if options.tiny else 20
    for name in MINI:
        for precision in ("fp32", "bf16"):
            arguments = (f"workload={name}", "optimizer=adamw", f"precision={precision}", "deterministic=true")
            whole, first, second = (make_training(options, *arguments) for _ in range(3))
            train(whole, 2 * steps)
            train(first, steps)
            _resume(first, second)
            train(second, steps)
            if not _equal_bits(whole, second):
                raise Failed(f"workload={name} precision={precision}: other weights after a resume")
            repeated = make_training(options, *arguments)
            train(repeated, 2 * steps)
            if not _equal_bits(whole, repeated):
                raise Failed(f"workload={name} precision={precision}: other weights in a second run")
    return {"workloads": len(MINI), "precisions": 2, "steps": 2 * steps}


def conformance(options: Options) -> Figures:
    """Every submission passes the conformance checks on the device."""
    failures = {}
    for name in options.submissions:
        if failed := run_checks(make_subject(name, f"device={options.device}")):
            failures[name] = failed
    if failures:
        raise Failed(json.dumps(failures, indent=1))
    return {"submissions": len(options.submissions)}


def torchrun(options: Options) -> Figures:
    """A trial of one process under torchrun trains to its end, through torch.distributed's start and end."""
    with tempfile.TemporaryDirectory() as folder:
        trial = [
            "workload=gpt2", "optimizer=adamw", "workload.max_steps=20", "workload.eval_every=10",
            "workload.target=0.001", f"device={options.device}", f"records={folder}", "machine=here",
        ]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        done = subprocess.run([*command, "run.py", *trial], cwd=ROOT, capture_output=True, text=True, timeout=240)
        manifests = [json.loads(path.read_text()) for path in Path(folder).rglob("manifest.json")]
    if done.returncode or [manifest["status"] for manifest in manifests] != ["exhausted"]:
        raise Failed(f"status {done.returncode}: {done.stderr[-3000:]}")
    final = manifests[0]["final"]
    return {"steps": final["global_step"], "seconds per step": final["submission_seconds"] / final["global_step"]}


# ---- measurements --------------------------------------------------------------------------------------------------


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


PARTS: dict[str, Callable[[Options], Figures]] = {
    part.__name__: part for part in (waits, resume, torchrun, mini, gpt2, images, updates, energy, conformance)
}
"""All parts by name, in the order in which they run."""
SECONDS = {
    "waits": 150, "resume": 90, "torchrun": 90, "mini": 240, "gpt2": 240, "images": 150, "updates": 150, "energy": 60,
    "conformance": 300,
}  # fmt: skip
"""The longest that each may take, its process's start included."""

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


# ---- how it is measured --------------------------------------------------------------------------------------------


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


def _rates(figures: Figures, unit: str, per_step: int, flops: float, device: torch.device) -> Figures:
    """`unit` per second and the share of the GPU's peak FLOP/s, of the harness and of the bare loop."""
    rates: Figures = {}
    peak = peak_flops(device)
    for prefix, key in (("", "seconds per step"), ("bare loop's ", "bare loop")):
        rates[f"{prefix}{unit} per second"] = per_step / figures[key]
        rates[f"{prefix}utilisation"] = None if peak is None else flops / figures[key] / peak
    return rates


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU by its name; None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((value for part, value in PEAKS.items() if part in words), None)


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
    return _milliseconds(make(parameters).step, device, steps)


def _milliseconds(step: Callable[[], Any], device: torch.device, steps: int) -> float:
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


def _bandwidth(device: torch.device, elements: int) -> float:
    """Bytes per second of a copy from memory to memory, read and written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_milliseconds(lambda: target.copy_(source), device, 10) / 1e3)


def _gpt_shapes(layers: int, width: int, vocabulary: int, context: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2's parameters."""
    of_layer: list[tuple[int, ...]] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *of_layer * layers, (width,), (width,)]


@contextmanager
def _waiting_is_an_error(options: Options) -> Iterator[None]:
    """Within the steps of the body torch raises an error where the host would wait for the GPU."""
    step = Training._step

    def checked_step(training: Training) -> Any:
        # Within the step alone: a segment waits for the device at both its ends.
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if options.device == "cuda":
        Training._step = checked_step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Training._step = step  # type: ignore[method-assign]


def _error_of(name: str, action: Callable[[], object]) -> dict[str, str]:
    """The error that `action` raises, by `name`; empty if none."""
    try:
        action()
    # Whatever it is, it is reported, and the others still run.
    except Exception as error:
        return {name: f"{type(error).__name__}: {error}"}
    return {}


def _resume(first: Training, second: Training) -> None:
    """Continue `first` in `second`, through a checkpoint's bytes."""
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, map_location="cpu", weights_only=True))


def _equal_bits(first: Training, second: Training) -> bool:
    states = first.runner.model.state_dict(), second.runner.model.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def _workload_of(arguments: tuple[str, ...]) -> str:
    return next(a.removeprefix("workload=") for a in arguments if a.startswith("workload="))


def describe(options: Options) -> Figures:
    """The card, the packages and the commit, for the report."""
    run = load_run(["workload=gpt2", "optimizer=adamw", f"device={options.device}"])
    machine = describe_machine(select_device(run), run.threads)
    return {"machine": machine, "packages": package_versions(), "code": code_version()}
