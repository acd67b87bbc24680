"""Records of many trials as one table: AlgoPerf's own, and ours.

    .../<submission>/study_<i>/<workload>_<jax|pytorch>/trial_<j>/eval_measurements.csv [+ manifest.json, ours]
    .../<submission>.tar.xz     the same files in an archive (harness/records/archive.py)

Tolerant of what real folders hold, and strict about reporting it: every trial folder ends in a status, and
`Records.problems` lists what was missing, repaired or refused, and why. Our records are held against the configs and
against one another (harness/review). Nothing in a record is executed, and nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError, did_you_mean
from harness.records.archive import LARGEST_MEMBER
from harness.records.evaluations import NO_ROWS, Evaluations, Parsed, parse_evaluations
from harness.records.layout import (
    EVALUATIONS,
    MANIFEST,
)
from harness.records.manifest import Manifest
from harness.records.status import UNUSABLE, Status
from harness.records.trial_folders import Problem, TrialFolder, find_trials, read_manifest
from harness.review.finding import Finding, Severity
from harness.review.review import READING, review
from harness.review.shipped import Shipped
from harness.scoring.crossings import Crossings, find_crossings
from harness.scoring.targets import Target, Targets

MOST_REASONS = 3
"""Reasons that the list of problems gives for a refused trial."""


@dataclass
class Records:
    """What `load_records` returns."""

    trials: pd.DataFrame
    """A row per trial folder:

    submission, workload (without framework), study, trial, framework, status (a `Status`);
    index (of the evaluation that met the target), seconds, steps and examples (of all gradients) there, NaN if it was
    not met; resolution_seconds and resolution_steps since the evaluation before; crossing_share, where between the two
    the metric meets the target (`Crossings`); limit_seconds and limit_steps, how far the trial went; best and final
    value of the target's metric; machine, path, and figures of our manifests.
    """
    rows: Evaluations
    """All evaluations, by row label of `trials`."""
    targets: Targets
    problems: list[Problem] = field(default_factory=list)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    """By row label of `trials`; AlgoPerf's records have none."""

    def select_workloads(self, workloads: Iterable[str]) -> Records:
        """The records of these workloads alone; raises UserError for one that is not there.

        Rows and manifests of the others stay, so row labels of `trials` go on to mean the same.
        """
        wanted, known = set(workloads), sorted(self.targets.targets)
        if unknown := sorted(wanted.difference(known)):
            raise UserError(f"--workloads {', '.join(unknown)}: not in the records, which hold {', '.join(known)}")
        base, held_out = ([w for w in names if w in wanted] for names in (self.targets.base, self.targets.held_out))
        targets = Targets(tuple(base), tuple(held_out), {w: self.targets.targets[w] for w in (*base, *held_out)})
        return replace(self, trials=self.trials[self.trials["workload"].isin(wanted)], targets=targets)

    def select_submissions(self, submissions: Iterable[str]) -> Records:
        """The records of these submissions alone, on all workloads; raises UserError for one that is not there. Rows
        and manifests of the others stay, as above."""
        wanted, known = set(submissions), set(self.trials["submission"])
        if unknown := sorted(wanted - known):
            raise UserError(
                [f"--submissions {name}: not in the records; {did_you_mean(name, known)}" for name in unknown]
            )
        return replace(self, trials=self.trials[self.trials["submission"].isin(wanted)])


