"""How trials stand, by their records, and what is shown of it. No trial is run: the records are written by hand."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from harness.config.compose import load_run
from harness.display import make_console
from harness.records import evaluations
from harness.records.lease import Lease
from harness.study import ledger, progress, status
from harness.study.ledger import PlannedTrial
from harness.study.progress import PoolProgress, StudyDisplay, print_status, watch_records
from harness.study.status import RecordsSurvey, Survey, TrialProgress, seconds_left
from harness.trial.progress import ProgressLine
from tests.conftest import TINY_GPT2
from tests.harness.manifests import write_manifest

HEADER = "accumulated_submission_time,global_step,score,total_duration,validation/loss"


def plan(records: Path, *arguments: str) -> list[PlannedTrial]:
    """Three trials of adamw on a workload of 12 steps whose target is a loss of 2."""
    study = ["optimizer=adamw", "ruleset=external", "ruleset.studies=1", "ruleset.trials=3", "machine=here"]
    run = load_run([*TINY_GPT2, *study, "workload.target=2", f"records={records}", *arguments])
    return sorted(ledger.plan([run], "unused"), key=lambda trial: trial.path.trial)


def write_rows(trial: PlannedTrial, values: Sequence[float], seconds: float = 10.0) -> None:
    """A row every three steps with `seconds` on the clock, and half as much again of wall time."""
    rows = [f"{seconds * i},{3 * i},{seconds * i},{1.5 * seconds * i},{value}" for i, value in enumerate(values, 1)]
    trial.path.folder.mkdir(parents=True, exist_ok=True)
    trial.path.evaluations.write_text("\n".join([HEADER, *rows]) + "\n")


def start(trial: PlannedTrial, values: Sequence[float] = ()) -> Lease:
    """Let the trial run, as far as a reader can tell."""
    write_manifest(trial.path.folder, status="running", final=None)
    write_rows(trial, values)
    lease = Lease.acquire(trial.path.folder, executor="slurm")
    assert lease is not None
    return lease


def finish(trial: PlannedTrial, state: str, **final: Any) -> None:
    write_manifest(trial.path.folder, status=state, final=final)


def look(trials: Sequence[PlannedTrial]) -> list[TrialProgress]:
    standing, messages = Survey(trials).look()
    assert not messages
    return standing


# ---- how they stand ------------------------------------------------------------------------------------------------


def test_a_running_trial_tells_where_it_is_and_when_it_ends(tmp_path: Path) -> None:
    trials = plan(tmp_path)
    assert [trial.expected_seconds for trial in look(trials)] == [None] * 3
    assert seconds_left(look(trials)) == (0, 3)
    lease = start(trials[0], [4.0, 2.5, 3.0])
    running, planned, _ = look(trials)
    assert running.standing is not None
    assert (running.standing.steps, running.standing.value, running.standing.best_value) == (9, 3.0, 2.5)
    assert running.standing.steps_per_second == pytest.approx(0.3) and running.standing.steps_to_target is None
    assert running.progress == 0.75 and running.worker.startswith("slurm ")
    # Three quarters took 45 s of wall time, so that nobody has to wait for the end of the first trial.
    assert running.expected_seconds == pytest.approx(15) and running.is_bound
    assert planned.expected_seconds == pytest.approx(60) and planned.is_bound
    assert seconds_left(look(trials)) == (pytest.approx(15 + 60 + 60), 0)
    lease.release()


def test_speed_is_that_of_the_last_evaluations(tmp_path: Path) -> None:
    trials = plan(tmp_path, "workload.max_steps=1000")
    write_rows(trials[0], [4.0] * 4)
    slow = [f"{40 + 30 * i},{12 + 3 * i},{40 + 30 * i},900,4.0" for i in range(1, 6)]
    trials[0].path.evaluations.write_text(trials[0].path.evaluations.read_text() + "\n".join(slow) + "\n")
    standing = look(trials)[0].standing
    assert standing is not None and standing.steps_per_second == pytest.approx(0.1) and standing.wall_seconds == 900


def test_time_left_goes_by_the_trials_that_went_on_for_longer(tmp_path: Path) -> None:
    trials = plan(tmp_path, "ruleset.trials=4")
    # Of 12 steps: one met the target after 3, one after 9, each at 10 s of wall time a step.
    finish(trials[0], "reached", submission_seconds=24.0, evaluation_share=0.2, global_step=3, steps_to_target=3)
    finish(trials[1], "reached", submission_seconds=72.0, evaluation_share=0.2, global_step=9, steps_to_target=9)
    write_rows(trials[2], [4.0, 4.0], seconds=20.0)
    *_, begun, planned = look(trials)
    # At step 6 after 60 s: the first one has told nothing about it.
    assert begun.expected_seconds == pytest.approx(30) and not begun.is_bound
    assert planned.expected_seconds == pytest.approx((3 + 9) / 2 * 10) and not planned.is_bound
    write_rows(trials[2], [4.0, 4.0, 4.0], seconds=20.0)
    begun = look(trials)[2]
    assert begun.expected_seconds == pytest.approx(30) and begun.is_bound


def test_rows_that_tell_nothing_do_no_harm(tmp_path: Path) -> None:
    trials = plan(tmp_path)
    write_rows(trials[0], [float("nan")])
    write_rows(trials[1], [])
    trials[2].path.folder.mkdir(parents=True)
    trials[2].path.evaluations.write_text("a,b\n1,2\n")
    diverged, empty, foreign = look(trials)
    assert diverged.progress == 0.25 and diverged.best_value is None and diverged.steps_to_target is None
    assert empty.standing is None and foreign.standing is None


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(file: Any, *arguments: Any) -> Any:
            read.append(getattr(file, "path", file).folder.name if isinstance(file, PlannedTrial) else file.parent.name)
            return function(file, *arguments)

        return noted

    monkeypatch.setattr(status, "read_state", note(ledger.read_state))
    monkeypatch.setattr(status, "read_evaluations", note(evaluations.read_evaluations))
    trials = plan(tmp_path)
    finish(trials[0], "exhausted")
    lease = start(trials[1], [4.0])
    survey = Survey(trials)
    first, _ = survey.look()
    assert sorted(read) == ["trial_1", "trial_2", "trial_2", "trial_3"]
    read.clear()
    assert survey.look()[0] == first and not read
    write_rows(trials[1], [4.0, 3.0])
    assert [trial.progress for trial in survey.look()[0]] == [1.0, 0.5, 0.0] and read == ["trial_2"]
    # The end of a lease changes no file that is read.
    read.clear()
    lease.release()
    assert [trial.state.name for trial in survey.look()[0]] == ["exhausted", "interrupted", "planned"] and not read


def test_trials_that_come_later_are_followed_too(tmp_path: Path) -> None:
    plan(tmp_path)
    survey = RecordsSurvey(tmp_path)
    assert len(survey.look()[0]) == 3
    plan(tmp_path, "ruleset.trials=5")
    assert len(survey.look()[0]) == 5
    others = plan(tmp_path, "optimizer=lion")
    finish(others[0], "exhausted")
    assert [trial.state.name for trial in survey.look()[0]].count("exhausted") == 1
    # One that nobody planned.
    write_manifest(others[0].path.sibling(7, 1).folder, config=ledger._read_plan(others[0].path.plan)["config"])
    assert len(survey.look()[0]) == 9


# ---- what is shown -------------------------------------------------------------------------------------------------


def plain() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return make_console(file=output), output


def terminal(width: int = 120, height: int = 30) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return make_console(file=output, force_terminal=True, width=width, height=height), output


def screen(output: io.StringIO) -> str:
    """What was written to a terminal, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_without_a_terminal_a_line_tells_each_start_and_each_end(tmp_path: Path) -> None:
    console, output = plain()
    trials = plan(tmp_path)
    finish(trials[0], "exhausted")
    lease = start(trials[1], [4.0])
    with PoolProgress(console, trials):
        finish(trials[1], "reached", steps_to_target=9, time_to_target=30.0)
        lease.release()
    first, started, ended = output.getvalue().splitlines()
    assert first == "3 trials, 1 of them finished already"
    assert re.fullmatch(rf"{trials[1].name}: started by slurm \S+ \d+, at 25% of the budget", started)
    assert ended == f"[2/3] {trials[1].name}: reached at 9 steps, 30.0 s on the clock"


