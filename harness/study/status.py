"""How trials stand at this moment: state, position, and the time left. Read from their records, and from nothing else.

So it is the same for trials of this process, of other workers, and of other machines that share the records. The
display of it: harness/study/progress.py.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.interface.workload import WorkloadSpec
from harness.records.evaluations import Evaluations, read_evaluations
from harness.records.layout import MANIFEST, RecordPath, list_submission_folders, list_trials_of_submission
from harness.study.ledger import Phase, PlannedTrial, TrialState, judge_state, list_all_trials, read_state

RECENT_ROWS = 5
"""Evaluations that the steps per second are taken over."""
_FURTHER = {"wall": "total_duration"}


@dataclass(frozen=True)
class Standing:
    """How far an unfinished trial is, by its rows."""

    steps: float
    """Nominal."""
    value: float
    """Last value of the target's metric."""
    best_value: float
    """Best value so far; NaN where none is finite."""
    steps_to_target: float | None
    """Nominal steps at the first evaluation that met the target."""
    steps_per_second: float
    """Of the training clock, over the last evaluations; NaN where it cannot be told."""
    wall_seconds: float
    """Since the trial began, without interruptions."""

    @classmethod
    def from_rows(cls, rows: Evaluations, spec: WorkloadSpec) -> Standing | None:
        """From the rows of a trial on the workload `spec`; None where there are none that can be used."""
        usable = np.isfinite(rows.steps)
        if not usable.any():
            return None
        steps, seconds, values = rows.steps[usable], rows.seconds[usable], rows.value[usable]
        finite = values[np.isfinite(values)]
        best = np.nan if not len(finite) else float(finite.min() if spec.direction == "min" else finite.max())
        met = [spec.meets_target(float(value)) for value in values]
        # From the start of the clock where there are too few rows.
        is_long = len(steps) > RECENT_ROWS
        first_step, first_second = (steps[-1 - RECENT_ROWS], seconds[-1 - RECENT_ROWS]) if is_long else (0.0, 0.0)
        elapsed = float(seconds[-1] - first_second)
        wall = float(rows.further["wall"][usable][-1])
        return cls(
            steps=float(steps[-1]),
            value=float(values[-1]),
            best_value=best,
            steps_to_target=float(steps[met.index(True)]) if any(met) else None,
            steps_per_second=float(steps[-1] - first_step) / elapsed if elapsed > 0 else np.nan,
            # Records of other tools may lack the column.
            wall_seconds=wall if np.isfinite(wall) else float(seconds[-1]),
        )


@dataclass(frozen=True)
class TrialProgress:
    """A trial with its state and how far it is."""

    trial: PlannedTrial
    spec: WorkloadSpec
    state: TrialState
    standing: Standing | None = None
    """None where it is over, or has no rows yet."""
    expected_seconds: float | None = None
    """Wall time still to come; None where nothing tells the speed of such trials yet."""
    is_bound: bool = False
    """Whether `expected_seconds` is to the end of the budget, since no trial of the kind has ended beyond this point:
    the trial may meet its target earlier."""

    @property
    def progress(self) -> float:
        """Share of the budget in steps that it has done; 1 where it is over."""
        if self.state.is_over:
            return 1.0
        # The last batch can go beyond the budget.
        return min(1.0, self.standing.steps / self.spec.max_steps) if self.standing is not None else 0.0

    @property
    def worker(self) -> str:
        """Executor, host and process of a running trial; empty for any other."""
        return self.state.worker

    @property
    def steps_to_target(self) -> float | None:
        """Nominal steps at the first evaluation that met the target, also while the trial goes on; None if none did."""
        if self.standing is not None:
            return self.standing.steps_to_target
        steps = self.state.final.steps_to_target
        return None if steps is None else float(steps)

    @property
    def best_value(self) -> float | None:
        """Best value of the target's metric so far; None if there is none."""
        if self.standing is not None:
            return self.standing.best_value if np.isfinite(self.standing.best_value) else None
        return self.state.final.of_metric(f"best_validation/{self.spec.metric}")


