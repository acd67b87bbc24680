"""Submissions written for AlgoPerf's interface: trained to the bits of a resume and of a judge, counted, or refused."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.compose import load_run
from harness.config.study_trials import configure_trial, list_trials
from harness.errors import UserError
from harness.records.layout import SOURCES
from harness.review.audit import audit
from harness.review.finding import Severity
from harness.trial import conformance, remote_training
from harness.trial.conformance import CHECKS
from harness.trial.record import Record, Status
from submissions.algoperf import package
from submissions.algoperf.state import StatePacker
from tests import forked
from tests.conftest import TINY_GPT2, TINY_RESNET
from tests.harness.outcomes import read_outcome
from tests.harness.trial.test_trial import interrupted

Trial = Callable[..., Record]
FOLDER = Path(__file__).parents[1] / "data" / "algoperf" / "adamw"
OWN = (FOLDER / "submission.py").read_text()
PATH = f"optimizer.path={FOLDER}/submission.py"
POINT = {"learning_rate": 0.01, "one_minus_beta1": 0.1, "beta2": 0.999, "weight_decay": 0.1, "warmup_factor": 0.0}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a submission that differs from the one of the tests by the replacements; its optimizer.path=..."""

    def write_file(*replacements: tuple[str, str], text: str = OWN, name: str = "mine", **files: str) -> str:
        for former, new in replacements:
            assert former in text
            text = text.replace(former, new)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "submission.py").write_text(text)
        for stem, content in files.items():
            (folder / stem.replace("__", ".")).write_text(content)
        return f"optimizer.path={folder}/submission.py"

    return write_file


def given(**values: Any) -> str:
    return f"optimizer.hyperparameters={json.dumps(POINT | values).replace(chr(34), '')}"


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run(["workload=gpt2", "optimizer=algoperf", *arguments])
    assert len(caught.value.messages) == 1
    return caught.value.messages[0]


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [TINY_GPT2, TINY_RESNET])
def test_adamw_through_it_is_adamw_to_rounding(trial: Trial, fashion_mnist_data: Any, base: list[str]) -> None:
    length = ["workload.max_steps=32", "workload.eval_every=16", "workload.micro_batch=4"]
    through = trial(PATH, *length, base=base, optimizer="algoperf")
    plain = {"lr": 0.01, "betas": [0.9, 0.999], "weight_decay": 0.1, "fused": False}
    options = [f"optimizer.hyperparameters={json.dumps(plain).replace(chr(34), '')}", "optimizer.clip_norm=null",
               "optimizer.no_decay=[]", "schedule=constant", "schedule.warmup_fraction=0"]  # fmt: skip
    ours = trial(*length, *options, base=base)
    assert [row["global_step"] for row in through.rows] == [16, 32]
    for key in ("train/loss", "validation/loss"):
        values = [row[key] for row in through.rows]
        assert values == pytest.approx([row[key] for row in ours.rows], rel=2e-5)
        assert len(set(values)) == len(values)
    for row, other in zip(through.rows, ours.rows, strict=True):
        for key in ("update_steps", "examples", "forward_examples", "backward_examples", "optimizer_state_bytes"):
            assert row[key] == other[key], key
        assert row["counted_forward_examples"] == row["forward_examples"]


def test_it_resumes_to_the_same_bits(trial: Trial) -> None:
    arguments = (PATH, "optimizer.point=2", "workload.model.dropout=0.1")
    whole = trial(*arguments, "label=whole", optimizer="algoperf")
    assert whole.status is Status.EXHAUSTED, whole.manifest.final.traceback
    cut = interrupted(trial, *arguments, "label=cut", optimizer="algoperf")
    assert read_outcome(cut.folder) == read_outcome(whole.folder)


def test_a_judge_sees_the_same_and_the_file_is_in_the_evidence(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_training, "launch", forked.launch_trainee)
    alone = trial(PATH, "label=alone", optimizer="algoperf")
    judged = trial(PATH, "label=judged", "judge=process", optimizer="algoperf")
    assert read_outcome(judged.folder) == read_outcome(alone.folder)
    name, digest = "algoperf_submission_adamw", hashlib.sha256(OWN.encode()).hexdigest()
    for record in (alone, judged):
        evidence = record.manifest.evidence
        assert evidence.sources[name] == digest and "submissions.algoperf.adaptor" in evidence.sources
        assert not evidence.model_changes and not evidence.files_opened and not evidence.patched
        assert record.manifest.identity["optimizer"]["file_sha256"] == digest
        assert "path" not in record.manifest.identity["optimizer"]
    assert "def update_params" in json.loads((judged.folder / SOURCES).read_text())[name]


