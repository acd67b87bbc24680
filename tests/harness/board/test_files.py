"""From folders of records to the files of a leaderboard, by the scripts that a maintainer runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.board.files import format_files, write_board
from harness.errors import UserError
from harness.scoring.leaderboard import score
from harness.scoring.load_records import load_records
from harness.scoring.timings import Timings, read_timings
from tests.harness.folders import pacemark_trial
from tests.processes import call

pytestmark = pytest.mark.usefixtures("workloads_of_tests")

ROOT = Path(__file__).parents[3]
NASTY = [
    "<script>alert(1)<script>",
    "=cmd|' calc'!A1",
    "a|b`c*[x](javascript:alert(1))",
    "@user",
    "$x$_{y}\\end",
    "-1+1",
    "+1",
]
HEADER = b"machine,workload,submission,round,steps,seconds,build_seconds,compile_seconds\n"


def board_of(root: Path, studies: int = 3) -> Path:
    """Fast reaches the target at 20 s, slow at 30, never not at all; a little later in each further study."""
    for study in range(studies):
        for workload in ("lm", "mri"):
            for name, seconds, values in (("fast", 10, [3, 1, 1]), ("slow", 15, [3, 1, 1]), ("never", 10, [3, 3, 3])):
                jitter = 1 + 0.01 * study * (1 + (workload == "mri"))
                pacemark_trial(root, values, seconds * jitter, submission=name, workload=workload, study=study)
    return root


def test_scores_times_and_intervals(tmp_path: Path) -> None:
    board = score(load_records([board_of(tmp_path)]), baseline="slow")
    scores = board.scores.set_index("submission")
    assert list(scores.index) == ["fast", "slow", "never"]
    assert scores["score"].tolist() == pytest.approx([1, 2.5 / 3, 0])
    assert scores["steps_score"].tolist() == [1, 1, 0]
    assert scores.loc["fast", "speedup"] == pytest.approx(1.5)
    assert scores.loc["fast", "speedup_low"] < 1.5 < scores.loc["fast", "speedup_high"]
    assert scores.loc["never", "speedup_reading"] == "upper bound"
    # Crossings between evaluations every 10 or 15 seconds cannot tell 15 seconds from 23.
    assert scores.loc["fast", ["rank_low", "rank_high"]].tolist() == [1, 2]
    assert scores.loc["fast", ["reached", "exhausted"]].tolist() == [6, 0]
    times = board.times.set_index(["submission", "workload"])
    assert times.loc[("fast", "lm"), ["status", "seconds", "steps", "studies", "studies_reached"]].tolist() == [
        "reached", pytest.approx(15.15), 150, 3, 3
    ]  # fmt: skip
    assert times.loc[("never", "lm"), "status"] == "missed"


def with_variant(root: Path) -> Path:
    """The same, and the held-out lm_silu: fast reaches its target, slow does not, never did not run it."""
    board_of(root)
    for study in range(3):
        for name, values in (("fast", [3, 1, 1]), ("slow", [3, 3, 3])):
            pacemark_trial(root, values, 10 + study, submission=name, workload="lm_silu", study=study, variant_of="lm")
    return root


def test_a_workload_counts_only_with_its_held_out_variant(tmp_path: Path) -> None:
    board = score(load_records([with_variant(tmp_path)]), baseline="slow")
    assert (board.targets.base, board.targets.held_out) == (("lm", "mri"), ("lm_silu",))
    scores = board.scores.set_index("submission")
    assert scores["score"].to_dict() == pytest.approx({"fast": 1, "slow": (0 + 2.5 / 3) / 2, "never": 0})
    assert scores.loc["fast", "speedup"] == pytest.approx(1.5)  # that stays a matter of the base workloads
    times = board.times.set_index(["submission", "workload"])
    assert times.loc[("slow", "lm"), ["status", "counts"]].tolist() == ["reached", False]
    assert times.loc[("slow", "mri"), "counts"] and times.loc[("fast", "lm_silu"), ["held_out", "counts"]].all()
    assert times["status"]["never", "lm_silu"] == "not run"
    (meaning,) = [note for note in board.notes if note.startswith("Held out: lm_silu.")]
    assert "over-fitted" in meaning and "within 4 times" in meaning
    assert "Solved, but not counted for want of a held-out variant: slow on lm." in board.notes
    markdown = format_files(board, "Test", [])["LEADERBOARD.md"]
    assert "(does not count)" in markdown and "over-fitted" in markdown
    write_board(board, tmp_path / "out", "Test", [])
    page = (tmp_path / "out" / "site" / "index.html").read_text()
    assert "over-fitted" in page and '<span class="tag">held out</span>' in page


def test_without_variants_nothing_is_said_of_them(tmp_path: Path) -> None:
    board = score(load_records([board_of(tmp_path)]), baseline="slow")
    assert not any("held" in note.lower() for note in board.notes)


def test_a_single_study_has_no_interval_and_says_so(tmp_path: Path) -> None:
    board = score(load_records([board_of(tmp_path, studies=1)]))
    assert board.scores[["score_low", "score_high", "rank_low"]].isna().all(axis=None) or "single" in board.notes[0]
    assert "single study" in board.notes[0]


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--baseline nobody.*fast, never, slow"):
        score(load_records([board_of(tmp_path, 1)]), baseline="nobody")


def test_seconds_of_a_timing_run_replace_the_clocks(tmp_path: Path) -> None:
    records = load_records([board_of(tmp_path)])
    rows = [
        {"machine": "m", "workload": w, "submission": s, "round": r, "steps": 10, "seconds": rate * (1 + 0.01 * r),
         "build_seconds": 1.0, "compile_seconds": 2.0}
        for w in ("lm", "mri") for s, rate in (("fast", 4.0), ("slow", 1.0), ("never", 1.0)) for r in (1, 2, 3)
    ]  # fmt: skip
    timings = Timings.from_rows(pd.DataFrame(rows))
    assert timings.costs.loc[("fast", "lm"), "seconds_per_step"] == pytest.approx(0.408)
    board = score(records, baseline="slow", timings=timings)
    times = board.times.set_index(["submission", "workload"])["seconds"]
    # The crossing is half way between the evaluations at 100 and 200 steps.
    assert times["fast", "lm"] == pytest.approx(150 * 0.408 + 3) and times["slow", "lm"] == pytest.approx(
        150 * 0.102 + 3
    )
    assert board.scores["submission"].iloc[0] == "slow"
    assert any("3 alternating rounds on m" in note for note in board.notes)
    raw = score(records, mode="algoperf", timings=timings).times.set_index(["submission", "workload"])
    assert raw.loc[("fast", "lm"), "seconds"] == pytest.approx(20.2)
    with pytest.raises(UserError, match=r"the timing run has no never on lm.*--submissions fast slow"):
        timings.__class__("m", 3, timings.costs.drop(index=[("never", "lm")])).apply(records.trials)
    of_two = Timings.from_rows(pd.DataFrame([row for row in rows if row["submission"] != "never"]))
    restricted = score(records.select_submissions(["fast", "slow"]), baseline="slow", timings=of_two)
    assert sorted(restricted.scores["submission"]) == ["fast", "slow"]
    assert restricted.times.set_index(["submission", "workload"])["seconds"].to_dict() == {
        key: seconds for key, seconds in times.items() if key[0] != "never"
    }
    with pytest.raises(UserError, match="--submissions fats: not in the records; did you mean `fast`"):
        records.select_submissions(["fats", "slow"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"a,b\n1,2\n", "lacks machine"),
        (HEADER + b"m,w,s,1,0,1,0,0\n", "row 2"),
        (HEADER + b"m,w,s,1,x,1,0,0\n", "no numbers"),
        (HEADER + b"m,w,s,1,1,1,0,0\nn,w,s,2,1,1,0,0\n", "mixes machines"),
    ],
)
def test_a_bad_timing_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "timing.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_timings(path)


def test_names_are_text_in_every_file(tmp_path: Path) -> None:
    for study in range(2):
        for name in NASTY:
            pacemark_trial(tmp_path / "records", [3, 1], 10.0 + study, submission=name.replace("/", "_"), study=study)
    board = score(load_records([tmp_path / "records"]))
    write_board(board, tmp_path / "out", "A <b>title", ["python"])
    assert {p.name for p in tmp_path.iterdir()} == {"records", "out"}
    markdown = (tmp_path / "out" / "LEADERBOARD.md").read_text()
    assert (
        "<script" not in markdown
        and "<b>" not in markdown
        and "[x](" not in markdown
        and "`c" not in markdown.replace("\\`", "")
    )
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:8]} == {10}
    csv = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert not csv["submission"].str.match(r"[=+\-@\t\r]").any()
    latex = (tmp_path / "out" / "leaderboard.tex").read_text()
    assert r"\textbackslash{}end" in latex and "$x$" not in latex


def test_the_script_writes_and_checks_and_only_inside_out(tmp_path: Path) -> None:
    records, out = board_of(tmp_path / "records"), tmp_path / "out"
    arguments = (records, "--out", out, "--baseline", "slow", "--title", "Test", "--consolidate", tmp_path / "all.csv")
    written = call("leaderboard", *arguments)
    assert written.returncode == 0, written.stderr
    assert {p.name for p in out.iterdir()} == {"scores.csv", "times.csv", "LEADERBOARD.md", "leaderboard.tex", "site"}
    assert (out / "site" / "index.html").exists()
    header = (out / "scores.csv").read_text().splitlines()[0]
    wanted = "submission,score,score_low,score_high,steps_score,speedup,speedup_low,speedup_high,rank_low,rank_high"
    assert header.startswith(wanted)
    assert call("leaderboard", *arguments, "--check").returncode == 0
    scores = pd.read_csv(out / "scores.csv")
    scores["score"] *= 1 + 1e-9  # another machine's last digits
    scores.to_csv(out / "scores.csv", index=False)
    assert call("leaderboard", *arguments, "--check").returncode == 0
    pacemark_trial(records, [1, 1], 10, submission="slow", workload="lm", study=0)
    differing = call("leaderboard", *arguments, "--check")
    assert differing.returncode == 1 and "differs from" in differing.stdout and "scores.csv:2" in differing.stdout
    assert pd.read_csv(out / "scores.csv")["score"].iloc[0] == pytest.approx(1)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    records, blocked = board_of(tmp_path / "records"), tmp_path / "file"
    blocked.touch()
    done = call("leaderboard", records, "--out", tmp_path / "out", "--consolidate", blocked / "all.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(blocked) in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_arguments_end_with_status_2_and_one_message(tmp_path: Path) -> None:
    done = call("leaderboard", tmp_path / "absent", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_compare_gives_a_verdict_or_the_reason_for_none(tmp_path: Path) -> None:
    records = board_of(tmp_path)
    done = call("compare", "fast", "slow", "--records", records)
    assert done.returncode == 0, done.stderr
    assert "no difference shown" in done.stdout  # in steps they are equal
    assert "--time measures both" in done.stdout
    done = call("compare", "fast", "never", "--records", records)
    assert "fast is faster" in done.stdout or "no verdict" in done.stdout
    typo = call("compare", "fats", "slow", "--records", records)
    assert typo.returncode == 2 and "did you mean `fast`" in typo.stderr


def test_compare_in_steps_takes_records_of_several_machines(tmp_path: Path) -> None:
    for study in range(3):
        for name, machine in (("fast", "one"), ("slow", "other")):
            hardware = {"device": "cpu", "cpu": machine, "threads": 1}
            pacemark_trial(tmp_path, [3, 1, 1], 10, submission=name, study=study, machine=hardware)
    refused = call("leaderboard", tmp_path, "--out", tmp_path / "out")
    assert refused.returncode == 2 and "2 machines" in refused.stderr
    done = call("compare", "fast", "slow", "--records", tmp_path)
    assert done.returncode == 0 and "no difference shown" in done.stdout, done.stderr


def test_a_table_of_some_of_the_workloads(tmp_path: Path) -> None:
    records = board_of(tmp_path / "records")
    pacemark_trial(records, [3, 1, 1], 5, submission="new", workload="mri")
    written = call("leaderboard", records, "--out", tmp_path / "out", "--workloads", "mri", "--baseline", "slow")
    assert written.returncode == 0, written.stderr
    assert set(pd.read_csv(tmp_path / "out" / "times.csv")["workload"]) == {"mri"}
    scores = pd.read_csv(tmp_path / "out" / "scores.csv").set_index("submission")["score"]
    assert scores["new"] == 1 and scores["never"] == 0
    unknown = call("leaderboard", records, "--out", tmp_path / "out", "--workloads", "mir")
    assert unknown.returncode == 2 and "which hold lm, mri" in unknown.stderr


def test_compare_shows_held_out_variants_apart(tmp_path: Path) -> None:
    done = call("compare", "fast", "slow", "--records", with_variant(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "lm_silu" in line]
    assert "slow missed (0 of 3 studies)" in line and line.endswith("held out, no part of the verdict")


def test_a_miss_of_unknown_length_and_a_broken_trial_leave_no_nan_scores(tmp_path: Path) -> None:
    board_of(tmp_path)
    for study in range(3):
        (
            pacemark_trial(tmp_path, [3], submission="broken", study=study, status="failed") / "eval_measurements.csv"
        ).unlink()
    scores = score(load_records([tmp_path]), baseline="slow").scores.set_index("submission")
    assert scores.loc["broken", ["score", "failed"]].tolist() == [0, 3]
    assert np.isfinite(scores["score"]).all()


def test_clocks_of_several_machines_meet_only_when_asked(tmp_path: Path) -> None:
    cpus = [{"device": "cpu", "cpu": name, "threads": 1} for name in ("Fast", "Slow")]
    for study, seconds, machine in ((0, 10.0, cpus[0]), (1, 30.0, cpus[1])):
        for submission in ("a", "b"):
            pacemark_trial(tmp_path, [3, 1.5], seconds, submission=submission, study=study, machine=machine)
    records = load_records([tmp_path])
    with pytest.raises(UserError, match=r"2 machines \(fast-1-thread, slow-1-thread\).*--timing.*--mix-machines"):
        score(records)
    board = score(records, mix_machines=True)
    times = board.times.set_index("submission").loc["a"]
    seconds = (times["seconds"], times["seconds_on_fast-1-thread"], times["seconds_on_slow-1-thread"])
    # Of evaluations at 20 and 60 seconds; the crossings are two thirds of the way from those before.
    assert seconds == pytest.approx((100 / 3, 50 / 3, 50))
    assert "## Seconds to target on slow-1-thread" in format_files(board, "t", [])["LEADERBOARD.md"]


def test_a_second_timing_run_gives_a_column_for_its_machine(tmp_path: Path) -> None:
    records = load_records([board_of(tmp_path)])

    def timed(machine: str, rate: float) -> Timings:
        rows = [
            {"machine": machine, "workload": w, "submission": s, "round": r, "steps": 10, "seconds": rate * 10,
             "build_seconds": 0.0, "compile_seconds": 0.0}
            for w in ("lm", "mri") for s in ("fast", "slow", "never") for r in (1, 2, 3)
        ]  # fmt: skip
        return Timings.from_rows(pd.DataFrame(rows))

    board = score(records, timings=timed("here", 1.0), further_timings=[timed("there", 3.0)])
    reached = board.times[board.times["status"] == "reached"]
    assert len(reached) and (reached["seconds_on_there"] == 3 * reached["seconds"]).all()
