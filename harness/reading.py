"""Reading records: folders of trials in AlgoPerf's layout, AlgoPerf's own or ours, into one table.

    .../<submission>/study_<i>/<workload>_<jax|pytorch>/trial_<j>/eval_measurements.csv [+ manifest.json, ours]

Tolerant of what real folders hold, strict about saying it: every trial folder ends in a status, and `Records.problems`
lists what was missing, repaired or refused, and why. Nothing in a record is executed, and nothing is written.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness import evaluations, machine
from harness.evaluations import Evaluations
from harness.problems import UserError
from harness.targets import Target, Targets

FRAMEWORKS = ("jax", "pytorch")
CSV, MANIFEST = "eval_measurements.csv", "manifest.json"
LARGEST_FILE = 64 * 2**20  # a real record has a few hundred rows; more is not a record

SCORED = ("reached", "exhausted", "diverged", "out_of_memory", "failed", "pruned")
UNFINISHED = ("running", "stopped")
UNUSABLE = ("missing", "invalid", "duplicate")
"""missing: no CSV, or one without rows. invalid: refused, `problems` says why. duplicate: another folder of the same
trial was taken."""


@dataclass(frozen=True)
class Problem:
    """Something missing, repaired or refused."""

    path: str
    what: str


@dataclass
class Records:
    """`trials` has one row per trial folder:

    submission, workload (without framework), study, trial, framework, status (see SCORED, UNFINISHED, UNUSABLE);
    index (of the evaluation that met the target), seconds, steps, examples (of all gradients) there, NaN if it was not
    met; resolution_seconds, resolution_steps since the evaluation before; limit_seconds, limit_steps: how far
    the trial went; best, final: of the target's metric; machine, path, and what our manifests add.
    """

    trials: pd.DataFrame
    rows: Evaluations
    targets: Targets
    problems: list[Problem] = field(default_factory=list)
    manifests: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By row label of `trials`."""

    def only(self, workloads: Iterable[str]) -> Records:
        """Those of these workloads; UserError for one that is not there."""
        wanted, known = set(workloads), sorted(self.targets.targets)
        if unknown := sorted(wanted.difference(known)):
            raise UserError(f"--workloads {', '.join(unknown)}: not in the records, which hold {', '.join(known)}")
        base, held_out = ([w for w in names if w in wanted] for names in (self.targets.base, self.targets.held_out))
        targets = Targets(tuple(base), tuple(held_out), {w: self.targets.targets[w] for w in (*base, *held_out)})
        return replace(self, trials=self.trials[self.trials["workload"].isin(wanted)], targets=targets)


@dataclass
class _Folder:
    path: Path
    shown: str
    submission: str
    workload: str
    framework: str
    study: int
    trial: int
    has_csv: bool
    has_manifest: bool
    manifest: dict[str, Any] = field(default_factory=dict)


def read(
    folders: Iterable[Path],
    targets: Targets | None = None,
    *,
    scale: str | None = None,
    ruleset: str | None = None,
    trust_clock: bool = False,
) -> Records:
    """Read every trial below `folders`. Without `targets`, those of the manifests count.

    scale, ruleset: which of our records to take, where several are there (AlgoPerf's carry neither). trust_clock: keep
    trials whose clock runs backwards, as AlgoPerf does. UserError if nothing can be scored or versions are mixed.
    """
    problems: list[Problem] = []
    found = [trial for folder in folders for trial in _find(folder, problems)]
    for trial in found:
        if trial.has_manifest:
            trial.manifest = _manifest(trial, problems)
    found = _of_one_kind(found, scale, ruleset, problems)
    if targets is None:
        targets = _declared_targets(found)
    unknown = Counter((t.workload, _unscored(t, targets)) for t in found if t.workload not in targets.targets)
    for (workload, why), count in sorted(unknown.items()):
        problems.append(Problem(workload, f"{count} trials not scored: {why}"))
    found = [trial for trial in found if trial.workload in targets.targets]
    if not found:
        said = "".join(f"\n  {p.path}: {p.what}" for p in problems[:10])
        raise UserError(f"no trial to score in {', '.join(map(str, folders))}; expected .../study_<i>/<workload>_"
                        f"<jax|pytorch>/trial_<j>/{CSV}{said}")  # fmt: skip
    found.sort(key=lambda t: (t.submission, t.workload, t.study, t.trial, t.framework, t.shown))
    return _tabulate(found, targets, problems, trust_clock)