# ---- reading -------------------------------------------------------------------------------------------------------


class Survey:
    """Follows some trials. `look` reads again only the files that have changed since the last one."""

    def __init__(self, trials: Iterable[PlannedTrial] = ()) -> None:
        self._followed: dict[RecordPath, _Followed] = {}
        self.follow(trials)

    def follow(self, trials: Iterable[PlannedTrial]) -> None:
        """Follow these trials and no others, in this order."""
        former = self._followed
        self._followed = {}
        # One for all trials of a study: making it validates it.
        specs: dict[int, WorkloadSpec] = {}
        for trial in trials:
            if trial.path in former:
                self._followed[trial.path] = former[trial.path]
            else:
                spec = specs[id(trial.study)] = specs.get(id(trial.study)) or trial.study.spec
                self._followed[trial.path] = _Followed(trial, spec)

    def look(self) -> tuple[list[TrialProgress], list[str]]:
        """Every trial as it stands now, and a message for each that cannot be read."""
        messages: list[str] = []
        standing: list[TrialProgress] = []
        with _garbage_collection_paused():
            for followed in self._followed.values():
                try:
                    standing.append(followed.look())
                except UserError as error:
                    messages += error.messages
            return _with_expectations(standing), messages


class RecordsSurvey:
    """Follows every trial below a folder of records, those that are planned or begun in the meantime included."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._survey = Survey()
        self._listed: tuple[object, ...] = ()
        self._messages: list[str] = []

    def look(self) -> tuple[list[TrialProgress], list[str]]:
        """As `Survey.look`. Raises UserError if the records are no folder."""
        listing = self._listing()
        # Listing the trials reads every plan and takes far longer than a look.
        if listing != self._listed:
            with _garbage_collection_paused():
                trials, self._messages = list_all_trials(self._records)
                self._survey.follow(trials)
            self._listed = listing
        progress, messages = self._survey.look()
        return progress, [*self._messages, *messages]

    def _listing(self) -> tuple[object, ...]:
        """What changes when a trial is planned or a folder of one is made: plans are replaced by a rename, which
        touches the folder of their submission."""
        folders = list_submission_folders(self._records)
        trials = frozenset(
            (folder, path.study, path.workload, path.trial)
            for folder in folders
            for path in list_trials_of_submission(folder)
        )
        return (self._records.is_dir(), tuple((folder, _stamp(folder)) for folder in folders), trials)


def survey_records(records: Path) -> tuple[list[TrialProgress], list[str]]:
    """Every trial below `records` as it stands now, and a message for each folder that cannot be read. Raises UserError
    if it is no folder."""
    with _garbage_collection_paused():
        trials, messages = list_all_trials(records)
        progress, further = Survey(trials).look()
    return progress, [*messages, *further]


class _Followed:
    """What was read of a trial, with the stamps of the files when it was."""

    def __init__(self, trial: PlannedTrial, spec: WorkloadSpec) -> None:
        self._trial, self._spec = trial, spec
        self._folder = trial.path.folder_string
        self._manifest = f"{self._folder}/{MANIFEST}"
        self._evaluations: Path | None = None
        self._state: TrialState | None = None
        self._manifest_stamp: object = None
        self._rows_stamp: object = None
        self._standing: Standing | None = None

    def look(self) -> TrialProgress:
        # Most trials of a large study have not begun, and one call tells so.
        if self._state is not None and self._state.phase is Phase.PLANNED and _stamp(self._folder) is None:
            return TrialProgress(self._trial, self._spec, self._state)
        # Before the file is read: a change in between is seen at the next look.
        stamp = _stamp(self._manifest)
        if self._state is None or stamp != self._manifest_stamp:
            self._state = read_state(self._trial)
            self._manifest_stamp = stamp
        elif not self._state.is_over:
            # A lease ends without a change of the manifest.
            self._state = judge_state(self._trial, self._state.manifest)
        if self._state.is_over:
            return TrialProgress(self._trial, self._spec, self._state)
        # Made once: it takes longer than the look itself.
        self._evaluations = self._evaluations or self._trial.path.evaluations
        stamp = _stamp(self._evaluations)
        if stamp != self._rows_stamp:
            rows = read_evaluations(self._evaluations, f"validation/{self._spec.metric}", _FURTHER)
            self._standing = None if rows is None else Standing.from_rows(rows, self._spec)
            self._rows_stamp = stamp
        return TrialProgress(self._trial, self._spec, self._state, self._standing)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Within it Python looks for no cyclic garbage: with a hundred thousand trials it would go through millions of
    objects again and again, none of which is garbage, and take a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stamp(path: Path | str) -> tuple[int, int, int] | None:
    """Differs once a file was replaced or written; None if it is not there."""
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


# ---- the time left -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pace:
    """Of a trial that is over or has rows."""

    seconds_per_budget: float
    """Wall time that the whole budget would take at its speed."""
    end: float | None
    """Share of the budget at which it ended; None while it goes on."""


def _with_expectations(trials: Sequence[TrialProgress]) -> list[TrialProgress]:
    paces: dict[tuple[str, ...], list[_Pace]] = defaultdict(list)
    for trial in trials:
        if (pace := _pace(trial)) is not None:
            # By (scale, workload, label) and by (scale, workload).
            paces[_kind(trial)].append(pace)
            paces[_kind(trial)[:2]].append(pace)
    return [trial if trial.state.is_over else _with_expectation(trial, paces) for trial in trials]


def _with_expectation(trial: TrialProgress, paces: Mapping[tuple[str, ...], Sequence[_Pace]]) -> TrialProgress:
    # Of the same submission if there are any, else of any submission on the workload.
    similar = paces.get(_kind(trial)) or paces.get(_kind(trial)[:2]) or ()
    ends = [pace.end for pace in similar if pace.end is not None]
    pace = _pace(trial)
    if pace is not None:
        seconds = pace.seconds_per_budget
    elif similar:
        # Trials that are over are known to their end.
        over = [pace for pace in similar if pace.end is not None]
        seconds = statistics.mean(pace.seconds_per_budget for pace in over or similar)
    else:
        return trial
    # A trial that has gone on for longer than some that are over is none of their kind.
    beyond = [end for end in ends if end > trial.progress]
    end = statistics.mean(beyond) if beyond else 1.0
    return TrialProgress(
        trial.trial, trial.spec, trial.state, trial.standing, max(0.0, end - trial.progress) * seconds, not beyond
    )


def _kind(trial: TrialProgress) -> tuple[str, str, str]:
    return trial.trial.study.scale.name, trial.trial.path.workload, trial.trial.path.label


def _pace(trial: TrialProgress) -> _Pace | None:
    """The speed of a trial; None where nothing tells it."""
    if not trial.state.is_over:
        standing = trial.standing
        if standing is None or trial.progress <= 0 or standing.wall_seconds <= 0:
            return None
        return _Pace(standing.wall_seconds / trial.progress, None)
    final = trial.state.final
    seconds, evaluation_share = final.submission_seconds, final.evaluation_share or 0.0
    if not seconds or evaluation_share >= 1:
        return None
    end = 1.0 if final.global_step is None else final.global_step / trial.spec.max_steps
    return _Pace(seconds / (1 - evaluation_share) / end, end) if end > 0 else None


def seconds_left(trials: Sequence[TrialProgress]) -> tuple[float, int]:
    """Seconds until the last trial ends with as many workers as there are now (one if there is none), and the number of
    trials whose duration nothing tells yet."""
    unfinished = [trial for trial in trials if not trial.state.is_over]
    workers = max(1, sum(trial.state.phase is Phase.RUNNING for trial in unfinished))
    known = [trial.expected_seconds for trial in unfinished if trial.expected_seconds is not None]
    # A single trial is never shared by workers, so the longest one is a lower bound.
    return max(sum(known) / workers, max(known, default=0.0)), len(unfinished) - len(known)
