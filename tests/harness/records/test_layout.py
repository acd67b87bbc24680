from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.compose import load_run
from harness.records.layout import RecordPath, list_submission_folders, list_trials_of_submission, machine_folder_name

NAME = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)


@given(NAME, NAME, NAME, NAME, st.integers(0, 2**31 - 1), NAME, st.integers(0, 999_999_999))
def test_a_folder_is_parsed_into_the_parts_that_made_it(
    scale: str, ruleset: str, machine: str, label: str, study: int, workload: str, trial: int
) -> None:
    path = RecordPath(Path("/records/of mine"), scale, ruleset, machine, label, study, workload, trial)
    assert RecordPath.parse(path.folder) == path


@pytest.mark.parametrize(
    "name",
    ["study_1/gpt2_pytorch/trial_x", "study_-1/gpt2_pytorch/trial_1", "study_1/gpt2/trial_1", "study_1/gpt2_tf/trial_1",
     "gpt2_pytorch/trial_1", "study_1/gpt2_pytorch/trial_1234567890", "study_1/gpt2_pytorch/trial_1.old"],
)  # fmt: skip
def test_a_folder_of_another_name_is_no_trial(name: str) -> None:
    assert RecordPath.parse(Path("/records/mini/quick/m/lion") / name) is None
    assert RecordPath.parse(Path(name)) is None


def test_the_trials_of_a_submission_are_listed_and_nothing_else(tmp_path: Path) -> None:
    run = load_run(["workload=gpt2", "optimizer=lion", f"records={tmp_path}", "seed=3"])
    path = RecordPath.of_run(run, "m")
    assert path.folder == tmp_path / "mini/quick/m/lion/study_3/gpt2_pytorch/trial_1"
    others = [path.sibling(3, 2), path.sibling(4, 1)]
    for folder in (path.folder, *(other.folder for other in others), path.study_folder / "trial_1.old"):
        folder.mkdir(parents=True)
    # Packed, and a folder of a process that packs.
    (path.machine_folder / "sgd.tar.xz").touch()
    (path.machine_folder / ".lion.packing").mkdir()
    assert list_submission_folders(tmp_path) == [path.submission_folder, path.machine_folder / "sgd"]
    assert list_trials_of_submission(path.submission_folder) == [path, *others]
    assert list(path.trials_of_study()) == [path, others[0]]
    assert list(path.trials_on_workload()) == [path, *others]


def test_the_folder_of_a_machine_is_named_after_what_its_seconds_depend_on() -> None:
    cpu = {"device": "cpu", "cpu": "AMD EPYC", "threads": 1, "host": "a"}
    assert machine_folder_name(cpu) == "amd-epyc-1-thread"
    assert machine_folder_name(cpu | {"threads": 2, "ranks": 4}) == "amd-epyc-2-threads-4-ranks"
    gpu = {"device": "cuda", "gpu": "NVIDIA H100 80GB", "gpu_count": 8, "cpu": "x", "threads": 3}
    assert machine_folder_name(gpu) == "8x-nvidia-h100-80gb"
    with pytest.raises(KeyError):
        machine_folder_name({"device": "cpu", "cpu": "x"})