# ---- finding -----------------------------------------------------------------------------------------------------


def _find(root: Path, problems: list[Problem]) -> list[_Folder]:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give a folder of records, or a table ending in .csv")
    found: list[_Folder] = []
    pending = [str(root.resolve())]
    cut = len(pending[0]) + 1
    study_name = re.compile(r"study_(\d{1,9})")
    while pending:
        here = pending.pop()
        for entry in _entries(here, problems):
            if not entry.is_dir(follow_symlinks=False):
                continue
            if match := study_name.fullmatch(entry.name):
                found += _study(entry.path, os.path.basename(here), int(match[1]), cut, problems)  # noqa: PTH119
            else:
                pending.append(entry.path)
    return found


def _study(path: str, submission: str, study: int, cut: int, problems: list[Problem]) -> list[_Folder]:
    found = []
    for entry in _entries(path, problems):
        shown = entry.path[cut:]
        workload, _, framework = entry.name.rpartition("_")
        if not entry.is_dir(follow_symlinks=False):
            continue
        if framework not in FRAMEWORKS or not workload:
            problems.append(Problem(shown, "refused: not named <workload>_jax or <workload>_pytorch"))
            continue
        for inner in _entries(entry.path, problems):
            match = re.fullmatch(r"trial_(\d{1,9})", inner.name)
            if not match or not inner.is_dir(follow_symlinks=False):
                if inner.name.startswith("trial"):
                    problems.append(Problem(inner.path[cut:], "refused: not a folder named trial_<number>"))
                continue
            names = {file.name for file in _entries(inner.path, problems)}
            files = (CSV in names, MANIFEST in names)
            where = (Path(inner.path), inner.path[cut:])
            found.append(_Folder(*where, submission, workload, framework, study, int(match[1]), *files))
    return found


