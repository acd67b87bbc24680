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

from harness.command_line import run_script
from harness.config.choices import (
    BASE_VARIANT,
    EXPERIMENT_GROUP,
    GROUPS,
    add_user_config_dir,
    config_files,
    list_choices,
    list_variants,
    target_file,
)
from harness.config.compose import expand_sweep, load_run
from harness.config.options import parse_options
from harness.config.schema import Run
from harness.errors import UserError
from harness.log import take_verbosity
from harness.processes import is_launched, is_main_process, local_rank, make_working_folder_importable
from harness.version import package_version

if TYPE_CHECKING:
    from rich.console import Console

    from harness.study.ledger import TrialState

# Modules that bring torch are imported inside the functions below: --help need not wait for it, and its thread pools
# are sized on import, after OMP_NUM_THREADS is set.

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
  ruleset=confirmed                      tune once, then measure the best point on fresh seeds
  executor.workers=2                     trials at a time
  seed=1                                 another study seed: other weights, data order and augmentation
  run_to_end=true                        train past the target, to the end of the budget
  pruning=exact                          stop trials that can no longer be the best of their study (docs/pruning.md)
  workload.max_steps=60                  any fact of the workload, for a quick try; marks the record as modified
  device=cuda precision=bf16 compile=true deterministic=false
  torchrun --nproc_per_node=4 run.py ...     four GPUs, or CPU processes, share each trial's micro-batches
  data=/path/to/folder                   where the data lie, if not where the workload looks
  records=FOLDER label=NAME overwrite=true

