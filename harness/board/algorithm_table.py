"""The table of algorithms: what each file of configs/optimizer/ is, needs, holds and costs.

All of it comes from the YAMLs and the classes that they name, except the bytes of state, which are counted
(harness/trial/state_size.py), and the times, which a run of benchmarks/optimizer_step.py left in a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.config.declared_needs import declared_needs, host_waits
from harness.config.hyperparameters import import_algorithm
from harness.config.schema import Run
from harness.errors import UserError
from harness.interface.needs import Need
from harness.interface.submission import Submission

RULES, STEP_OWNERS, WRAPPED = (
    "Update rules: one gradient, one update",
    "Algorithms that own their step",
    "In wrappers: around an update rule or an algorithm",
)
"""Titles of the tables, by kind of algorithm."""


@dataclass(frozen=True)
class Algorithm:
    """A row of the table."""

    name: str
    description: str
    paper: str
    classes: tuple[str, ...]
    """Import paths: the algorithm's, then its wrappers'."""
    kind: str
    """RULES, STEP_OWNERS or WRAPPED."""
    needs: tuple[Need, ...]
    state: float
    """Bytes held between steps, per parameter."""
    host_waits: tuple[str, ...] = ()
    """When the host waits for the device, of each class where it does (`Submission.host_waits`)."""


def describe_algorithm(run: Run, state: float) -> Algorithm:
    """The row of the submission that `run` trains. state: bytes held between steps, per parameter."""
    options = run.optimizer
    algorithm = import_algorithm(options.class_path)
    needs = declared_needs(run)
    return Algorithm(
        name=options.name,
        description=options.description,
        paper=options.paper or "",
        classes=(options.class_path, *options.wrappers),
        kind=WRAPPED if options.wrappers else STEP_OWNERS if issubclass(algorithm, Submission) else RULES,
        # In the order of the enumeration: that of a set of strings differs from process to process, and --check
        # compares texts.
        needs=tuple(need for need in Need if need in needs),
        host_waits=host_waits(run),
        state=state,
    )


def read_times(path: Path) -> pd.DataFrame:
    """The file of `benchmarks/optimizer_step.py --out`; raises UserError if it is not one.

    Indexed by submission, with the columns set, clock, threads, milliseconds (of a step), fused_adamw (likewise).
    """
    columns = ["submission", "set", "clock", "threads", "milliseconds", "fused_adamw"]
    try:
        rows = pd.read_csv(path)
        return rows[columns].set_index("submission")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--times {path} is not a table of times ({error}); make it with benchmarks/optimizer_step.py --out {path}"
        ) from error


def format_algorithms(algorithms: Sequence[Algorithm], times: pd.DataFrame) -> str:
    """Markdown, a table for each kind. times: of `read_times`; a submission that is not in it is shown as not timed."""
    parts = []
    for kind in (RULES, STEP_OWNERS, WRAPPED):
        members = [algorithm for algorithm in algorithms if algorithm.kind == kind]
        heading = (
            f"## {kind} ({len(members)})\n\n"
            "| name | what it is | paper | capabilities used | host waits | state, bytes per parameter | "
            "time of an update |\n"
            "|---|---|---|---|---|---|---|\n"
        )
        parts.append(heading + "".join(_row(algorithm, times) for algorithm in members))
    return "\n".join(parts)


def _row(algorithm: Algorithm, times: pd.DataFrame) -> str:
    ratio = "not timed"
    # A ratio to AdamW in the same run, since the milliseconds are those of one machine at one time.
    if algorithm.name in times.index:
        ratio = f"{(times['milliseconds'] / times['fused_adamw'])[algorithm.name]:.1f}"
    needs = ", ".join(need.value.replace("_", " ") for need in algorithm.needs)
    waits = "; ".join(algorithm.host_waits)
    rule, *wrappers = algorithm.classes
    code = link_source(rule) + "".join(f", in {link_source(wrapper)}" for wrapper in wrappers)
    cells = (
        f"`{algorithm.name}` ({code})", _escape(algorithm.description), link_paper(_escape(algorithm.paper)), needs,
        waits, f"{algorithm.state:.2f}", ratio,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def link_source(path: str, root: str = "..") -> str:
    """`submissions.lion.Lion` as a link to its file; others by the name of their package. root: from the page to the
    root of the repository."""
    module = path.rpartition(".")[0]
    if not module.startswith("submissions."):
        return module.partition(".")[0]
    file = module.replace(".", "/") + ".py"
    return f"[{Path(file).name}]({root}/{file})"


def _escape(text: str) -> str:
    return text.replace("|", r"\|")


def link_paper(paper: str) -> str:
    """A citation in Markdown, with its arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
