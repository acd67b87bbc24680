"""The evidence of a record: what was seen of the submission while it ran (`harness.records.manifest.Evidence`).

What can only come from breaking a rule is refused. What can have an innocent cause is a warning, and a person asks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from harness.records.manifest import Evidence, Manifest
from harness.records.trial_folders import TrialFolder
from harness.review.columns import TrialRows
from harness.review.finding import Finding, Remark, Severity, refused, warning
from harness.review.majority import majority
from harness.review.shipped import Shipped

_CLOCKS, _CLOCKS_SECONDS = 1.1, 1.0
"""How much longer the judge's clock may run than the training clock: messages between the two take time."""
_CLOCKS_REFUSED = 2.0
_CHILDREN, _CHILDREN_SECONDS = 0.01, 0.5
_OFF_CLOCK, _OFF_CLOCK_SECONDS = 0.25, 5.0
_LIVES, _LIVES_SECONDS = 1.2, 30.0
"""Wall time of the lives over the trial's, and seconds that a life may take to begin."""
_MOST_LIVES = 5
_ALWAYS = ("counted_forward_examples", "off_clock_forward_examples", "off_clock_changes", "children_cpu")
_OF_JUDGE = ("second_clock", "second_cpu")
"""Columns that rows with evidence have, and with judge=process besides."""
_NEVER_PATCHED = ("harness.", "workloads.", "time.")
"""Prefixes of what nothing but a cheat replaces."""
_IMPORT_SECONDS = 20.0
"""CPU time of importing a submission, of which most is that of its libraries."""


def check_evidence(manifest: Manifest, rows: TrialRows | None, shipped: Shipped) -> Iterator[Remark]:
    """What the evidence of one record says against it. rows: None where the trial has none."""
    evidence = manifest.evidence
    if evidence is None:
        return
    rules = shipped.ruleset(manifest.ruleset)
    if rules is not None and rules.judge != "none" and evidence.judge == "none":
        yield warning(
            f"judge=none: its own process evaluated it, and ruleset {rules.name} has judge={rules.judge}; run it again"
        )
    yield from _check_lists(manifest, evidence)
    threads = manifest.identity.get("threads")
    if evidence.threads is not None and isinstance(threads, int) and evidence.threads > threads:
        yield refused(f"evidence.threads={evidence.threads}: more than threads={threads}; run it again within them")
    if evidence.import_cpu_seconds is not None and evidence.import_cpu_seconds > _IMPORT_SECONDS:
        yield warning(
            f"evidence.import_cpu_seconds={evidence.import_cpu_seconds:.4g}: importing it took long; read what it does"
        )
    built, initial = evidence.built_weights_sha256, evidence.initial_weights_sha256
    if built is not None and initial is not None and built != initial:
        yield warning("evidence.built_weights_sha256: building the submission changed the weights; read why")
    if rows is not None and len(rows.seconds):
        expected = _ALWAYS + (_OF_JUDGE if evidence.judge == "process" else ())
        if absent := rows.absent(expected):
            yield refused(
                f"{', '.join(absent)}: the rows lack these columns of the evidence; send it as the run wrote it"
            )
        yield from _check_counters(manifest, rows)
        yield from _check_clocks(manifest, rows)
        yield from _check_lives(manifest, evidence, rows)


def _check_lists(manifest: Manifest, evidence: Evidence) -> Iterator[Remark]:
    if evidence.tampered:
        yield refused(f"evidence.tampered={_listed(evidence.tampered)}: changed by another process than the judge")
    # Where a judge evaluates, it does so with a model of its own.
    if evidence.model_changes:
        text = f"evidence.model_changes={_listed(evidence.model_changes)}: its model was not the workload's"
        yield warning(f"{text}; read why") if evidence.judge == "process" else refused(f"{text} when it was evaluated")
    if evidence.judge_imported:
        yield warning("evidence.judge_imported=true: the judge's process had imported the submission; use run.py")
    if of_harness := [name for name in evidence.patched if name.startswith(_NEVER_PATCHED)]:
        yield refused(f"evidence.patched={_listed(of_harness)}: replaced in its process")
    if others := [name for name in evidence.patched if not name.startswith(_NEVER_PATCHED)]:
        # Some libraries replace functions of torch when they are imported.
        yield warning(f"evidence.patched={_listed(others)}: replaced in its process; read why")
    for key, done in (("files_opened", "opened"), ("connections", "connected to"), ("programs", "started")):
        if values := getattr(evidence, key):
            yield warning(f"evidence.{key}={_listed(values)}: {done} while it trained; read what for")


def _check_counters(manifest: Manifest, rows: TrialRows) -> Iterator[Remark]:
    counted, declared = rows.last("counted_forward_examples"), rows.last("forward_examples")
    if counted > declared:
        yield refused(
            f"counted_forward_examples={counted:g}: the model saw more than the {declared:g} that the submission was "
            "charged for; ask for passes through the step alone"
        )
    if (off := rows.last("off_clock_forward_examples")) > 0:
        yield refused(f"off_clock_forward_examples={off:g}: passes through the model while the clock stood")
    if (changes := rows.last("off_clock_changes")) > 0:
        yield refused(f"off_clock_changes={changes:g}: weights changed while the clock stood")


