"""The machine on which the trials of a command run: its GPUs, and the name of its folder of records.

A command that starts trials in processes of their own opens no CUDA context itself. A context takes some 500 MB of the
GPU for as long as the command lives, and where GPUs are in exclusive mode it would lock the trials out. So a GPU is
described by a short child process, which this module is the program of:

    python -m harness.study.machine < {"run": ..., "gpus": ...}      prints a list of descriptions as JSON
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from typing import Any

from harness import log
from harness.config.schema import Run
from harness.errors import UserError
from harness.processes import SOURCE_ROOT, is_launched
from harness.records.layout import machine_folder_name

logger = logging.getLogger(__name__)

CHILD_SECONDS = 300.0
"""How long the description of a GPU may take: torch is loaded, possibly from a slow file system."""


def find_machine_folder(run: Run, workers: int) -> str:
    """The name of the folder of records of this machine, for trials of `run` that so many workers run.

    No CUDA context is opened in this process, unless it is one of several ranks, which trains itself. Raises UserError
    where the device is not there, and where the workers' GPUs are of different kinds.
    """
    from harness.trial.environment import resolve_device
    from harness.trial.hardware import machine_folder

    device = resolve_device(run)
    # A name that the user gave needs no description.
    if run.machine != "auto":
        return run.machine
    if device.type != "cuda" or is_launched():
        return machine_folder(device, run.threads)
    folders = list(dict.fromkeys(machine_folder_name(description) for description in _describe_in_child(run, workers)))
    if len(folders) > 1:
        raise UserError(
            f"executor.workers={workers}: the GPUs are of different kinds ({', '.join(folders)}), whose seconds do not "
            "belong together; name those of one kind in CUDA_VISIBLE_DEVICES, or the folder of records with machine="
        )
    return folders[0]


def list_visible_gpus() -> list[str]:
    """The GPUs that processes of this machine can use, each as CUDA_VISIBLE_DEVICES names it: by number, or by the
    UUID of a GPU or of a part of one. Opens no CUDA context."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = parse_visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if named is None:
        return [str(number) for number in range(count)]
    # A process sees one part of a GPU at most, but each of several processes can have one.
    if count and named and named[0].startswith("MIG-"):
        return named
    # CUDA hides whatever follows a GPU that is not there.
    return named[:count]


def parse_visible_devices(text: str | None) -> list[str] | None:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES names, as CUDA reads it; None where it is not set.

    It ends at the first name that is none, such as -1, and a name that is repeated hides all.
    """
    if text is None:
        return None
    first = text.strip()
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if first.startswith(prefix)), None)
    names: list[str] = []
    for entry in text.split(","):
        entry = entry.strip()
        if prefix is not None:
            name = entry if entry.startswith(prefix) else None
        else:
            # As strtoul reads it: the digits that it begins with.
            digits = re.match(r"\+?(\d+)", entry)
            name = str(int(digits[1])) if digits else None
        if name is None:
            break
        if name in names:
            return []
        names.append(name)
    return names


def _describe_in_child(run: Run, gpus: int) -> list[dict[str, Any]]:
    """What `describe_machine` returns in a process of its own, for each of the first `gpus` GPUs that trials use."""
    request = json.dumps({"run": run.model_dump(mode="json"), "gpus": gpus})
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    command = [sys.executable, "-m", "harness.study.machine"]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, errors="replace", env=environment,
            timeout=CHILD_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"device={run.device}: the GPU did not answer within {CHILD_SECONDS:g} s; look whether `nvidia-smi` does, "
            "or use device=cpu"
        ) from error
    lines = done.stderr.strip().splitlines()
    messages = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if done.returncode == 2 and messages:
        raise UserError(messages)
    if done.returncode != 0:
        logger.info("the description of the GPU failed:\n%s", done.stderr)
        reason = lines[-1] if lines else f"status {done.returncode}"
        raise UserError(f"device={run.device}: the GPU cannot be described ({reason}); use device=cpu, or mend it")
    # The last line, since a library may print lines of its own.
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> int:
    """Run in the child: read the request, print the descriptions, and return the exit status."""
    log.configure()
    request: dict[str, Any] = json.load(sys.stdin)
    import torch

    from harness.trial.environment import resolve_device
    from harness.trial.hardware import describe_machine

    run = Run(**request["run"])
    try:
        device = resolve_device(run)
    except UserError as error:
        for message in error.messages:
            print(f"error: {message}", file=sys.stderr)
        return 2
    devices = [device]
    # Workers share out all GPUs, unless one of them is named.
    if device.type == "cuda" and run.device in ("auto", "cuda"):
        devices = [torch.device("cuda", i) for i in range(min(request["gpus"], torch.cuda.device_count()))]
    print(json.dumps([describe_machine(device, run.threads) for device in devices]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