def test_in_a_terminal_a_table_shows_what_runs(tmp_path: Path) -> None:
    console, output = terminal()
    trials = plan(tmp_path)
    lease = start(trials[1], [4.0, 2.5])
    with StudyDisplay(console) as display:
        display.show(look(trials))
        shown = screen(output)
        (row,) = [line.split() for line in shown.splitlines() if line.startswith(trials[1].name)]
        assert row[-9:-2] == ["6/12", "loss", "2.5000", "0.5000", "0.3", "<0:30", "slurm"]
        assert re.search(r"gpt2 +adamw +0/3 +loss 2.5000, 0.5000 to target", shown)
        assert "0 of 3 trials over, 1 running; at most about 2 minutes left with 1 at a time" in shown
        # A crash is told above the table, any other end is seen in it.
        finish(trials[0], "failed", traceback="Traceback\nArithmeticError: wrong")
        write_manifest(
            trials[0].path.folder, status="failed", failures=["first"], final={"traceback": "x\nSomeError: y"}
        )
        finish(trials[2], "reached", steps_to_target=9, time_to_target=30.0)
        display.show(look(trials))
    shown = screen(output)
    assert f"[1/3] {trials[0].name}: failed: SomeError: y" in shown and f"] {trials[2].name}" not in shown
    assert re.search(r"gpt2 +adamw +2/3 +target met at 9 steps", shown)
    assert "2 of 3 trials over (1 failed, 1 reached), 1 running" in shown
    lease.release()


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 24)])
def test_the_table_fits_a_small_terminal(tmp_path: Path, width: int, height: int) -> None:
    console, output = terminal(width, height)
    trials = [trial for label in "abcdefgh" for trial in plan(tmp_path, f"label={label * 20}")]
    leases = [start(trial, [4.0]) for trial in trials[:20]]
    with StudyDisplay(console) as display:
        display.show(look(trials))
        lines = screen(output).partition("24 trials")[2].strip().splitlines()
        assert len(lines) <= height and max(map(len, lines)) <= width
        assert sum("more, which scripts/status.py lists" in line for line in lines) == 2
        # The submission's name is cut, and nothing else.
        (row,) = [line for line in lines if line.startswith("aa") and "study 0, trial 2" in line]
        assert row.endswith("<0:45") and "… on gpt2, study 0, trial 2" in row
        assert lines[-1].endswith("at a time")
    for lease in leases:
        lease.release()