Running a command again continues what was interrupted and leaves finished trials as they are. Running it twice at the
same time, on this machine or on another that sees the same records, makes the two share the trials. scripts/status.py
lists them, and shows them while they run (--watch). -v or -vv, anywhere, logs what happens behind the display.
Exit status: 0 the trial ended with a result, 1 it failed, 2 bad input, 130 interrupted.
"""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    debug = "debug=true" in (argument.lower() for argument in arguments)
    try:
        options = parse_options(take_verbosity(arguments))
        for folder in options.config_dirs:
            add_user_config_dir(folder)
        if options.version:
            print(f"pacemark {package_version()}")
            return 0
        if options.help or not arguments:
            print(USAGE.format(choices=_describe_choices()))
            return 0
        make_working_folder_importable()
        if options.show:
            return _show(load_run(options.overrides))
        return _run(_load_sweep(options.overrides) if options.multirun else [load_run(options.overrides)])
    except UserError as error:
        if debug:
            traceback.print_exc()
        if _prints_errors():
            for message in error.messages:
                print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _prints_errors() -> bool:
    """Whether this process prints what is wrong. Once the ranks are connected they agree on it, and rank 0 prints it;
    before that, the first process of each machine does."""
    if is_main_process():
        return True
    from harness.trial.distributed import is_initialized

    return local_rank() == 0 and not is_initialized()


def _run(runs: list[Run]) -> int:
    """Run the trials of a command, here if there is just one and otherwise as a pool; returns the exit status."""
    # Before the imports below, which bring torch.
    os.environ["OMP_NUM_THREADS"] = str(runs[0].threads)
    from harness.display import make_console
    from harness.records.status import CRASHED
    from harness.study import ledger

    # A scheduler's stop is like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = make_console(quiet=not is_main_process())
    _check_runs(runs)
    machine = _find_machine(runs)
    if is_launched():
        return _run_on_ranks(runs, machine, console)
    is_confirmed = runs[0].ruleset.tuning is not None
    if runs[0].executor.name == "local":
        trials = ledger.enumerate_trials(runs, machine) if not is_confirmed else []
        # A single trial needs neither a plan nor workers, and its progress line shows in this terminal.
        # A judge is of a process that has not imported the submission, as this one has to check the configuration.
        if len(trials) == 1 and trials[0].run.judge != "process":
            code, _ = _run_here(trials[0].run.model_copy(update={"overwrite": runs[0].overwrite}), console)
            return code
        _check_data(runs)
    if is_confirmed:
        return _run_confirmed(runs, machine, console)
    states = _run_pool(runs, machine, console)
    return int(any(not state.is_over or state.name in CRASHED for state in states))


def _run_confirmed(runs: list[Run], machine: str, console: Console) -> int:
    """The stages of a ruleset that confirms, each as a pool; returns the exit status."""
    from harness.records.status import CRASHED
    from harness.study.confirmed import confirm, power_sentence

    def report(line: str) -> None:
        console.print(line, markup=False)

    def run_stage(of_stage: list[Run]) -> bool:
        return all(state.is_over for state in _run_pool(of_stage, machine, console))

    report(power_sentence(runs))
    confirmed = confirm(runs, machine, run_stage, report)
    if confirmed is None:
        return 1
    states = _run_pool(confirmed, machine, console)
    return int(any(not state.is_over or state.name in CRASHED for state in states))


def _run_pool(runs: list[Run], machine: str, console: Console) -> list[TrialState]:
    """Plan the trials and run the unfinished ones as a pool; their states after it."""
    from rich.text import Text

    from harness.records.kills import KILL_LIMIT, count_kills, last_cause
    from harness.study import executors, ledger
    from harness.study.progress import PoolProgress, print_studies

    trials = ledger.plan(runs, machine)
    with PoolProgress(console, trials):
        # A text with a style, since style= would colour the live display below the line too.
        executors.execute(trials, lambda line: console.print(Text(line, style="yellow")))
    states = print_studies(console, trials)
    left = sum(not state.is_over for state in states)
    for trial, state in zip(trials, states, strict=True):
        if not state.is_over and (kills := count_kills(trial.path)) >= KILL_LIMIT:
            remedy = "where memory ran out, a smaller executor.workers helps"
            cause = last_cause(trial.path) or "its process was killed"
            text = f"{trial.name}: {cause}, {kills} times without a new checkpoint; {remedy}"
            console.print(Text(text, style="yellow"))
    if left:
        console.print(f"{left} trials are left; the same command continues", style="yellow")
    return list(states)


def _check_runs(runs: list[Run]) -> None:
    """Raise UserError for what no executor can run."""
    from harness.config.confirmation import CONFIRMED_SEEDS
    from harness.config.study_trials import TARGET_SEEDS, list_trials

    if any(run.ruleset.tuning is not None for run in runs):
        from harness.study.confirmed import check_confirmed

        check_confirmed(runs)
        if is_launched():
            raise UserError(
                f"ruleset={runs[0].ruleset.name}: its stages are pools of trials, and a launcher's processes share one "
                "trial; start it without the launcher"
            )
    if len({str(run.executor) for run in runs}) > 1:
        raise UserError("executor: one for all runs of a sweep; it cannot be swept")
    # A folder of records is of one machine, and both are part of its name.
    if len({(run.device, run.threads) for run in runs}) > 1:
        raise UserError("device, threads: one for all runs of a sweep; start a command for each")
    if runs[0].executor.name != "local" and runs[0].device.startswith("cuda:"):
        raise UserError(
            f"device={runs[0].device}: names a GPU of one machine, and executor={runs[0].executor.name} gives every "
            "worker a GPU; use device=cuda"
        )
    if runs[0].executor.name != "local" and runs[0].machine == "auto":
        raise UserError(
            f"executor={runs[0].executor.name}: the machine that will train cannot be seen from here; "
            "name its folder of records with machine=NAME"
        )
    for run in runs:
        if any(seed in TARGET_SEEDS for seed, _ in list_trials(run)):
            raise UserError(
                f"seed={run.seed}: the seeds {TARGET_SEEDS[0]} to {TARGET_SEEDS[-1]} serve the measurement of targets; "
                "take another"
            )
        if any(seed in CONFIRMED_SEEDS for seed, _ in list_trials(run)):
            raise UserError(
                f"seed={run.seed}: the seeds {CONFIRMED_SEEDS[0]} to {CONFIRMED_SEEDS[-1]} are kept for "
                "ruleset=confirmed, so that nobody has seen them before; take another"
            )


def _run_on_ranks(runs: list[Run], machine: str, console: Console) -> int:
    """In one process of several that a launcher started: one trial after the other, each shared by all."""
    from harness.study import ledger
    from harness.study.progress import print_studies
    from harness.trial.distributed import shutdown

    if runs[0].executor.name != "local" or runs[0].executor.workers > 1:
        raise UserError("executor: several processes share one trial at a time; leave executor= and its keys out")
    trials = ledger.enumerate_trials(runs, machine)
    # One process writes the plan; the others have the same list from the same command.
    if len(trials) > 1 and is_main_process():
        ledger.plan(runs, machine)
    code = 0
    for trial in trials:
        trial_code, ran = _run_here(trial.run.model_copy(update={"overwrite": runs[0].overwrite}), console)
        if ran and trial_code:
            # The ranks have lost each other; nothing that waits for them could come to an end.
            if trial is not trials[-1]:
                console.print("The same command goes on with the trials that are left.", style="yellow")
            return shutdown(trial_code, wait=False)
        code = max(code, trial_code)
    if len(trials) > 1 and is_main_process():
        print_studies(console, trials)
    return shutdown(code)


def _find_machine(runs: list[Run]) -> str:
    """The name of the machine's folder of records. Raises UserError where a trial that runs here has no such device."""
    from harness.config.study_trials import list_trials
    from harness.study.machine import find_machine_folder
    from harness.trial.environment import resolve_device, select_device
    from harness.trial.hardware import machine_folder

    first = runs[0]
    # The nodes of a cluster have devices of their own.
    if first.executor.name != "local":
        return first.machine
    for run in runs:
        resolve_device(run)
    number = sum(len(list_trials(run)) for run in runs)
    # A single trial runs in this process, which may as well ask the GPU itself.
    if number == 1:
        return machine_folder(select_device(first), first.threads)
    return find_machine_folder(first, min(first.executor.workers, number))