def _entries(path: str, problems: list[Problem]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        problems.append(Problem(path, f"cannot be listed: {error.strerror}"))
        return []


def _manifest(trial: _Folder, problems: list[Problem]) -> dict[str, Any]:
    try:
        manifest = json.loads((trial.path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
            raise ValueError("not the manifest of a trial")
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        problems.append(Problem(trial.shown, f"{MANIFEST} ignored: {error}"))
        return {}


# ---- one kind of records in a table ------------------------------------------------------------------------------


def _of_one_kind(
    found: list[_Folder], scale: str | None, ruleset: str | None, problems: list[Problem]
) -> list[_Folder]:
    modified = [trial for trial in found if trial.manifest.get("modified")]
    for submission, count in sorted(Counter(trial.submission for trial in modified).items()):
        problems.append(Problem(submission, f"{count} trials left out: facts of their workload were overridden"))
    found = [trial for trial in found if not trial.manifest.get("modified")]
    for key, wanted in (("scale", scale), ("ruleset", ruleset)):
        kinds = {str(_name(trial, key)) for trial in found if trial.manifest}
        if wanted is None and len(kinds) > 1:
            raise UserError(f"the records mix {key}s ({', '.join(sorted(kinds))}), and no table does; "
                            f"choose one with --{key}")  # fmt: skip
        if wanted is not None:
            left_out = [trial for trial in found if trial.manifest and _name(trial, key) != wanted]
            if left_out and len(left_out) == len(found):
                raise UserError(f"no record is of {key}={wanted}; there are: {', '.join(sorted(kinds))}")
            if left_out:
                problems.append(Problem(f"{key}={wanted}", f"{len(left_out)} trials of another {key} left out"))
            found = [trial for trial in found if not trial.manifest or _name(trial, key) == wanted]
    return found


def _name(trial: _Folder, key: str) -> Any:
    entry = trial.manifest["identity"].get(key)
    return entry.get("name") if isinstance(entry, dict) else entry


def _declared_targets(found: list[_Folder]) -> Targets:
    """From the manifests, which also say what is a held-out variant of what. Of several versions of a target the newest
    counts, since curves can be scored again; UserError where two trials of a workload disagree otherwise. A variant
    whose base workload has no records cannot decide anything, and has no place in the table."""
    declared: dict[str, Target] = {}
    versions: dict[str, tuple[Any, int]] = {}
    variant_of: dict[str, str] = {}
    for trial in found:
        m = trial.manifest
        try:
            metric, direction = str(m["metric"]).removeprefix("validation/"), m["direction"]
            version = (m["workload_version"], int(m["target_version"]))
            target = Target(metric, direction, float(m["target"]), f"workload {version[0]}, target {version[1]}")
            if direction not in ("min", "max") or not np.isfinite(target.value):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            continue
        other = declared.setdefault(trial.workload, target)
        workload_version, target_version = versions.setdefault(trial.workload, version)
        comparable = (other.metric, other.direction, workload_version) == (metric, direction, version[0])
        if comparable and version[1] != target_version:
            if version[1] > target_version:
                declared[trial.workload], versions[trial.workload] = target, version
        elif other != target:
            raise UserError(
                f"{trial.shown}: its {trial.workload} has {target}, others have {other}; no table mixes versions: "
                "give only the records of one, or the target with --targets"
            )
        of = m.get("variant_of")
        if isinstance(of, str) and trial.workload.startswith(f"{of}_"):
            variant_of[trial.workload] = of
    if not declared and found:
        raise UserError(
            "these records declare no targets (AlgoPerf's do not); give AlgoPerf's targets file with --targets"
        )
    base = sorted(declared.keys() - variant_of.keys())
    held_out = sorted(workload for workload, of in variant_of.items() if of in base)
    return Targets(tuple(base), tuple(held_out), {workload: declared[workload] for workload in (*base, *held_out)})


def _unscored(trial: _Folder, targets: Targets) -> str:
    base = trial.manifest.get("variant_of")
    if base is not None and base not in targets.base:
        return f"it is held out, and there are no records of {base}, which it is a variant of"
    return "no target is declared for this workload"


# ---- the table ---------------------------------------------------------------------------------------------------


def _tabulate(found: list[_Folder], targets: Targets, problems: list[Problem], trust_clock: bool) -> Records:
    problem_of: dict[int, str] = {}
    contents: dict[int, bytes] = {}
    seen: dict[tuple[str, str, int, int], int] = {}
    status = np.array([_declared_status(trial) for trial in found], dtype=object)
    for i, trial in enumerate(found):
        first = seen.setdefault((trial.submission, trial.workload, trial.study, trial.trial), i)
        if first != i:
            status[i] = "duplicate"
            problem_of[i] = f"left out: the same trial as {found[first].shown}"
            continue
        content, why = _content(trial)
        if content is None:
            # A trial that says how it ended, before its first evaluation, is a result.
            if status[i] not in ("diverged", "out_of_memory", "failed"):
                status[i] = "missing"
            problem_of[i] = why
        else:
            contents[i] = content
    columns = {i: targets.targets[found[i].workload].column for i in contents}
    rows, refused, repaired = evaluations.parse(contents, columns)
    at = evaluations.crossings(
        rows,
        np.array([targets.targets[trial.workload].value for trial in found]),
        np.array([targets.targets[trial.workload].direction == "min" for trial in found]),
    )
    for i, why in refused.items():
        status[i] = "missing" if why == evaluations.NO_ROWS else "invalid"
        problem_of[i] = why
    for i, why in repaired.items():
        problem_of[i] = why
    for i in np.flatnonzero(at["backwards"]).tolist():
        if trust_clock:
            problem_of[i] = "its clock or its steps run backwards; taken as it is"
        else:
            status[i], problem_of[i] = "invalid", "refused: its clock or its steps run backwards"
    met = np.isfinite(at["index"]) & ~np.isin(status.astype(str), UNUSABLE)
    for name in ("index", "seconds", "steps", "examples", "resolution_seconds", "resolution_steps"):
        at[name] = np.where(met, at[name], np.nan)
    # The rows decide whether the target is met, since it can be another than the one the trial was run with.
    status[met] = "reached"
    _refuse_stopped_early([trial for trial, is_met in zip(found, met.tolist(), strict=True) if not is_met], targets)
    for i in np.flatnonzero(status == "pruned").tolist():
        used, now = found[i].manifest.get("target"), targets.targets[found[i].workload].value
        if used != now:
            problem_of[i] = f"pruned under the target {used}; under {now:g} it might have been the best of its study"
    unmet = ~met & np.isin(status.astype(str), ("reached", ""))
    status[unmet] = np.where(np.isfinite(at["final"][unmet]), "exhausted", "diverged")
    problems += [Problem(found[i].shown, problem_of[i]) for i in sorted(problem_of)]
    table = pd.DataFrame(
        {
            "submission": [trial.submission for trial in found],
            "workload": [trial.workload for trial in found],
            "study": np.array([trial.study for trial in found]),
            "trial": np.array([trial.trial for trial in found]),
            "framework": [trial.framework for trial in found],
            "status": status,
            **{name: values for name, values in at.items() if name != "backwards"},
            "machine": [_machine(trial) for trial in found],
            "energy_joules": _column(found, "energy_joules_to_target"),
            "disturbed": [_final(trial, "disturbed") is True for trial in found],
            "state_bytes_per_parameter": _column(found, "optimizer_state_bytes_per_parameter"),
            "path": [trial.shown for trial in found],
        }
    )
    manifests = {i: trial.manifest for i, trial in enumerate(found) if trial.manifest}
    return Records(table, rows, targets, problems, manifests)


def _refuse_stopped_early(unmet: list[_Folder], targets: Targets) -> None:
    """UserError for trials that stopped at a target of their own, short of the table's: they are no misses."""
    stopped = [
        trial
        for trial in unmet
        if trial.manifest.get("status") == "reached"
        and trial.manifest.get("config", {}).get("run_to_end") is False
        and trial.manifest.get("target") != targets.targets[trial.workload].value
    ]
    if stopped:
        first, target = stopped[0], targets.targets[stopped[0].workload]
        raise UserError(
            f"{len(stopped)} trials stopped at another target than the table's and say nothing of it, the first of "
            f"them {first.shown}: its target was {first.manifest['target']:g}, here it is {target.value:g} "
            f"({target.version}); run them again with overwrite=true, or leave them out of the folders"
        )


def _declared_status(trial: _Folder) -> str:
    status = trial.manifest.get("status", "")
    return status if status in SCORED + UNFINISHED else ""


def _content(trial: _Folder) -> tuple[bytes | None, str]:
    if not trial.has_csv:
        return None, f"missing: no {CSV}"
    try:
        with open(trial.path / CSV, "rb") as file:  # noqa: PTH123 - a third of the time of Path.open over 4,000 files
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        return None, f"missing: {CSV} cannot be read ({error.strerror})"
    if len(content) > LARGEST_FILE:
        return None, f"refused: {CSV} is larger than {LARGEST_FILE >> 20} MiB"
    return content, ""


def _machine(trial: _Folder) -> str | None:
    """What it ran on, whatever its folder is called."""
    described = trial.manifest.get("machine")
    try:
        return machine.folder_name(described) if isinstance(described, dict) else None
    except (KeyError, TypeError):
        return trial.path.parents[3].name


def _final(trial: _Folder, key: str) -> Any:
    final = trial.manifest.get("final")
    return final.get(key) if isinstance(final, dict) else None


def _column(found: list[_Folder], key: str) -> NDArray[np.float64]:
    values = (_final(trial, key) for trial in found)
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=float)