def load_records(
    folders: Iterable[Path],
    targets: Targets | None = None,
    *,
    scale: str | None = None,
    ruleset: str | None = None,
    workloads: Collection[str] | None = None,
    submissions: Collection[str] | None = None,
    trust_clock: bool = False,
    accepted: Collection[str] = (),
) -> Records:
    """Read every trial below `folders`, in folders and archives. Without `targets`, those of the configs count: never
    one that a record declares.

    scale, ruleset: which of our records to take, where several are there (AlgoPerf's carry neither). workloads,
    submissions: the only ones that are compared with each other; others are read, and not reviewed. trust_clock: keep
    trials whose clock runs backwards, as AlgoPerf does. accepted: settings in which records may differ
    (`harness.review.settings.MIXABLE`). Raises UserError if nothing can be scored, or if records that no table may mix
    are mixed in such numbers that none is an exception.
    """
    folders = list(folders)
    shipped = Shipped()
    own_targets = targets is not None
    problems: list[Problem] = []
    trials = [trial for folder in folders for trial in find_trials(folder, problems)]
    for trial in trials:
        if MANIFEST in trial.files:
            trial.manifest = read_manifest(trial, problems)
    trials = _select_kind(trials, scale, ruleset, problems)
    if targets is None:
        targets = _shipped_targets(trials, shipped)
    not_scored = Counter(
        (t.workload, _why_not_scored(t, targets, shipped)) for t in trials if t.workload not in targets.targets
    )
    for (workload, reason), count in sorted(not_scored.items()):
        problems.append(Problem(workload, f"{count} trials not scored: {reason}"))
    trials = [trial for trial in trials if trial.workload in targets.targets]
    if not trials:
        listed = "".join(f"\n  {problem.path}: {problem.message}" for problem in problems[:10])
        raise UserError(
            f"no trial to score in {', '.join(map(str, folders))}; expected .../study_<i>/<workload>_<jax|pytorch>/"
            f"trial_<j>/{EVALUATIONS}{listed}"
        )
    versions = Counter(t.manifest.code.get("version") for t in trials if t.manifest is not None)
    if len(named := sorted(str(version) for version in versions if version is not None)) > 1:
        counts = ", ".join(f"{versions[version]} by {version}" for version in named)
        problems.append(Problem("versions", f"trials of several versions of Pacemark: {counts}"))
    # The order gives the row labels of the table, and decides which of two folders of one trial is the duplicate.
    trials.sort(key=lambda t: (t.submission, t.workload, t.study, t.trial, t.framework, t.packed is not None, t.shown))
    contents, without_rows = _read_contents(trials)
    # A duplicate repeats a trial that is reviewed already.
    compared = [
        i
        for i, trial in enumerate(trials)
        if not (i in without_rows and without_rows[i].status is Status.DUPLICATE)
        and (workloads is None or trial.workload in workloads)
        and (submissions is None or trial.submission in submissions)
    ]
    findings = review(
        [trials[i] for i in compared],
        {place: contents[i] for place, i in enumerate(compared) if i in contents},
        shipped=shipped,
        accepted=accepted,
        own_targets=own_targets,
    )
    refused = _take_findings(findings, compared, problems)
    return _tabulate(trials, contents, without_rows, refused, targets, problems, trust_clock)


def _take_findings(findings: list[Finding], positions: list[int], problems: list[Problem]) -> dict[int, str]:
    """Why trials are refused, by position. The other findings are added to `problems`; one for which the table as a
    whole is refused raises UserError. positions: of the trials that were reviewed."""
    refused: dict[int, list[str]] = {}
    of_table = []
    for finding in findings:
        # What is read is parsed again for the table, and reported there.
        if finding.kind == READING and finding.severity is not Severity.REFUSED:
            continue
        if finding.severity is not Severity.REFUSED:
            problems.append(Problem(finding.path, f"{finding.severity}: {finding.message}"))
        elif finding.trial is None:
            of_table.append(f"{finding.path}: {finding.message}")
        else:
            refused.setdefault(positions[finding.trial], []).append(finding.message)
    if of_table:
        raise UserError(of_table)
    return {i: "refused: " + _join_some(messages) for i, messages in refused.items()}


def _join_some(messages: list[str]) -> str:
    more = f"; and {len(messages) - MOST_REASONS} more" if len(messages) > MOST_REASONS else ""
    return "; ".join(messages[:MOST_REASONS]) + more


# ---- one kind of records in a table --------------------------------------------------------------------------------


def _select_kind(
    trials: list[TrialFolder], scale: str | None, ruleset: str | None, problems: list[Problem]
) -> list[TrialFolder]:
    """The trials of one scale and one ruleset, without those of modified workloads; UserError where kinds mix."""
    modified = Counter(trial.submission for trial in trials if trial.is_modified)
    for submission, count in sorted(modified.items()):
        problems.append(Problem(submission, f"{count} trials left out: facts of their workload were overridden"))
    trials = [trial for trial in trials if not trial.is_modified]
    for key, wanted in (("scale", scale), ("ruleset", ruleset)):
        # By id, since a dataclass that compares by value has no hash.
        kind_of = {id(t): getattr(t.manifest, key) for t in trials if t.manifest is not None}
        kinds = ", ".join(sorted(set(kind_of.values())))
        if wanted is None:
            if len(set(kind_of.values())) > 1:
                raise UserError(f"the records mix {key}s ({kinds}), and no table does; choose one with --{key}")
            continue
        others = [trial for trial in trials if id(trial) in kind_of and kind_of[id(trial)] != wanted]
        if others and len(others) == len(trials):
            raise UserError(f"no record is of {key}={wanted}; there are: {kinds}")
        if others:
            problems.append(Problem(f"{key}={wanted}", f"{len(others)} trials of another {key} left out"))
        # A trial without a manifest, as AlgoPerf's are, does not say its kind and is kept.
        trials = [trial for trial in trials if kind_of.get(id(trial), wanted) == wanted]
    return trials


