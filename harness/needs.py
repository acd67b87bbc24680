"""What a submission may ask of the harness beyond one gradient per step.

A submission declares its needs in a class attribute, before any model exists, so that the harness can arrange them and
write them into the record; asking for what was not declared raises `UndeclaredNeed`.
"""

from __future__ import annotations

from enum import StrEnum


class Need(StrEnum):
    LOSS = "loss"
    """The value of the loss without a gradient: line searches, zeroth-order methods."""
    RE_EVALUATE = "re_evaluate"
    """More than one forward on the step's batch, with the same randomness: SAM, MARS-exact, closures."""
    SAMPLED_LABELS = "sampled_labels"
    """Losses and gradients on labels drawn from the model's own predictions: Gauss-Newton-Bartlett, true Fisher."""
    SECOND_DERIVATIVES = "second_derivatives"
    """Hessian-vector products, gradients with create_graph. Arranged: attention by plain matrix products (fused
    attention has no second derivative) and no compilation of the model."""
    MICRO_BATCH_GRADIENTS = "micro_batch_gradients"
    """The gradient of every micro-batch of the step by itself, of finer ones than the workload's if asked: gradient
    noise, signal-to-noise ratios."""
    LAYERS = "layers"
    """The model itself, for hooks on its layers. Arranged: no compilation of the model, in which a hook set later
    would silently never fire."""
    PARAMETER_ROLES = "parameter_roles"
    """What each parameter is for (harness.roles)."""
    EVALUATION_WEIGHTS = "evaluation_weights"
    """Evaluate other weights than the trained ones: averages, Schedule-Free, Lookahead."""
    SELECTION = "selection"
    """Choose the batch size or the examples."""
    TOTAL_STEPS = "total_steps"
    """The length of the budget, beyond what the schedule makes of it."""
    COMMUNICATION = "communication"
    """Exchange gradients between the ranks itself: compression, local steps. Every gradient is then the mean over this
    rank's examples alone, and `Setup.ranks` says who the others are."""
    OWN_COMPILATION = "own_compilation"
    """Compile its own code with torch.compile. Arranged: an empty private compiler cache, so that every trial pays
    for it once; its seconds get their own column."""


class UndeclaredNeed(Exception):
    """A submission asked for a capability that it did not declare."""

    def __init__(self, asked: str, need: Need, submission: str) -> None:
        super().__init__(
            f"{submission} asked for {asked} without declaring it; add Need.{need.name} to its `needs` "
            f"(or `optimizer.needs=[{need.value}]` in its YAML)"
        )
