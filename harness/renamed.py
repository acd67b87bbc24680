"""Names of an earlier version: code that uses one gets an error with the new name.

Modules moved into packages, and a few names of the interface changed. Nothing here keeps the former names working.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MODULES = {
    "problems": "errors",
    **dict.fromkeys(("needs", "roles", "schedules", "ranks", "workload", "step", "submission"), "interface"),
    **dict.fromkeys(("choices", "hyperparameters", "search_space"), "config"),
    "lease": "records.lease",
    "evaluations": "records.evaluations",
    "record": "trial.record",
    "clock": "trial.clock",
    "energy": "trial.energy",
    "environment": "trial.environment",
    "machine": "trial.hardware",
    "recalibration": "trial.batch_norm",
    "refined_schedule": "trial.refined_schedule",
    "conformance": "trial.conformance",
    "tracker": "trial.trackers",
    "training": "trial.training",
    "ledger": "study.ledger",
    "worker": "study.worker",
    "process": "study.trial_process",
    "executors": "study.executors",
    "progress": "study.progress",
    "status": "study.status",
    "target_setting": "study.target_procedure",
    "pruning": "study.pruning_rules",
    "pruner": "study.pruning_online",
    "replay": "study.pruning_replay",
    "reading": "scoring.load_records",
    "consolidated": "scoring.trials_table",
    "targets": "scoring.targets",
    "median_models": "scoring.interval_models",
    "uncertainty": "scoring.uncertainty",
    "tunability": "scoring.tunability",
    "timing": "scoring.timings",
    "leaderboard": "scoring.leaderboard",
    "publish": "board.files",
    "page": "board.page",
    "generated": "board.generated_docs",
    "recipes": "board.recipe_table",
    "algorithms": "board.algorithm_table",
}
"""Former modules of harness/ and where their contents are now."""
NAMES = {
    "harness.config": {
        "load": "compose.load_run",
        "expand": "compose.expand_sweep",
        **{
            name: f"schema.{name}"
            for name in ("Executor", "Named", "Optimizer", "Recipe", "Ruleset", "Run", "Tracker")
        },
    },
    "harness.study": {
        "trials_of": "list_trials of harness.config.study_trials",
        "trial_of": "configure_trial of harness.config.study_trials",
        "TARGET_SEEDS": "TARGET_SEEDS of harness.config.study_trials",
    },
    "harness.trial": {name: f"trial.{name}" for name in ("Observer", "load_workload", "run_trial")},
    "harness.scoring": {
        name: f"benchmark_score.{name}"
        for name in (
            "TAU_MAX", "algoperf_scores", "benchmark_scores", "disqualified", "performance_profile",
            "performance_ratios", "qualified", "speedups", "study_times", "times_to_target", "unscored_held_out",
        )
    },
    "submissions.rule": {"Slice": "Bucket", "wide": "upcast"},
}  # fmt: skip
"""Former names in modules that are still there, or whose name is now a package's."""


class _MovedModules:
    """An import hook of last resort: it is asked only for modules that nobody else finds."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError for a module that moved; None for any other, as for a finder that finds nothing."""
        package, _, name = fullname.rpartition(".")
        if package == "harness" and name in MODULES:
            raise ModuleNotFoundError(f"harness.{name} is now harness.{MODULES[name]}", name=fullname)
        return None


def install_import_hook() -> None:
    """Let the import of a moved module fail with a message that names the new one."""
    if _MovedModules not in sys.meta_path:
        # Appended, so that every real module is found before this hook is asked.
        sys.meta_path.append(_MovedModules)


def arguments(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: keyword arguments `old="new"` that are given under their old name raise a TypeError."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in renamed.items():
                if old in kwargs:
                    raise TypeError(f"{function.__qualname__}({old}=...) is now {function.__qualname__}({new}=...)")
            return function(*args, **kwargs)

        return wrapper

    return decorate


def names(module: str) -> Callable[[str], object]:
    """A `__getattr__` for `module`, in which the import of a former name fails with an error that has the new one."""
    new_names = NAMES[module]

    def getattr_of_module(name: str) -> object:
        if name in new_names:
            new = new_names[name]
            raise ImportError(f"{module}.{name} is now {new if ' of ' in new else f'{module}.{new}'}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_of_module


def refuse_overrides(cls: type[object], renamed: Mapping[str, str]) -> None:
    """TypeError if the class defines a method under a name that is no longer called, which would do nothing."""
    for old, new in renamed.items():
        if old in vars(cls):
            raise TypeError(f"{cls.__name__}.{old} is never called: the method is now named {new}")
