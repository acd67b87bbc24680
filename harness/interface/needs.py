"""Capabilities that a submission may ask of the harness beyond one gradient per step.

A submission declares its needs in a class attribute, before any model exists. The harness arranges them and writes them
into the record. Asking for a capability that was not declared raises `UndeclaredNeed`.
"""

from __future__ import annotations

from enum import StrEnum

from harness.errors import UndeclaredNeed


class Need(StrEnum):
    """A capability. Below each: which algorithms use it, and what the harness arranges for it."""

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
    """The gradient of each micro-batch by itself, and of smaller ones than the workload's on request: gradient noise,
    signal-to-noise ratios."""
    LAYERS = "layers"
    """The model itself, for hooks on its layers. Arranged: no compilation of the model, in which a hook set later
    would silently never fire."""
    PARAMETER_ROLES = "parameter_roles"
    """What each parameter is for (`harness.interface.roles`)."""
    EVALUATION_WEIGHTS = "evaluation_weights"
    """Evaluate other weights than the trained ones: averages, Schedule-Free, Lookahead."""
    SELECTION = "selection"
    """Choose the batch size or the examples."""
    TOTAL_STEPS = "total_steps"
    """The length of the budget, for more than the schedule."""
    COMMUNICATION = "communication"
    """Exchange gradients between the ranks itself: compression, local steps. Every gradient is then the mean over this
    rank's examples alone, and `Setup.ranks` gives access to the others."""
    OWN_PASSES = "own_passes"
    """Draw its batches and run the passes itself, in steps of its own length: submissions written for another
    benchmark's interface. Arranged: each step is a `harness.interface.own_step.OwnStep`, and no compilation of the
    model."""
    OWN_COMPILATION = "own_compilation"
    """Compile its own code with torch.compile. Arranged: an empty private compiler cache, so that every trial pays
    for it once; its seconds get their own column."""


def require(need: Need, declared: frozenset[Need], asked: str, submission: str) -> None:
    """Raise UndeclaredNeed unless `need` is in `declared`.

    asked: the capability in words, for the message. submission: its name, for the message.
    """
    if need not in declared:
        raise UndeclaredNeed(asked, (need.name, need.value), submission)
