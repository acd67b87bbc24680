"""What must be equal over a table although no config fixes it: precision, compilation, threads, versions, data.

Per workload, since only there are times compared. A few records that differ from the others are refused. Where no value
is that of two thirds of the records, nobody can say which of them are the mistake, and the table as a whole is refused,
with what to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records.manifest import Manifest
from harness.records.trial_folders import TrialFolder
from harness.review.finding import Finding, Severity
from harness.review.majority import describe, freeze, majority
from harness.review.shipped import Shipped


@dataclass(frozen=True)
class _Setting:
    name: str
    """In messages, and as a value of --mix."""
    read: Callable[[Manifest], Any]
    remedy: str
    """What a user does to make it equal."""


def _of_identity(key: str) -> Callable[[Manifest], Any]:
    return lambda manifest: manifest.identity.get(key)


_SETTINGS = (
    _Setting("precision", _of_identity("precision"), "run these again with precision="),
    _Setting("compile", _of_identity("compile"), "run these again with compile="),
    _Setting("deterministic", _of_identity("deterministic"), "run these again with deterministic="),
    _Setting("threads", _of_identity("threads"), "run these again with threads="),
    _Setting("device", lambda manifest: manifest.machine.get("device"), "run these again on "),
    _Setting("torch", lambda manifest: manifest.packages.get("torch"), "run these again with torch "),
)
MIXABLE = tuple(setting.name for setting in _SETTINGS)
"""What --mix can name."""


def check_settings(
    trials: Sequence[TrialFolder], shipped: Shipped, accepted: Collection[str], own_targets: bool
) -> Iterator[Finding]:
    """Records that differ from the others in what must be equal over a table. accepted: names of `MIXABLE` that may
    differ all the same. own_targets: as in `check_identity`."""
    groups: dict[tuple[str, str], list[tuple[int, TrialFolder, Manifest]]] = defaultdict(list)
    for i, trial in enumerate(trials):
        if trial.manifest is not None and not trial.manifest.modified:
            groups[trial.workload, trial.manifest.scale].append((i, trial, trial.manifest))
    for (workload, scale), members in sorted(groups.items()):
        for setting in _SETTINGS:
            yield from _compare(
                workload, members, setting.name, [setting.read(manifest) for *_, manifest in members], setting.remedy,
                accepted, mixable=True,
            )  # fmt: skip
        # Where they came from does not matter.
        data = [{key: value for key, value in m.data.items() if key != "source"} for *_, m in members]
        yield from _compare(workload, members, "data", data, "run these again on the same data as ", accepted)
        if shipped.workload(workload, scale) is None:
            yield from _compare_facts(workload, members, accepted, own_targets)


def _compare_facts(
    workload: str, members: list[tuple[int, TrialFolder, Manifest]], accepted: Collection[str], own_targets: bool
) -> Iterator[Finding]:
    """A workload that no config has: what its records say of it must be the same in all."""
    # The target of a table that is scored under a given one is nobody's business.
    left_out = {"description", "target_provenance", *(("target", "target_version") if own_targets else ())}
    facts = []
    for *_, manifest in members:
        of_record = manifest.identity.get("workload")
        facts.append({k: v for k, v in of_record.items() if k not in left_out} if isinstance(of_record, dict) else None)
    remedy = "no config has this workload (pacemark --config-dir FOLDER names yours), so it must be the same in all: "
    yield from _compare(workload, members, "workload", facts, remedy, accepted)


def _compare(
    workload: str,
    members: list[tuple[int, TrialFolder, Manifest]],
    name: str,
    values: list[Any],
    remedy: str,
    accepted: Collection[str],
    *,
    mixable: bool = False,
) -> Iterator[Finding]:
    texts = [freeze(value) for value in values]
    if len(set(texts)) <= 1:
        return
    described = describe(texts, [trial.submission for _, trial, _ in members])
    if name in accepted:
        message = f"{name} is not the same in all records ({described}); taken as --mix {name} says"
        yield Finding(workload, Severity.WARNING, "settings", message)
        return
    option = f", or accept it with --mix {name}" if mixable else ""
    usual = majority(texts)
    if usual is None:
        message = (
            f"the records mix values of {name} ({described}), and no table does; "
            f"{remedy}one value, leave some out{option}"
        )
        yield Finding(workload, Severity.REFUSED, "settings", message)
        return
    for (i, trial, _), text in zip(members, texts, strict=True):
        if text != usual:
            message = f"{name}={text[:80]}, and the other records have {usual[:80]}; {remedy}{usual[:80]}{option}"
            yield Finding(trial.shown, Severity.REFUSED, "settings", message, i)
