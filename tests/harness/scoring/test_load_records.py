from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.records.evaluations import parse_evaluations
from harness.records.layout import folder_of_archive, list_submission_folders
from harness.records.packing import pack, unpack
from harness.records.status import SCORED, UNUSABLE
from harness.records.trial_folders import Problem
from harness.scoring.leaderboard import score
from harness.scoring.load_records import Records, load_records
from harness.scoring.targets import Target, Targets, read_targets
from tests.harness import algoperf
from tests.harness.folders import HEADER, algoperf_trial, curve, folder, pacemark_trial

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

LM = Targets(("lm",), (), {"lm": Target("loss", "min", 2.0)})


def only(root: Path, **options: bool) -> tuple[pd.Series, list[str]]:
    records = load_records([root], LM, **options)  # type: ignore[arg-type]
    assert len(records.trials) == 1
    return records.trials.iloc[0], [problem.message for problem in records.problems]


def test_a_clean_trial(tmp_path: Path) -> None:
    algoperf_trial(tmp_path, [3.0, 2.5, 1.9, 2.1, 1.8])
    trial, problems = only(tmp_path)
    assert trial[["submission", "workload", "framework", "status"]].tolist() == ["a", "lm", "pytorch", "reached"]
    numbers = ["index", "seconds", "steps", "resolution_seconds", "resolution_steps", "limit_seconds", "best", "final"]
    assert trial[numbers].tolist() == [2, 30, 300, 10, 100, 50, 1.8, 1.8]
    assert not problems


def test_a_first_evaluation_that_meets_the_target_is_known_to_itself(tmp_path: Path) -> None:
    algoperf_trial(tmp_path / "x", [3.0] * 4, submission="before")  # its rows must not leak into the next trial
    algoperf_trial(tmp_path / "x", [1.0])
    trials = load_records([tmp_path], LM).trials.set_index("submission")
    assert trials.loc["a", ["index", "resolution_seconds", "resolution_steps"]].tolist() == [0, 10, 100]


@pytest.mark.parametrize("direction", ["min", "max"])
def test_the_direction_is_the_declared_one(tmp_path: Path, direction: str) -> None:
    algoperf_trial(tmp_path, [3.0, 1.0])
    targets = Targets(("lm",), (), {"lm": Target("loss", direction, 2.0)})  # type: ignore[arg-type]
    assert load_records([tmp_path], targets).trials["index"].tolist() == [0 if direction == "max" else 1]


def test_both_frameworks_and_a_column_order_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a" / "study_0" / "lm_jax" / "trial_1"
    path.mkdir(parents=True)
    (path / "eval_measurements.csv").write_text(
        "validation/loss,extra,global_step,accumulated_submission_time\n1.5,x y,7,3.5\n"
    )
    trial, problems = only(tmp_path)
    assert trial[["framework", "seconds", "steps"]].tolist() == ["jax", 3.5, 7] and not problems


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", "missing", "no rows"),
        (HEADER.encode() + b"\n", "missing", "no rows"),
        (b"a,b\n1,2\n", "invalid", "no column validation/loss, global_step, score"),
        (HEADER.encode() + b",score\n1,1,1,1,1,1,1\n", "invalid", "twice"),
        (bytes(range(256)) * 20, "invalid", "refused"),
        (curve([3, 1.5]).encode()[:-10], "exhausted", "1 rows with too few or too many cells"),  # cut in the last row
        (curve([3, 1.5]).replace("\n20.0", "\n20.0,9,9").encode(), "exhausted", "too few or too many"),
        (curve([3, 1.5]).replace(",1.5,", ",abc,").encode(), "exhausted", "1 cells without a number"),
        (curve([3, 1.5]).replace(",1.5,", ",,").encode(), "diverged", None),  # ended without a value
        (curve([3, float("nan")]).encode(), "diverged", None),
        (curve([3, float("-inf")]).encode(), "diverged", None),  # no loss is minus infinity
        (curve([3, 1.5]).replace("20.0,", "inf,").encode(), "exhausted", "whose time or step is no number"),
        (curve([3, 1.5]).replace("20.0,", "-20.0,").encode(), "exhausted", "whose time or step is no number"),
        (curve([3, 2.5, 1.5]).replace("20.0,", "5.0,").encode(), "invalid", "run backwards"),
        ((HEADER + "\n1,1,1,1," + "9" * 200_000 + ",1\n").encode(), "diverged", None),
        ((HEADER + '\n1,1,1,1,"' + "x" * 200_000 + ",1\n").encode(), "invalid", "not a CSV file"),
        (curve([3, 1.5]).encode("utf-16"), "invalid", "refused"),
        (curve([3, 1.5]).replace("\n", "\r\n").encode(), "reached", None),
        (("\ufeff" + curve([3, 1.5])).encode(), "reached", None),
        (curve([3, 1.5]).replace("3,64", '"3","64"').encode(), "reached", "quotes"),
    ],
)  # fmt: skip
def test_what_real_folders_hold_is_read_or_refused_and_reported(
    tmp_path: Path, content: bytes, status: str, message: str | None
) -> None:
    (folder(tmp_path) / "eval_measurements.csv").write_bytes(content)
    trial, problems = only(tmp_path)
    assert trial["status"] == status
    assert (message is None and not problems) or message in problems[0]  # type: ignore[operator]
    assert np.isfinite(trial["seconds"]) == (status == "reached")