CHANGES = {
    "several batches in a step": (
        ("    return next(input_queue)", "    return input_queue"),
        ("    logits, new", "    next(batch)\n    batch = next(batch)\n    logits, new"),
    ),
    "two passes": (
        ("    logits, new", "    workload.model_fn(params=model, augmented_and_preprocessed_input_batch=batch, "
         "model_state=None, mode=spec.ForwardPassMode.TRAIN, rng=rng, update_batch_norm=False)\n    logits, new"),
    ),
    "stops early": (
        ("    model.train()\n", "    if global_step == 5:\n        raise spec.TrainingCompleteError\n"),
    ),
    "half of a batch": (
        ("    return next(input_queue)", "    return {key: value[:4] for key, value in next(input_queue).items()}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "arguments", "counts"),
    [
        ("several batches in a step", [], (6, 96, 48, 48)),
        ("two passes", [], (12, 96, 192, 96)),
        ("stops early", [], (12, 96, 40, 40)),
        ("half of a batch", [], (12, 96, 48, 48)),
        (None, ["optimizer.batch_size=16"], (6, 96, 96, 96)),
    ],
)
def test_work_is_counted(
    trial: Trial, write: Callable[..., str], change: str | None, arguments: list[str], counts: tuple[int, ...]
) -> None:
    path = write(*CHANGES.get(change or "", ()))
    options = (path, given(), "workload.eval_every=4", *arguments)
    record = trial(*options, "label=whole", optimizer="algoperf")
    assert record.status is Status.EXHAUSTED, record.manifest.final.traceback
    row = record.rows[-1]
    keys = ("update_steps", "examples", "forward_examples", "backward_examples")
    assert tuple(row[key] for key in keys) == counts
    assert row["counted_forward_examples"] == row["forward_examples"]
    assert [row["global_step"] for row in record.rows] == [4, 8, 12]
    if change in ("several batches in a step", "stops early"):
        cut = interrupted(trial, *options, "label=cut", optimizer="algoperf")
        assert read_outcome(cut.folder) == read_outcome(record.folder)


def test_the_review_finds_nothing_to_refuse(trial: Trial, write: Callable[..., str], tmp_path: Path) -> None:
    for name, change in CHANGES.items():
        trial(write(*change), given(), f"label={name.replace(' ', '_')}", optimizer="algoperf")
    count, findings = audit([tmp_path / "records"])
    assert count == len(CHANGES)
    # The sizes of the tests are those of a modified workload.
    refused = {finding.message for finding in findings if finding.severity is Severity.REFUSED}
    assert not {message for message in refused if "modified" not in message}


def test_statistics_of_batch_norm_move_only_when_asked(
    trial: Trial, write: Callable[..., str], fashion_mnist_data: Any
) -> None:
    path = write(("update_batch_norm=True", "update_batch_norm=False"))
    model = conformance.make_subject("algoperf", path, given())
    training = model.train(3)
    before = model.build()
    buffers = [name for name, _ in training.runner.model.named_buffers() if "running" in name]
    assert buffers
    for name in buffers:
        assert torch.equal(training.runner.model.get_buffer(name), before.runner.model.get_buffer(name))
    moved = conformance.make_subject("algoperf", PATH).train(3).runner.model
    assert not all(torch.equal(moved.get_buffer(name), before.runner.model.get_buffer(name)) for name in buffers)


def test_prepare_for_eval_is_called_once_between_two_steps_and_training_goes_on_from_it(
    write: Callable[..., str],
) -> None:
    halve = "    import torch\n    with torch.no_grad():\n        for p in current_param_container.parameters():\n" \
            "            p.mul_(0.5)\n    return optimizer_state, current_param_container, model_state\n"  # fmt: skip
    former = "    return optimizer_state, current_param_container, model_state\n"
    training = conformance.make_subject("algoperf", write((former, halve)), given()).train(2)
    weights = [parameter.detach().clone() for parameter in training.runner.parameters]
    for _ in range(2):
        with training.submission.evaluation_weights():
            pass
    for weight, parameter in zip(weights, training.runner.parameters, strict=True):
        assert torch.equal(parameter, weight * 0.5)


def test_label_smoothing_is_that_of_cross_entropy(write: Callable[..., str]) -> None:
    training = conformance.make_subject("algoperf", PATH).train(1)
    facade: Any = training.submission._workload  # type: ignore[attr-defined]
    outputs, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    result = facade.loss_fn(labels, outputs, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), 0.2)
    expected = torch.nn.functional.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.2)[:3]
    assert result["n_valid_examples"] == 3 and result["per_example"].shape == (5,)
    torch.testing.assert_close(result["summed"], expected.sum())


