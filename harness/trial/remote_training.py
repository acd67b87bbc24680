"""The judge's side of a training whose submission runs in another process (judge=process).

    judge                                    process of the submission (harness/trial/trainee_process.py)
      holds data that are held back,           holds training data, model, submission
      target, record, a model of its own
      "train to this many examples"  ------>   a segment on the clock
      "show the weights"             ------>   sends them, and is stopped
      evaluates its own model with them
      "go on"                        ------>   continues

A `RemoteTraining` stands in for `harness.trial.training.Training`: same names, and the same results to the bit. Nothing
that the other process does to its copies of clock, target, evaluation or record reaches this one. The judge reads a
clock of its own beside the one that the submission is charged by.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import nn

from harness.config.schema import Run
from harness.errors import ProcessKilled, UserError
from harness.interface.model_runner import Counters
from harness.interface.needs import Need
from harness.interface.ranks import SINGLE_RANK
from harness.interface.workload import Workload
from harness.processes import MARK_VARIABLE, PROGRESS_VARIABLE, SOURCE_ROOT, describe_end
from harness.records.kills import is_kill
from harness.seeding import TrialSeeds
from harness.trial import trainee_process
from harness.trial.channel import Channel, ChannelClosed
from harness.trial.clock import Clock, Disturbance
from harness.trial.hardware import PeakMemory
from harness.trial.liveness import progress_descriptor, show_progress
from harness.trial.training import Training, TrainingFacts, build_model
from harness.trial.weights import hash_weights
from harness.trial.witness import EvidenceCounters, describe_structure

logger = logging.getLogger(__name__)

_END_SECONDS = 10.0
"""How long the process may take to end by itself when it is no longer needed."""
_PR_SET_CHILD_SUBREAPER = 36
_SEEN_BY_JUDGE = (
    "accumulated_children_cpu_time",
    "accumulated_off_clock_cpu_time",
    "accumulated_second_clock_time",
    "accumulated_second_cpu_time",
)
# Columns of the clock that the process of the submission measures.
_CHARGED = ("submission", "build", "data_wait", "compile", "averaging", "cpu", "energy")


class SubmissionFailed(Exception):
    """The submission raised an exception in its process, or its process ended. The message is the traceback."""

    def __init__(self, text: str, out_of_memory: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.out_of_memory = out_of_memory
        """What torch says of it, where memory ran out."""


class _Witnessed:
    """The evidence that the other process has gathered, with what this one has seen itself."""

    def __init__(self) -> None:
        self.counters = EvidenceCounters()
        for column in _SEEN_BY_JUDGE:
            setattr(self.counters, column, 0.0)
        self.model_changes: list[str] = []


class _Model:
    """What a trial asks of a `ModelRunner`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.counters = Counters()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]


