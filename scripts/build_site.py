"""Build the site: README, docs/, the reference, every board, and a page for each algorithm.

    python scripts/build_site.py [--out FOLDER] [--without-boards]

Repeats the command of each results/*/leaderboard/LEADERBOARD.md into build/boards, writes a list of the boards, makes
the pages of the algorithms from the committed records in build/algorithms, and runs `mkdocs build --strict`. Needs `pip
install -e '.[site]'`. In the environment: REPOSITORY_URL, where links to source files lead (without it they are plain
text), and SITE_URL. --out: default build/site. --without-boards leaves out what is made from records.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.board.algorithm_page import format_index, format_page
from harness.board.algorithm_table import describe_algorithm, read_times
from harness.command_line import run_script
from harness.config.choices import TEMPLATES, list_choices
from harness.errors import UserError
from harness.review.settings import MIXABLE
from harness.scoring.load_records import load_records
from harness.trial.state_size import count_state

ROOT = Path(__file__).parents[1]
BOARDS = ROOT / "build" / "boards"
ALGORITHMS = ROOT / "build" / "algorithms"
BASELINE = "adamw"
RECORDS = {"quick": ["results/untuned/records", "results/recipes/records"], "external": ["results/external/records"]}
"""Records that the pages of algorithms show, by ruleset."""
COMMAND = "    python scripts/leaderboard.py "


@dataclass(frozen=True)
class Board:
    """A committed board."""

    name: str
    """Its folder in results/."""
    title: str
    arguments: list[str]
    """Of scripts/leaderboard.py."""
    submissions: int
    scales: list[str]
    rulesets: list[str]

    @classmethod
    def read(cls, folder: Path) -> Board:
        """From results/<name>/leaderboard. Raises UserError if it does not say which command made it."""
        lines = (folder / "LEADERBOARD.md").read_text().splitlines()
        commands = [line for line in lines if line.startswith(COMMAND)]
        if len(commands) != 1:
            raise UserError(f"{folder / 'LEADERBOARD.md'} does not name the one command that makes it")
        arguments = shlex.split(commands[0])[2:]
        records = [ROOT / argument for argument in arguments[: arguments.index("--out")] if _is_records(argument)]
        scale, ruleset = (_option(arguments, name) for name in ("--scale", "--ruleset"))
        manifests = load_records(records, scale=scale, ruleset=ruleset).manifests.values()
        return cls(
            folder.parent.name,
            lines[0].removeprefix("# "),
            arguments,
            len(pd.read_csv(folder / "scores.csv")),
            sorted({manifest.scale for manifest in manifests}),
            sorted({manifest.ruleset for manifest in manifests}),
        )

    def build(self, out: Path) -> None:
        """Make the board again, with its page, in `out`; the committed files stay as they are. Raises UserError."""
        arguments = list(self.arguments)
        arguments[arguments.index("--out") + 1] = str(out)
        command = [sys.executable, str(ROOT / "scripts" / "leaderboard.py"), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the board {self.name} could not be made: {done.stderr.strip()}")

    @property
    def row(self) -> str:
        """Its row in the list of boards."""
        cells = [self.title, ", ".join(self.scales), ", ".join(self.rulesets), str(self.submissions)]
        links = f"[table]({self.name}/LEADERBOARD.md), [page]({self.name}/site/index.html)"
        return f"| {' | '.join(cells)} | {links} |"


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--without-boards", action="store_true", help="the documents alone, in a few seconds")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("mkdocs") is None:
        raise UserError("mkdocs is not installed; pip install -e '.[site]'")
    for folder in (BOARDS, ALGORITHMS):
        if folder.exists():
            shutil.rmtree(folder)
    if not options.without_boards:
        build_boards()
        build_algorithms(ALGORITHMS)
    # Not --quiet, under which mkdocs counts no warning, and --strict is without effect.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(options.out.resolve())]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode
    if code == 0:
        print(f"written: {options.out / 'index.html'}")
    return code


def build_boards() -> None:
    """Write build/boards: the list of the boards, and the page of each."""
    boards = [Board.read(path.parent) for path in sorted(ROOT.glob("results/*/leaderboard/LEADERBOARD.md"))]
    for board in boards:
        made = BOARDS / "made"
        board.build(made)
        shutil.move(made / "site", BOARDS / board.name / "site")
        shutil.rmtree(made)
    lines = [
        "# Boards",
        "Each board has a table, with the command that makes it, and a page with plots and one page per submission. "
        "Scores of different boards do not compare.",
        "| board | scale | ruleset | submissions | |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(board.row for board in boards),
    ]
    (BOARDS / "index.md").write_text("\n\n".join(lines) + "\n")


def build_algorithms(folder: Path, names: Sequence[str] | None = None) -> None:
    """Write a page for each algorithm, and their list. names: only these."""
    trials, curves = _read_trials()
    times = read_times(ROOT / "benchmarks" / "optimizer_step_mini.csv")
    names = [name for name in list_choices("optimizer") if name not in TEMPLATES] if names is None else names
    folder.mkdir(parents=True)
    algorithms = []
    for run, state in count_state(names):
        algorithm = describe_algorithm(run, state)
        algorithms.append(algorithm)
        both = trials[trials["submission"].isin([algorithm.name, BASELINE])]
        page = format_page(algorithm, run, both, _curves_of(curves, algorithm.name), BASELINE, times)
        (folder / f"{algorithm.name}.md").write_text(page)
    (folder / "index.md").write_text(format_index(algorithms, trials))


def _read_trials() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The trials and the curves of RECORDS, as `format_page` takes them; curves of the recipes alone."""
    parts, curves = [], []
    for ruleset, folders in RECORDS.items():
        paths = [ROOT / folder for folder in folders if (ROOT / folder).is_dir()]
        loaded = load_records(paths, ruleset=ruleset, accepted=MIXABLE)
        known = loaded.trials[[i in loaded.manifests for i in loaded.trials.index]]
        manifests = [loaded.manifests[i] for i in known.index]
        columns: dict[str, list[Any]] = {
            "budget": [manifest.max_steps for manifest in manifests],
            "direction": [manifest.direction for manifest in manifests],
            "target": [loaded.targets.targets[workload].value for workload in known["workload"]],
            "lr": [manifest.hyperparameters.get("lr") for manifest in manifests],
        }
        table = known[["submission", "workload", "study", "trial", "status", "steps", "best"]].assign(**columns)
        parts.append(table.assign(lr=pd.to_numeric(table["lr"], errors="coerce")))
        if ruleset == "quick":
            rows = loaded.rows
            values = loaded.trials.loc[rows.trial, ["submission", "workload", "study"]].reset_index(drop=True)
            curves.append(values.assign(step=rows.steps, value=rows.value))
    return pd.concat(parts, ignore_index=True), pd.concat(curves, ignore_index=True)


def _curves_of(curves: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    """By workload the curves of the algorithm and of the baseline, of the first study of each."""
    of_both = curves["submission"].isin([name, BASELINE]) & (curves["study"] == 0)
    rows_of_both = curves[of_both].dropna(subset=["value"])
    return {
        str(workload): rows for workload, rows in rows_of_both.groupby("workload") if name in set(rows["submission"])
    }


def _option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def _is_records(argument: str) -> bool:
    return (ROOT / argument).is_dir()


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