@pytest.mark.parametrize("check", ["deterministic", "resumes", "counts_state", "frees"])
def test_it_conforms(check: str) -> None:
    CHECKS[check](conformance.make_subject("algoperf", PATH))


# ---- its package and its folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", package.NAMES)
def test_both_names_of_the_package(write: Callable[..., str], spelling: str) -> None:
    path = write(("from algoperf", f"from {spelling}"))
    module: Any = conformance.make_subject("algoperf", path, given()).build().submission.module  # type: ignore[attr-defined]
    assert module.spec.ParameterType.ATTENTION_QKV.value == 12 and module.spec.LossType(2).name == "MEAN_SQUARED_ERROR"
    assert module.USE_PYTORCH_DDP is False


def test_modules_beside_it_are_found_by_every_name_and_are_its_own(write: Callable[..., str]) -> None:
    def path(name: str, value: int) -> str:
        lines = f"from beside import VALUE\nimport submissions.self_tuning.{name}.beside as other\n"
        return write(("import torch\n", f"import torch\n{lines}"), name=name, beside__py=f"VALUE = {value}\n")

    for name, value in (("first", 1), ("second", 2)):
        training = conformance.make_subject("algoperf", path(name, value), given()).build()
        module: Any = training.submission.module  # type: ignore[attr-defined]
        assert module.VALUE == module.other.VALUE == value
        assert Path(module.other.__file__).parent.name == name
        assert {"beside", f"algoperf_submission_{name}"} <= training.collect_evidence()["sources"].keys()
    assert "algoperf_submission_first" not in sys.modules


# ---- hyperparameters -----------------------------------------------------------------------------------------------


def test_a_list_of_points_is_the_recipe_and_the_search_space() -> None:
    run = load_run(["workload=gpt2", "optimizer=algoperf", PATH, "optimizer.hyperparameters.beta2=0.9"])
    assert run.optimizer.name == "algoperf-adamw" and run.submission_label.startswith("algoperf-adamw-")
    assert run.optimizer.effective_hyperparameters == POINT | {"beta2": 0.9}
    chosen = load_run(["workload=gpt2", "optimizer=algoperf", PATH, "optimizer.point=2"])
    assert chosen.optimizer.effective_hyperparameters["learning_rate"] == 0.003
    study = load_run(["workload=gpt2", "optimizer=algoperf", PATH, "ruleset=external", "ruleset.trials=2"])
    trials = [configure_trial(study, *place) for place in list_trials(study)]
    assert sorted(t.optimizer.effective_hyperparameters["learning_rate"] for t in trials) == [0.003] * 3 + [0.01] * 3
    assert len({t.submission_label for t in trials}) == 1


def test_ranges_are_a_search_space_and_their_middle_is_the_recipe() -> None:
    space = f"optimizer.tuning_search_space={FOLDER}/ranges.json"
    run = load_run(["workload=gpt2", "optimizer=algoperf", PATH, space])
    values = run.optimizer.effective_hyperparameters
    assert values["learning_rate"] == pytest.approx(0.01) and values["weight_decay"] == pytest.approx(0.1)
    assert (values["one_minus_beta1"], values["beta2"], values["warmup_factor"]) == (0.1, 0.99, 0.1)
    study = load_run(["workload=gpt2", "optimizer=algoperf", PATH, space, "ruleset=external"])
    drawn = [configure_trial(study, *place).optimizer.effective_hyperparameters for place in list_trials(study)]
    assert len({values["learning_rate"] for values in drawn}) == len(drawn) == 15
    assert all(0.001 <= v["learning_rate"] <= 0.1 and v["beta2"] in (0.9, 0.99, 0.999) for v in drawn)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is no JSON"),
        ("3", "must hold a list of points, or a range for each"),
        ('{"lr": {"min": 1, "max": 2}}', "lr must be"),
        ('[{"lr": 1}, {"lr": 1}]', "listed twice"),
        ('{"lr": {"min": 2, "max": 1, "scaling": "log"}}', "the first number must be the smaller"),
    ],
)
def test_a_search_space_that_cannot_be_read_is_named(write: Callable[..., str], content: str, words: str) -> None:
    message = refusal(write(tuning_search_space__json=content))
    assert message.startswith("optimizer.tuning_search_space=") and words in message


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_the_path_is_checked(write: Callable[..., str], tmp_path: Path) -> None:
    assert "add optimizer.path=FOLDER/submission.py" in refusal()
    assert "cannot be read (No such file or directory)" in refusal(f"optimizer.path={tmp_path}/none.py")
    assert "this is a folder; give the file" in refusal(f"optimizer.path={tmp_path}")
    assert "is no Python" in refusal(write(text="def ("))
    assert "this is a JAX submission (it imports jax)" in refusal(write(text="import jax.numpy as jnp\n"))
    assert "importing it fails (ZeroDivisionError" in refusal(write(text="1 / 0\n"))
    missing = refusal(write(("def update_params", "def other"), ("def get_batch_size", "def another")), given())
    assert "it has no function get_batch_size and no update_params" in missing
    absent = refusal(write(("import torch\n", "import torch\nfrom algoperf import jax_sharding_utils\n")), given())
    assert "imports what is not here of AlgoPerf's package" in absent
    absent = refusal(write(("import torch\n", "import torch\nimport no_such_package\n")), given())
    assert "cannot import no_such_package" in absent
    with pytest.raises(UserError, match="is no algorithm in a file; leave it out, or take optimizer=algoperf"):
        load_run(["workload=gpt2", "optimizer=adamw", PATH])


