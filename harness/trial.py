"""One trial: train a workload with a submission until it meets the target, and leave a record.

check -> load data -> open the record -> build and warm up the model -> build the submission (clock starts)
-> [train a segment | evaluate | append a row | checkpoint] ... -> close the record with a status
"""

from __future__ import annotations

import hashlib
import math
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from harness import hyperparameters, machine
from harness.config import Run
from harness.environment import configure_torch, device_of, private_compiler_cache
from harness.lease import LeaseLost
from harness.needs import Need
from harness.problems import UserError
from harness.ranks import Ranks, join, world_size
from harness.record import Follower, Record, Status
from harness.training import Training, needs_of
from harness.workload import Split, Workload, WorkloadError

if TYPE_CHECKING:
    from harness.pruner import Pruner

Row = dict[str, Any]


class Observer(Protocol):
    """Watches a trial, off the clock: the progress line, a tracker."""

    def begin(self, record: Record, first_step: float) -> None: ...
    def evaluation(self, row: Row) -> None: ...
    def end(self, record: Record) -> None: ...


def run_trial(
    run: Run,
    observers: Callable[[], list[Observer]] = list,
    *,
    retry: bool = False,
    lease_token: str | None = None,
) -> tuple[Record, bool]:
    """Run, continue, or find finished the trial that `run` describes.

    retry: run a trial that crashed again, from its last checkpoint. lease_token: of the lease of its folder, if the
    parent process holds it. Returns the record and whether anything was done. Raises UserError, before anything is
    written, for what the user can mend; every later failure is a status in the record.
    """
    device = device_of(run)
    configure_torch(run, device)
    check_ranks(run)
    ranks = join()
    folder = machine.folder_of(device, run.threads)
    record = ranks.together(lambda: (Record if ranks.first else Follower).inspect(run, folder))
    done = record.over and not (retry and record.status is not None and record.status.crashed)
    if ranks.agree(done and not run.overwrite):
        return record, False
    needs_of(run)  # its errors come before the data's
    workload = ranks.together(lambda: load_workload(run, device))
    with ExitStack() as stack:
        stack.callback(record.close)
        watching = observers() if ranks.first else []
        checkpoint = None if run.overwrite else ranks.together(lambda: record.load_checkpoint(device))
        if len(set(ranks.of_all(len(record.rows)))) > 1:
            raise UserError(f"records={run.records}: the ranks see different checkpoints; give a folder that all share")
        if checkpoint is not None:
            _check_ranks_of(checkpoint, record, ranks)
        training = Training(run, workload, device, ranks)
        ranks.together(lambda: record.begin(_manifest_facts(training), lease_token))
        if checkpoint is not None:
            record.write_rows()
        trial = _Trial(training, record, watching)
        try:
            status, final = trial.run(checkpoint)
            record.finish(status, final)
        except LeaseLost as error:
            raise UserError(f"{error}, after this one had not been heard of; the trial goes on there") from error
        except OSError as error:
            raise UserError(
                f"records={run.records}: {record.folder} could not be written ({error.strerror}); make room there, "
                "and the same command continues from the last checkpoint"
            ) from error
        for observer in watching:
            observer.end(record)
    return record, True


def check_ranks(run: Run) -> None:
    """UserError if the processes that the launcher started cannot share the trial."""
    facts, size = run.facts, world_size()
    count = facts.nominal_batch // facts.micro_batch
    if count % size:
        raise UserError(
            f"{size} processes cannot share a step of workload={facts.full_name} evenly: its nominal_batch="
            f"{facts.nominal_batch} is {count} micro-batches of {facts.micro_batch}; start as many as divide {count}"
        )
    if size > 1 and Need.LAYERS in needs_of(run):
        raise UserError(
            f"optimizer={run.optimizer.name} reads the layers of the model (Need.LAYERS), and a hook sees the examples "
            f"of its own process only; start one process instead of {size}"
        )


