"""Pacemark's command: train a workload with a submission until it meets the target, and leave a record.

python run.py workload=gpt2 optimizer=lion
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from harness.choices import BASE, CONFIG_DIR, GROUPS, choices, target_file, variants
from harness.config import Run, expand, load
from harness.problems import UserError
from harness.ranks import end, is_first, launched, local_rank, met

if TYPE_CHECKING:
    from rich.console import Console

USAGE = """\
Measures how fast a training algorithm reaches a fixed validation target.

  python run.py workload=NAME optimizer=NAME [KEY=VALUE ...]     one trial, or all that ruleset= asks for
  python run.py workload=NAME optimizer=NAME variant=NAME ...    on a held-out variant of the workload
  python run.py -m workload=gpt2,vit optimizer=adamw,lion ...    every combination, as one pool of trials
  python run.py -m workload=gpt2 'optimizer=glob(*lion*)'        the same for all optimizers of such a name
  python run.py --show workload=NAME optimizer=NAME ...          print the configuration, train nothing

{choices}
Any optimizer of any installed library:
  optimizer=any optimizer.class_path=torch.optim.Adagrad optimizer.hyperparameters.lr=0.02

Keys that are often set (all of them: --show)
  optimizer.hyperparameters.lr=0.01      a hyperparameter of the algorithm; its record gets a folder of its own
  schedule.horizon_fraction=0.8          length of the schedule as a share of the budget
  optimizer.clip_norm=1                  clip the global gradient norm; null for none
  ruleset=external                       tune: trials from the search space, in several studies
  ruleset.studies=3 ruleset.trials=5     how many
  executor.workers=2                     trials at a time
  seed=1                                 another study seed: other weights, data order and augmentation
  run_to_end=true                        train past the target, to the end of the budget
  pruning=exact                          stop trials that can no longer be the best of their study (docs/pruning.md)
  workload.max_steps=60                  any fact of the workload, for a quick try; marks the record as modified
  device=cuda precision=bf16 compile=true deterministic=false
  torchrun --nproc_per_node=4 run.py ...     four GPUs, or CPU processes, share each trial's micro-batches
  data=/path/to/folder                   where the data lie, if not where the workload looks
  records=FOLDER label=NAME overwrite=true

