"""Training itself: a model, a submission built on it, and segments of steps on the clock. No records, no evaluations.

A trial evaluates between the segments and writes down what came of it (harness/trial.py); a timing run alternates the
segments of several submissions (harness/timing.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import hyperparameters
from harness.clock import Clock, Disturbance
from harness.config import Run
from harness.needs import Need
from harness.problems import UserError
from harness.ranks import ALONE, Ranks
from harness.recalibration import recalibrate
from harness.roles import Role, parameter_roles
from harness.seeding import ExampleStream, Selection, TrialSeeds
from harness.step import Counters, Evaluator, StepContext
from harness.submission import OptimizerSubmission, Setup, Submission, Wrapper
from harness.workload import Workload


class Training:
    """The state of one training run: model, submission, place in the example stream, clock."""

    def __init__(self, run: Run, workload: Workload, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.run, self.workload, self.device, self.ranks = run, workload, device, ranks
        self.cls = hyperparameters.algorithm_class(run.optimizer.class_path)
        self.wrappers = [hyperparameters.wrapper_class(path) for path in run.optimizer.wrappers]
        self.needs = needs_of(run)
        self.facts = workload.facts
        self.seeds = TrialSeeds(run.seed, run.trial)
        self.stream = ExampleStream(self.seeds, workload.train_size)
        self.clock = Clock(device)
        self.disturbance = Disturbance()
        self.evaluator: Evaluator
        self.submission: Submission

    @property
    def built(self) -> bool:
        return hasattr(self, "submission")

    @property
    def nominal_step(self) -> float:
        step = self.evaluator.counters.examples / self.facts.nominal_batch
        return int(step) if step == int(step) else step

    def build(self, *, charge_compile: bool = True) -> None:
        """Build and warm up the model, then, on the clock, the submission on it."""
        torch.manual_seed(self.seeds.key("initial weights"))
        model = self.workload.build_model().to(self.device)
        if self.facts.memory_format == "channels_last":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train()
        roles = parameter_roles(model, self.workload.role_patterns())
        forward_model = model
        if self.run.compile and not self.needs & {Need.SECOND_DERIVATIVES, Need.LAYERS}:
            forward_model = torch.compile(model)  # type: ignore[assignment]
        self.evaluator = Evaluator(self.workload, model, self.seeds, self._precision, forward_model, self.ranks)
        self._warm_up()
        generator = torch.Generator().manual_seed(self.seeds.key("submission"))
        on_device = generator
        if self.device.type != "cpu":
            on_device = torch.Generator(self.device).manual_seed(self.seeds.key("submission on device"))
        with self.clock.submission("build", charge_compile=charge_compile):
            self.submission = self._build_submission(model, roles, generator, on_device)

    def _build_submission(
        self, model: nn.Module, roles: dict[str, Role], generator: torch.Generator, on_device: torch.Generator
    ) -> Submission:
        options = self.run.optimizer
        setup = Setup(
            named_parameters={name: p for name, p in model.named_parameters() if p.requires_grad},
            nominal_batch=self.facts.nominal_batch,
            schedule=self.run.schedule,
            generator=generator,
            device_generator=on_device,
            clip_norm=options.clip_norm,
            no_decay=frozenset(Role(role) for role in options.no_decay),
            needs=self.needs,
            _roles=roles,
            _max_steps=self.facts.max_steps,
            _model=model,
            _ranks=self.ranks,
            _recalibrate=self._recalibrate,
        )
        values = options.effective_hyperparameters
        arguments = hyperparameters.own(self.cls, values)
        submission: Submission
        if issubclass(self.cls, Submission):
            submission = self.cls(setup, **arguments)
        else:
            decays = "weight_decay" in hyperparameters.accepted(self.cls)
            groups = setup.decay_groups() if decays else [{"params": setup.parameters}]
            submission = OptimizerSubmission(setup, [self.cls(groups, **arguments)], closure=options.closure)
        for wrapper in self.wrappers:
            submission = wrapper(setup, submission, **hyperparameters.own(wrapper, values))
        return submission

    def _recalibrate(self, steps: int) -> None:
        nominal, examples = self.facts.nominal_batch, self.evaluator.counters.examples
        starts = range(max(0, examples - steps * nominal), max(nominal, examples), nominal)
        stream = ExampleStream(self.seeds, self.workload.train_size)
        recalibrate(
            self.evaluator, (Selection(stream.indices_at(s, nominal), stream.keys_at(s, nominal)) for s in starts)
        )

    def _warm_up(self) -> None:
        """Fill caches and compile the fixed model, on the first batch of the stream; leaves no trace in the model."""
        evaluator = self.evaluator
        before = [buffer.detach().clone() for buffer in evaluator.buffers]
        size = self.facts.nominal_batch
        batch = evaluator.fetch(Selection(self.stream.indices_at(0, size), self.stream.keys_at(0, size)))
        for _ in range(2):
            StepContext(evaluator, batch, 0, frozenset(Need), "warm-up").backward()
        for buffer, value in zip(evaluator.buffers, before, strict=True):
            buffer.copy_(value)
        for parameter in evaluator.parameters:
            parameter.grad = None
        evaluator.counters = Counters()

    def segment(self, goal: int, charge_compile: bool) -> Tensor:
        """Train until `goal` examples are done; the mean of the steps' losses. Nothing here waits for the device."""
        counters, nominal = self.evaluator.counters, self.facts.nominal_batch
        before, first = self.clock.elapsed.submission, counters.update_steps
        examples_before = counters.examples
        total = torch.zeros((), device=self.device)
        with self.clock.submission(charge_compile=charge_compile):
            while counters.examples < goal:
                loss = self._step()
                if loss is not None:
                    total += loss
        nominal_steps = (counters.examples - examples_before) / nominal
        self.disturbance.add(self.clock.elapsed.submission - before, nominal_steps)
        return total / (counters.update_steps - first)

    def _step(self) -> Tensor | None:
        """One step; its first loss. When it returns the batch is free, before the next one needs room."""
        counters = self.evaluator.counters
        start = perf_counter()
        selection = self.submission.select(self.stream)
        self._read_ahead()
        batch = self.evaluator.fetch(selection)
        self.clock.data_wait(perf_counter() - start)
        position = counters.examples / self.facts.nominal_batch
        ctx = StepContext(self.evaluator, batch, position, self.needs, self.run.optimizer.name)
        self.submission.step(ctx)
        counters.update_steps += 1
        counters.examples += len(selection.indices)
        return ctx.first_loss

    def _read_ahead(self) -> None:
        """Tell the workload which batches come next, unless the submission chooses them itself."""
        if self.workload.lookahead and Need.SELECTION not in self.needs:
            size = self.facts.nominal_batch
            mine = self.evaluator.mine(size)
            for position in range(self.stream.position, self.stream.position + self.workload.lookahead * size, size):
                indices, keys = self.stream.indices_at(position, size), self.stream.keys_at(position, size)
                self.workload.prefetch(indices[mine], keys[mine])

    def state_dict(self) -> dict[str, Any]:
        """Everything from which `load_state_dict` continues to the bit, on a training that has been built.

        Where the submission owns the communication, the ranks differ, and every one's state is there.
        """
        setup = self.submission.setup
        state = {
            "model": self.evaluator.model.state_dict(),
            "submission": self.submission.state_dict(),
            "generator": setup.generator.get_state(),
            "device_generator": setup.device_generator.get_state(),
            "position": self.stream.position,
            "counters": asdict(self.evaluator.counters),
            "clock": self.clock.state_dict(),
            "seconds_per_step": self.disturbance.seconds_per_step,
        }
        return {"of_ranks": self.ranks.of_all(state)} if Need.COMMUNICATION in self.needs else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "of_ranks" in state:
            state = state["of_ranks"][self.ranks.rank]
        setup = self.submission.setup
        self.evaluator.model.load_state_dict(state["model"])
        self.submission.load_state_dict(state["submission"])
        setup.generator.set_state(state["generator"].cpu())
        setup.device_generator.set_state(state["device_generator"].cpu())
        self.stream.position = state["position"]
        self.evaluator.counters = Counters(**state["counters"])
        self.clock.load_state_dict(state["clock"])
        self.disturbance.seconds_per_step = state["seconds_per_step"]

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.run.precision == "bf16":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if Need.SECOND_DERIVATIVES in self.needs:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def needs_of(run: Run) -> frozenset[Need]:
    """What the classes and the configuration declare; UserError where a class uses what it does not declare."""
    options = run.optimizer
    needs = frozenset(options.needs)
    if options.closure:
        needs |= {Need.RE_EVALUATE}
    algorithm = hyperparameters.algorithm_class(options.class_path)
    for cls in (algorithm, *map(hyperparameters.wrapper_class, options.wrappers)):
        if not issubclass(cls, Submission):
            continue
        needs |= cls.needs
        if cls.select not in (Submission.select, Wrapper.select) and Need.SELECTION not in needs:
            raise UserError(
                f"{cls.__name__} overrides select() without declaring it; add Need.SELECTION to its `needs`"
            )
        plain = (base.evaluation_weights for base in (Submission, OptimizerSubmission, Wrapper))
        if cls.evaluation_weights not in plain and Need.EVALUATION_WEIGHTS not in needs:
            raise UserError(
                f"{cls.__name__} overrides evaluation_weights() without declaring it; "
                "add Need.EVALUATION_WEIGHTS to its `needs`"
            )
    return needs
