"""The command `pacemark`: one word for each of the commands of the folder scripts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from harness.command_line import run_script

# First, since in an installed package it makes `harness` and `scripts` importable.
from harness.config.choices import add_user_config_dir
from harness.errors import UserError, did_you_mean
from harness.processes import make_working_folder_importable
from harness.version import package_version

COMMANDS = {
    "run": "train a workload with a submission until it meets the target, or a whole study",
    "status": "what a folder of records holds: trials planned, running, finished, and the time left",
    "compare": "is submission A faster than B? a verdict with its uncertainty",
    "confirm": "which differences seeds will find, and what confirmed settings and their tuning are worth",
    "leaderboard": "a leaderboard from records: tables and a page",
    "audit": "what in records contradicts itself, the configs or the other records",
    "timing": "time submissions alternately on this machine, for seconds that compare",
    "conformance": "check what every submission must do, in seconds",
    "search-space": "what a tuner may try with a submission",
    "prepare-data": "fetch and prepare data sets",
    "records": "pack, unpack and show records",
    "replay": "replay records through an early stopping policy",
    "refine-schedule": "a schedule from the gradient norms of a recorded trial",
    "set-targets": "measure the target of a workload",
}
"""Each with what it does; the module is scripts/<name>.py, with underscores."""

USAGE = """\
Pacemark measures how fast training algorithms reach a target.

  pacemark run workload=gpt2 optimizer=lion
  pacemark COMMAND --help

{commands}
  {completion:<17}print a script that completes commands, keys and names in bash or zsh

Options, in any place: --config-dir FOLDER   take configs of your own from FOLDER too (FOLDER/optimizer/mine.yaml)
                       --version
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands and return its exit status: 2 with a message after bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run_script(_main, arguments)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<17}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=commands, completion="completion SHELL"), end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"pacemark {package_version()}")
        return 0
    # Before the command too, as in `pacemark --config-dir configs run ...`.
    arguments = _take_config_dirs(arguments)
    name, *rest = arguments or ["--config-dir"]
    if name == "completion":
        # Brings Hydra's parser, which the other commands need not wait for.
        from pacemark.completion import completion_script

        print(completion_script(rest, list(COMMANDS)), end="")
        return 0
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command; {did_you_mean(name, [*COMMANDS, 'completion'])}")
    make_working_folder_importable()
    # The name that argparse shows in usage and errors.
    sys.argv[0] = f"pacemark {name}"
    command = importlib.import_module(f"scripts.{name.replace('-', '_')}")
    return int(command.main(rest))


def _take_config_dirs(arguments: list[str]) -> list[str]:
    """The arguments without --config-dir, whose folders are noted for this process and those that it starts."""
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--config-dir", "-cd"):
            rest.append(word)
            continue
        folder = value if equals else next(words, None)
        if not folder:
            raise UserError(f"{option}: a folder is missing")
        add_user_config_dir(Path(folder))
    return rest
