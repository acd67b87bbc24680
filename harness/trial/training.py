"""Training itself: a model, a submission built on it, and segments of steps on the clock. No records, no evaluations.

A trial evaluates between the segments and records the results (harness/trial/trial.py); a timing run alternates the
segments of several submissions (harness/study/timing_run.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.config import hyperparameters
from harness.config.assembly import assemble
from harness.config.declared_needs import declared_needs
from harness.config.probe import examine
from harness.config.schema import Run
from harness.errors import UserError
from harness.interface.any_optimizer import AnyOptimizer
from harness.interface.data_order import ExampleStream, Selection, plain_selection
from harness.interface.model_runner import Counters, ModelRunner
from harness.interface.needs import Need
from harness.interface.own_step import OwnStep
from harness.interface.ranks import SINGLE_RANK, Ranks
from harness.interface.roles import Role, parameter_roles
from harness.interface.step import StepContext
from harness.interface.submission import Setup, Submission
from harness.interface.workload import Batch, Workload, WorkloadSpec
from harness.seeding import TrialSeeds
from harness.trial.batch_norm import recompute_statistics
from harness.trial.clock import Clock, Disturbance
from harness.trial.devices import device_types, restore_devices
from harness.trial.environment import is_compiler_error, use_empty_compiler_cache
from harness.trial.hardware import PeakMemory
from harness.trial.liveness import show_progress
from harness.trial.patches import find_patches, snapshot
from harness.trial.sources import hash_sources, read_sources, submission_distributions, submission_sources
from harness.trial.weights import hash_weights
from harness.trial.witness import EvidenceCounters, Witness, describe_structure

logger = logging.getLogger(__name__)

# A compiled model has no second derivatives, and a hook set after compilation would never fire.
UNCOMPILED_NEEDS = frozenset({Need.SECOND_DERIVATIVES, Need.LAYERS, Need.OWN_PASSES})
"""Needs under which the model is not compiled."""
VARYING_SIZES = frozenset({Need.SELECTION, Need.MICRO_BATCH_GRADIENTS})
"""Needs under which micro-batches may have other sizes than the workload's."""


class TrainingFacts:
    """What follows from a run and its model, whichever process trains it."""

    run: Run
    spec: WorkloadSpec
    device: torch.device
    needs: frozenset[Need]
    runner: Any
    """A ModelRunner, or what stands in for it: `counters` and `parameters`."""

    @property
    def nominal_step(self) -> float:
        """Nominal steps done: examples over the nominal batch, an int where it is whole."""
        step = self.runner.counters.examples / self.spec.nominal_batch
        return int(step) if step == int(step) else step

    @property
    def compiles_model(self) -> bool:
        """Whether the model is compiled: if the run says so and no need forbids it."""
        return self.run.compile and not self.needs & UNCOMPILED_NEEDS

    @property
    def parameter_count(self) -> int:
        """Trainable parameters of the model."""
        return sum(parameter.numel() for parameter in self.runner.parameters)

    def precision_context(self) -> AbstractContextManager[object]:
        """Entered around every pass of the model."""
        return precision_context(self.run, self.needs, self.device)


