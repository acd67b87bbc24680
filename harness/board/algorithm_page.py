"""A page for each algorithm: its rule, what it costs, what came of it in the committed records.

All of it is made: the rule is the docstring of the class's module, the values are those of the YAML, the figures are
those of records. A page states no more than they show; a miss stands beside a hit.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from harness.board.algorithm_table import Algorithm, link_paper, link_source
from harness.config.schema import Run

WIDTH, HEIGHT, MARGIN = 640, 260, 44


def format_page(
    algorithm: Algorithm, run: Run, trials: pd.DataFrame, curves: Mapping[str, pd.DataFrame], baseline: str,
    times: pd.DataFrame,
) -> str:  # fmt: skip
    """The page in Markdown.

    trials: a row per trial of the algorithm and of the baseline, with submission, workload, status, steps, best, budget
    (nominal steps), target, metric, lr (or NaN) and tuned (whether its point was drawn). curves: by workload, with
    columns submission, step and value, one trial for each of the two. times: of `read_times`.
    """
    parts = [f"# {algorithm.name}", algorithm.description + "."]
    parts.append("\n".join(f"- {line}" for line in _facts(algorithm, times)))
    parts.append("## Rule\n\n```text\n" + _docstring(algorithm) + "\n```")
    parts.append("## Hyperparameters\n\n" + _hyperparameters(run))
    parts.append("## In the records\n\n" + _outcomes(trials, algorithm.name, baseline))
    for workload, rows in curves.items():
        parts.append(f"### {workload}\n\n" + draw_curves(rows, algorithm.name, baseline, _target(trials, workload)))
    if sensitivity := _sensitivity(trials, algorithm.name):
        parts.append("## Learning rate\n\n" + sensitivity)
    parts.append(f"```sh\npython run.py workload=gpt2 optimizer={algorithm.name}\n```")
    return "\n\n".join(parts) + "\n"


def format_index(algorithms: Sequence[Algorithm], trials: pd.DataFrame) -> str:
    """The list of the pages, with the best outcome on each workload."""
    workloads = sorted(trials["workload"].unique()) if len(trials) else []
    heading = ["algorithm", "what it is", *workloads]
    lines = [heading, ["---"] * len(heading)]
    for algorithm in algorithms:
        rows = trials[trials["submission"] == algorithm.name]
        cells = [_best_outcome(rows[rows["workload"] == workload]) for workload in workloads]
        lines.append([f"[{algorithm.name}]({algorithm.name}.md)", _cell(algorithm.description), *cells])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return (
        "# Each algorithm\n\nThe best outcome in the committed records, whatever was tuned: steps to the target, or "
        f"the best value of a miss. This is no ranking.\n\n{table}"
    )


def draw_curves(rows: pd.DataFrame, name: str, baseline: str, target: float | None) -> str:
    """An SVG of the value against nominal steps, for the algorithm and the baseline, with the target."""
    if rows.empty:
        return "No curve is in the records."
    values = [*rows["value"], *([target] if target is not None else [])]
    # Early values of a loss would flatten the part that matters.
    low, high = min(values), float(pd.Series(values).quantile(0.9))
    high = high if high > low else low + 1.0
    last = float(rows["step"].max()) or 1.0

    def point(step: float, value: float) -> str:
        x = MARGIN + step / last * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (min(value, high) - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for submission, colour in ((baseline, "#888888"), (name, "#3f51b5")):
        of_one = rows[rows["submission"] == submission]
        points = " ".join(point(s, v) for s, v in zip(of_one["step"], of_one["value"], strict=True))
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
    if target is not None:
        start, end = point(0, target), point(last, target)
        (x1, y1), (x2, y2) = start.split(","), end.split(",")
        lines.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#2e7d32" stroke-dasharray="4 4"/>')
    texts = [
        (MARGIN, 18, f"{name} (blue), {baseline} (grey)" + (f", target {target:g}" if target is not None else "")),
        (MARGIN, HEIGHT - 12, "0"), (WIDTH - MARGIN - 60, HEIGHT - 12, f"{last:g} steps"),
        (2, HEIGHT - MARGIN, f"{low:.3g}"), (2, MARGIN, f"{high:.3g}"),
    ]  # fmt: skip
    labels = "".join(
        f'<text x="{x}" y="{y}" font-size="12" fill="currentColor">{html.escape(text)}</text>' for x, y, text in texts
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" width="100%">{"".join(lines)}{labels}</svg>'


def _facts(algorithm: Algorithm, times: pd.DataFrame) -> list[str]:
    facts = [f"paper: {link_paper(algorithm.paper)}"] if algorithm.paper else []
    facts.append("code: " + ", in ".join(link_source(path, "../..") for path in algorithm.classes))
    facts.append(f"state: {algorithm.state:.2f} bytes per parameter")
    if algorithm.name in times.index:
        ratio = (times["milliseconds"] / times["fused_adamw"])[algorithm.name]
        facts.append(f"an update of the mini GPT-2 takes {ratio:.1f} times as long as torch's fused AdamW")
    if algorithm.needs:
        facts.append("asks for " + ", ".join(need.value.replace("_", " ") for need in algorithm.needs))
    if algorithm.host_waits:
        facts.append("the host waits for a GPU " + "; ".join(algorithm.host_waits))
    return facts


def _docstring(algorithm: Algorithm) -> str:
    """Of the modules of its classes; of another library, the first paragraph of the class."""
    texts = []
    for path in algorithm.classes:
        module, _, name = path.rpartition(".")
        loaded = importlib.import_module(module)
        if module.startswith("submissions."):
            texts.append((loaded.__doc__ or "").strip())
        else:
            texts.append((getattr(loaded, name).__doc__ or "").strip().partition("\n\n")[0])
    # A fence within would end the block.
    return "\n\n".join(texts).replace("```", "'''")


def _hyperparameters(run: Run) -> str:
    options = run.optimizer
    space: dict[str, Any] = (options.search_space or {}).get("hyperparameters", {})
    names = dict.fromkeys([*options.paper_defaults, *options.recipe.hyperparameters, *space])
    rows = [["hyperparameter", "paper", "recipe", "search space"], ["---"] * 4]
    for name in names:
        values = (options.paper_defaults.get(name), options.effective_hyperparameters.get(name), space.get(name))
        rows.append([f"`{name}`", *("" if value is None else f"`{_cell(value)}`" for value in values)])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    chosen = options.recipe_provenance.get("procedure")
    return table + (f"\nThe recipe was chosen by `{chosen}`.\n" if chosen else "")


def _outcomes(trials: pd.DataFrame, name: str, baseline: str) -> str:
    rows = [["workload", "trials", name, baseline], ["---"] * 4]
    for workload in sorted(trials["workload"].unique()):
        of_workload = trials[trials["workload"] == workload]
        ours = of_workload[of_workload["submission"] == name]
        theirs = of_workload[of_workload["submission"] == baseline]
        if len(ours):
            rows.append([workload, str(len(ours)), _best_outcome(ours), _best_outcome(theirs)])
    if len(rows) == 2:
        return "None of the committed records is of it."
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\nThe best trial of each, whatever was tuned.\n"


def _best_outcome(trials: pd.DataFrame) -> str:
    """Steps to the target of the best trial, with its share of the budget; of a miss the best value."""
    if trials.empty:
        return "not run"
    reached = trials[trials["status"] == "reached"].sort_values("steps")
    if len(reached):
        steps, budget = float(reached["steps"].iloc[0]), float(reached["budget"].iloc[0])
        return f"{steps:.0f} ({100 * steps / budget:.0f}%)"
    values = trials["best"].dropna()
    if values.empty:
        return str(trials["status"].iloc[0])
    return f"missed, {values.min() if trials['direction'].iloc[0] == 'min' else values.max():.4f}"


def _sensitivity(trials: pd.DataFrame, name: str) -> str:
    """What came of trials with different learning rates; empty below three rates."""
    rows = trials[(trials["submission"] == name) & trials["lr"].notna()].sort_values(["workload", "lr"])
    if rows["lr"].nunique() < 3:
        return ""
    lines = [["workload", "learning rate", "outcome"], ["---"] * 3]
    lines += [
        [str(row["workload"]), f"{row['lr']:.3g}", _best_outcome(pd.DataFrame([row]))]
        for row in rows.to_dict("records")
    ]
    return "Other hyperparameters differ as well.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _target(trials: pd.DataFrame, workload: str) -> float | None:
    targets = trials.loc[trials["workload"] == workload, "target"]
    return None if targets.empty else float(targets.iloc[0])


def _cell(value: Any) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")
