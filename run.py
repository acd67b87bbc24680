"""Pacemark's command: train a workload with a submission until it meets the target, and leave a record.

python run.py workload=gpt2 optimizer=lion
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import traceback

from omegaconf import OmegaConf

from harness.config import CONFIG_DIR, GROUPS, Run, choices, expand, load
from harness.problems import UserError

USAGE = """\
Measures how fast a training algorithm reaches a fixed validation target.

  python run.py workload=NAME optimizer=NAME [KEY=VALUE ...]     one trial
  python run.py -m workload=gpt2,vit optimizer=adamw,lion ...    every combination, one after the other
  python run.py --show workload=NAME optimizer=NAME ...          print the configuration, train nothing

{choices}
Any optimizer of any installed library:
  optimizer=any optimizer.class_path=torch.optim.Adagrad optimizer.hyperparameters.lr=0.02

Keys that are often set (all of them: --show)
  optimizer.hyperparameters.lr=0.01      a hyperparameter of the algorithm; its record gets a folder of its own
  schedule.horizon_fraction=0.8          length of the schedule as a share of the budget
  optimizer.clip_norm=1                  clip the global gradient norm; null for none
  seed=1                                 another study seed: other weights, data order and augmentation
  run_to_end=true                        train past the target, to the end of the budget
  workload.max_steps=60                  any fact of the workload, for a quick try; marks the record as modified
  device=cuda precision=bf16 compile=true deterministic=false
  data=/path/to/folder                   where the data lie, if not where the workload looks
  records=FOLDER label=NAME overwrite=true

Running a command again continues an interrupted trial and leaves a finished one as it is.
Exit status: 0 the trial ended with a result, 1 it failed, 2 bad input, 130 interrupted.
"""


def main(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE.format(choices=_describe_choices()))
        return 0
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        if arguments[0] in ("-m", "--multirun"):
            return _sweep(arguments[1:])
        if arguments[0] == "--show":
            return _show(load(arguments[1:]))
        if unknown := [a for a in arguments if a.startswith("-")]:
            raise UserError(f"{unknown[0]}: no such option; there are --help, --show and -m, each in first place")
        return _run_one(load(arguments))
    except UserError as error:
        if debug:
            traceback.print_exc()
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _run_one(run: Run) -> int:
    # Before torch is loaded: its thread pools are sized on import.
    os.environ["OMP_NUM_THREADS"] = str(run.threads)
    from rich.console import Console

    from harness.progress import ProgressLine, print_summary
    from harness.record import Status
    from harness.tracker import make_tracker
    from harness.trial import Observer, run_trial

    console = Console(highlight=False)
    line = ProgressLine(console)
    tracker = make_tracker(run)

    def observers() -> list[Observer]:
        return [line] if tracker is None else [line, tracker]

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is like Ctrl-C
    try:
        record, ran = run_trial(run, observers)
    finally:
        line.close()
    if not ran:
        console.print("This trial is finished already; nothing was changed (overwrite=true replaces it).")
    print_summary(console, record)
    if record.status is Status.STOPPED:
        return 130
    return 1 if record.status in (Status.FAILED, Status.OUT_OF_MEMORY) else 0


def _sweep(arguments: list[str]) -> int:
    """Every combination in a process of its own, so that each runs in the environment of a single trial."""
    runs = expand(arguments)
    problems: list[str] = []
    for run in runs:
        try:
            load(run)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(dict.fromkeys(problems))
    worst = 0
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {' '.join(run)}", flush=True)
        status = subprocess.run([sys.executable, __file__, *run]).returncode
        if status == 130 or status < 0:
            return 130
        worst = max(worst, status)
    return worst


def _show(run: Run) -> int:
    shown = run.model_dump(mode="json", exclude={"modified", "shipped"})
    shown["optimizer"]["hyperparameters"] = run.optimizer.effective_hyperparameters
    print(OmegaConf.to_yaml(shown), end="")
    return 0


def _describe_choices() -> str:
    lines = []
    for group in GROUPS:
        lines.append(f"{group}=")
        for choice in choices(group):
            text = (CONFIG_DIR / group / f"{choice}.yaml").read_text()
            found = re.search(r"^(?:description:|#) *(.*)$", text, re.MULTILINE)
            lines.append(f"  {choice:<14}{found.group(1) if found else ''}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
