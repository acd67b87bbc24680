from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from harness import study, target_setting
from harness.config import CONFIG_DIR
from harness.problems import UserError
from harness.target_setting import Measured, write
from tests.conftest import TINY_GPT2

PROVENANCE = {"procedure": "python scripts/set_targets.py", "finalists": {"adamw 1": [1.5, 1.25]}, "hits": "9/10"}


def test_the_procedure_measures_a_target_and_finds_finished_trials_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, on a tiny model and a smaller grid: what it reports is what stands in the records."""
    for name, value in {"POINTS": 2, "FINALIST_RUNS": 2, "CONFIRM_RUNS": 3, "HITS_NEEDED": 3}.items():
        monkeypatch.setattr(target_setting, name, value)
    monkeypatch.setattr(target_setting, "SUBMISSIONS", {"nesterov": ["optimizer=sgd"], "adamw": ["optimizer=adamw"]})
    tiny = [argument for argument in TINY_GPT2 if not argument.startswith(("workload=", "workload.target"))]
    arguments = [*tiny, f"records={tmp_path}", "machine=here", "executor.workers=2"]
    said: list[str] = []
    measured = target_setting.measure("gpt2", "mini", arguments, "here", said.append)
    manifests = {path: json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json")}
    assert len(manifests) == 2 * 2 + 2 * 2 + 3
    assert {m["seeds"]["study"] for m in manifests.values()} <= set(study.TARGET_SEEDS)
    lengths = {m["config"]["workload"]["max_steps"] for m in manifests.values()}
    assert lengths == {9, 12}
    assert all(m["status"] == "exhausted" for m in manifests.values())
    finals = {
        name: [m["final"]["final_validation/loss"] for path, m in sorted(manifests.items())
               if m["submission"] == name.replace(" ", "-") and m["config"]["workload"]["max_steps"] == 9]
        for name in measured.provenance["finalists"]
    }  # fmt: skip
    for name, values in finals.items():
        assert measured.provenance["finalists"][name] == [round(value, 4) for value in values]
    assert measured.target == min(round(sum(values) / 2, 4) for values in finals.values())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = target_setting.measure("gpt2", "mini", arguments, "here", said.append)
    assert again.target == measured.target
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["gpt2-mini", "resnet-mini", "vit-mini"])
def test_writing_a_target_changes_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "workload.yaml"
    path.write_text((CONFIG_DIR / "workload" / "scale" / f"{name}.yaml").read_text())
    before = yaml.safe_load(path.read_text())
    write(path, Measured(0.123, True, True, PROVENANCE))
    after = yaml.safe_load(path.read_text())
    assert (after["target"], after["target_version"]) == (0.123, before["target_version"] + 1)
    assert after["target_provenance"] == PROVENANCE
    ignored = {"target", "target_version", "target_provenance"}
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}
    write(path, Measured(0.123, True, True, PROVENANCE))
    assert yaml.safe_load(path.read_text()) == after  # the same target is the same version


def test_a_config_without_a_place_for_the_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "workload.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(UserError, match="target_version"):
        write(path, Measured(0.1, True, True, PROVENANCE))
    assert path.read_text() == "name: mine\n"
