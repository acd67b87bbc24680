"""The table of algorithms: what each file of configs/optimizer/ is, needs, holds and costs.

All of it comes from the YAMLs and the classes that they name, but for the times, which a run of
benchmarks/optimizer_step.py left in a file. The state is counted on the mini GPT-2, a number of the submission alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from harness import hyperparameters
from harness.choices import choices
from harness.config import Run, load
from harness.needs import Need
from harness.problems import UserError
from harness.submission import Submission
from harness.training import Training, needs_of
from harness.workload import Workload

STEPS = 3
"""After so many, every submission holds all that it will hold."""
SMALL_BATCH = ["workload=gpt2", "workload.nominal_batch=8", "workload.micro_batch=8"]
"""State does not depend on the batch."""
RULES, STEPPERS, WRAPPED = (
    "Update rules: one gradient, one update",
    "Algorithms that own their step",
    "In wrappers: around an update rule or an algorithm",
)


@dataclass(frozen=True)
class Algorithm:
    name: str
    description: str
    paper: str
    classes: tuple[str, ...]
    """Import paths: the algorithm's, then its wrappers'."""
    kind: str
    needs: tuple[Need, ...]
    state: float
    """Bytes held between steps, per parameter."""


def algorithms() -> Iterator[Algorithm]:
    """Every submission that ships, in the order of the names."""
    workload: Workload | None = None
    for name in choices("optimizer"):
        if name == "any":
            continue
        run = load([*SMALL_BATCH, f"optimizer={name}"])
        if workload is None:
            workload = hyperparameters.import_class(run.facts.class_path, "workload.class_path")(run.facts)
            assert workload is not None
            workload.load(run.data, torch.device("cpu"))
        yield _of(run, workload)


def _of(run: Run, workload: Workload) -> Algorithm:
    options = run.optimizer
    owns_step = issubclass(hyperparameters.algorithm_class(options.class_path), Submission)
    training = Training(run, workload, torch.device("cpu"))
    training.build()
    training.segment(STEPS * training.facts.nominal_batch, charge_compile=False)
    count = sum(parameter.numel() for parameter in training.submission.setup.parameters)
    return Algorithm(
        name=options.name,
        description=options.description,
        paper=options.paper or "",
        classes=(options.class_path, *options.wrappers),
        kind=WRAPPED if options.wrappers else STEPPERS if owns_step else RULES,
        needs=tuple(need for need in Need if need in needs_of(run)),
        state=training.submission.state_bytes() / count,
    )


def read_times(path: Path) -> pd.DataFrame:
    """A file of `benchmarks/optimizer_step.py --out`, by submission; UserError if it is not one."""
    columns = ["submission", "set", "clock", "threads", "milliseconds", "fused_adamw"]
    try:
        rows = pd.read_csv(path)
        return rows[columns].set_index("submission")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--times {path} is not a table of times ({error}); make it with benchmarks/optimizer_step.py --out {path}"
        ) from error


def tables(found: list[Algorithm], times: pd.DataFrame) -> str:
    """Markdown, a table for each kind."""
    parts = []
    for kind in (RULES, STEPPERS, WRAPPED):
        members = [algorithm for algorithm in found if algorithm.kind == kind]
        head = (
            f"## {kind} ({len(members)})\n\n"
            "| name | what it is | paper | capabilities used | state, bytes per parameter | time of an update |\n"
            "|---|---|---|---|---|---|\n"
        )
        parts.append(head + "".join(_row(algorithm, times) for algorithm in members))
    return "\n".join(parts)


def _row(algorithm: Algorithm, times: pd.DataFrame) -> str:
    ratio = "not timed"
    if algorithm.name in times.index:
        ratio = f"{(times['milliseconds'] / times['fused_adamw'])[algorithm.name]:.1f}"
    needs = ", ".join(need.value.replace("_", " ") for need in algorithm.needs)
    own, *wrappers = algorithm.classes
    code = _source(own) + "".join(f", in {_source(wrapper)}" for wrapper in wrappers)
    cells = (
        f"`{algorithm.name}` ({code})", _escaped(algorithm.description), _linked(_escaped(algorithm.paper)), needs,
        f"{algorithm.state:.2f}", ratio,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def _source(path: str) -> str:
    """`submissions.lion.Lion` as a link to its file; others by the name of their package."""
    module = path.rpartition(".")[0]
    if not module.startswith("submissions."):
        return module.partition(".")[0]
    file = module.replace(".", "/") + ".py"
    return f"[{Path(file).name}](../{file})"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
