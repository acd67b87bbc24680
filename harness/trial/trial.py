"""One trial: train a workload with a submission until it meets the target, and leave a record.

check -> load the data -> open the record -> build and warm up the model -> build the submission (the clock starts)
-> [train a segment | evaluate | append a row | checkpoint] ... -> close the record with a status
"""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist

from harness.config import hyperparameters
from harness.config.declared_needs import declared_needs
from harness.config.schema import Run
from harness.errors import LeaseLost, ProcessKilled, UserError, WorkloadError
from harness.interface.needs import Need
from harness.interface.ranks import Ranks
from harness.interface.workload import Split, Workload
from harness.processes import world_size
from harness.records.layout import WEIGHTS_AT_END, WEIGHTS_AT_TARGET, RecordPath
from harness.records.packing import unpack_if_packed
from harness.records.status import Status
from harness.trial import figures
from harness.trial.distributed import announce_exit, init_distributed, watchdog
from harness.trial.environment import configure_torch, private_compiler_cache, select_device
from harness.trial.evaluation import evaluate
from harness.trial.evidence import WeightsKeeper, write_evidence
from harness.trial.figures import Row
from harness.trial.hardware import machine_folder
from harness.trial.liveness import show_progress
from harness.trial.outcome import Outcome, out_of_memory_cause
from harness.trial.record import ReadOnlyRecord, Record
from harness.trial.remote_training import AnyTraining, RemoteTraining, SubmissionFailed
from harness.trial.training import Training

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted; the same command continues it"

ShouldStop = Callable[[list[Row]], str | None]
"""Called off the clock after each evaluation with all rows so far; a reason stops the trial, None lets it go on."""
MakeShouldStop = Callable[[Run, RecordPath], ShouldStop | None]


class Observer(Protocol):
    """Watches a trial, off the clock: the progress line, a tracker."""

    def begin(self, record: Record, first_step: float) -> None:
        """Called once, before training; first_step: nominal steps that a checkpoint had done."""

    def evaluation(self, row: Row) -> None:
        """Called after each evaluation with its row."""

    def end(self, record: Record) -> None:
        """Called once, when the record has its final status."""


def run_trial(
    run: Run,
    make_observers: Callable[[], list[Observer]] = list,
    *,
    make_should_stop: MakeShouldStop | None = None,
    retry: bool = False,
    lease_token: str | None = None,
) -> tuple[Record, bool]:
    """Run, continue, or leave alone because it is finished, the trial that `run` describes.

    make_should_stop: makes the rule that `run.pruning` names. retry: run a trial that crashed again, from its last
    checkpoint. lease_token: of the lease of its folder, if the parent process holds it.

    A submission that is packed is unpacked first. Returns the record and whether anything was done. Raises UserError,
    before anything is written, for errors that the user can correct; every later failure is a status in the record.
    """
    if run.pruning != "none" and make_should_stop is None:
        raise ValueError(f"pruning={run.pruning} takes a make_should_stop (harness.study.stop_rule)")
    device = select_device(run)
    configure_torch(run, device)
    # Before the ranks connect: a mistake that each can see alone must not make them wait for each other.
    check_ranks(run)
    ranks = init_distributed()
    path = RecordPath.of_run(run, machine_folder(device, run.threads))
    # Before any rank looks for its record. Rank 0 alone, and the others wait for it.
    ranks.run_on_all(lambda: unpack_if_packed(path.submission_folder) if ranks.is_main else None)
    record = ranks.run_on_all(lambda: (Record if ranks.is_main else ReadOnlyRecord).load(run, path))
    is_done = record.is_over and not (retry and record.status is not None and record.status.is_crash)
    # Rank 0 decides: the others may read an older manifest from a shared file system.
    if ranks.broadcast(is_done and not run.overwrite):
        logger.info("%s: finished already, as %s", path.folder, record.status)
        return record, False
    if run.modified:
        logger.info("the workload is modified (%s): no table takes this trial", ", ".join(run.modified))
    if run.judge != "process":
        declared_needs(run)  # raises its errors before data are loaded
    started = perf_counter()
    workload = ranks.run_on_all(lambda: load_workload(run, device))
    show_progress()
    logger.info("%s loaded in %.1f s (data=%s)", run.spec.full_name, perf_counter() - started, run.data)
    with ExitStack() as stack:
        # Registered before the folder is taken, so that the lease is released whatever fails.
        stack.callback(record.close)
        observers = make_observers() if ranks.is_main else []
        training: AnyTraining
        if run.judge == "process":
            training = stack.enter_context(closing(RemoteTraining(run, workload, device)))
        else:
            training = Training(run, workload, device, ranks)
        for remark in training.remarks if ranks.is_main else []:
            logger.warning("%s", remark)
        ranks.run_on_all(lambda: record.acquire(lease_token))
        # With the folder: its former holder may have written a newer checkpoint until then. Before the manifest is
        # written: a corrupt checkpoint is refused, and nothing is changed.
        checkpoint = None if run.overwrite else ranks.run_on_all(lambda: record.load_checkpoint())
        _check_checkpoint(checkpoint, record, ranks)
        with _report_lost_folder(record):
            ranks.run_on_all(lambda: record.start(figures.manifest_values(training)))
        if checkpoint is not None:
            # Drops the rows after the checkpoint, whose steps are made again.
            record.write_rows()
            logger.info("continues from the checkpoint at row %d", len(record.rows))
        should_stop = make_should_stop(run, path) if make_should_stop is not None and ranks.is_main else None
        trial = _Trial(training, record, observers, should_stop, checkpoint)
        # The trial lets go of it once it is loaded; this frame would keep it to the end.
        del checkpoint
        with _report_lost_folder(record):
            trial.finish(trial.run())
        for observer in observers:
            observer.end(record)
    return record, True


