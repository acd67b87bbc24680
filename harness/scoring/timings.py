"""Seconds that can be compared, from the measurements of a timing run (harness/study/timing_run.py).

Steps-to-target hardly depend on the machine; seconds per step do, and on shared machines they vary by a factor of two.
So a board's time-to-target is (docs/statistics.md, eq. 1)

    steps-to-target x median seconds per step + building the submission + compiling its own code

with the last three from a timing run, in which all submissions alternate on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.records.status import Status

COLUMNS = ["machine", "workload", "submission", "round", "steps", "seconds", "build_seconds", "compile_seconds"]
"""Of the file of a timing run: a row per submission, workload and round. Rounds count from 1."""
MOST_DOUBTED = 2.0
"""Times as long as in the timing run that a step may take in trials. Where the machine is the same they agree to 5%."""
_NUMERIC_COLUMNS = COLUMNS[3:]


@dataclass(frozen=True)
class Timings:
    """What a step of each submission costs on one machine."""

    machine: str
    rounds: int
    costs: pd.DataFrame
    """A row per (submission, workload), its index: seconds_per_step, its relative error (one standard error of the
    median, as a share), and one_off seconds."""

    @classmethod
    def from_rows(cls, rows: pd.DataFrame) -> Timings:
        """From the rows of a timing run, with columns COLUMNS; one-off costs are the same in all rounds."""
        keys = ["submission", "workload"]
        rates = rows.assign(rate=rows["seconds"] / rows["steps"])
        groups = rates.groupby(keys)
        median = groups["rate"].median()
        deviation = (rates.set_index(keys)["rate"] - median).abs().groupby(keys).median()
        # For normal noise 1.4826 times the median absolute deviation estimates the standard deviation, and a median of
        # n has 1.2533 times the standard error of a mean (docs/statistics.md, eq. 2).
        error: pd.Series = 1.2533 * 1.4826 * deviation / np.sqrt(groups.size()) / median
        # They are paid once, before the first round, and repeated in every row.
        one_off = groups["build_seconds"].first() + groups["compile_seconds"].first()
        costs = pd.DataFrame({"seconds_per_step": median, "error": error, "one_off": one_off})
        return cls(str(rows["machine"].iloc[0]), int(rows["round"].max()), costs)

    @property
    def sentence(self) -> str:
        """What was done, for the reader of a board."""
        return (
            f"Seconds are steps-to-target x median seconds per step (+ building and compiling) of a timing run of "
            f"{self.rounds} alternating rounds on {self.machine}; the median is known to "
            f"{100 * self.costs['error'].max():.1f}% or better, which the intervals of seconds include."
        )

    def doubts(self, trials: pd.DataFrame) -> list[str]:
        """A sentence for each submission whose step cost another time in the timing run than in its trials, compared
        with the other submissions on the workload: it may do less where it sees that it is timed.

        Of trials, the fastest counts, which was disturbed least. A machine that is faster throughout is so for all.
        """
        training = trials["limit_seconds"] - trials["build_seconds"].fillna(0) - trials["compile_seconds"].fillna(0)
        keys = ["submission", "workload"]
        fastest = (training / trials["limit_steps"]).groupby([trials[key] for key in keys]).min()
        ratios = (fastest / self.costs["seconds_per_step"]).dropna().rename("ratio").reset_index()
        sentences = []
        for workload, group in ratios.groupby("workload"):
            # Of two, the one with the smaller ratio has the same cost in both.
            usual = group["ratio"].median() if len(group) > 2 else group["ratio"].min()
            for row in group.itertuples():
                relative = float(row.ratio) / usual  # type: ignore[arg-type]
                if not 1 / MOST_DOUBTED <= relative <= MOST_DOUBTED:
                    sentences.append(
                        f"A step of {row.submission} on {workload} takes {relative:.2g} times as long in its trials as "
                        "in the timing run, compared with the other submissions: read what it does while it is timed."
                    )
        return sentences

    def apply(self, trials: pd.DataFrame) -> pd.DataFrame:
        """`trials` with seconds, resolution, limit and budget in seconds of this timing run. The budget is that of the
        workload's longest trial.

        Also timing_error, the relative error that this run leaves in the seconds (or in the limit, where the target was
        missed), and timing_dof, its degrees of freedom. Raises UserError for submissions that were not timed, and for
        pruned studies.
        """
        refuse_pruned(trials)
        keys = pd.MultiIndex.from_frame(trials[["submission", "workload"]])
        not_timed = sorted(set(keys) - set(self.costs.index))
        if not_timed:
            listed = ", ".join(f"{s} on {w}" for s, w in not_timed[:6]) + ", ..." * (len(not_timed) > 6)
            timed = sorted({s for s, _ in keys} - {s for s, _ in not_timed})
            remedy = (
                f", or make the board of those that were timed, with --submissions {' '.join(timed)}" if timed else ""
            )
            raise UserError(f"the timing run has no {listed}; run scripts/timing.py on these records again{remedy}")
        costs = self.costs.reindex(keys)
        rate, one_off = costs["seconds_per_step"].to_numpy(), costs["one_off"].to_numpy()
        # docs/statistics.md, eq. 1.
        seconds, limit = trials["steps"] * rate + one_off, trials["limit_steps"] * rate + one_off
        # The error is of the rate, and the one-off costs have none.
        stepping = 1 - one_off / seconds.where(np.isfinite(seconds), limit)
        return trials.assign(
            seconds=seconds,
            # A difference of two times, so without the one-off costs.
            resolution=trials["resolution_steps"] * rate,
            limit=limit,
            timing_error=costs["error"].to_numpy() * stepping.fillna(1.0).clip(0.0, 1.0),
            timing_dof=float(max(self.rounds - 1, 1)),
            budget=trials.groupby("workload")["limit_steps"].transform("max") * rate + one_off,
        )


def read_timings(path: Path) -> Timings:
    """The file of a timing run; raises UserError if it is not one."""
    try:
        rows = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--timing {path} cannot be read ({error}); make it with scripts/timing.py") from error
    missing = [column for column in COLUMNS if column not in rows]
    not_numeric = [c for c in _NUMERIC_COLUMNS if c in rows and not pd.api.types.is_numeric_dtype(rows[c])]
    problems = [f"lacks {', '.join(missing)}"] * bool(missing)
    problems += [f"{', '.join(not_numeric)} are no numbers"] * bool(not_numeric)
    if problems or rows.empty:
        raise UserError(f"--timing {path} {'; '.join(problems) or 'is empty'}; make it with scripts/timing.py")
    usable = np.isfinite(rows[_NUMERIC_COLUMNS].to_numpy(float)).all(axis=1)
    bad = rows[~usable | (rows["steps"] <= 0) | (rows["seconds"] <= 0)]
    if len(bad):
        # Line 1 of the file is the header.
        raise UserError(f"--timing {path}, row {bad.index[0] + 2}: steps and seconds must be positive and finite")
    if rows["machine"].nunique() > 1:
        raise UserError(
            f"--timing {path} mixes machines ({', '.join(rows['machine'].unique())}); one table, one machine"
        )
    return Timings.from_rows(rows)


def refuse_pruned(trials: pd.DataFrame) -> None:
    """Raise UserError if trials were pruned: with other seconds per step than those that stopped it, such a trial might
    have been the best of its study."""
    pruned = trials[trials["status"] == Status.PRUNED]
    if len(pruned):
        listed = ", ".join(sorted({str(name) for name in pruned["submission"]}))
        raise UserError(
            f"{len(pruned)} trials of {listed} were pruned, so a timing run cannot tell the times of their studies; "
            "leave --timing out, or run them again with pruning=none and label=NAME"
        )