def _shipped_targets(trials: list[TrialFolder], shipped: Shipped) -> Targets:
    """The targets that the configs have for the workloads of the records. Held-out variants without records of their
    base workload are ignored."""
    scales = {(t.workload, t.manifest.scale) for t in trials if t.manifest is not None}
    targets: dict[str, Target] = {}
    base_of: dict[str, str] = {}
    for workload, scale in sorted(scales):
        config = shipped.workload(workload, scale)
        # One that has not been measured yet is null.
        if config is None or not isinstance(config.get("target"), int | float):
            continue
        targets[workload] = Target(
            config["metric"],
            config["direction"],
            float(config["target"]),
            f"workload {config['version']}, target {config['target_version']}",
        )
        if config.get("variant") is not None and config.get("held_out", True):
            base_of[workload] = config["name"]
    if not scales and trials:
        raise UserError(
            "these records have no manifests (AlgoPerf's have none); give AlgoPerf's targets file with --targets"
        )
    base_workloads = sorted(targets.keys() - base_of.keys())
    held_out = sorted(workload for workload, base in base_of.items() if base in base_workloads)
    scored = {workload: targets[workload] for workload in (*base_workloads, *held_out)}
    return Targets(tuple(base_workloads), tuple(held_out), scored)


def _why_not_scored(trial: TrialFolder, targets: Targets, shipped: Shipped) -> str:
    if trial.manifest is None:
        return "no target is given for this workload"
    config = shipped.workload(trial.workload, trial.manifest.scale)
    if config is None:
        return (
            f"no config has this workload at scale={trial.manifest.scale}, and records do not set targets; name the "
            "folder of its YAML with pacemark --config-dir FOLDER, or give the target with --targets FILE"
        )
    if config["name"] not in targets.base:
        return f"it is held out, and there are no records of {config['name']}, which it is a variant of"
    return "its target has not been measured"


# ---- the table -----------------------------------------------------------------------------------------------------


_NO_MISS = (Status.REACHED, *UNUSABLE)
"""Statuses of trials that are not scored as a miss of the table's target by their own rows."""


@dataclass(frozen=True)
class _Verdict:
    """The status of a trial, and what is to be reported of it."""

    status: Status
    message: str | None = None


def _tabulate(
    trials: list[TrialFolder],
    contents: dict[int, bytes],
    without_rows: dict[int, _Verdict],
    refused: dict[int, str],
    targets: Targets,
    problems: list[Problem],
    trust_clock: bool,
) -> Records:
    """The table of the trials, in their order. refused: why, by position. Adds to `problems`."""
    target_of = [targets.targets[trial.workload] for trial in trials]
    parsed = parse_evaluations(contents, {i: target_of[i].column for i in contents})
    crossings = find_crossings(
        parsed.rows,
        np.array([target.value for target in target_of]),
        np.array([target.direction == "min" for target in target_of]),
    )
    verdicts = [
        without_rows.get(i)
        or (_Verdict(Status.INVALID, refused[i]) if i in refused else None)
        or _judge(trial, target_of[i], i, parsed, crossings, trust_clock)
        for i, trial in enumerate(trials)
    ]
    met = np.array([verdict.status is Status.REACHED for verdict in verdicts])
    _refuse_stopped_early(
        [trial for trial, verdict in zip(trials, verdicts, strict=True) if verdict.status not in _NO_MISS], targets
    )
    problems += [
        Problem(trial.shown, verdict.message)
        for trial, verdict in zip(trials, verdicts, strict=True)
        if verdict.message is not None
    ]
    table = pd.DataFrame(
        {
            "submission": [trial.submission for trial in trials],
            "workload": [trial.workload for trial in trials],
            "study": np.array([trial.study for trial in trials]),
            "trial": np.array([trial.trial for trial in trials]),
            "framework": [trial.framework for trial in trials],
            "status": np.array([str(verdict.status) for verdict in verdicts], dtype=object),
            **crossings.columns(met),
            "machine": [trial.machine for trial in trials],
            "energy_joules": np.array([trial.final("energy_joules_to_target") for trial in trials]),
            "disturbed": [trial.final("disturbed") == 1 for trial in trials],
            "state_bytes_per_parameter": np.array(
                [trial.final("optimizer_state_bytes_per_parameter") for trial in trials]
            ),
            "path": [trial.shown for trial in trials],
        }
    )
    manifests = {i: trial.manifest for i, trial in enumerate(trials) if trial.manifest is not None}
    return Records(table, parsed.rows, targets, problems, manifests)