class Training(TrainingFacts):
    """The state of one training run: model, submission, position in the example stream, clock."""

    def __init__(self, run: Run, workload: Workload, device: torch.device, ranks: Ranks = SINGLE_RANK) -> None:
        self.run, self.workload, self.device, self.ranks = run, workload, device, ranks
        self._loaded_before = frozenset(sys.modules)
        self._callables_before = snapshot()
        self.cls = hyperparameters.import_submission(run.optimizer, device)
        # An earlier check of the same file may have loaded modules of these names.
        self._loaded_before -= getattr(self.cls, "modules", frozenset())
        self.wrappers = [hyperparameters.import_wrapper(path) for path in run.optimizer.wrappers]
        self.needs = declared_needs(run)
        self.remarks = [*examine(run).remarks, *getattr(self.cls, "remarks", ())]
        """What a reader of the record should know of the submission."""
        self.spec = workload.spec
        self.seeds = TrialSeeds(run.seed, run.trial)
        self.stream = ExampleStream(self.seeds, workload.train_size)
        self.clock = Clock(device)
        self.disturbance = Disturbance()
        self.memory = PeakMemory(device)
        self.witness = Witness(
            # Streamed data are read while the clock runs, and compilers are started and write files.
            listens=not (workload.lookahead or run.compile or Need.OWN_COMPILATION in self.needs)
        )
        self.initial_weights_sha256: str | None = None
        """Of the model before the submission saw it."""
        self.built_weights_sha256: str | None = None
        """Of the model when the submission had been built on it."""
        self.runner: ModelRunner
        self.submission: Submission

    @property
    def is_built(self) -> bool:
        """Whether `build` has come to its end."""
        return hasattr(self, "submission")

    # ---- building --------------------------------------------------------------------------------------------------

    def build(self, *, charge_compile: bool = True) -> None:
        """Build and warm up the model, then, on the clock, the submission on it.

        charge_compile: whether compilation of the submission's own code is charged (see `Clock.submission`).
        """
        self.build_model()
        self.build_submission(charge_compile=charge_compile)
        self.note_built_weights()

    def build_model(self) -> None:
        """Build and warm up the model, off the clock: it is the workload's, and the same for every submission."""
        model = build_model(self.workload, self.seeds, self.device)
        self.initial_weights_sha256 = hash_weights(model)
        self.witness.watch(model, ignores_hooks=Need.LAYERS in self.needs)
        self.runner = ModelRunner(
            self.workload,
            model,
            self.seeds,
            self.precision_context,
            self.ranks,
            compiled=self.compiles_model,
            sizes_vary=bool(self.needs & VARYING_SIZES),
            pass_context=self.clock.model_compilation if self.compiles_model else nullcontext,
            count_compiled=self.witness.count_compiled,
        )
        self._warm_up_with_sound_cache()
        self.witness.start_counting()
        self._setup = self._prepare_setup()

    def build_submission(self, *, charge_compile: bool = True) -> None:
        """Build the submission on the model, on the clock; see `build`."""
        with self.witness.on_clock(), self.clock.submission("build", charge_compile=charge_compile):
            self.submission = self._build_submission(self._setup)

    def _prepare_setup(self) -> Setup:
        model = self.runner.model
        roles = parameter_roles(model, self.workload.role_patterns())
        generator = torch.Generator().manual_seed(self.seeds.key("submission"))
        device_generator = generator
        if self.device.type != "cpu":
            device_generator = torch.Generator(self.device).manual_seed(self.seeds.key("submission on device"))
        return self._make_setup(model, roles, generator, device_generator)

    def note_built_weights(self) -> str:
        """Hash the weights as building the submission has left them."""
        self.built_weights_sha256 = hash_weights(self.runner.model)
        return self.built_weights_sha256

    def _make_setup(
        self, model: nn.Module, roles: dict[str, Role], generator: torch.Generator, device_generator: torch.Generator
    ) -> Setup:
        """The trial as the submission may see it."""
        options = self.run.optimizer
        return Setup(
            named_parameters={name: p for name, p in model.named_parameters() if p.requires_grad},
            nominal_batch=self.spec.nominal_batch,
            schedule=self.run.schedule,
            generator=generator,
            device_generator=device_generator,
            clip_norm=options.clip_norm,
            no_decay=frozenset(Role(role) for role in options.no_decay),
            needs=self.needs,
            _roles=roles,
            _max_steps=self.spec.max_steps,
            _model=model,
            _ranks=self.ranks,
            _recalibrate=self._recalibrate,
            compile=self.run.compile,
            _runner=self.runner,
        )

    def _build_submission(self, setup: Setup) -> Submission:
        """The submission in its wrappers; the last one that the configuration names is the outermost."""
        values = self.run.optimizer.effective_hyperparameters
        submission: Submission
        if issubclass(self.cls, Submission):
            submission = self.cls(setup, **hyperparameters.select_arguments(self.cls, values))
        else:
            gradient_first = examine(self.run).gradient_first
            submission = AnyOptimizer(setup, assemble(self.run.optimizer, gradient_first=gradient_first))
        for wrapper in self.wrappers:
            submission = wrapper(setup, submission, **hyperparameters.select_arguments(wrapper, values))
        return submission

    def _recalibrate(self, steps: int) -> None:
        """Recompute the BatchNorm statistics from the examples of the last `steps` nominal steps."""
        nominal, examples = self.spec.nominal_batch, self.runner.counters.examples
        # max(nominal, ...): before the first step there is one batch all the same.
        starts = range(max(0, examples - steps * nominal), max(nominal, examples), nominal)
        stream = ExampleStream(self.seeds, self.workload.train_size)
        recompute_statistics(self.runner, (stream.peek(start, nominal) for start in starts))

    def _warm_up_with_sound_cache(self) -> None:
        """`_warm_up`, once more from an empty compiler cache where the shared one holds a damaged file: a process that
        was killed while it compiled leaves one behind."""
        try:
            self._warm_up()
        except Exception as error:
            if not self.compiles_model or not is_compiler_error(error):
                raise
            logger.warning("torch.compile failed, and compiles again from an empty cache: %s", error)
            use_empty_compiler_cache()
            self._warm_up()

    def _warm_up(self) -> None:
        """Fill caches and compile the model, off the clock, on the first batch; leaves no trace in the model."""
        runner = self.runner
        buffers_before = [buffer.detach().clone() for buffer in runner.buffers]
        batch = runner.load_batch(self.stream.peek(0, self.spec.nominal_batch))

        def context() -> StepContext:
            # All needs, for the passes that every submission finds warmed up.
            return StepContext(runner, batch, 0, frozenset(Need), "warm-up")

        for _ in range(2):
            context().backward()
            show_progress()
        # What the declared needs run besides; a submission pays for its own work, not for the model's first run of it.
        if Need.LOSS in self.needs:
            context().loss()
        if Need.SAMPLED_LABELS in self.needs:
            context().gradients(labels="sampled")
        if self.needs & VARYING_SIZES:
            context().micro_batch_gradients(2 * batch.count)
        if Need.SECOND_DERIVATIVES in self.needs:
            context().hessian_vector_product([torch.zeros_like(parameter) for parameter in runner.parameters])
        show_progress()
        for buffer, value in zip(runner.buffers, buffers_before, strict=True):
            buffer.copy_(value)
        for parameter in runner.parameters:
            parameter.grad = None
        runner.counters = Counters()

    # ---- training --------------------------------------------------------------------------------------------------

    def measured_segment(self, goal: int, charge_compile: bool) -> float:
        """As `segment`, with its peak memory; the mean loss on the host."""
        with self.memory.measure("training"), self.witness.on_clock():
            loss = self.segment(goal, charge_compile)
        return float(loss)

    def segment(self, goal: int, charge_compile: bool) -> Tensor:
        """Train until `goal` examples are done (counted from the start of training); the mean of the steps' losses, a
        scalar on the device.

        Nothing between the start and the end of a segment waits for the device.
        """
        counters, nominal = self.runner.counters, self.spec.nominal_batch
        seconds_before = self.clock.elapsed.submission
        steps_before, examples_before = counters.update_steps, counters.examples
        # Added up on the device: reading a loss would wait for the device at every step.
        total_loss = torch.zeros((), device=self.device)
        with self.clock.submission(charge_compile=charge_compile):
            while counters.examples < goal:
                loss = self._step()
                # A step without a pass has no loss.
                if loss is not None:
                    total_loss += loss
        nominal_steps = (counters.examples - examples_before) / nominal
        self.disturbance.add_segment(self.clock.elapsed.submission - seconds_before, nominal_steps)
        return total_loss / (counters.update_steps - steps_before)

    def _step(self) -> Tensor | None:
        """One step; its first loss. The batch is freed on return, before the next one needs the room."""
        if Need.OWN_PASSES in self.needs:
            return self._own_step()
        counters = self.runner.counters
        with self.clock.data_wait():
            selection = plain_selection(self.submission.select(self.stream))
            # After select(), which has moved the stream to the next batch; before load_batch(), which may wait, so that
            # the next batches are read meanwhile.
            self._prefetch()
            batch = self.runner.load_batch(selection)
        position = counters.examples / self.spec.nominal_batch
        ctx = StepContext(self.runner, batch, position, self.needs, self.run.optimizer.name)
        self.submission.step(ctx)
        # After the step: update_steps seeds the step's dropout masks and sampled labels.
        counters.update_steps += 1
        counters.examples += len(selection.indices)
        show_progress()
        return ctx.first_loss

    def _own_step(self) -> Tensor | None:
        """As `_step`, of a submission that draws its batches itself."""
        step = OwnStep(self.runner, self.stream, self.nominal_step, self._load_drawn)
        self.submission.step(step)  # type: ignore[arg-type]
        # It would go on for ever.
        if not step.examples:
            raise UserError(f"optimizer={self.run.optimizer.name}: a step drew no examples; let each draw a batch")
        self.runner.counters.update_steps += 1
        show_progress()
        return step.first_loss

    def _load_drawn(self, selection: Selection) -> Batch:
        """This rank's examples of what the stream has just given."""
        with self.clock.data_wait():
            self._announce(len(selection.indices))
            return self.runner.load_examples(selection)

    def _prefetch(self) -> None:
        """Announce the next batches to the workload, unless the submission chooses them itself."""
        if Need.SELECTION not in self.needs:
            self._announce(self.spec.nominal_batch)

    def _announce(self, size: int) -> None:
        """Announce the next batches of `size` examples to the workload."""
        if self.workload.lookahead:
            local = self.runner.local_slice(size)
            for position in range(self.stream.position, self.stream.position + self.workload.lookahead * size, size):
                selection = self.stream.peek(position, size)
                self.workload.prefetch(selection.indices[local], selection.keys[local])

    # ---- evaluation ------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation_model(self) -> Iterator[tuple[nn.Module, Any]]:
        """Within it the model holds the weights that the submission wants evaluated; yields it, and the same as it is
        to be called. Preparing the weights and putting the trained ones back is on the clock."""
        weights = self.submission.evaluation_weights()
        # Entered and left by hand, so that each is timed by itself. Entered before model.eval(), since recomputing
        # BatchNorm statistics takes the training mode.
        self.enter_evaluation(weights)
        try:
            with self.witness.not_counting():
                yield self.runner.model, self.runner.forward_model
        except BaseException:
            # Without the clock, which would wait for a device that may be waiting for a lost rank.
            weights.__exit__(None, None, None)
            raise
        self.leave_evaluation(weights)

    def enter_evaluation(self, weights: AbstractContextManager[None]) -> None:
        """Put the weights to evaluate into the model, on the clock. weights: `Submission.evaluation_weights()`."""
        with self.witness.on_clock(), self.clock.submission("averaging"):
            weights.__enter__()

    def leave_evaluation(self, weights: AbstractContextManager[None]) -> None:
        """Put the trained weights back, on the clock."""
        with self.witness.on_clock(), self.clock.submission("averaging"):
            weights.__exit__(None, None, None)

    def state_bytes(self) -> int:
        """Bytes that the submission holds between steps."""
        return self.submission.state_bytes()

    def record_summary(self) -> dict[str, Any]:
        """What the submission has to say of the training, for the record (`Submission.record_summary`)."""
        return self.submission.record_summary()

    def weights_sha256(self) -> str:
        """Hash of the trained weights."""
        return hash_weights(self.runner.model)

    def collect_evidence(self) -> dict[str, Any]:
        """What is known of the submission: fields of `harness.records.manifest.Evidence`, and `texts`, its source files
        by module."""
        paths = self.run.optimizer.class_paths
        classes = [self.cls, *(hyperparameters.import_class(path, "optimizer") for path in paths[1:])]
        sources = submission_sources(classes, self._loaded_before)
        # Copied first: reading the sources opens files too.
        notes = self.witness.notes.copy()
        return {
            "sources": hash_sources(sources),
            "texts": read_sources(sources),
            "distributions": submission_distributions(classes),
            "model_changes": list(self.witness.model_changes),
            "patched": find_patches(self._callables_before),
            "threads": self.witness.threads,
            "files_opened": notes.files,
            "connections": notes.connections,
            "programs": notes.programs,
        }

    @property
    def model_structure(self) -> list[str]:
        """A line for each module of the model, without hooks."""
        return describe_structure(self.runner.model, ignores_hooks=True)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything from which `load_state_dict` continues to the bit, on a training that has been built.

        With Need.COMMUNICATION the ranks differ, and the states of all of them are in it.
        """
        setup = self.submission.setup
        state = {
            "model": self.runner.model.state_dict(),
            "submission": (submission := self.submission.state_dict()),
            "submission_devices": device_types(submission),
            "generator": setup.generator.get_state(),
            "device_generator": setup.device_generator.get_state(),
            "position": self.stream.position,
            "counters": asdict(self.runner.counters),
            "clock": self.clock.state_dict(),
            "seconds_per_step": self.disturbance.seconds_per_step,
            "evidence": asdict(self.witness.counters),
        }
        return {"of_ranks": self.ranks.all_gather(state)} if Need.COMMUNICATION in self.needs else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, on as many ranks if their states are in it. The tensors may be on
        the CPU."""
        if "of_ranks" in state:
            state = state["of_ranks"][self.ranks.rank]
        setup = self.submission.setup
        self.runner.model.load_state_dict(state["model"])
        self.submission.load_state_dict(restore_devices(state["submission"], state["submission_devices"], self.device))
        setup.generator.set_state(state["generator"])
        setup.device_generator.set_state(state["device_generator"])
        self.stream.position = state["position"]
        self.runner.counters = Counters(**state["counters"])
        self.clock.load_state_dict(state["clock"])
        self.disturbance.seconds_per_step = state["seconds_per_step"]
        self.witness.counters = EvidenceCounters(**state["evidence"])
        self.witness.forget_pause()


def build_model(workload: Workload, seeds: TrialSeeds, device: torch.device) -> nn.Module:
    """The workload's model with the initial weights of a trial, in training mode."""
    torch.manual_seed(seeds.key("initial weights"))
    # Built on the CPU, so that the initial weights do not depend on the device.
    model = workload.build_model().to(device)
    if workload.spec.memory_format == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    return model


@contextmanager
def precision_context(run: Run, needs: frozenset[Need], device: torch.device) -> Iterator[None]:
    """The precision of `run`, and the kind of attention that the needs take."""
    with ExitStack() as stack:
        if run.precision == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if Need.SECOND_DERIVATIVES in needs:
            # Fused attention has no second derivative.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
