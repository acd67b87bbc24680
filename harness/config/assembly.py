"""From the keys of an optimizer's configuration to the optimizers that a submission is made of."""

from __future__ import annotations

from harness.config import hyperparameters
from harness.config.schema import Optimizer, OptimizerPart
from harness.interface.any_optimizer import Assembly, Part


def assemble(options: Optimizer, *, gradient_first: bool = False) -> Assembly:
    """The assembly that the keys say, of a torch.optim.Optimizer. gradient_first: as `Assembly.gradient_first`."""
    cls = hyperparameters.import_optimizer(options.class_path, "optimizer.class_path")
    return Assembly(
        main=Part(cls, hyperparameters.select_arguments(cls, options.effective_hyperparameters)),
        takes=options.takes,
        param_groups=options.param_groups,
        base=_part("optimizer.base", options.base),
        fallback=_part("optimizer.fallback", options.fallback),
        fallback_parameters=tuple(options.fallback.parameters) if options.fallback is not None else (),
        closure=options.closure,
        gradient_first=gradient_first,
    )


def _part(key: str, part: OptimizerPart | None) -> Part | None:
    if part is None:
        return None
    cls = hyperparameters.import_optimizer(part.class_path, f"{key}.class_path")
    return Part(cls, hyperparameters.select_arguments(cls, part.hyperparameters))