Running a command again continues what was interrupted and leaves finished trials as they are. Running it twice at once,
on this machine or on another that sees the same records, makes the two share the trials. scripts/status.py lists them.
Exit status: 0 the trial ended with a result, 1 it failed, 2 bad input, 130 interrupted.
"""


def main(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(USAGE.format(choices=_describe_choices()))
        return 0
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        if arguments[0] in ("-m", "--multirun"):
            return _run(_load_all(arguments[1:]))
        if arguments[0] == "--show":
            return _show(load(arguments[1:]))
        if unknown := [a for a in arguments if a.startswith("-")]:
            raise UserError(f"{unknown[0]}: no such option; there are --help, --show and -m, each in first place")
        return _run([load(arguments)])
    except UserError as error:
        if debug:
            traceback.print_exc()
        if is_first() or (local_rank() == 0 and not met()):  # the ranks agree on what is wrong: one says it
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first():
            print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _run(runs: list[Run]) -> int:
    # Before torch is loaded: its thread pools are sized on import.
    os.environ["OMP_NUM_THREADS"] = str(runs[0].threads)
    from rich.console import Console

    from harness import executors, ledger, machine, study
    from harness.environment import device_of
    from harness.progress import PoolProgress, print_studies

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is like Ctrl-C
    console = Console(highlight=False, quiet=not is_first())
    if len({str(run.executor) for run in runs}) > 1:
        raise UserError("executor: one for all runs of a sweep; it cannot be swept")
    if runs[0].executor.name != "local" and runs[0].machine == "auto":
        raise UserError(
            f"executor={runs[0].executor.name}: the machine that will train cannot be seen from here; "
            "name its folder of records with machine=NAME"
        )
    for run in runs:
        if any(seed in study.TARGET_SEEDS for seed, _ in study.trials_of(run)):
            first, last = study.TARGET_SEEDS[0], study.TARGET_SEEDS[-1]
            raise UserError(
                f"seed={run.seed}: the seeds {first} to {last} serve the measurement of targets; take another"
            )
    folder = machine.folder_of(device_of(runs[0]), runs[0].threads)
    if launched():
        return _run_together(runs, folder, console)
    if runs[0].executor.name == "local":
        entries = ledger.trials_of(runs, folder)
        if len(entries) == 1:
            return _run_here(entries[0].run.model_copy(update={"overwrite": runs[0].overwrite}), console)[0]
        _check_data(runs)
    entries = ledger.plan(runs, folder)
    with PoolProgress(console, entries):
        executors.execute(entries, lambda line: console.print(line, style="yellow", markup=False))
    states = print_studies(console, entries)
    return 1 if any(state in ("failed", "out_of_memory") for state in states) else 0


def _run_together(runs: list[Run], folder: str, console: Console) -> int:
    """One process of several that a launcher started: one trial after the other, each shared by all."""
    from harness import ledger
    from harness.progress import print_studies

    if runs[0].executor.name != "local" or runs[0].executor.workers > 1:
        raise UserError("executor: several processes share one trial at a time; leave executor= and its keys out")
    entries = ledger.trials_of(runs, folder)
    if len(entries) > 1 and is_first():
        ledger.plan(runs, folder)
    code = 0
    for entry in entries:
        ended, ran = _run_here(entry.run.model_copy(update={"overwrite": runs[0].overwrite}), console)
        if ran and ended:
            # The ranks have lost each other; nothing that waits for them could come to an end.
            if entry is not entries[-1]:
                console.print("The same command goes on with the trials that are left.", style="yellow")
            return end(ended, wait=False)
        code = max(code, ended)
    if len(entries) > 1 and is_first():
        print_studies(console, entries)
    return end(code)


def _check_data(runs: list[Run]) -> None:
    """Load the data of every workload once, so that what is missing is said before anything is planned."""
    from harness.environment import device_of
    from harness.trial import load_workload

    checked: list[tuple[str, object, str]] = []
    for run in runs:
        what = (run.facts.class_path, run.facts.data, run.data)
        if what not in checked:
            load_workload(run, device_of(run))
            checked.append(what)


def _run_here(run: Run, console: Console) -> tuple[int, bool]:
    """The exit status for how the trial ended, and whether it ended now rather than before."""
    from harness.progress import ProgressLine, print_summary
    from harness.record import Status
    from harness.tracker import make_tracker
    from harness.trial import Observer, run_trial

    line = ProgressLine(console)
    tracker = make_tracker(run)

    def observers() -> list[Observer]:
        return [line] if tracker is None else [line, tracker]

    try:
        record, ran = run_trial(run, observers)
    finally:
        line.close()
    if not ran:
        console.print("This trial is finished already; nothing was changed (overwrite=true replaces it).")
    if is_first():
        print_summary(console, record)
    if record.status is Status.STOPPED:
        return 130, ran
    return int(record.status in (Status.FAILED, Status.OUT_OF_MEMORY)), ran


def _load_all(arguments: list[str]) -> list[Run]:
    """The runs of a sweep; UserError with the problems of all."""
    runs: list[Run] = []
    problems: list[str] = []
    for one in expand(arguments):
        try:
            runs.append(load(one))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(dict.fromkeys(problems))
    return runs


def _show(run: Run) -> int:
    shown = run.model_dump(mode="json", exclude={"modified", "shipped"})
    shown["optimizer"]["hyperparameters"] = run.optimizer.effective_hyperparameters
    print(OmegaConf.to_yaml(shown), end="")
    known = ", ".join([BASE, *variants(run.facts.name, run.scale.name)])
    print(f"# variant={run.facts.variant or BASE}, of {known}")
    return 0


def _describe_choices() -> str:
    lines = []
    for group in GROUPS:
        lines.append(f"{group}=")
        for choice in choices(group):
            lines.append(f"  {choice:<23}{_description(CONFIG_DIR / group / f'{choice}.yaml')}")
        if group == "scale":
            lines += [
                "variant=",
                f"  {BASE:<23}the workload itself; the others change it, most are held out",
            ]
            for workload, scale in itertools.product(choices("workload"), choices("scale")):
                for variant in variants(workload, scale):
                    text = _description(target_file(workload, scale, variant))
                    lines.append(f"  {variant:<23}{workload} at scale={scale}: {text}")
    return "\n".join(lines) + "\n"


def _description(path: Path) -> str:
    found = re.search(r"^(?:description:|#) *(.*)$", path.read_text(), re.MULTILINE)
    return found.group(1) if found else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
