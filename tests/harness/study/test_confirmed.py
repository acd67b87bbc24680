"""The procedure of ruleset=confirmed, on trials of a second in this process: stages, seeds, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.config import study_trials
from harness.config.compose import load_run, shipped_ruleset
from harness.config.confirmation import CONFIRMED_SEEDS, FINALIST_SEED, FRESH_SEED, TUNING_SEED
from harness.config.schema import Run
from harness.errors import UserError
from harness.study import confirmed, ledger
from harness.study.confirmed import PointCost, check_confirmed, choose_finalists, confirm, tuning_run
from harness.study.stop_rule import make_should_stop
from harness.trial.trial import run_trial
from tests.conftest import TINY_GPT2
from tests.processes import call

# A target that some points reach in these few steps and others do not.
TINY = [argument for argument in TINY_GPT2 if not argument.startswith("workload.target=")]
TINY += ["workload.target=5.3", "optimizer=adamw", "judge=none", "machine=m", "ruleset.studies=2"]
SMALL = ["ruleset.tuning.trials=4", "ruleset.tuning.finalists=2", "ruleset.tuning.finalist_studies=2"]


class Stages:
    """Runs the stages in this process, and notes the trials that were run: [stage] of (ruleset, study, trial)."""

    def __init__(self) -> None:
        self.ran: list[list[tuple[str, int, int]]] = []

    def __call__(self, runs: Sequence[Run]) -> bool:
        ran = []
        for trial in ledger.plan(runs, "m", lambda line: None):
            if not ledger.read_state(trial).is_over:
                run_trial(trial.run, make_should_stop=make_should_stop)
                ran.append((trial.path.ruleset, trial.path.study, trial.path.trial))
        self.ran.append(ran)
        return True


def run_all(run: Run) -> tuple[Run, Stages, list[str]]:
    stages, lines = Stages(), []
    confirmed_runs = confirm([run], "m", stages, lines.append)
    assert confirmed_runs is not None
    stages(confirmed_runs)
    return confirmed_runs[0], stages, lines


def small_run(records: Path, *arguments: str) -> Run:
    return load_run([*TINY, "ruleset=confirmed", *SMALL, f"records={records}", *arguments])


def hyperparameters(records: Path, ruleset: str) -> dict[tuple[int, int], str]:
    """By study and trial."""
    values_of = {}
    for path in records.glob(f"*/{ruleset}/*/*/study_*/*/trial_*/manifest.json"):
        manifest = json.loads(path.read_text())
        values = manifest["hyperparameters"], manifest["identity"]["schedule"]
        values_of[manifest["identity"]["seed"], manifest["identity"]["trial"]] = json.dumps(values)
    return values_of


def test_the_winner_of_other_seeds_is_measured_on_fresh_ones(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    chosen, stages, lines = run_all(run)
    tuning, finalists, fresh = stages.ran
    assert sorted(tuning) == [("confirmed_tuning", TUNING_SEED, number) for number in range(1, 5)]
    numbers = sorted({number for *_, number in finalists})
    assert len(numbers) == 2
    assert sorted(finalists) == [("confirmed_finalists", FINALIST_SEED + i, n) for i in range(2) for n in numbers]
    assert chosen.trial in numbers
    assert sorted(fresh) == [("confirmed", FRESH_SEED + i, chosen.trial) for i in range(2)]
    # A trial's number is that of its point, whatever its seed.
    points = hyperparameters(tmp_path, "confirmed_tuning")
    assert len(set(points.values())) == 4
    for stage in ("confirmed_finalists", "confirmed"):
        for (_, number), values in hyperparameters(tmp_path, stage).items():
            assert values == points[TUNING_SEED, number]
    # The winner has the least mean cost on the seeds of the second stage.
    costs = {number: confirmed.finalist_cost(run, number, "m") for number in numbers}
    assert costs[chosen.trial] == min(costs.values())
    assert len(lines) == 2 and f"point {chosen.trial} is confirmed" in lines[1]

    # The same command again runs nothing, and an interrupted one the rest.
    again, stages, _ = run_all(run)
    assert again == chosen and stages.ran == [[], [], []]
    for path in tmp_path.glob(f"*/confirmed_finalists/*/*/study_{FINALIST_SEED}/*/trial_{numbers[0]}/*"):
        path.unlink()
    _, stages, _ = run_all(run)
    assert stages.ran == [[], [("confirmed_finalists", FINALIST_SEED, numbers[0])], []]


def test_trials_that_are_left_end_the_command_at_their_stage(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    for last in (0, 1):
        stages = Stages()

        def run_stage(runs: list[Run], stages: Stages = stages, last: int = last) -> bool:
            return stages(runs) and len(stages.ran) <= last

        assert confirm([run], "m", run_stage, lambda line: None) is None
        assert len(stages.ran) == last + 1


def test_only_the_tuning_is_pruned_and_spares_what_can_be_a_finalist(tmp_path: Path) -> None:
    run = small_run(tmp_path, "pruning=exact")
    assert (tuning_run(run).pruning, tuning_run(run).ruleset.kept) == ("exact", 2)
    assert {of_point.pruning for of_point in confirmed.finalist_runs(run, [1, 2])} == {"none"}
    assert confirmed.fresh_run(run, 1).pruning == "none"
    # Of each study of `external` the best alone is looked at.
    external = load_run([*TINY, "ruleset=confirmed_external", f"records={tmp_path}"])
    assert tuning_run(external).ruleset.kept == 1


def test_studies_that_are_there_are_not_tuned_again(tmp_path: Path) -> None:
    external = [*TINY, "ruleset=external", "ruleset.studies=2", "ruleset.trials=2", f"records={tmp_path}"]
    Stages()([load_run(external)])
    arguments = ["ruleset.tuning.studies=2", "ruleset.tuning.trials=2", "ruleset.tuning.finalists=2"]
    run = load_run([*TINY, "ruleset=confirmed_external", *arguments, f"records={tmp_path}", "ruleset.studies=1"])
    chosen, stages, _ = run_all(run)
    assert stages.ran[0] == []
    points = hyperparameters(tmp_path, "external")
    study, point = divmod(chosen.trial - 1, 2)
    (values,) = hyperparameters(tmp_path, "confirmed_external").values()
    assert values == points[study, point + 1]
    # The best of each study is a finalist.
    assert sorted((number - 1) // 2 for *_, number in stages.ran[1]) == [0, 0, 0, 1, 1, 1]


def test_finalists_are_the_best_of_each_study_and_the_earlier_of_equals(tmp_path: Path) -> None:
    run = load_run([*TINY, "ruleset=confirmed", f"records={tmp_path}"])
    costs = [0.9, 0.5, 1.2, 0.5, float("inf"), 0.4]
    points = [PointCost(number, 0, cost) for number, cost in enumerate(costs, 1)]
    assert choose_finalists(run, points) == [6, 2, 4]
    # Fewer where the others did not train.
    assert choose_finalists(run, points[4:]) == [6]
    with pytest.raises(UserError, match="no point of its tuning trains"):
        choose_finalists(run, points[4:5])
    external = load_run([*TINY, "ruleset=confirmed_external", f"records={tmp_path}"])
    points = [PointCost(number, (number - 1) // 5, cost) for number, cost in [(1, 0.3), (2, 0.2), (6, 0.9), (11, 0.8)]]
    assert choose_finalists(external, points) == [2, 11, 6]


def test_seeds_of_stages_overlap_with_no_others() -> None:
    rules = [shipped_ruleset(name) for name in ("confirmed_tuning", "confirmed_finalists", "confirmed")]
    firsts = [TUNING_SEED, FINALIST_SEED, FRESH_SEED]
    seeds = [set(range(first, first + r.studies)) for first, r in zip(firsts, rules, strict=True) if r is not None]
    assert len(seeds) == 3 and sum(map(len, seeds)) == len(set.union(*seeds))
    assert set.union(*seeds) <= set(CONFIRMED_SEEDS)
    assert not set(CONFIRMED_SEEDS) & set(study_trials.TARGET_SEEDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "has its own"),
        (["overwrite=true"], "would discard the tuning"),
        (["pruning=futility"], "may stop a finalist"),
        (["ruleset.trials=2"], "has the winner alone"),
    ],
)
def test_what_would_spoil_the_procedure_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_confirmed([small_run(tmp_path, *arguments)])


def test_a_sweep_is_of_one_kind_and_seeds_are_kept(tmp_path: Path) -> None:
    other = load_run([*TINY, f"records={tmp_path}"])
    with pytest.raises(UserError, match="not of both"):
        check_confirmed([small_run(tmp_path), other])
    done = call("run", *TINY, f"seed={FRESH_SEED}", f"records={tmp_path}")
    assert done.returncode == 2 and "are kept for ruleset=confirmed" in done.stderr


def test_the_tuning_of_another_ruleset_has_its_identity(tmp_path: Path) -> None:
    run = load_run([*TINY, "ruleset=confirmed_external", f"records={tmp_path}"])
    external = load_run([*TINY, "ruleset=external", f"records={tmp_path}"])
    assert tuning_run(run).identity() == external.identity()