def _read_contents(trials: list[TrialFolder]) -> tuple[dict[int, bytes], dict[int, _Verdict]]:
    """The CSV of each trial by its position, and the verdict on those that have none to parse."""
    contents: dict[int, bytes] = {}
    without: dict[int, _Verdict] = {}
    first_of: dict[tuple[str, str, int, int], TrialFolder] = {}
    for i, trial in enumerate(trials):
        first = first_of.setdefault((trial.submission, trial.workload, trial.study, trial.trial), trial)
        if first is not trial:
            without[i] = _Verdict(Status.DUPLICATE, f"left out: the same trial as {first.shown}")
            continue
        content = _read_csv(trial)
        if isinstance(content, bytes):
            contents[i] = content
            continue
        status = trial.declared_status
        # A trial whose manifest says how it ended before its first evaluation is a result.
        if status is None or status not in (Status.DIVERGED, Status.OUT_OF_MEMORY, Status.FAILED):
            status = Status.MISSING
        without[i] = _Verdict(status, content)
    return contents, without


def _read_csv(trial: TrialFolder) -> bytes | str:
    """The content of the CSV, or why there is none."""
    if EVALUATIONS not in trial.files:
        return f"missing: no {EVALUATIONS}"
    try:
        content = trial.read(EVALUATIONS)
    except OSError as error:
        return f"missing: {EVALUATIONS} cannot be read ({error.strerror})"
    if len(content) > LARGEST_MEMBER:
        return f"refused: {EVALUATIONS} is larger than {LARGEST_MEMBER >> 20} MiB"
    return content


def _judge(
    trial: TrialFolder, target: Target, i: int, parsed: Parsed, crossings: Crossings, trust_clock: bool
) -> _Verdict:
    """The status of a trial whose CSV was read. i: its position.

    The rows decide whether the target is met, since it can be another than the one the trial was run with.
    """
    if i in parsed.refused:
        reason = parsed.refused[i]
        return _Verdict(Status.MISSING if reason == NO_ROWS else Status.INVALID, reason)
    message = parsed.repaired.get(i)
    # Before the target is looked at: on such a clock the time of the crossing is not known.
    if crossings.non_monotonic[i]:
        if not trust_clock:
            return _Verdict(Status.INVALID, "refused: its clock or its steps run backwards")
        message = "its clock or its steps run backwards; taken as it is"
    if np.isfinite(crossings.index[i]):
        return _Verdict(Status.REACHED, message)
    status = trial.declared_status
    # A manifest's `reached` is about the trial's own target. A last evaluation without a value is a divergence.
    if status is None or status is Status.REACHED:
        return _Verdict(Status.EXHAUSTED if np.isfinite(crossings.final[i]) else Status.DIVERGED, message)
    if status is Status.PRUNED and trial.manifest is not None and trial.manifest.target != target.value:
        message = (
            f"pruned under the target {trial.manifest.target}; under {target.value:g} it might have been the best of "
            "its study"
        )
    return _Verdict(status, message)


def _refuse_stopped_early(unmet: list[TrialFolder], targets: Targets) -> None:
    """Raise UserError for trials that stopped at a target of their own, short of the table's: they are no misses."""
    stopped = [
        (trial, own_target)
        for trial in unmet
        if (own_target := trial.stopped_at_another_target) is not None
        and own_target != targets.targets[trial.workload].value
    ]
    if stopped:
        first, own_target = stopped[0]
        target = targets.targets[first.workload]
        raise UserError(
            f"{len(stopped)} trials stopped at another target than the table's and do not show when they would have "
            f"met it, the first of them {first.shown}: its target was {own_target:g}, here it is {target.value:g} "
            f"({target.version}); run them again with overwrite=true, or leave them out of the folders"
        )