def _check_data(runs: list[Run]) -> None:
    """Load the data of every workload once, so that missing data are reported before anything is planned. Onto the CPU:
    what a GPU held would stay allocated for as long as the trials run."""
    import torch

    from harness.trial.trial import load_workload

    checked: list[tuple[str, object, str]] = []
    for run in runs:
        data = (run.spec.class_path, run.spec.data, run.data)
        # A sweep has many runs on the same data, and loading them takes long.
        if data not in checked:
            load_workload(run, torch.device("cpu"))
            checked.append(data)


def _run_here(run: Run, console: Console) -> tuple[int, bool]:
    """Run a trial in this process; the exit status for how it ended, and whether it ended now rather than before."""
    from harness.records.status import Status
    from harness.study.stop_rule import make_should_stop
    from harness.trial.progress import ProgressLine, print_summary
    from harness.trial.trackers import make_tracker
    from harness.trial.trial import Observer, run_trial

    line = ProgressLine(console)
    tracker = make_tracker(run)

    def make_observers() -> list[Observer]:
        return [line] if tracker is None else [line, tracker]

    try:
        record, ran = run_trial(run, make_observers, make_should_stop=make_should_stop)
    finally:
        line.close()
    if not ran:
        console.print("This trial is finished already; nothing was changed (overwrite=true replaces it).")
    if is_main_process():
        print_summary(console, record)
    if record.status is Status.STOPPED:
        return 130, ran
    return int(record.status is not None and record.status.is_crash), ran


def _load_sweep(arguments: list[str]) -> list[Run]:
    """The runs of a sweep; raises UserError with the problems of all."""
    runs: list[Run] = []
    messages: list[str] = []
    for combination in expand_sweep(arguments):
        try:
            runs.append(load_run(combination))
        except UserError as error:
            messages += error.messages
    if messages:
        # Without repetition, since a mistake is found in every combination that has it.
        raise UserError(dict.fromkeys(messages))
    return runs


def _show(run: Run) -> int:
    shown = run.model_dump(mode="json", exclude={"modified", "shipped"})
    shown["optimizer"]["hyperparameters"] = run.optimizer.effective_hyperparameters
    print(OmegaConf.to_yaml(shown), end="")
    known = ", ".join([BASE_VARIANT, *list_variants(run.spec.name, run.scale.name)])
    print(f"# variant={run.spec.variant or BASE_VARIANT}, of {known}")
    return 0


def _describe_choices() -> str:
    """The files of configs/ and the variants of workloads, with a line on each, as --help lists them."""
    lines = []
    for group in (*GROUPS, EXPERIMENT_GROUP):
        choices = list_choices(group)
        if choices:
            lines.append(f"{'+' if group == EXPERIMENT_GROUP else ''}{group}=")
        for choice in choices:
            lines.append(f"  {choice:<23}{_description(config_files(group, choice)[0])}")
        if group == "scale":
            lines.append("variant=")
            lines.append(f"  {BASE_VARIANT:<23}the workload itself; the others change it, most are held out")
            for workload, scale in itertools.product(list_choices("workload"), list_choices("scale")):
                for variant in list_variants(workload, scale):
                    text = _description(target_file(workload, scale, variant))
                    lines.append(f"  {variant:<23}{workload} at scale={scale}: {text}")
    return "\n".join(lines) + "\n"


def _description(path: Path) -> str:
    """The description of a config file, or the comment in its place."""
    match = re.search(r"^(?:description:|#(?! *@)) *(.*)$", path.read_text(), re.MULTILINE)
    return match.group(1) if match else ""


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
