"""The engine on the real workloads, tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness.errors import UserError
from harness.trial.record import Record, Status
from harness.trial.training import Training
from tests.conftest import TINY_GPT2, TINY_RESNET
from tests.harness import seams
from tests.harness.outcomes import read_outcome

Trial = Callable[..., Record]
SEAMS = ["PolyakStep", "Sam", "ZerothOrder", "HutchinsonDiagonal", "LookAheadGradient", "SampledFisher",
         "GrowingBatch", "ExponentialAverage", "LayerInputs", "OwnCompilation"]  # fmt: skip


def seam(name: str) -> list[str]:
    return [f"optimizer.class_path=tests.harness.seams.{name}", "schedule=constant", "schedule.warmup_fraction=0"]


def test_one_seed_gives_the_same_bits_and_another_seed_others(trial: Trial) -> None:
    first, again, other = trial("label=a"), trial("label=b"), trial("label=a", "seed=1")
    assert read_outcome(first.folder) == read_outcome(again.folder)
    assert read_outcome(first.folder).rows != read_outcome(other.folder).rows
    assert first.folder.parts[-3:] == ("study_0", "gpt2_pytorch", "trial_1")
    assert other.folder.parts[-3] == "study_1"


@pytest.mark.parametrize("workload", ["gpt2", "resnet", "vit"])
def test_the_shipped_workloads_train(trial: Trial, workload: str, request: pytest.FixtureRequest) -> None:
    if workload != "gpt2":
        request.getfixturevalue("fashion_mnist_data")
    base = [f"workload={workload}", "workload.max_steps=4", "workload.eval_every=2"]
    record = trial(base=base)
    assert record.status is Status.EXHAUSTED
    rows = record.rows
    assert [row["global_step"] for row in rows] == [2, 4]
    assert rows[-1]["test/loss"] > 0 and rows[0]["test/loss"] == ""
    assert record.manifest.modified == ["eval_every", "max_steps"]
    assert "-modified-" in str(record.folder)


def test_reaching_the_target_stops_or_goes_on(trial: Trial) -> None:
    stops = trial("workload.target=5.545")
    assert stops.status is Status.REACHED
    final = stops.manifest.final.model_dump()
    reached = final["steps_to_target"]
    assert len(stops.rows) == reached // 3 and final["resolution_steps"] == 3
    assert final["time_to_target"] == stops.rows[-1]["accumulated_submission_time"]
    goes_on = trial("workload.target=5.545", "run_to_end=true", "label=on")
    assert goes_on.status is Status.REACHED
    assert goes_on.rows[-1]["global_step"] == 12
    assert goes_on.manifest.final.steps_to_target == reached
    assert trial("label=never").manifest.final.time_to_target is None


def test_the_order_of_data_does_not_depend_on_the_submission(trial: Trial) -> None:
    """lr near zero: the training loss is that of the initial weights on the same examples, whatever the rule."""
    quiet = ["optimizer.hyperparameters.lr=1e-30", "workload.model.dropout=0.0"]
    adamw, lion = trial(*quiet), trial(*quiet, optimizer="lion")
    assert [row["train/loss"] for row in adamw.rows] == [row["train/loss"] for row in lion.rows]


@pytest.mark.parametrize("name", SEAMS)
def test_every_seam_trains_and_resumes_to_the_same_bits(trial: Trial, name: str) -> None:
    uninterrupted = trial(*seam(name), "label=uninterrupted", optimizer="any")
    assert uninterrupted.status is Status.EXHAUSTED, uninterrupted.manifest.final.traceback
    assert uninterrupted.rows[-1]["examples"] >= 12 * 8
    cut = interrupted(trial, *seam(name), "label=cut", optimizer="any")
    assert read_outcome(cut.folder) == read_outcome(uninterrupted.folder)
    assert cut.manifest.preemption_count == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nadamw", "lion", "muon"])
def test_every_optimizer_resumes_to_the_same_bits(trial: Trial, optimizer: str, *, base: list[str] = TINY_GPT2) -> None:
    uninterrupted = trial("label=uninterrupted", optimizer=optimizer, base=base)
    assert uninterrupted.status is Status.EXHAUSTED, uninterrupted.manifest.final.traceback
    cut = interrupted(trial, "label=cut", optimizer=optimizer, base=base)
    assert read_outcome(cut.folder) == read_outcome(uninterrupted.folder)


@pytest.mark.usefixtures("fashion_mnist_data")
@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_images_with_statistics_of_batches_resume_to_the_same_bits(trial: Trial, optimizer: str) -> None:
    test_every_optimizer_resumes_to_the_same_bits(trial, optimizer, base=TINY_RESNET)


def stopped(trial: Trial, *arguments: str, **options: Any) -> Record:
    """A trial that Ctrl-C has stopped after its second evaluation, or its first if it is very short."""
    segment = Training.segment
    calls = 0

    def stop_in_the_third_segment(self: Any, goal: int, charge_compile: bool) -> Any:
        nonlocal calls
        calls += 1
        last = 3 if self.spec.max_steps > 4 else 2
        if calls == last:
            segment(self, goal, charge_compile)  # work that will be lost
            raise KeyboardInterrupt
        return segment(self, goal, charge_compile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.trial.training.Training.segment", stop_in_the_third_segment)
        record = trial(*arguments, "checkpoint_seconds=0", **options)
    assert record.status is Status.STOPPED and record.path.checkpoint.exists()
    return record


def interrupted(trial: Trial, *arguments: str, **options: Any) -> Record:
    """Stop the trial by Ctrl-C, then run the same command again."""
    stopped(trial, *arguments, **options)
    finished = trial(*arguments, "checkpoint_seconds=0", **options)
    assert finished.status is not Status.STOPPED and not finished.path.checkpoint.exists()
    return finished


def test_lost_work_is_not_on_the_clock_twice(trial: Trial) -> None:
    cut = interrupted(trial)
    times = [row["accumulated_submission_time"] for row in cut.rows]
    assert times == sorted(times)
    assert cut.rows[-1]["update_steps"] == 12 and cut.rows[-1]["examples"] == 96


def test_a_growing_batch_counts_nominal_steps(trial: Trial) -> None:
    rows = trial(*seam("GrowingBatch"), optimizer="any").rows
    assert [row["global_step"] for row in rows] == [3, 6, 10, 12]
    assert [row["update_steps"] for row in rows] == [6, 9, 11, 12]
    assert [row["examples"] for row in rows] == [24, 48, 80, 96]


def test_work_is_counted_in_examples(trial: Trial) -> None:
    row = trial(*seam("Sam"), optimizer="any").rows[-1]
    assert (row["examples"], row["forward_examples"], row["backward_examples"]) == (96, 192, 192)
    row = trial(*seam("ZerothOrder"), "label=zo", optimizer="any").rows[-1]
    assert (row["forward_examples"], row["backward_examples"]) == (192, 0)


def test_evaluation_weights_are_evaluated_and_leave_the_training_alone(trial: Trial) -> None:
    average = trial(*seam("ExponentialAverage"), optimizer="any")
    plain = trial("optimizer.class_path=torch.optim.SGD", "optimizer.hyperparameters.lr=0.1", "schedule=constant",
                  "schedule.warmup_fraction=0", "label=plain", optimizer="any")  # fmt: skip
    assert average.manifest.final.weights_sha256 == plain.manifest.final.weights_sha256
    assert average.rows[-1]["validation/loss"] > plain.rows[-1]["validation/loss"]
    assert average.rows[-1]["accumulated_averaging_time"] > 0


def test_second_derivatives_are_arranged_and_recorded(trial: Trial) -> None:
    record = trial(*seam("HutchinsonDiagonal"), "compile=true", optimizer="any")
    assert record.status is Status.EXHAUSTED
    assert record.manifest.arranged == {"compile": False, "attention": "math"}
    assert record.manifest.needs == ["re_evaluate", "second_derivatives"]


def test_own_compilation_has_its_own_column(trial: Trial) -> None:
    row = trial(*seam("OwnCompilation"), optimizer="any").rows[-1]
    assert 0 < row["accumulated_compile_time"] < row["accumulated_submission_time"]


def test_statuses(trial: Trial) -> None:
    failed = trial(*seam("Broken"), optimizer="any")
    assert failed.status is Status.FAILED
    assert "ArithmeticError: the third step is wrong" in failed.manifest.final.traceback
    record = trial(*seam("OutOfMemory"), "label=o", optimizer="any")
    assert record.status is Status.OUT_OF_MEMORY
    assert "workload.micro_batch=4 halves" in record.manifest.final.stop_reason
    undeclared = trial(*seam("Undeclared"), "label=u", optimizer="any")
    assert undeclared.status is Status.FAILED
    assert "add Need.PARAMETER_ROLES" in undeclared.manifest.final.traceback
    diverged = trial("optimizer.hyperparameters.lr=1e30", "optimizer.clip_norm=null", "label=d", optimizer="sgd")
    assert diverged.status is Status.DIVERGED
    assert "nan" in diverged.manifest.final.stop_reason
    limited = trial("workload.max_seconds=1e-9", "label=l")
    assert limited.status is Status.EXHAUSTED and len(limited.rows) == 1
    assert "max_seconds" in limited.manifest.final.stop_reason


def test_ctrl_c_is_stopped_and_resumable(trial: Trial) -> None:
    seams.Interrupted.pressed = False
    record = trial(*seam("Interrupted"), "checkpoint_seconds=0", optimizer="any")
    assert record.status is Status.STOPPED
    assert len(record.rows) == 2
    assert trial(*seam("Interrupted"), "checkpoint_seconds=0", optimizer="any").status is Status.EXHAUSTED


def test_state_bytes_are_those_held(trial: Trial) -> None:
    final = trial().manifest.final.model_dump()
    assert final["optimizer_state_bytes"] >= 2 * 4 * final["parameters"]
    assert 8 <= final["optimizer_state_bytes_per_parameter"] < 8.1
    assert 4 <= trial(optimizer="lion").manifest.final.optimizer_state_bytes_per_parameter < 4.1


def test_a_third_party_class_that_swallows_keywords(trial: Trial) -> None:
    with pytest.raises(UserError, match="no such hyperparameter"):
        trial(
            "optimizer.class_path=tests.harness.trial.test_trial.Swallows",
            "optimizer.hyperparameters.typo=1",
            optimizer="any",
        )
    record = trial(
        "optimizer.class_path=tests.harness.trial.test_trial.Swallows",
        "optimizer.hyperparameters.lr=0.01",
        optimizer="any",
    )
    assert record.status is Status.EXHAUSTED
    assert record.folder.parts[-4].startswith("swallows-")


class Swallows(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1, **kwargs: Any) -> None:
        super().__init__(params, lr=lr)


def test_closures(trial: Trial) -> None:
    arguments = ["optimizer.class_path=torch.optim.LBFGS", "optimizer.hyperparameters.max_iter=3"]
    record = trial(*arguments, "optimizer.closure=true", optimizer="any")
    assert record.status is Status.EXHAUSTED
    assert record.rows[-1]["backward_examples"] > record.rows[-1]["examples"]


@pytest.mark.parametrize(("precision", "products"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_products_of_a_gpu_are_as_precise_as_stated_in_both_of_torchs_interfaces(
    trial: Trial, precision: str, products: str
) -> None:
    trial(f"precision={precision}")
    cudnn: Any = torch.backends.cudnn
    assert torch.backends.cuda.matmul.fp32_precision == products
    # "none" is torch's default, which is no TF32.
    allowed = "tf32" if products == "tf32" else "none"
    assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == allowed
    assert torch.backends.cuda.matmul.allow_tf32 == cudnn.allow_tf32 == (products == "tf32")
    assert torch.get_float32_matmul_precision() == ("high" if products == "tf32" else "highest")
    # Libraries change the settings for a while, and read them all for it.
    with cudnn.flags(enabled=True):
        pass


def test_bf16_and_other_precisions_differ(trial: Trial) -> None:
    low, full = trial("precision=bf16"), trial("precision=fp32", "label=f")
    assert low.status is Status.EXHAUSTED
    assert low.rows[-1]["validation/loss"] != full.rows[-1]["validation/loss"]
    assert low.rows[-1]["validation/loss"] == pytest.approx(full.rows[-1]["validation/loss"], rel=0.05)


# One process loads Inductor and asks the compiler what the processor can do, which takes longer than the compilation.
@pytest.mark.xdist_group("inductor")
def test_a_compiled_model_trains_alike(trial: Trial) -> None:
    quick = ["workload.max_steps=3", "workload.model.dropout=0.0"]
    compiled, eager = trial(*quick, "compile=true", "label=c"), trial(*quick, "label=e")
    assert compiled.status is Status.EXHAUSTED, compiled.manifest.final.traceback
    assert compiled.rows[-1]["validation/loss"] == pytest.approx(eager.rows[-1]["validation/loss"], rel=1e-4)
    assert compiled.rows[-1]["accumulated_compile_time"] == 0  # the fixed model's compilation is off the clock


@pytest.mark.xdist_group("inductor")
def test_an_elementwise_rule_is_compiled_with_the_model_and_charged_for_it(trial: Trial) -> None:
    quick = ["workload.max_steps=3", "workload.model.dropout=0.0"]
    compiled = trial(*quick, "compile=true", "label=c", optimizer="ademamix")
    eager = trial(*quick, "label=e", optimizer="ademamix")
    assert compiled.rows[-1]["validation/loss"] == pytest.approx(eager.rows[-1]["validation/loss"], rel=1e-4)
    row = compiled.rows[-1]
    assert 0 < row["accumulated_compile_time"] < row["accumulated_submission_time"]
    assert eager.rows[-1]["accumulated_compile_time"] == 0