@contextmanager
def _report_lost_folder(record: Record) -> Iterator[None]:
    """Raise UserError where the body could not write the record any more."""
    try:
        yield
    except LeaseLost as error:
        raise UserError(
            f"{error} after this one missed its heartbeats; the trial goes on there, and nothing is to be done"
        ) from error
    except OSError as error:
        raise UserError(
            f"records={record.run.records}: {record.folder} could not be written ({error.strerror}); make room there, "
            "and the same command continues from the last checkpoint"
        ) from error


def check_ranks(run: Run) -> None:
    """Raise UserError if the processes that the launcher started cannot share the trial."""
    spec, size = run.spec, world_size()
    count = spec.nominal_batch // spec.micro_batch
    if count % size:
        raise UserError(
            f"{size} processes cannot share a step of workload={spec.full_name} evenly: its nominal_batch="
            f"{spec.nominal_batch} is {count} micro-batches of {spec.micro_batch}; start as many as divide {count}"
        )
    if size > 1 and run.judge == "process":
        raise UserError(
            f"judge=process: {size} processes share the trial, and each would need a judge; use judge=replay, which "
            "keeps the weights so that scripts/audit.py can evaluate them again"
        )
    if size > 1 and run.device != "cpu" and torch.cuda.is_available() and not dist.is_nccl_available():
        raise UserError(
            f"device={run.device}: {size} processes on GPUs exchange sums by NCCL, which torch {torch.__version__} "
            "is built without; start one process, use device=cpu, or install torch with NCCL"
        )
    if size > 1 and Need.LAYERS in declared_needs(run):
        raise UserError(
            f"optimizer={run.optimizer.name} reads the layers of the model (Need.LAYERS), and a hook sees the examples "
            f"of its own process only; start one process instead of {size}"
        )


def load_workload(run: Run, device: torch.device) -> Workload:
    """The workload of `run` with its data on `device`; raises UserError if the data cannot be had."""
    try:
        workload: Workload = hyperparameters.import_class(run.spec.class_path, "workload.class_path")(run.spec)
        workload.load(run.data, device)
    except WorkloadError as error:
        raise UserError(str(error)) from error
    return workload


def _check_checkpoint(checkpoint: dict[str, Any] | None, record: Record, ranks: Ranks) -> None:
    """Raise UserError where the ranks read different checkpoints, or one of another number of ranks that differ."""
    if len(set(ranks.all_gather(len(record.rows)))) > 1:
        raise UserError(
            f"records={record.run.records}: the ranks see different checkpoints; give a folder that all share"
        )
    if checkpoint is None:
        return
    saved = len(checkpoint["training"].get("of_ranks", ())) or ranks.size
    if saved != ranks.size:
        raise UserError(
            f"{record.folder} holds a trial of {saved} processes, each with a state of its own, and there are now "
            f"{ranks.size}; start {saved}, give label=NAME for a record of its own, or overwrite=true to replace it"
        )


