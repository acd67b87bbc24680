"""All checks on some records, in one list."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from harness.records.evaluations import NO_ROWS, REVIEW_COLUMNS, Parsed, parse_evaluations
from harness.records.trial_folders import TrialFolder
from harness.review.columns import TrialRows, check_columns
from harness.review.copies import check_copies
from harness.review.declared import check_declared
from harness.review.evidence import check_evidence, check_evidence_of_all
from harness.review.finding import Finding, Remark, Severity
from harness.review.identity import check_identity
from harness.review.labels import check_labels
from harness.review.manifests import check_code, check_manifests
from harness.review.settings import check_settings
from harness.review.shipped import Shipped
from harness.review.studies import check_studies

READING = "rows"
"""Kind of the findings about files of rows that cannot be read as they should."""


def review(
    trials: Sequence[TrialFolder],
    contents: Mapping[int, bytes],
    *,
    shipped: Shipped | None = None,
    accepted: Collection[str] = (),
    own_targets: bool = False,
) -> list[Finding]:
    """What is wrong with trials that one table would hold: of one scale and one ruleset, each once.

    contents: the CSVs, by position. accepted: settings that may differ (`harness.review.settings.MIXABLE`).
    own_targets: the table is scored under targets that were given, so those of the records do not matter. Trials
    without manifest are AlgoPerf's, and are left alone unless others of their workload have one. Raises UserError where
    a config cannot be read.
    """
    shipped = shipped if shipped is not None else Shipped()
    columns = {i: manifest.metric for i, trial in enumerate(trials) if (manifest := trial.manifest) is not None}
    ours = {i: content for i, content in contents.items() if i in columns}
    parsed = parse_evaluations(ours, {i: columns[i] for i in ours}, REVIEW_COLUMNS)
    rows = {i: TrialRows.of(parsed.rows, i) for i in ours if i not in parsed.refused}
    findings = [*_unreadable(trials, parsed)]
    findings += [finding for i in columns for finding in _review_one(i, trials[i], rows.get(i), shipped, own_targets)]
    return [
        *findings,
        *check_manifests(trials),
        *check_code(trials),
        *check_settings(trials, shipped, accepted, own_targets),
        *check_labels(trials, shipped),
        *check_studies(trials, shipped),
        *check_evidence_of_all(trials),
        *check_copies(trials, rows),
    ]


def _unreadable(trials: Sequence[TrialFolder], parsed: Parsed) -> Iterator[Finding]:
    """Files of rows that cannot be used, or not whole."""
    for i, reason in parsed.refused.items():
        # Such a trial is missing, not refused.
        severity = Severity.WARNING if reason == NO_ROWS else Severity.REFUSED
        yield Finding(trials[i].shown, severity, READING, reason.removeprefix("refused: "), i)
    for i, message in parsed.repaired.items():
        yield Finding(trials[i].shown, Severity.WARNING, READING, message, i)


def _review_one(
    i: int, trial: TrialFolder, rows: TrialRows | None, shipped: Shipped, own_targets: bool
) -> Iterator[Finding]:
    manifest = trial.manifest
    assert manifest is not None
    remarks: list[tuple[str, Iterator[Remark]]] = [
        ("identity", check_identity(trial, manifest, shipped, own_targets)),
        ("manifest", check_declared(trial, manifest)),
        ("evidence", check_evidence(manifest, rows, shipped)),
    ]
    if rows is not None:
        remarks.append(("columns", check_columns(manifest, rows)))
    for kind, of_kind in remarks:
        for remark in of_kind:
            yield Finding(trial.shown, remark.severity, kind, remark.message, i)
