"""An audit: the findings about all records below some folders, of whatever kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from harness.records.archive import LARGEST_MEMBER
from harness.records.layout import EVALUATIONS, MANIFEST
from harness.records.trial_folders import Problem, TrialFolder, find_trials, read_manifest
from harness.review.finding import Finding, Severity
from harness.review.review import review
from harness.review.shipped import Shipped

_ORDER = list(Severity)


def audit(folders: Iterable[Path], *, accepted: Collection[str] = ()) -> tuple[int, list[Finding]]:
    """The number of trials below `folders`, and what is found about them, what is refused first.

    Records of one scale and ruleset are compared with each other, as a board would. accepted: settings in which they
    may differ (`harness.review.settings.MIXABLE`). Raises UserError for a folder that is none, and for a config that
    cannot be read.
    """
    problems: list[Problem] = []
    trials = [trial for folder in folders for trial in find_trials(folder, problems)]
    for trial in trials:
        if MANIFEST in trial.files:
            trial.manifest = read_manifest(trial, problems)
    findings = [Finding(problem.path, Severity.REFUSED, "files", problem.message) for problem in problems]
    findings += _modified(trials)
    findings += _without_manifest(trials)
    shipped = Shipped()
    for group in _group(trials).values():
        # The first of two folders of one trial counts, as in a table.
        distinct: list[TrialFolder] = []
        contents: dict[int, bytes] = {}
        seen: dict[tuple[str, str, int, int], TrialFolder] = {}
        for trial in group:
            first = seen.setdefault((trial.submission, trial.workload, trial.study, trial.trial), trial)
            if first is not trial:
                message = f"the same trial as {first.shown}; leave one of the two out"
                findings.append(Finding(trial.shown, Severity.WARNING, "files", message))
                continue
            content = _read_rows(trial, findings)
            if content is not None:
                contents[len(distinct)] = content
            distinct.append(trial)
        findings += review(distinct, contents, shipped=shipped, accepted=accepted)
    findings.sort(key=lambda finding: (_ORDER.index(finding.severity), finding.path))
    return len(trials), findings


def _group(trials: list[TrialFolder]) -> dict[tuple[str, str], list[TrialFolder]]:
    """The trials by scale and ruleset; one without a manifest is in the group of its workload's others."""
    kind_of = {t.workload: (t.manifest.scale, t.manifest.ruleset) for t in trials if t.manifest is not None}
    groups: dict[tuple[str, str], list[TrialFolder]] = defaultdict(list)
    for trial in sorted(trials, key=lambda t: (t.submission, t.workload, t.study, t.trial, t.packed is not None)):
        manifest = trial.manifest
        kind = (manifest.scale, manifest.ruleset) if manifest is not None else kind_of.get(trial.workload, ("", ""))
        groups[kind].append(trial)
    return groups


def _modified(trials: list[TrialFolder]) -> list[Finding]:
    labels = [trial.submission for trial in trials if trial.is_modified]
    if not labels:
        return []
    names = sorted(set(labels))
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    message = f"{len(labels)} trials, of {listed}: their workload was modified, so no board takes them"
    return [Finding("records", Severity.NOTE, "identity", message)]


def _without_manifest(trials: list[TrialFolder]) -> list[Finding]:
    ours = {trial.workload for trial in trials if trial.manifest is not None}
    count = sum(trial.workload not in ours for trial in trials)
    message = f"{count} trials without {MANIFEST}, as AlgoPerf's are: nothing of them can be checked but their rows"
    return [Finding("records", Severity.NOTE, "manifest", message)] if count else []


def _read_rows(trial: TrialFolder, findings: list[Finding]) -> bytes | None:
    """The content of the CSV; None, and a finding, where it cannot be read."""
    status = trial.declared_status
    if EVALUATIONS not in trial.files:
        # A trial that broke down before its first evaluation has none.
        if status is None or not status.is_finished:
            findings.append(Finding(trial.shown, Severity.WARNING, "files", f"no {EVALUATIONS}: it counts as missing"))
        return None
    try:
        content = trial.read(EVALUATIONS)
    except OSError as error:
        findings.append(
            Finding(trial.shown, Severity.REFUSED, "files", f"{EVALUATIONS} cannot be read ({error.strerror})")
        )
        return None
    if len(content) > LARGEST_MEMBER:
        message = f"{EVALUATIONS} is larger than {LARGEST_MEMBER >> 20} MiB"
        findings.append(Finding(trial.shown, Severity.REFUSED, "files", message))
        return None
    return content
