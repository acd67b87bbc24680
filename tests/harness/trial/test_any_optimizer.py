"""A torch.optim.Optimizer of any library by config alone: trained to the bit, or refused with the option that helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.compose import load_run
from harness.config.declared_needs import declared_needs
from harness.config.hyperparameters import check_hyperparameters
from harness.config.probe import examine
from harness.errors import UserError
from harness.interface import Need
from harness.interface.any_optimizer import AnyOptimizer, claim_parameters
from harness.interface.roles import Role
from harness.interface.submission import plain_tensors
from harness.trial import conformance
from harness.trial.conformance import CHECKS
from scripts import any_optimizer

SGD = "optimizer.base.class_path=torch.optim.SGD optimizer.base.hyperparameters.lr=0.1"
MOMENTUM = "optimizer.base.class_path=torch.optim.SGD optimizer.base.hyperparameters={lr:0.1,momentum:0.9}"
ADAMW = "optimizer.fallback.class_path=torch.optim.AdamW optimizer.fallback.hyperparameters.lr=0.001"
OTHER = "optimizer.fallback.class_path=torch.optim.SGD"
CONSTANT = "schedule=constant schedule.warmup_fraction=0"
FLAGS = "{hidden_matrix: {use_sign: true}, rest: {use_sign: false}}"


def arguments(name: str, options: str = "") -> list[str]:
    path = name if "." in name else f"tests.harness.foreign.{name}"
    return [f"optimizer.class_path={path}", *options.split()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Switches", ""), ("Closure", ""), ("Loss", ""), ("TwoRates", ""), ("KeepsMuch", ""), ("TakesModel", ""),
        ("Unusual", "optimizer.hyperparameters.lr=-0.2"), ("NoRate", CONSTANT),
        ("Around", MOMENTUM), ("Ascends", f"{MOMENTUM} optimizer.closure=true"),
        ("TakesNames", "optimizer.takes=named_parameters"), ("MatricesOnly", ADAMW),
        ("SecondDerivatives", "optimizer.needs=[second_derivatives]"),
        ("torch.optim.Muon", ADAMW),
    ],
)  # fmt: skip
def test_every_convention_trains_and_resumes_to_the_bit(name: str, options: str) -> None:
    subject = conformance.make_subject("any", *arguments(name, options))
    for check in ("deterministic", "resumes", "evaluates", "counts_state"):
        CHECKS[check](subject)


def test_groups_with_flags() -> None:
    option = f"optimizer.param_groups={FLAGS}"
    subject = conformance.make_subject("any", *arguments("Flags"), option)
    CHECKS["resumes"](subject)
    groups = subject.build().submission.optimizers[0].param_groups  # type: ignore[attr-defined]
    assert [group["use_sign"] for group in groups] == [True, False]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("Ascends", SGD),
        ("SecondDerivatives", "optimizer.needs=[second_derivatives]"),
        ("NoRate", CONSTANT),
        ("MatricesOnly", ADAMW),
        ("TakesNames", "optimizer.takes=named_parameters"),
        ("Flags", f"optimizer.param_groups='{FLAGS}'"),
    ],
)
def test_a_refusal_names_the_option_that_helps(name: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(["workload=gpt2", "optimizer=any", *arguments(name)])
    (message,) = caught.value.messages
    assert message.endswith(f"; add {remedy}")
    assert "optimizer." in message.partition(":")[0]


def test_the_option_that_helps_may_be_two() -> None:
    with pytest.raises(UserError, match=r"add optimizer\.closure=true"):
        load_run(["workload=gpt2", "optimizer=any", *arguments("Ascends", SGD)])
    run = load_run(["workload=gpt2", "optimizer=any", *arguments("Ascends", f"{SGD} optimizer.closure=true")])
    assert examine(run).gradient_first
    assert not examine(load_run(["workload=gpt2", "optimizer=any", *arguments("Closure")])).gradient_first


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("KeepsFunction", "['projection'] is a function"),
        ("WaitsForHessian", "nothing calls update_hessian()"),
        ("WithinBackward", "within the backward pass"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
    ],
)
def test_what_cannot_work_points_to_the_page(name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run(["workload=gpt2", "optimizer=any", *arguments(name)])
    (message,) = caught.value.messages
    assert expected in message and "docs/any_optimizer.md" in message


def test_a_class_without_its_group_keys_does_not_run_as_adam() -> None:
    command = ["workload=gpt2", "optimizer=any", *arguments("LowRank")]
    with pytest.raises(UserError, match="no parameter group has rank, without which LowRank runs as Adam"):
        load_run(command)
    load_run([*command, "optimizer.param_groups={hidden_matrix: {rank: 4}, rest: {}}"])
    # Said on purpose.
    load_run([*command, "optimizer.param_groups={rest: {}}"])


def test_what_a_reader_should_know_is_a_remark() -> None:
    def remarks(*command: str) -> str:
        return " ".join(examine(load_run(["workload=gpt2", "optimizer=any", *command])).remarks)

    assert "the schedule does not change final_lr" in remarks(*arguments("TwoRates"))
    assert "no checkpoint holds" in remarks(*arguments("Forgets"))
    assert remarks(*arguments("KeepsMuch")) == ""
    pytest.importorskip("schedulefree")
    assert "averages the weights by itself" in remarks(*arguments("schedulefree.AdamWScheduleFree"))
    assert remarks(*arguments("schedulefree.AdamWScheduleFree", "schedule=constant")) == ""


def test_an_optimizer_that_runs_as_its_base_is_remarked() -> None:
    command = ["workload=gpt2", "optimizer=any", *arguments("Around", SGD)]
    assert "as its base alone" in examine(load_run([*command, "optimizer.hyperparameters.k=100"])).remarks[0]
    assert examine(load_run([*command, "optimizer.hyperparameters.k=3"])).remarks == ()


@pytest.mark.parametrize("name", ["Adam", "LBFGS", "Muon", "SparseAdam"])
def test_the_document_says_what_comes_of_a_class(name: str) -> None:
    outcome = any_optimizer.try_class(f"torch.optim.{name}")
    document = (any_optimizer.ROOT / "docs" / "any_optimizer.md").read_text()
    lines = any_optimizer.format_table([outcome]).splitlines()
    if outcome.kind == "trains":
        (line,) = (line for line in document.splitlines() if line.startswith("- torch.optim: "))
        assert name in line.removeprefix("- torch.optim: ").split(", ")
    else:
        assert lines[-1] in document


def test_every_rate_follows_the_schedule() -> None:
    subject = conformance.make_subject("any", *arguments("TwoRates", "schedule=linear schedule.warmup_fraction=0"))
    training = subject.build()
    conformance.train_until(training, 41)
    (group,) = training.submission.optimizers[0].param_groups  # type: ignore[attr-defined]
    assert group["lr"] == pytest.approx(0.05) and group["bias_lr"] == pytest.approx(0.1)
    assert group["final_lr"] == 0.3


def test_needs_come_from_the_signature_and_the_probe() -> None:
    def needs(name: str) -> frozenset[Need]:
        return declared_needs(load_run(["workload=gpt2", "optimizer=any", *arguments(name)]))

    assert needs("Closure") == {Need.RE_EVALUATE}
    assert needs("TakesModel") == {Need.LAYERS}
    assert needs("Compiles") == {Need.OWN_COMPILATION}
    assert needs("torch.optim.AdamW") == frozenset()


def test_parameters_are_claimed_once() -> None:
    roles = {"a.weight": Role.HIDDEN_MATRIX, "a.bias": Role.BIAS, "b.weight": Role.HEAD}
    assert claim_parameters(["hidden_matrix", "rest"], roles) == {
        "hidden_matrix": ["a.weight"],
        "rest": ["a.bias", "b.weight"],
    }
    for keys, expected in (
        (["stem", "rest"], "param_groups.stem: no parameter matches; the model has the roles hidden_matrix, bias"),
        (["hidden_matrix", "a.*", "rest"], "hidden_matrix and a.* both claim `a.weight`"),
        (["*.weight"], "nothing claims `a.bias` \\(bias\\); add the key `rest`"),
    ):
        with pytest.raises(ValueError, match=expected.replace("*", "\\*")):
            claim_parameters(keys, roles)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["optimizer.param_groups={stem: {lr: 1}, rest: {}}"], "optimizer.param_groups.stem: no parameter matches"),
        (["optimizer.fallback.class_path=torch.optim.Adan"], "optimizer.fallback.class_path=torch.optim.Adan"),
        ([OTHER, "optimizer.fallback.hyperparameters.lrr=1"], "optimizer.fallback.hyperparameters.lrr=1"),
        ([OTHER, "optimizer.fallback.parameters=[stem]"], "optimizer.fallback.parameters.stem"),
    ],
)
def test_wrong_parts_are_named(options: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_run(["workload=gpt2", "optimizer=any", *arguments("torch.optim.SGD"), *options])


def test_a_submission_takes_no_parts() -> None:
    with pytest.raises(UserError, match=r"optimizer\.base: .* is a submission"):
        load_run(["workload=gpt2", "optimizer=muon", *SGD.split()])


def test_ranges_of_names_are_no_law_for_other_libraries() -> None:
    path = "tests.harness.foreign.Unusual"
    assert check_hyperparameters(path, {"lr": -1.0, "beta": 3.0, "growth_rate": float("inf")}) == []
    assert "must be above 0" in check_hyperparameters("torch.optim.AdamW", {"lr": -1.0})[0]
    assert check_hyperparameters(path, {"beta": float("nan")}) != []


class _Wrapped(torch.Tensor):
    """A tensor around two others, as quantised state is."""

    inner: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None


def test_the_tensors_within_a_tensor_are_counted() -> None:
    codes, scale = torch.zeros(8, dtype=torch.int8), torch.zeros(2)
    wrapped = torch.Tensor._make_wrapper_subclass(_Wrapped, (8,), dtype=torch.float32)  # type: ignore[attr-defined]
    wrapped.codes, wrapped.scale = codes, scale
    pieces = plain_tensors(wrapped)
    assert pieces[0] is codes and pieces[1] is scale


@pytest.mark.parametrize("options", ["", ADAMW, f"{OTHER} optimizer.fallback.parameters=[norm,bias,embedding]"])
def test_parameters_are_in_the_order_of_the_model(options: str) -> None:
    # Not in that of a set, which is another one in every process: a checkpoint has the parameters by their numbers.
    submission = conformance.make_subject("any", *arguments("torch.optim.SGD", options)).build().submission
    assert isinstance(submission, AnyOptimizer)
    numbers = {id(p): number for number, p in enumerate(submission.setup.parameters)}
    for optimizer in submission.optimizers:
        claimed = [numbers[id(p)] for group in optimizer.param_groups for p in group["params"]]
        assert claimed == sorted(claimed) and claimed


def test_an_unused_option_leaves_the_identity_as_it_was() -> None:
    optimizer = load_run(["workload=gpt2", "optimizer=adamw"]).identity()["optimizer"]
    assert not {"param_groups", "base", "fallback", "takes"} & optimizer.keys()