def test_a_missing_hyperparameter_is_named_with_the_ways_to_give_it(write: Callable[..., str], trial: Trial) -> None:
    values = {name: value for name, value in POINT.items() if name != "beta2"}
    message = refusal(write(), f"optimizer.hyperparameters={json.dumps(values).replace(chr(34), '')}")
    assert message.startswith("optimizer.hyperparameters.beta2 is missing")
    assert "optimizer.hyperparameters.beta2=VALUE" in message and "tuning_search_space.json" in message
    # Read in a way that the source does not show.
    hidden = write(("hyperparameters.beta2", "(lambda h: h.beta9)(hyperparameters)"))
    record = trial(hidden, given(), optimizer="algoperf")
    assert record.status is Status.FAILED
    assert "optimizer.hyperparameters.beta9 is not given" in record.manifest.final.traceback.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("workload.step_hint", "workload.train_stddev"), "workload.train_stddev: the workloads here have no such"),
        (("params=model,", "params=torch.nn.Linear(1, 1),"), "is not the model that the submission was given"),
        (("del current_params_types", "eval_results[-1]; del current_params_types"), "eval_results stays empty"),
        (("del current_params_types", "train_state['accumulated_submission_time']\n    del current_params_types"),
         "is not told its times"),
        (("    return next(input_queue)", "    return {}"), "KeyError"),
        (('"calls": 0}', '"calls": 0, "f": None}'), ""),
    ],
)  # fmt: skip
def test_what_is_not_here_is_one_sentence(
    write: Callable[..., str], trial: Trial, change: tuple[str, str], words: str
) -> None:
    record = trial(write(change), given(), optimizer="algoperf")
    if not words:
        assert record.status is Status.EXHAUSTED
        return
    assert record.status is Status.FAILED
    assert words in record.manifest.final.traceback.strip().splitlines()[-1]


def test_options_of_the_default_step_are_refused(write: Callable[..., str], trial: Trial) -> None:
    assert "clips gradients itself; leave it out" in refusal(PATH, "optimizer.clip_norm=1")
    record = trial(PATH, "schedule=cosine", optimizer="algoperf")
    assert "has a schedule of its own; leave both out" in record.manifest.final.traceback
    wrapped = trial(PATH, "optimizer.wrappers=[submissions.sam.SAM]", "label=w", optimizer="algoperf")
    assert wrapped.status is Status.FAILED


def test_state_that_cannot_be_saved_is_named_by_its_key() -> None:
    model = torch.nn.Linear(2, 2)
    built = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "rule": math.sin, "rest": [1, {"a": None}]}
    packer = StatePacker(built, model.parameters(), [], [model])
    assert packer.unpack(packer.pack(built))["rule"] is math.sin
    for key, value in {"new": lambda: 0, "other": torch.optim.SGD(model.parameters(), lr=1), "thing": object()}.items():
        with pytest.raises(ValueError, match=key):
            packer.pack(built | {"rest": {key: value}})


def test_remarks_of_the_record(write: Callable[..., str], trial: Trial) -> None:
    reads = ("del current_params_types, loss_type, eval_results", "len(eval_results)\n    del loss_type")
    passes = ("update_batch_norm=True,", "update_batch_norm=True, dropout_rate=0.5,")
    both = trial(write(reads, passes), given(), optimizer="algoperf")
    assert both.status is Status.EXHAUSTED
    remarks = [remark.partition(":")[0] for remark in both.manifest.remarks]
    assert remarks == ["eval_results stays empty", "dropout_rate has no effect"]
    assert read_outcome(both.folder).weights == read_outcome(trial(PATH, optimizer="algoperf").folder).weights
    by_runner = trial(PATH, "optimizer.hyperparameters.dropout_rate=0.1", optimizer="algoperf")
    assert [remark.partition(":")[0] for remark in by_runner.manifest.remarks] == remarks[1:]