def test_watching_goes_on_until_all_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    trials: list[PlannedTrial] = []

    def let_time_pass(seconds: float) -> None:
        assert seconds == 7
        step = next(steps)
        if step == "folder":
            records.mkdir()
        elif step == "plan":
            trials.extend(plan(records))
        else:
            finish(trials[int(step)], "exhausted")

    steps = iter(["folder", "plan", "0", "1", "2"])
    monkeypatch.setattr(progress.time, "sleep", let_time_pass)
    console, output = plain()
    over = watch_records(console, records, 7)
    assert [trial.state.name for trial in over] == ["exhausted"] * 3 and not list(steps)
    assert output.getvalue().splitlines() == [
        f"{records} is not there yet; waiting for it (Ctrl-C ends)",
        f"no trial in {records} yet; waiting for it (Ctrl-C ends)",
        "3 trials",
        *(f"[{i}/3] {trial.name}: exhausted" for i, trial in enumerate(trials, 1)),
    ]


def test_a_status_is_never_broken_where_it_is_no_terminal(tmp_path: Path) -> None:
    console, output = plain()
    label = "a-rather-long-label-" * 4
    trials = plan(tmp_path, f"label={label}x", "machine=" + "m" * 60)
    lease = start(trials[0], [2.5])
    write_rows(trials[1], [4.0, 1.5])
    write_manifest(trials[1].path.folder, status="stopped")
    print_status(console, look(trials))
    table, running, interrupted, summary = (
        next(line for line in output.getvalue().splitlines() if re.match(start_of_line, line))
        for start_of_line in ("mini-modified", re.escape(trials[0].name), "interrupted: ", "0 of 3")
    )
    assert f"{label}x" in table and "m" * 60 in table and "target met at 6 steps" in table
    assert "loss 2.5000" in running and "0.5000" in running
    assert interrupted == f"interrupted: {trials[1].name}, 50% of the budget"
    assert "0 of 3 trials over, 1 running; at most about" in summary
    lease.release()


def test_a_batch_that_goes_beyond_the_budget_leaves_no_negative_time(tmp_path: Path) -> None:
    running, *_ = trials = plan(tmp_path)
    write_manifest(running.path.folder, status="running", final=None)
    rows = [f"{seconds},{steps},{seconds},{seconds},3.0" for seconds, steps in ((10, 8), (20, 16))]
    running.path.evaluations.write_text("\n".join([HEADER, *rows]) + "\n")
    standing, *_ = look(trials)
    assert standing.progress == 1.0 and standing.expected_seconds == 0.0

    output = io.StringIO()
    line = ProgressLine(Console(file=output, width=200))
    line.begin(SimpleNamespace(run=running.run), 0)  # type: ignore[arg-type]
    row = {"global_step": 16, "total_duration": 20.0, "accumulated_submission_time": 20.0, "train/loss": 3.0}
    line.evaluation(row | {"validation/loss": 3.0})
    assert "step 16/12" in output.getvalue() and "<1 s left" in output.getvalue()