def _check_ranks_of(checkpoint: dict[str, Any], record: Record, ranks: Ranks) -> None:
    """UserError where every rank has a state of its own, and the trial was begun with another number of them."""
    begun = len(checkpoint["training"].get("of_ranks", ())) or ranks.size
    if begun != ranks.size:
        raise UserError(
            f"{record.folder} holds a trial of {begun} processes, each with a state of its own, and there are now "
            f"{ranks.size}; start {begun}, give label=NAME for a record of its own, or overwrite=true to replace it"
        )


def load_workload(run: Run, device: torch.device) -> Workload:
    """The workload of `run` with its data on `device`; UserError if the data cannot be had."""
    try:
        workload: Workload = hyperparameters.import_class(run.facts.class_path, "workload.class_path")(run.facts)
        workload.load(run.data, device)
    except WorkloadError as error:
        raise UserError(str(error)) from error
    return workload


class _Trial:
    """A training with its evaluations, and what is written down of them."""

    def __init__(self, training: Training, record: Record, observers: list[Observer]) -> None:
        self.training, self.record, self.observers = training, record, observers
        self.config, self.workload, self.facts = training.run, training.workload, training.facts
        self.clock, self.ranks = training.clock, training.ranks
        self.memory = machine.PeakMemory(training.device)
        self.state_bytes = 0
        self.stop_reason: str | None = None
        self.reached_row: int | None = None
        self.pruner = _pruner(self.config, record) if self.ranks.first else None
        self.lost_ranks: list[int] = []

    # ---- life of a trial -----------------------------------------------------------------------------------------

    def run(self, checkpoint: dict[str, Any] | None) -> tuple[Status, dict[str, Any]]:
        error: str | None = None
        try:
            with self.ranks.watched(self._give_up), private_compiler_cache(Need.OWN_COMPILATION in self.training.needs):
                self.training.build(charge_compile=checkpoint is None)
                if checkpoint is not None:
                    self.training.load_state_dict(checkpoint["training"])
                    self.reached_row, self.state_bytes = checkpoint["reached_row"], checkpoint["state_bytes"]
                    self._take_up_energy()
                for observer in self.observers:
                    observer.begin(self.record, self.training.nominal_step)
                status = self._train(resumed=checkpoint is not None)
        except KeyboardInterrupt:
            status, self.stop_reason = Status.STOPPED, "interrupted; the same command continues it"
        except torch.OutOfMemoryError as caught:
            status, error = Status.OUT_OF_MEMORY, f"{caught}\n{traceback.format_exc()}"
        except MemoryError:
            status, error = Status.OUT_OF_MEMORY, traceback.format_exc()
        except _RecordError as caught:
            raise caught.error from caught
        except LeaseLost:
            raise
        except Exception:
            status, error = Status.FAILED, traceback.format_exc()
        if status is Status.OUT_OF_MEMORY:
            self.stop_reason = self._how_to_need_less()
        if self.ranks.size > 1 and (status.crashed or status is Status.STOPPED):
            status, error = self._parted(status, error)
        return status, self._final_figures(status, error)

    def _give_up(self) -> int:
        """The record's end while this rank waits for one that is gone (see Ranks.watched); the exit status."""
        self.stop_reason = "interrupted; the same command continues it"
        status, error = self._parted(Status.STOPPED, None)
        self.record.finish(status, self._final_figures(status, error))
        self.record.close()
        if self.ranks.first:
            print(f"{status}: {self.stop_reason or error}", file=sys.stderr)
        return int(status.crashed) or 130

    def _parted(self, status: Status, error: str | None) -> tuple[Status, str | None]:
        """How the trial ended, with what the other ranks say: the launcher stops all when one of them ends."""
        others = self.ranks.part(str(status), error or "")
        for rank, said in sorted(others.items()):
            if said is not None and Status(said[0]).crashed:
                self.stop_reason = None
                return Status(said[0]), f"on rank {rank} of {self.ranks.size}:\n{said[1]}"
        self.lost_ranks = sorted(rank for rank, said in others.items() if said is None)
        if self.lost_ranks:
            self.stop_reason = f"lost rank {', '.join(map(str, self.lost_ranks))}; the same command continues"
            return Status.FAILED, f"the process of rank {self.lost_ranks[0]} is gone\n{error or ''}".rstrip()
        return status, error

    def _how_to_need_less(self) -> str:
        facts, config = self.facts, self.config
        ways = []
        if facts.micro_batch > 1:
            ways.append(f"workload.micro_batch={facts.micro_batch // 2} halves the activations (and marks the record)")
        if self.training.device.type == "cuda" and config.precision != "bf16":
            ways.append("precision=bf16 halves most of them")
        if self.training.device.type == "cpu":
            ways.append("a smaller executor.workers leaves each trial more")
        return "; ".join(ways)

    def _train(self, resumed: bool) -> Status:
        facts, counters = self.facts, self.training.evaluator.counters
        last_checkpoint = perf_counter()
        budget = facts.max_steps * facts.nominal_batch
        if resumed and (ended := self._status_after(self.record.rows[-1])) is not None:
            return ended
        while True:
            grid = facts.eval_every * facts.nominal_batch
            goal = min(budget, (counters.examples // grid + 1) * grid)
            self.ranks.wait()  # nobody's clock or energy runs while another is still at what is off the clock
            train_loss = self.training.segment(goal, charge_compile=not resumed)
            resumed = False
            metrics = self._evaluate("validation")
            with self.clock.off("logging"):
                row = self._of_all_ranks(self._row(train_loss, metrics))
            status = self._status_after(row)
            if self.reached_row is None and facts.meets_target(row[f"validation/{facts.metric}"]):
                self.reached_row = len(self.record.rows)
                row |= self._split_columns("test", self._evaluate("test"))
            elif status is not None:
                row |= self._split_columns("test", self._evaluate("test"))
            with self.clock.off("logging"):
                self._write(lambda row=row: self.record.append(row))  # type: ignore[misc]
                for observer in self.observers:
                    observer.evaluation(row)
                save = perf_counter() - last_checkpoint >= self.config.checkpoint_seconds
                if status is None:
                    status, self.stop_reason, save = self.ranks.agree((self._pruned(), self.stop_reason, save))
                if status is None and save:
                    self._write(lambda: self.record.save_checkpoint(self._checkpoint()))
                    last_checkpoint = perf_counter()
            if status is not None:
                return status

    def _evaluate(self, split: Split) -> dict[str, float]:
        """Metrics of the weights that the submission wants evaluated. Preparing those is on the clock, the rest off."""
        evaluator, model = self.training.evaluator, self.training.evaluator.model
        weights = self.training.submission.evaluation_weights()
        with self.clock.submission("averaging"):
            weights.__enter__()
        try:
            with self.clock.off("evaluation"), torch.no_grad():
                model.eval()
                sums: dict[str, Tensor] = {}
                part = slice(self.ranks.rank, None, self.ranks.size)
                for batch in self.workload.evaluation_batches(split, part):
                    with evaluator.precision_context():
                        outputs = self.workload.forward(evaluator.forward_model, batch)
                    for key, value in self.workload.evaluation_sums(outputs, batch).items():
                        sums[key] = sums[key] + value if key in sums else value
                total: dict[str, float] = {}
                for shared in self.ranks.of_all({key: float(value) for key, value in sums.items()}):
                    total |= {key: total.get(key, 0.0) + value for key, value in shared.items()}
                count = total.pop("num_examples")
                metrics = {key: value / count for key, value in total.items()} | {"num_examples": int(count)}
                model.train()
        finally:
            with self.clock.submission("averaging"):
                weights.__exit__(None, None, None)
        return metrics

    def _status_after(self, row: Row) -> Status | None:
        """The status with which the trial ends after `row`, or None to go on."""
        value = row[f"validation/{self.facts.metric}"]
        if not (math.isfinite(row["train/loss"]) and math.isfinite(value)):
            self.stop_reason = f"train/loss={row['train/loss']}, validation/{self.facts.metric}={value}"
            return Status.DIVERGED
        reached = self.reached_row is not None or self.facts.meets_target(value)
        if reached and not self.config.run_to_end:
            return Status.REACHED
        if row["global_step"] >= self.facts.max_steps:
            return Status.REACHED if reached else Status.EXHAUSTED
        if row["accumulated_submission_time"] > self.facts.max_seconds:
            self.stop_reason = f"workload.max_seconds={self.facts.max_seconds} used up"
            return Status.REACHED if reached else Status.EXHAUSTED
        return None

    def _pruned(self) -> Status | None:
        """What the stopping policy says of the rows so far; a trial that met its target is never stopped."""
        if self.pruner is None or self.reached_row is not None:
            return None
        self.stop_reason = self.pruner.reason(self.record.rows)
        return None if self.stop_reason is None else Status.PRUNED

    def _of_all_ranks(self, row: Row) -> Row:
        """Rank 0's row, so that all take the same decisions, with the largest of what each rank has its own of."""
        rows = self.ranks.of_all(row)
        own = ("peak_memory_bytes", "optimizer_state_bytes", "accumulated_data_wait_time")
        combined = rows[0] | {key: max(one[key] for one in rows) for key in own}
        energy = "accumulated_energy_joules"
        if energy in combined:
            # Each rank counts its own GPU, but the packages of a machine are counted by its first rank alone.
            combined[energy] = sum(one.get(energy, 0.0) for one in rows)
            if self.training.device.type == "cuda" and not all(energy in one for one in rows):
                del combined[energy]  # a part of the energy is no energy
        return combined

    def _take_up_energy(self) -> None:
        """After a resume: what all ranks used goes on as rank 0's; the checkpoint's clock is that of rank 0 alone."""
        elapsed = self.clock.elapsed
        if self.ranks.size > 1 and self.clock.meter is not None:
            so_far = self.record.rows[-1].get("accumulated_energy_joules")
            elapsed.energy = so_far if self.ranks.first or so_far is None else 0.0

    # ---- what is recorded ----------------------------------------------------------------------------------------

    def _split_columns(self, split: Split, metrics: dict[str, float]) -> Row:
        return {f"{split}/{key}": value for key, value in metrics.items()}

    def _row(self, train_loss: Tensor, metrics: dict[str, float]) -> Row:
        self.clock.tick()
        elapsed, counters = self.clock.elapsed, self.training.evaluator.counters
        self.state_bytes = max(self.state_bytes, self.training.submission.state_bytes())
        return {
            "accumulated_submission_time": elapsed.submission,
            "accumulated_eval_time": elapsed.evaluation,
            "accumulated_logging_time": elapsed.logging,
            "global_step": self.training.nominal_step,
            "score": elapsed.submission,
            "total_duration": elapsed.total,
            "preemption_count": self.record.manifest["preemption_count"],
            "train/loss": float(train_loss),
            **self._split_columns("validation", metrics),
            **{f"test/{key}": "" for key in metrics},
            "accumulated_build_time": elapsed.build,
            "accumulated_compile_time": elapsed.compile,
            "accumulated_averaging_time": elapsed.averaging,
            "accumulated_data_wait_time": elapsed.data_wait,
            "accumulated_cpu_time": elapsed.cpu,
            **({} if elapsed.energy is None else {"accumulated_energy_joules": elapsed.energy}),
            **asdict(counters),
            "peak_memory_bytes": self.memory.bytes(),
            "optimizer_state_bytes": self.state_bytes,
        }

    def _final_figures(self, status: Status, error: str | None) -> dict[str, Any]:
        facts, rows = self.facts, self.record.rows
        final: dict[str, Any] = {"stop_reason": self.stop_reason}
        if self.lost_ranks:
            final["lost_ranks"] = self.lost_ranks
        if error is not None:
            final["traceback"] = error
        if not rows or not self.training.built:  # ended before the model was built
            return final
        last, metric = rows[-1], f"validation/{facts.metric}"
        values = [row[metric] for row in rows if math.isfinite(row[metric])]
        parameters = sum(parameter.numel() for parameter in self.training.evaluator.parameters)
        elapsed = self.clock.elapsed
        final |= {
            "time_to_target": None,
            "steps_to_target": None,
            "global_step": last["global_step"],
            "submission_seconds": last["accumulated_submission_time"],
            f"final_{metric}": last[metric],
            f"best_{metric}": (min if facts.direction == "min" else max)(values) if values else None,
            "peak_memory_bytes": last["peak_memory_bytes"],
            "parameters": parameters,
            "optimizer_state_bytes": self.state_bytes,
            "optimizer_state_bytes_per_parameter": self.state_bytes / parameters,
            "data_wait_share": elapsed.data_wait / elapsed.submission if elapsed.submission else 0.0,
            "evaluation_share": elapsed.evaluation / elapsed.total if elapsed.total else 0.0,
            **self.training.disturbance.summary(elapsed, self.training.device),
        }
        if status.finished and not status.crashed:  # else the weights are of no step, and the device may never answer
            final["weights_sha256"] = _weights_hash(self.training.evaluator.model)
        if self.reached_row is not None and self.reached_row < len(rows):
            reached = rows[self.reached_row]
            before = rows[self.reached_row - 1] if self.reached_row else {}
            final |= {
                "time_to_target": reached["accumulated_submission_time"],
                "steps_to_target": reached["global_step"],
                "resolution_seconds": reached["accumulated_submission_time"]
                - before.get("accumulated_submission_time", 0.0),
                "resolution_steps": reached["global_step"] - before.get("global_step", 0),
                "forward_examples_to_target": reached["forward_examples"],
                "backward_examples_to_target": reached["backward_examples"],
                **_energy_to_target(reached),
                f"test/{facts.metric}_at_target": reached[f"test/{facts.metric}"],
            }
        return final

    def _checkpoint(self) -> dict[str, Any]:
        own = {"reached_row": self.reached_row, "state_bytes": self.state_bytes}
        return {"training": self.training.state_dict(), **own}

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise _RecordError(error) from error


def _energy_to_target(reached: Row) -> Row:
    joules = reached.get("accumulated_energy_joules")
    return {} if joules is None else {"energy_joules_to_target": joules}


def _pruner(run: Run, record: Record) -> Pruner | None:
    if run.pruning == "none":
        return None
    from harness.pruner import Pruner  # with the libraries of tables, which other trials need not wait for

    return Pruner(run, record.folder)


class _RecordError(Exception):
    """The record could not be written: told from an OSError of the submission, which is a failure of the trial."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _manifest_facts(training: Training) -> dict[str, Any]:
    run, needs, workload, seeds = training.run, training.needs, training.workload, training.seeds
    return {
        "submission": run.submission_label,
        "workload": run.facts.full_name,
        **({"variant_of": run.facts.name} if run.facts.variant is not None and run.facts.held_out else {}),
        "workload_version": run.facts.version,
        "target_version": run.facts.target_version,
        "metric": f"validation/{run.facts.metric}",
        "direction": run.facts.direction,
        "target": run.facts.target,
        "hyperparameters": run.optimizer.effective_hyperparameters,
        "needs": sorted(needs),
        "arranged": {
            "compile": run.compile and not needs & {Need.SECOND_DERIVATIVES, Need.LAYERS},
            "attention": "math" if Need.SECOND_DERIVATIVES in needs else "fused where possible",
        },
        "seeds": {"study": run.seed, "trial": run.trial, "base": seeds.base},
        "data": workload.fingerprint,
        "code": machine.code_version(),
        "packages": machine.packages(),
        "machine": machine.describe(training.device, run.threads),
    }


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