@given(st.one_of(st.binary(max_size=300), st.text(alphabet='0123456789.,-einf\n"\r x', max_size=300).map(lambda t: (HEADER + "\n" + t).encode())))  # fmt: skip  # noqa: E501
@example(HEADER.encode() + b"\n,,,,,\n")
@example(HEADER.encode() + b"\n\n\n1,1,1,1,1,1\n")
def test_any_bytes_end_in_a_status(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.mktemp("records")
    (folder(root) / "eval_measurements.csv").write_bytes(content)
    algoperf_trial(root, [3.0, 1.0], trial=2)
    trials = load_records([root], LM).trials.set_index("trial")
    assert trials.loc[1, "status"] in SCORED + UNUSABLE
    assert trials.loc[2, ["status", "seconds"]].tolist() == ["reached", 20.0]


@given(st.lists(st.lists(st.floats(width=32) | st.none(), max_size=6), min_size=1, max_size=5))
def test_many_files_at_once_read_like_each_alone(curves: list[list[float | None]]) -> None:
    contents = {i: curve(["" if v is None else v for v in values]).encode() for i, values in enumerate(curves)}  # type: ignore[misc]
    together = parse_evaluations(contents, dict.fromkeys(contents, "validation/loss")).rows
    for i, content in contents.items():
        alone = parse_evaluations({i: content}, {i: "validation/loss"}).rows
        for name in ("seconds", "steps", "value"):
            np.testing.assert_array_equal(getattr(together, name)[together.rows_of(i)], getattr(alone, name))
        expected = [np.nan if v is None else v for v in curves[i]]
        np.testing.assert_array_equal(alone.value, np.array(expected, dtype=float))


def test_missing_unfinished_failed_and_duplicate_trials_have_a_status(tmp_path: Path) -> None:
    folder(tmp_path / "algoperf", trial=1)
    many: dict[str, Any] = {"root": tmp_path / "x", "ruleset": "many"}
    pacemark_trial(values=[3.0], trial=2, status="running", **many)
    pacemark_trial(values=[3.0], trial=3, status="out_of_memory", **many)
    pacemark_trial(values=[3.0, 1.0], trial=4, status="failed", **many)  # it met the target before it failed
    pacemark_trial(tmp_path / "y", [3.0, 1.0], trial=4, ruleset="many")
    pacemark_trial(values=[3.0], trial=5, status="reached", target=3.5, target_version=1, **many)  # of an older target
    # Nothing tells what it is.
    (pacemark_trial(values=[3.0], trial=6, **many) / "manifest.json").write_text("[1")
    (pacemark_trial(values=[], trial=7, status="failed", **many) / "eval_measurements.csv").unlink()
    records = load_records([tmp_path], LM)
    status = list(zip(records.trials["trial"], records.trials["status"], strict=True))
    assert status == [(1, "missing"), (2, "running"), (3, "out_of_memory"), (4, "reached"), (4, "duplicate"),
                      (5, "exhausted"), (6, "invalid"), (7, "failed")]  # fmt: skip
    messages = {
        problem.path.rpartition("/")[2]: problem.message
        for problem in records.problems
        if not problem.message.startswith("warning: trials are missing")
    }
    assert set(messages) == {"trial_1", "trial_4", "trial_6", "trial_7"}
    assert "same trial as" in messages["trial_4"] and "nothing can be checked" in messages["trial_6"]


def test_folders_that_are_no_trials_are_reported(tmp_path: Path) -> None:
    algoperf_trial(tmp_path, [1.0])
    for name in ("a/study_0/trial_1", "a/study_0/lm_pytorch/trial_x", "a/study_0/other_jax/trial_1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    records = load_records([tmp_path], LM)
    assert len(records.trials) == 1 and len(records.problems) == 4
    assert records.problems[0] == Problem("loop", "refused: a link; put the files themselves there")


def test_kinds_of_records_do_not_mix(tmp_path: Path) -> None:
    pacemark_trial(tmp_path, [3.0, 1.0])
    pacemark_trial(tmp_path, [3.0, 1.0], submission="b", ruleset="external")
    pacemark_trial(tmp_path, [1.0], submission="c", modified=["max_steps"])
    with pytest.raises(UserError, match=r"mix rulesets.*external, quick.*--ruleset"):
        load_records([tmp_path])
    records = load_records([tmp_path], ruleset="quick")
    assert records.trials["submission"].tolist() == ["a"]
    assert any("overridden" in p.message for p in records.problems)
    with pytest.raises(UserError, match="no record is of ruleset=extrnal; there are: external, quick"):
        load_records([tmp_path], ruleset="extrnal")
    pacemark_trial(tmp_path, [1.0], submission="d", workload_version=2)
    records = load_records([tmp_path], ruleset="quick")
    assert dict(zip(records.trials["submission"], records.trials["status"], strict=True))["d"] == "invalid"
    assert any("workload.version=2, and configs/ has 1" in p.message for p in records.problems)


def test_all_curves_are_scored_under_the_target_of_the_configs(tmp_path: Path) -> None:
    """The configs have version 2 of the target of lm, 2.0."""
    pacemark_trial(tmp_path, [3.0, 1.0], submission="a")
    old: dict[str, Any] = {"target": 2.5, "target_version": 1, "status": "reached"}
    pacemark_trial(tmp_path, [2.4, 2.2, 1.1], submission="b", config={"run_to_end": True}, **old)
    pacemark_trial(tmp_path, [2.9], submission="c", target=3.0, target_version=99, status="reached")
    pacemark_trial(tmp_path, [2.9], submission="d", target=3.0, status="reached")
    records = load_records([tmp_path])
    assert records.targets.targets["lm"].value == 2.0 and "target 2" in records.targets.targets["lm"].version
    steps = dict(zip(records.trials["submission"], records.trials["steps"], strict=True))
    assert (steps["a"], steps["b"]) == (200.0, 300.0)
    messages = {problem.path.split("/")[3]: problem.message for problem in records.problems}
    assert "target_version=99, and configs/ has 2" in messages["c"] and "target=3.0" in messages["d"]
    assert records.trials["status"].tolist() == ["reached", "reached", "invalid", "invalid"]
    pacemark_trial(tmp_path, [2.4], submission="e", config={"run_to_end": False}, **old)
    with pytest.raises(UserError, match=r"1 trials stopped at another target.*e/.*its target was 2.5, here it is 2"):
        load_records([tmp_path])


def test_versions_of_the_package_are_reported_where_they_mix(tmp_path: Path) -> None:
    for study, version in enumerate(("0.1.0", "0.1.0")):
        pacemark_trial(tmp_path, [3.0, 1.0], study=study, code={"version": version})
    pacemark_trial(tmp_path, [3.0, 1.0], study=2, code={"commit": "a" * 40})
    pacemark_trial(tmp_path, [3.0, 1.0], study=3, code={"version": "0.2.0"})
    (problem,) = load_records([tmp_path]).problems
    assert problem.message == "trials of several versions of Pacemark: 2 by 0.1.0, 1 by 0.2.0"
    shutil.rmtree(tmp_path / "mini" / "quick" / "machine" / "a" / "study_3" / "lm_pytorch" / "trial_1")
    assert not load_records([tmp_path]).problems


def test_a_variant_is_held_out_where_its_workload_has_records(tmp_path: Path) -> None:
    pacemark_trial(tmp_path, [3.0, 1.0])
    assert load_records([tmp_path]).targets.held_out == ()
    pacemark_trial(tmp_path, [3.0, 1.0], workload="lm_silu", variant_of="lm", target=1.5)
    pacemark_trial(tmp_path, [3.0, 1.0], workload="mri_silu", variant_of="mri")
    pacemark_trial(tmp_path, [3.0, 1.0], workload="other_silu", variant_of=["lm"])
    records = load_records([tmp_path])
    assert records.targets.base == ("lm", "other_silu") and records.targets.held_out == ("lm_silu",)
    assert records.targets.base_of("lm_silu") == "lm" and records.targets.targets["lm_silu"].value == 1.5
    assert set(records.trials["workload"]) == {"lm", "lm_silu", "other_silu"}
    (problem,) = records.problems
    assert problem.path == "mri_silu" and "there are no records of mri" in problem.message
    pacemark_trial(tmp_path / "alone", [3.0, 1.0], workload="mri_silu", variant_of="mri")
    with pytest.raises(UserError, match="mri_silu: 1 trials not scored: it is held out"):
        load_records([tmp_path / "alone"])


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent is neither a folder of records nor an archive"):
        load_records([tmp_path / "absent"], LM)
    with pytest.raises(UserError, match="no trial to score"):
        load_records([tmp_path], LM)
    algoperf_trial(tmp_path, [1.0])
    with pytest.raises(UserError, match="have no manifests"):
        load_records([tmp_path])


def test_the_published_algoperf_scores_come_out_of_the_raw_records(tmp_path: Path) -> None:
    archive = algoperf.ARCHIVE / "v05_external.tar.xz"
    if not archive.exists():
        pytest.skip("AlgoPerf's records are not here (ALGOPERF_V05 names their folder)")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    targets = read_targets(algoperf.ARCHIVE / "targets_v05.json")
    records = load_records([tmp_path], targets, trust_clock=True)
    board = score(records, mode="algoperf", baseline="baseline")
    scores = dict(zip(board.scores["submission"], board.scores["score"].round(4), strict=True))
    assert scores == algoperf.PUBLISHED
    table = pd.read_csv(algoperf.TABLE)
    ours = records.trials[table.columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, table, check_dtype=False)
    assert records.trials["status"].value_counts()["missing"] == 174


# ---- archives ----------------------------------------------------------------------------------------------------


def assert_same(a: Records, b: Records) -> None:
    """To the last digit, with the same problems."""
    pd.testing.assert_frame_equal(a.trials, b.trials, check_exact=True)
    for name in ("trial", "seconds", "steps", "value"):
        np.testing.assert_array_equal(getattr(a.rows, name), getattr(b.rows, name))
    for name, column in a.rows.further.items():
        np.testing.assert_array_equal(column, b.rows.further[name])
    assert (a.problems, a.manifests, a.targets) == (b.problems, b.manifests, b.targets)


def several_submissions(root: Path) -> Path:
    for submission in ("a", "b", "c"):
        for study in range(3):
            pacemark_trial(root, [3.0, 2.5, 1.9], submission=submission, study=study, status="reached")
            pacemark_trial(root, [3.0, np.nan], submission=submission, study=study, trial=2, status="diverged")
    # What is repaired or refused in a folder is so in an archive too.
    (pacemark_trial(root, [3.0], study=7, status="failed") / "eval_measurements.csv").write_text("a,b\n1,2\n")
    (pacemark_trial(root, [3.0], study=8, status="failed") / "eval_measurements.csv").unlink()
    return root


def test_archives_are_read_as_the_folders_were(tmp_path: Path) -> None:
    root = several_submissions(tmp_path / "records")
    folders = load_records([root])
    assert folders.problems
    first, second, _ = [pack(folder) for folder in list_submission_folders(root)]
    assert_same(load_records([root]), folders)
    unpack(second)
    assert_same(load_records([root]), folders)  # some of each
    for below in (root / "mini/quick/machine", first):
        assert load_records([below]).trials["submission"].iloc[0] == "a"
    assert load_records([first]).trials["machine"].unique().tolist() == ["machine"]


def test_the_committed_archives_are_read_as_folders_are(tmp_path: Path) -> None:
    committed = Path(__file__).parents[3] / "results" / "untuned" / "records"
    copy = tmp_path / "records"
    shutil.copytree(committed, copy)
    archives = sorted(copy.rglob("*.tar.xz"))
    for archive in archives:
        unpack(archive)
    assert archives and not list(copy.rglob("*.tar.xz")) and list(copy.rglob("eval_measurements.csv"))
    assert_same(load_records([committed]), load_records([copy]))


def test_a_trial_in_the_folder_and_in_the_archive_counts_once(tmp_path: Path) -> None:
    root = several_submissions(tmp_path / "records")
    folders = load_records([root])
    archive = pack(root / "mini/quick/machine/b")
    content = archive.read_bytes()
    unpack(archive)
    archive.write_bytes(content)
    assert_same(load_records([root]), folders)
    # The folder counts, and it is reported.
    pacemark_trial(root, [3.0, 1.0], submission="b", study=1)
    records = load_records([root])
    duplicates = records.trials[records.trials["status"] == "duplicate"]
    assert duplicates["path"].tolist() == ["mini/quick/machine/b.tar.xz/study_1/lm_pytorch/trial_1"]
    counted = records.trials[records.trials["status"] != "duplicate"]
    assert len(counted) == len(folders.trials)
    of_folder = counted[counted["path"] == "mini/quick/machine/b/study_1/lm_pytorch/trial_1"]
    assert of_folder["steps"].tolist() == [200]
    (problem,) = [problem for problem in records.problems if ".tar.xz" in problem.path]
    assert problem.message == "left out: the same trial as mini/quick/machine/b/study_1/lm_pytorch/trial_1"


def test_a_damaged_archive_is_reported_and_what_is_before_the_damage_counts(tmp_path: Path) -> None:
    root = several_submissions(tmp_path / "records")
    archive = pack(root / "mini/quick/machine/b")
    content = archive.read_bytes()
    lengths = set()
    for tenth in range(10):
        archive.write_bytes(content[: len(content) * tenth // 10])
        records = load_records([root])
        (problem,) = [problem for problem in records.problems if problem.path.endswith("b.tar.xz")]
        assert problem.path == "mini/quick/machine/b.tar.xz" and "damaged (it is cut off)" in problem.message
        assert (records.trials["submission"] != "b").sum() == 14
        lengths.add(len(records.trials))
    assert 14 in lengths and len(lengths) > 2


def test_other_files_beside_records_are_no_archives(tmp_path: Path) -> None:
    root = several_submissions(tmp_path / "records")
    folders = load_records([root])
    archive = pack(root / "mini/quick/machine/b")
    content = archive.read_bytes()
    unpack(archive)
    (root / "mini/quick/machine/x.tar.gz").write_bytes(content)
    (root / "link.tar.xz").symlink_to(root / "mini/quick/machine/x.tar.gz")
    # Of a process that packs or unpacks.
    working = root / "mini/quick/machine/.b.packing/fresh"
    shutil.copytree(folder_of_archive(archive), working)
    records = load_records([root])
    assert records.problems.pop(0) == Problem("link.tar.xz", "refused: a link; put the files themselves there")
    assert_same(records, folders)