class RemoteTraining(TrainingFacts):
    """A training in a process of its own, as `Training` with one rank. Must be closed."""

    ranks = SINGLE_RANK

    def __init__(self, run: Run, workload: Workload, device: torch.device) -> None:
        """Start the process and let it load data and submission. workload: with the data that are held back. Raises
        UserError as the composition of the submission does."""
        self.run, self.workload, self.device, self.spec = run, workload, device, workload.spec
        self.seeds = TrialSeeds(run.seed, run.trial)
        self.clock = Clock(device)
        self.disturbance = Disturbance()
        self.memory = PeakMemory(device)
        self.witness = _Witnessed()
        self.initial_weights_sha256: str | None = None
        self.built_weights_sha256: str | None = None
        self._cpu_before: float | None = None
        # An answer is outstanding. After an interruption it stays so, and whatever comes next would be the wrong one.
        self._is_waiting = False
        self._is_open = False
        # Its import may have changed what this process evaluates by.
        self._imported = any(map(_is_foreign, run.optimizer.class_paths)) or _has_run(run.optimizer.path)
        self._process, self._channel = _start(run)
        self._children_cpu = 0.0
        self._submission_process = psutil.Process(self._process.pid)
        self.runner: _Model
        try:
            answer = self._ask("open", run=run.model_dump(mode="json"))
        except SubmissionFailed as failure:
            self.close()
            raise UserError(f"optimizer={run.optimizer.name} cannot be built: {failure.text}") from failure
        except BaseException:
            self.close()
            raise
        self._is_open = True
        self.needs = frozenset(Need[name] for name in answer["needs"])
        self.remarks = [str(remark) for remark in answer["remarks"]]
        # The trial begins here: starting a process and importing libraries is the harness's affair.
        self.clock.restart()
        if answer["train_size"] != workload.train_size:
            self.close()
            raise UserError(f"workload={self.spec.full_name}: the process of the submission read other training data")

    # ---- as Training -----------------------------------------------------------------------------------------------

    @property
    def is_built(self) -> bool:
        """Whether `build` has come to its end."""
        return self.built_weights_sha256 is not None

    def build(self, *, charge_compile: bool = True) -> None:
        """As `Training.build`. The judge builds a model of its own, by its own code, to evaluate with."""
        model = build_model(self.workload, self.seeds, self.device)
        self.runner = _Model(model)
        self._forward_model: Any = torch.compile(model) if self.compiles_model else model
        self.initial_weights_sha256 = hash_weights(model)
        theirs = self._ask("build_model")["initial_weights_sha256"]
        if theirs != self.initial_weights_sha256:
            self.witness.model_changes.append("the initial weights are not those of the seed")
        show_progress()
        self._ask_on_clock("build_submission", charge_compile=charge_compile)
        self.built_weights_sha256 = self._ask("note_built_weights")["built_weights_sha256"]

    def measured_segment(self, goal: int, charge_compile: bool) -> float:
        """As `Training.measured_segment`."""
        answer = self._ask_on_clock("segment", goal=goal, charge_compile=charge_compile)
        if self.runner.counters.examples < goal:
            raise SubmissionFailed(
                f"a segment ended before {goal} examples: {self.runner.counters.examples} are counted"
            )
        return float(answer["loss"])

    @contextmanager
    def evaluation_model(self) -> Iterator[tuple[nn.Module, Any]]:
        """The judge's own model with the weights that the submission wants evaluated; within it the processes of the
        submission are stopped."""
        self._ask_on_clock("enter_evaluation")
        self._load_weights(self._ask("send_weights")["weights"])
        with self._stopped():
            yield self.runner.model, self._forward_model
        self._ask_on_clock("leave_evaluation")

    def state_bytes(self) -> int:
        """As `Training.state_bytes`."""
        return int(self._ask("state_bytes")["bytes"])

    def record_summary(self) -> dict[str, Any]:
        """As `Training.record_summary`."""
        return dict(self._ask("record_summary")["summary"])

    def weights_sha256(self) -> str:
        """As `Training.weights_sha256`."""
        return str(self._ask("weights_sha256")["sha256"])

    def state_dict(self) -> dict[str, Any]:
        """As `Training.state_dict`, with the judge's columns of the clock."""
        state: dict[str, Any] = self._ask("state")["state"]
        return state | {"clock": self.clock.state_dict(), "evidence": asdict(self.witness.counters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Training.load_state_dict`."""
        self.clock.load_state_dict(state["clock"])
        self.witness.counters = EvidenceCounters(**state["evidence"])
        self._ask("load", state=state | {"evidence": state["evidence"] | dict.fromkeys(_SEEN_BY_JUDGE)})

    def collect_evidence(self) -> dict[str, Any]:
        """What the process knows of the submission: fields of `harness.records.manifest.Evidence`, and `texts`, the
        source files by module."""
        # An interruption can come while the processes are being stopped or resumed.
        self._resume()
        answer = self._ask("evidence")
        answer.pop("figures", None)
        answer["judge_imported"] = self._imported
        answer["model_changes"] = [*self.witness.model_changes, *answer["model_changes"]]
        return answer

    @property
    def model_structure(self) -> list[str]:
        """Of the judge's model."""
        return describe_structure(self.runner.model, ignores_hooks=True)

    def close(self) -> None:
        """End the process, with all that it has started. It may do so by itself first."""
        self._channel.close()
        if not self._is_waiting:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        _kill(self._family())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        _adopt_orphans(False)

    # ---- how it is done --------------------------------------------------------------------------------------------

    def _ask_on_clock(self, request: str, **arguments: Any) -> dict[str, Any]:
        """As `_ask`, for what the training clock charges: its time counts on the judge's clock too."""
        self._ask("end_pause")
        cpu_before = self._cpu_seconds()
        if self._cpu_before is not None:
            # What the process has worked since the last request on the clock.
            self._add_seen("accumulated_off_clock_cpu_time", cpu_before - self._cpu_before)
        start = perf_counter()
        answer = self._ask(request, **arguments)
        seconds = perf_counter() - start
        self._cpu_before = self._cpu_seconds()
        self._add_seen("accumulated_second_clock_time", seconds)
        self._add_seen("accumulated_second_cpu_time", self._cpu_before - cpu_before)
        self._note_children()
        self._ask("begin_pause")
        return answer

    def _ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request. Raises SubmissionFailed, ProcessKilled and UserError."""
        if self._is_waiting:
            raise SubmissionFailed("the process of the submission was interrupted")
        self._is_waiting = True
        try:
            self._channel.send({"do": request, **arguments})
            answer = self._channel.receive()
        except ChannelClosed:
            raise self._end_of_process() from None
        except ValueError as error:
            raise SubmissionFailed(f"the process of the submission sent {error}") from error
        self._is_waiting = False
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "traceback" in answer:
            raise SubmissionFailed(str(answer["traceback"]), answer.get("out_of_memory"))
        if figures := answer.get("figures"):
            self._take_figures(figures)
        return answer

    def _take_figures(self, figures: dict[str, Any]) -> None:
        for column in _CHARGED:
            setattr(self.clock.elapsed, column, figures["elapsed"][column])
        if hasattr(self, "runner"):
            self.runner.counters = Counters(**figures["counters"])
        self.disturbance.seconds_per_step = list(figures["seconds_per_step"])
        self.memory.peaks["training"] = max(self.memory.peaks["training"], figures["memory"]["peak"])
        self.memory.data_bytes = figures["memory"]["data"]
        seen = {column: getattr(self.witness.counters, column) for column in _SEEN_BY_JUDGE}
        self.witness.counters = EvidenceCounters(**(figures["evidence"] | seen))

    def _load_weights(self, weights: dict[str, Any]) -> None:
        """Copy received weights into the judge's model. Raises SubmissionFailed where they do not fit."""
        expected = self.runner.model.state_dict()
        problems = [name for name in expected.keys() ^ weights.keys()]
        problems += [
            name
            for name, tensor in expected.items()
            if name in weights and (weights[name].shape, weights[name].dtype) != (tensor.shape, tensor.dtype)
        ]
        if problems:
            raise SubmissionFailed(
                f"the weights of the submission's process do not fit the model of workload={self.spec.full_name}: "
                f"{', '.join(sorted(problems)[:5])}"
            )
        self.runner.model.load_state_dict(weights)

    def _add_seen(self, column: str, seconds: float) -> None:
        """Add to a column that the judge measures itself."""
        counters = self.witness.counters
        setattr(counters, column, (getattr(counters, column) or 0.0) + max(0.0, seconds))

    def _note_children(self) -> None:
        """Add what the processes that the submission has started have worked since the last look."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                # Of those that it has waited for, which move there from their own when they end.
                total += times.children_user + times.children_system
                total += 0.0 if process.pid == self._process.pid else times.user + times.system
        self._add_seen("accumulated_children_cpu_time", total - self._children_cpu)
        self._children_cpu = max(self._children_cpu, total)

    def _cpu_seconds(self) -> float:
        with contextlib.suppress(psutil.Error):
            times = self._submission_process.cpu_times()
            return float(times.user + times.system)
        return 0.0

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Within it every process of the submission is stopped, so that nothing trains while the clock stands."""
        try:
            for process in self._family():
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            yield
        finally:
            self._resume()

    def _resume(self) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def _family(self) -> list[psutil.Process]:
        """The process of the submission and all that it has started and that still run."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            family += [self._submission_process, *self._submission_process.children(recursive=True)]
        # Those whose parent has ended have come to this process (see _start), which has children of its own too.
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child not in family and self._is_abandoned(child):
                    family += [child, *child.children(recursive=True)]
        return family

    def _is_abandoned(self, child: psutil.Process) -> bool:
        """Whether a child of this process was started by the submission. A process keeps group and environment of the
        one that started it unless it is told otherwise."""
        group = self._process.pid
        return os.getpgid(child.pid) == group or child.environ().get(MARK_VARIABLE) == str(group)

    def _end_of_process(self) -> SubmissionFailed | ProcessKilled:
        """What to raise where the process has closed its connection."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return SubmissionFailed("the process of the submission closed its connection to the judge")
        text = f"the process of the submission ended {describe_end(code)}"
        # Before the submission is there the trial has no record that could tell of a crash.
        return ProcessKilled(text) if is_kill(code) or not self._is_open else SubmissionFailed(text)


def _is_foreign(class_path: str) -> bool:
    """Whether a class is of neither torch nor Pacemark, and its module is loaded in this process."""
    module = class_path.rpartition(".")[0]
    return module in sys.modules and module.partition(".")[0] not in ("torch", "submissions", "harness")


def _has_run(path: str | None) -> bool:
    """Whether the file at `path` is loaded in this process as a module."""
    if path is None:
        return False
    return any(getattr(module, "__file__", None) == str(Path(path).resolve()) for module in list(sys.modules.values()))


AnyTraining = Training | RemoteTraining
"""In this process, or in one of its own."""


class ForkedTrainee:
    """A forked process of a submission, with what this module needs of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def wait(self, timeout: float) -> int:
        """As Popen's: the exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        try:
            status = self._process.wait(timeout)
            # None: it has been waited for already, among the processes that were ended together.
            return 0 if status is None else int(status)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired("the process of the submission", timeout) from None


# Between `fork_trainee` and the training that takes it.
_forked: tuple[ForkedTrainee, Channel] | None = None


def fork_trainee() -> None:
    """Fork the process of the submission off this one, for the next `RemoteTraining`; without it, that starts a new
    interpreter, which takes seconds to load torch.

    To be called once torch is loaded, and before anything else: no data that are held back, no use of a GPU, no
    parallel operation, none of which a forked process should have.
    """
    global _forked
    _adopt_orphans(True)
    ours, theirs = socket.socketpair()
    if pid := os.fork():
        theirs.close()
        _forked = ForkedTrainee(pid), Channel(ours)
        return
    status = 1
    try:
        ours.close()
        os.setpgid(0, 0)
        # The end of the parent's input is for the judge.
        with open(os.devnull) as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 0)
        trainee_process.main(theirs.detach())
        status = 0
    finally:
        sys.stderr.flush()
        # Never back into the judge's code.
        os._exit(status)


def _start(run: Run) -> tuple[subprocess.Popen[bytes] | ForkedTrainee, Channel]:
    """The process of the submission, and the connection to it."""
    global _forked
    if _forked is not None:
        (process, channel), _forked = _forked, None
        logger.info("the submission runs in process %d, of which this one is the judge", process.pid)
        return process, channel
    _adopt_orphans(True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(run.threads),
        "PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    ours, theirs = socket.socketpair()
    with theirs:
        # Steps of the submission are progress of the trial.
        started = launch(environment, theirs.fileno(), progress_descriptor())
    logger.info("the submission runs in process %d, of which this one is the judge", started.pid)
    return started, Channel(ours)


def _adopt_orphans(adopt: bool) -> None:
    """Let what the submission starts and abandons stay a descendant of this process, which stops and ends it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def launch(environment: dict[str, str], connection: int, progress: int | None) -> subprocess.Popen[bytes]:
    """Start harness/trial/trainee_process.py. connection, progress: descriptors that it gets."""
    if progress is not None:
        environment = environment | {PROGRESS_VARIABLE: str(progress)}
    return subprocess.Popen(
        [sys.executable, "-m", "harness.trial.trainee_process", str(connection)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
        pass_fds=[connection] if progress is None else [connection, progress],
        # Ctrl-C reaches the judge alone. A group of its own in the same session: where the judge is killed while it has
        # stopped the group, the kernel wakes and ends it.
        process_group=0,
    )


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=_END_SECONDS)