class _Trial:
    """A training with its evaluations, and the record of them."""

    def __init__(
        self,
        training: AnyTraining,
        record: Record,
        observers: list[Observer],
        should_stop: ShouldStop | None,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        """checkpoint: to continue from; None to start."""
        # None once it is loaded.
        self._checkpoint_to_load = checkpoint
        self.training, self.record, self.observers, self.should_stop = training, record, observers, should_stop
        self.run_config, self.workload, self.spec = training.run, training.workload, training.spec
        self.clock, self.ranks = training.clock, training.ranks
        self.memory = training.memory
        self.state_bytes = 0
        self.kept_weights = WeightsKeeper()
        # Files of the record that another process changed while the trial ran.
        self.tampered: set[str] = set()
        # Index of the row at which the target was met first.
        self.reached_row: int | None = None

    # ---- the life of a trial ---------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train from the checkpoint or from the start to the end; how it ended. Raises OSError and LeaseLost, for the
        record cannot be written then."""
        try:
            own_compilation = Need.OWN_COMPILATION in self.training.needs
            with watchdog(self.ranks, self._give_up), private_compiler_cache(own_compilation):
                resumed = self._checkpoint_to_load is not None
                self._build()
                outcome = self._train(resumed)
        # Here and for a lost lease there is no outcome: it could not be written into the record.
        except _RecordNotWritten as caught:
            raise caught.error from caught
        except LeaseLost:
            raise
        except (KeyboardInterrupt, Exception) as caught:
            outcome = self._outcome_of(caught)
        # The cause may be the failure of another rank.
        if self.ranks.size > 1 and (outcome.status.is_crash or outcome.status is Status.STOPPED):
            outcome = self._agree_with_other_ranks(outcome)
        return outcome

    def finish(self, outcome: Outcome) -> None:
        """Write the outcome and the final figures into the record."""
        logger.info("ended as %s%s", outcome.status, f": {outcome.stop_reason}" if outcome.stop_reason else "")
        final = figures.final_values(self.training, self.record.rows, self.reached_row, self.state_bytes, outcome)
        self.tampered |= set(self.record.changed_files())
        write_evidence(self.training, self.record)
        # The process of the submission ends before the record is complete: it cannot change what is written last.
        if isinstance(self.training, RemoteTraining):
            self.training.close()
            self.tampered |= set(self.record.changed_files())
            if self.record.rows:
                self.record.write_rows()
        self.record.finish(outcome.status, final, tampered=self.tampered)

    def _build(self) -> None:
        checkpoint, self._checkpoint_to_load = self._checkpoint_to_load, None
        self.training.build(charge_compile=checkpoint is None)
        show_progress()
        if checkpoint is not None:
            self.training.load_state_dict(checkpoint["training"])
            self.reached_row, self.state_bytes = checkpoint["reached_row"], checkpoint["state_bytes"]
            self.memory.peaks = checkpoint["memory_peaks"]
            self._resume_energy()
        for observer in self.observers:
            observer.begin(self.record, self.training.nominal_step)

    def _train(self, resumed: bool) -> Outcome:
        """Segments and evaluations until the trial ends."""
        if resumed and (outcome := self._outcome_after(self.record.rows[-1])) is not None:
            return outcome
        last_checkpoint = perf_counter()
        while True:
            # No rank's clock or energy runs while another is still busy off the clock.
            self.ranks.barrier()
            train_loss = self.training.measured_segment(self._next_goal(), charge_compile=not resumed)
            resumed = False
            outcome = self._evaluate_and_record(train_loss)
            with self.clock.off("logging"):
                if outcome is None:
                    due = perf_counter() - last_checkpoint >= self.run_config.checkpoint_seconds
                    # Rank 0 decides, by its own clock.
                    outcome, due = self.ranks.broadcast((self._pruned(), due))
                    if outcome is None and due:
                        self._write(lambda: self.record.save_checkpoint(self._checkpoint()))
                        show_progress()
                        last_checkpoint = perf_counter()
                        logger.debug("checkpoint at row %d", len(self.record.rows))
            if outcome is not None:
                return outcome

    def _next_goal(self) -> int:
        """Examples at which the next evaluation is due: on the grid, or at the end of the budget."""
        spec = self.spec
        grid = spec.eval_every * spec.nominal_batch
        return min(spec.max_steps * spec.nominal_batch, (self.training.runner.counters.examples // grid + 1) * grid)

    def _evaluate_and_record(self, train_loss: float) -> Outcome | None:
        """Evaluate, append the row, and tell the observers; how the trial ends, if it does."""
        metrics = self._evaluate("validation")
        with self.clock.off("logging"):
            row = self._combine_ranks(self._row(train_loss, metrics))
        outcome = self._outcome_after(row)
        reaches_target = self.reached_row is None and self.spec.meets_target(row[f"validation/{self.spec.metric}"])
        if reaches_target:
            # The index that the row gets when it is appended below.
            self.reached_row = len(self.record.rows)
        # The test split is for the report alone: where the target is met, and at the end.
        if reaches_target or outcome is not None:
            row |= figures.split_columns("test", self._evaluate("test"))
        with self.clock.off("logging"):
            self.tampered |= set(self.record.changed_files())
            if self.run_config.judge == "replay":
                names = [WEIGHTS_AT_TARGET] * reaches_target + [WEIGHTS_AT_END] * (outcome is not None)
                for name in names:
                    self._write(partial(self.kept_weights.write, self.record, name, len(self.record.rows)))
            self._write(lambda: self.record.append(row))
            for observer in self.observers:
                observer.evaluation(row)
            metric = f"validation/{self.spec.metric}"
            logger.debug("step %g of %d: %s %.6g", row["global_step"], self.spec.max_steps, metric, row[metric])
        return outcome

    def _evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the weights that the submission wants evaluated. Preparing those is on the clock, the rest off."""
        training = self.training
        with training.evaluation_model() as (model, forward_model):
            with self.clock.off("evaluation"), self.memory.measure("evaluation"):
                metrics = evaluate(self.workload, model, forward_model, split, training.precision_context, self.ranks)
            if self.run_config.judge == "replay" and split == "validation":
                self.kept_weights.remember(model)
        return metrics

    # ---- how it ends -----------------------------------------------------------------------------------------------

    def _outcome_after(self, row: Row) -> Outcome | None:
        """How the trial ends after `row`; None to go on. All ranks get the same row, and so the same outcome."""
        value = row[f"validation/{self.spec.metric}"]
        # First: NaN meets no target, and would exhaust the budget.
        if not (math.isfinite(row["train/loss"]) and math.isfinite(value)):
            reason = f"train/loss={row['train/loss']}, validation/{self.spec.metric}={value}"
            return Outcome(Status.DIVERGED, reason)
        reached = self.reached_row is not None or self.spec.meets_target(value)
        if reached and not self.run_config.run_to_end:
            return Outcome(Status.REACHED)
        # With run_to_end the budget is used up also after the target was met.
        status = Status.REACHED if reached else Status.EXHAUSTED
        if row["global_step"] >= self.spec.max_steps:
            return Outcome(status)
        if row["accumulated_submission_time"] > self.spec.max_seconds:
            return Outcome(status, f"workload.max_seconds={self.spec.max_seconds} used up")
        return None

    def _pruned(self) -> Outcome | None:
        """The outcome if the stopping rule ends the trial here, else None; one that met its target is never stopped."""
        if self.should_stop is None or self.reached_row is not None:
            return None
        reason = self.should_stop(self.record.rows)
        return None if reason is None else Outcome(Status.PRUNED, reason)

    def _outcome_of(self, caught: BaseException) -> Outcome:
        """How a trial ends that raised an exception."""
        # format_exc reads the exception that is being handled, so this method is called within `except`.
        text = traceback.format_exc()
        if isinstance(caught, KeyboardInterrupt):
            return Outcome(Status.STOPPED, INTERRUPTED)
        if isinstance(caught, ProcessKilled):
            return Outcome(Status.STOPPED, f"{caught}; the same command continues it")
        if isinstance(caught, SubmissionFailed):
            if caught.out_of_memory is None:
                return Outcome(Status.FAILED, None, caught.text)
            text = f"{caught.out_of_memory}\n{caught.text}"
            return Outcome(Status.OUT_OF_MEMORY, self._how_to_need_less_memory(), text)
        if (cause := out_of_memory_cause(caught)) is not None:
            # torch's message says how much was asked for and how much was free.
            return Outcome(Status.OUT_OF_MEMORY, self._how_to_need_less_memory(), f"{cause}\n{text}")
        return Outcome(Status.FAILED, None, text)

    def _how_to_need_less_memory(self) -> str:
        micro_batch, device = self.spec.micro_batch, self.training.device.type
        hints = []
        if micro_batch > 1:
            hints.append(f"workload.micro_batch={micro_batch // 2} halves the activations (and marks the record)")
        if device == "cuda" and self.run_config.precision != "bf16":
            hints.append("precision=bf16 halves most of them")
        if device == "cpu":
            hints.append("a smaller executor.workers leaves more to each trial")
        return "; ".join(hints)

    def _agree_with_other_ranks(self, outcome: Outcome) -> Outcome:
        """How the trial ended, by the announcements of all ranks: the launcher stops all when one of them ends."""
        exits = announce_exit(self.ranks, str(outcome.status), outcome.traceback or "")
        for rank, rank_exit in sorted(exits.items()):
            if rank_exit is not None and Status(rank_exit.status).is_crash:
                text = f"on rank {rank} of {self.ranks.size}:\n{rank_exit.traceback}"
                return Outcome(Status(rank_exit.status), None, text)
        lost = sorted(rank for rank, rank_exit in exits.items() if rank_exit is None)
        if lost:
            text = f"the process of rank {lost[0]} is gone\n{outcome.traceback or ''}".rstrip()
            reason = f"lost rank {', '.join(map(str, lost))}; the same command continues"
            return Outcome(Status.FAILED, reason, text, lost)
        return outcome

    def _give_up(self) -> int:
        """End the record while this rank waits for a lost one (see distributed.watchdog); the exit status."""
        outcome = self._agree_with_other_ranks(Outcome(Status.STOPPED, INTERRUPTED))
        self.finish(outcome)
        self.record.close()
        if self.ranks.is_main:
            print(f"{outcome.status}: {outcome.stop_reason or outcome.traceback}", file=sys.stderr)
        # As for a trial in one process: 1 for a failure, 130 for an interruption.
        return int(outcome.status.is_crash) or 130

    # ---- what is recorded ------------------------------------------------------------------------------------------

    def _row(self, train_loss: float, metrics: dict[str, float]) -> Row:
        self.state_bytes = max(self.state_bytes, self.training.state_bytes())
        return figures.row_values(
            self.training,
            train_loss,
            metrics,
            preemption_count=self.record.preemption_count,
            memory=self.memory.columns(),
            state_bytes=self.state_bytes,
        )

    def _combine_ranks(self, row: Row) -> Row:
        """Rank 0's row, so that all take the same decisions, with the largest of the figures that each rank has of its
        own, and the energy of all."""
        rows = self.ranks.all_gather(row)
        memory = (key for key in rows[0] if key.endswith("_memory_bytes"))
        largest = (*memory, "optimizer_state_bytes", "accumulated_data_wait_time")
        combined = rows[0] | {key: max(of_rank[key] for of_rank in rows) for key in largest}
        energy = "accumulated_energy_joules"
        if energy in combined:
            # Each rank counts its own GPU, but the processor packages of a machine are counted by its first rank alone.
            combined[energy] = sum(of_rank.get(energy, 0.0) for of_rank in rows)
            if self.training.device.type == "cuda" and not all(energy in of_rank for of_rank in rows):
                # A part of the energy would be read as all of it.
                del combined[energy]
        return combined

    def _resume_energy(self) -> None:
        """After a resume, rank 0 continues the energy of all ranks: the checkpoint has the clock of rank 0 alone."""
        elapsed = self.clock.elapsed
        if self.ranks.size > 1 and self.clock.meter is not None:
            used_by_all = self.record.rows[-1].get("accumulated_energy_joules")
            # The other ranks go on from 0, since the sum over the ranks is taken at every row.
            elapsed.energy = used_by_all if self.ranks.is_main or used_by_all is None else 0.0

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "training": self.training.state_dict(),
            "reached_row": self.reached_row,
            "state_bytes": self.state_bytes,
            "memory_peaks": self.memory.peaks,
        }

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise _RecordNotWritten(error) from error


class _RecordNotWritten(Exception):
    """The record could not be written. An OSError of the submission, in contrast, is a failure of the trial."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error
