"""What a submission declares to need, before anything is built."""

from __future__ import annotations

from typing import Any

from harness.config.hyperparameters import import_algorithm, import_wrapper, select_arguments
from harness.config.probe import examine
from harness.config.schema import Run
from harness.errors import UserError
from harness.interface.needs import Need
from harness.interface.optimizer_signature import requires_closure, takes_model
from harness.interface.submission import OptimizerSubmission, Submission, Wrapper


def declared_needs(run: Run) -> frozenset[Need]:
    """What the classes and the configuration declare; raises UserError where a class overrides a method whose need it
    does not declare."""
    options = run.optimizer
    needs = frozenset(options.needs)
    cls = import_algorithm(options.class_path)
    if not issubclass(cls, Submission):
        needs |= _needs_of_optimizer(cls, run)
    # A closure evaluates the step's batch again.
    if options.closure:
        needs |= {Need.RE_EVALUATE}
    # A torch.optim.Optimizer declares nothing and has neither method.
    for cls in (import_algorithm(options.class_path), *map(import_wrapper, options.wrappers)):
        if issubclass(cls, Submission):
            needs |= cls.needs
            _check_overrides(cls, needs)
    return needs


def _needs_of_optimizer(cls: type[Any], run: Run) -> frozenset[Need]:
    """What a torch.optim.Optimizer needs, by its signature and by the probe."""
    needs = set()
    if requires_closure(cls):
        needs.add(Need.RE_EVALUATE)
    if takes_model(cls) or run.optimizer.takes == "model":
        needs.add(Need.LAYERS)
    if examine(run).compiles:
        needs.add(Need.OWN_COMPILATION)
    return frozenset(needs)


def _check_overrides(cls: type[Submission], needs: frozenset[Need]) -> None:
    if cls.select not in (Submission.select, Wrapper.select) and Need.SELECTION not in needs:
        raise UserError(f"{cls.__name__} overrides select() without declaring it; add Need.SELECTION to its `needs`")
    # Compared as objects: a class that inherits the method has the function of its base.
    not_overridden = (base.evaluation_weights for base in (Submission, OptimizerSubmission, Wrapper))
    if cls.evaluation_weights not in not_overridden and Need.EVALUATION_WEIGHTS not in needs:
        raise UserError(
            f"{cls.__name__} overrides evaluation_weights() without declaring it; "
            "add Need.EVALUATION_WEIGHTS to its `needs`"
        )


def host_waits(run: Run) -> tuple[str, ...]:
    """When the host waits for the device, in words, of the algorithm and of each wrapper where it does
    (`harness.interface.Submission.host_waits`)."""
    options = run.optimizer
    classes = [import_algorithm(options.class_path), *map(import_wrapper, options.wrappers)]
    return tuple(
        filter(
            None,
            (
                cls.describe_host_waits(select_arguments(cls, options.effective_hyperparameters))
                if issubclass(cls, Submission)
                else getattr(cls, "host_waits", "")
                for cls in classes
            ),
        )
    )
