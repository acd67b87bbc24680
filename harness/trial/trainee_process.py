"""The process of the submission where a judge stands beside it (judge=process).

    python -m harness.trial.trainee_process DESCRIPTOR

It does what the judge (harness/trial/remote_training.py) asks, one request after the other, and answers each with
figures. It never holds held-back data, knows no record, and is stopped while the judge evaluates.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from time import process_time
from typing import Any

from harness import log
from harness.processes import MARK_VARIABLE, PROGRESS_VARIABLE, STACK_SIGNAL, make_working_folder_importable

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve the judge until it closes the connection."""
    _die_with_judge()
    # Ctrl-C is for the judge, which ends this process. A forked one has inherited what the judge blocks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    progress_pipe = os.environ.pop(PROGRESS_VARIABLE, None)
    # By it the judge knows what this process starts and abandons.
    os.environ[MARK_VARIABLE] = str(os.getpid())
    log.send_to_parent()
    from harness.trial.channel import Channel, ChannelClosed
    from harness.trial.liveness import send_progress_to

    if progress_pipe is not None:
        os.set_inheritable(int(progress_pipe), False)
        send_progress_to(int(progress_pipe))
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    channel = Channel(connection)
    make_working_folder_importable()
    with contextlib.closing(Trainee()) as trainee, contextlib.suppress(ChannelClosed):
        while True:
            request = channel.receive()
            try:
                answer = trainee.answer(request)
            except BaseException as error:
                # Whatever the submission raises, SystemExit too, is for the judge to tell.
                answer = _describe_error(error)
            channel.send(answer)


def _die_with_judge() -> None:
    """Let the kernel end this process with the judge, also while it is stopped."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _describe_error(error: BaseException) -> dict[str, Any]:
    from harness.errors import UserError
    from harness.trial.outcome import out_of_memory_cause

    if isinstance(error, UserError):
        return {"user_error": list(error.messages)}
    cause = out_of_memory_cause(error)
    return {"traceback": traceback.format_exc(), "out_of_memory": None if cause is None else str(cause)}


class Trainee:
    """The answers to the judge's requests."""

    def __init__(self) -> None:
        self._weights: AbstractContextManager[None] | None = None
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Remove what the process has put beside it."""
        self._stack.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what `request["do"]` names, with the rest of the request as arguments; its result and the figures."""
        arguments = dict(request)
        method: Callable[..., dict[str, Any]] = getattr(self, f"_do_{arguments.pop('do')}")
        result = method(**arguments)
        return result | {"figures": self._figures()}

    def _do_open(self, run: dict[str, Any]) -> dict[str, Any]:
        from harness.config.schema import Run
        from harness.interface.needs import Need
        from harness.trial.environment import configure_torch, private_compiler_cache, select_device
        from harness.trial.training import Training
        from harness.trial.trial import load_workload
        from harness.trial.witness import Notes, listen, module_files

        self._run = Run(**run)
        device = select_device(self._run)
        configure_torch(self._run, device)
        # Before the submission is imported: it finds the training data alone.
        data_notes = Notes()
        with listen(data_notes):
            workload = load_workload(self._run, device)
        workload.discard_held_back()
        before = process_time()
        self._training = Training(self._run, workload, device)
        self._import_cpu_seconds = process_time() - before
        self._training.witness.owns_process = True
        self._training.witness.notes.data_files = data_notes.every_file - module_files()
        self._stack.enter_context(private_compiler_cache(Need.OWN_COMPILATION in self._training.needs))
        return {
            "needs": sorted(need.name for need in self._training.needs),
            "remarks": self._training.remarks,
            "fingerprint": workload.fingerprint,
            "train_size": workload.train_size,
        }

    def _do_build_model(self) -> dict[str, Any]:
        from harness.trial.witness import listen

        self._training.build_model()
        if self._training.witness.listens:
            # From here on nothing but the submission has a reason to open a file.
            self._stack.enter_context(listen(self._training.witness.notes))
        return {"initial_weights_sha256": self._training.initial_weights_sha256}

    def _do_end_pause(self) -> dict[str, Any]:
        self._training.witness.end_pause()
        return {}

    def _do_begin_pause(self) -> dict[str, Any]:
        self._training.witness.begin_pause()
        return {}

    def _do_build_submission(self, charge_compile: bool) -> dict[str, Any]:
        self._training.build_submission(charge_compile=charge_compile)
        return {}

    def _do_note_built_weights(self) -> dict[str, Any]:
        return {"built_weights_sha256": self._training.note_built_weights()}

    def _do_load(self, state: dict[str, Any]) -> dict[str, Any]:
        self._training.load_state_dict(state)
        return {}

    def _do_segment(self, goal: int, charge_compile: bool) -> dict[str, Any]:
        return {"loss": self._training.measured_segment(goal, charge_compile)}

    def _do_enter_evaluation(self) -> dict[str, Any]:
        self._weights = self._training.submission.evaluation_weights()
        self._training.enter_evaluation(self._weights)
        return {}

    def _do_send_weights(self) -> dict[str, Any]:
        return {"weights": self._training.runner.model.state_dict()}

    def _do_leave_evaluation(self) -> dict[str, Any]:
        assert self._weights is not None
        self._training.leave_evaluation(self._weights)
        return {}

    def _do_record_summary(self) -> dict[str, Any]:
        return {"summary": self._training.record_summary()}

    def _do_state_bytes(self) -> dict[str, Any]:
        return {"bytes": self._training.state_bytes()}

    def _do_state(self) -> dict[str, Any]:
        return {"state": self._training.state_dict()}

    def _do_weights_sha256(self) -> dict[str, Any]:
        return {"sha256": self._training.weights_sha256()}

    def _do_evidence(self) -> dict[str, Any]:
        return self._training.collect_evidence() | {"import_cpu_seconds": self._import_cpu_seconds}

    def _figures(self) -> dict[str, Any]:
        training = getattr(self, "_training", None)
        if training is None or not hasattr(training, "runner"):
            return {}
        return {
            "elapsed": asdict(training.clock.elapsed),
            "counters": asdict(training.runner.counters),
            "seconds_per_step": training.disturbance.seconds_per_step,
            "memory": {"peak": training.memory.peaks["training"], "data": training.memory.data_bytes},
            "evidence": asdict(training.witness.counters),
        }


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stderr.flush()
    # Without the end of the interpreter, which takes long, and in which the submission could run code.
    os._exit(0)