def _check_clocks(manifest: Manifest, rows: TrialRows) -> Iterator[Remark]:
    clock, second = float(rows.seconds[-1]), rows.last("second_clock")
    if second > _CLOCKS_REFUSED * clock + _CLOCKS_SECONDS:
        yield refused(
            f"accumulated_submission_time={clock:.4g}: the judge's clock has {second:.4g} s for the same time"
        )
    elif second > _CLOCKS * clock + _CLOCKS_SECONDS:
        yield warning(f"accumulated_submission_time={clock:.4g}: the judge's clock has {second:.4g} s; ask why")
    # The training clock leaves out how long the workload's model is compiled, and never has more than passed.
    elif clock > _CLOCKS * second + _CLOCKS_SECONDS:
        yield warning(f"accumulated_submission_time={clock:.4g}: the judge's clock has only {second:.4g} s; ask why")
    threads, second_cpu = manifest.identity.get("threads"), rows.last("second_cpu")
    allowed = _CLOCKS * (threads if isinstance(threads, int) else 1) * max(clock, np.nan_to_num(second))
    # On a GPU, threads of the driver wait actively.
    if manifest.machine.get("device") == "cpu" and second_cpu > allowed + _CLOCKS_SECONDS:
        yield warning(f"accumulated_second_cpu_time={second_cpu:.4g}: more than threads={threads} can take; ask why")
    if (children := rows.last("children_cpu")) > _CHILDREN * clock + _CHILDREN_SECONDS:
        yield warning(f"accumulated_children_cpu_time={children:.4g}: processes of its own worked; read what for")
    off_clock = rows.last("off_clock_cpu")
    if off_clock > _OFF_CLOCK * clock + _OFF_CLOCK_SECONDS:
        yield warning(f"accumulated_off_clock_cpu_time={off_clock:.4g}: it worked while the clock stood; read what")


def _check_lives(manifest: Manifest, evidence: Evidence, rows: TrialRows) -> Iterator[Remark]:
    lives, total = evidence.lives, rows.last("total")
    wall = sum(life.seconds for life in lives)
    if wall > _LIVES * total + _LIVES_SECONDS * len(lives):
        yield warning(
            f"evidence.lives: {len(lives)} processes ran {wall:.4g} s for a trial of {total:.4g} s; ask what was lost"
        )
    starts = Counter(life.first_row for life in lives)
    if starts and (most := max(starts.values())) > _MOST_LIVES:
        yield warning(f"evidence.lives: {most} processes began at the same row; ask why they died")


def _listed(values: Sequence[str]) -> str:
    shown = ", ".join(value[:60] for value in values[:3])
    return f"[{shown}{f', and {len(values) - 3} more' if len(values) > 3 else ''}]"


# ---- over all records ----------------------------------------------------------------------------------------------


def check_evidence_of_all(trials: Sequence[TrialFolder]) -> Iterator[Finding]:
    """Initial weights are a function of the seed, and the model's structure of the workload: of all records that have
    these in common, the weights and the structure must be the same."""
    with_evidence = [i for i, t in enumerate(trials) if t.manifest is not None and t.manifest.evidence is not None]
    yield from _compare(trials, with_evidence, "initial_weights_sha256", _same_start)
    yield from _compare(trials, with_evidence, "model_sha256", _same_model)
    labels = {trials[i].submission for i in with_evidence}
    without: Counter[str] = Counter()
    for i, trial in enumerate(trials):
        if trial.manifest is None or trial.manifest.evidence is not None:
            continue
        if trial.submission in labels:
            message = "evidence: missing, and other trials under its label have it; send it as the run wrote it"
            yield Finding(trial.shown, Severity.WARNING, "evidence", message, i)
        else:
            without[trial.manifest.ruleset] += 1
    for ruleset, count in sorted(without.items()):
        message = f"{count} trials carry no evidence, since they were made before records had any"
        yield Finding(f"ruleset={ruleset}", Severity.NOTE, "evidence", message)


def _same_model(manifest: Manifest) -> tuple[object, ...]:
    workload = manifest.identity.get("workload")
    model = str(workload.get("model")) if isinstance(workload, dict) else ""
    return (manifest.workload, manifest.scale, manifest.workload_version, model, manifest.packages.get("torch"))


def _same_start(manifest: Manifest) -> tuple[object, ...]:
    return (*_same_model(manifest), manifest.seeds.get("base"))


def _compare(
    trials: Sequence[TrialFolder], members: list[int], key: str, group_of: Callable[[Manifest], tuple[object, ...]]
) -> Iterator[Finding]:
    groups: dict[tuple[object, ...], dict[int, str]] = defaultdict(dict)
    for i in members:
        manifest = trials[i].manifest
        assert manifest is not None and manifest.evidence is not None
        value = getattr(manifest.evidence, key)
        if isinstance(value, str):
            groups[group_of(manifest)][i] = value
    for values in groups.values():
        if len(set(values.values())) <= 1:
            continue
        usual = majority(values.values())
        # Of two records nobody can say which is right.
        severity = Severity.REFUSED if usual is not None else Severity.WARNING
        for i, value in values.items():
            if value != usual:
                message = f"evidence.{key}={value[:12]}...: not that of other records of the same workload and seed"
                yield Finding(trials[i].shown, severity, "evidence", message, i)
