"""From a command line to a `Run`.

Hydra composes the groups of configs/, and harness/config/validation.py checks the result. Composition lets unknown keys
through on purpose: the validation then reports all of them together, each with the key that was probably meant.
Importing this module does not import torch, so that --help is quick.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config import choices
from harness.config.choices import BASE_VARIANT, EXPERIMENT_GROUP, GROUPS, SCALE_GROUP, VARIANT_GROUP
from harness.config.confirmation import stage_ruleset
from harness.config.experiments import quote, read_experiment
from harness.config.schema import INTERNAL_KEYS, Ruleset, Run
from harness.errors import UserError, shorten

_DEEPEST = 20
"""Brackets within each other in one argument."""
_MOST_COMBINATIONS = 10_000
"""Of a sweep; each takes a part of a second to be checked."""


def expand_sweep(arguments: list[str]) -> list[list[str]]:
    """The command lines of a sweep: every combination of arguments such as `a=1,2`, in order. Raises UserError."""
    combinations: list[list[str]] = [[]]
    for override in _parse(arguments):
        # The text as it was typed, quotes included: load_run parses it again.
        lines = [str(override.input_line)]
        if override.is_sweep_override():
            lines = [f"{override.key_or_group}={value}" for value in _sweep_values(override)]
        if len(lines) * len(combinations) > _MOST_COMBINATIONS:
            raise UserError(f"{override.input_line}: more than {_MOST_COMBINATIONS} combinations; give fewer values")
        combinations = [[*combination, line] for combination in combinations for line in lines]
    return combinations


def load_run(arguments: list[str]) -> Run:
    """The validated configuration of a command line without sweeps; raises UserError with every problem in it.

    Of a study it is that of the first trial, at the recipe (see `harness.config.study_trials.configure_trial`).
    """
    overrides = _parse(arguments)
    _refuse_sweeps(overrides)
    overrides = _expand_experiment(overrides)
    if internal := [o.input_line for o in overrides if o.key_or_group in INTERNAL_KEYS]:
        raise UserError(f"{line}: made of the command itself, and cannot be set" for line in internal)
    # The choices are checked before Hydra composes them. Its own error names neither all of the wrong ones nor the
    # names that were probably meant.
    selected = {"scale": "mini", "variant": BASE_VARIANT}
    selected |= {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in (*GROUPS, "variant")}
    if messages := choices.check_choices(selected, {o.key_or_group for o in overrides}):
        raise UserError(messages)
    # Imported here, since it brings torch, which --help need not wait for.
    from harness.config import validation
    from harness.config.submission_files import read_submission_file

    shipped_values, values = map(read_submission_file, _compose(overrides))
    run = validation.validate_run(values)
    shipped = Run(**shipped_values)
    modified = _differing_keys(shipped.workload, run.workload)
    if validation.runs_on_incomplete_data(run):
        modified = (*modified, "data")
    rules = shipped_ruleset(run.ruleset.name)
    if rules is None or run.ruleset.budget_factor != rules.budget_factor:
        modified = (*modified, "ruleset.budget_factor")
    # After the comparison: the budget of the ruleset is no modification of the workload.
    workload = run.workload | {"max_steps": max(1, round(run.ruleset.budget_factor * run.spec.max_steps))}
    if selected["variant"] != BASE_VARIANT:
        workload["target_provenance"] = _provenance_of_variant(selected)
    run = _name_after_class(run, shipped)
    if run.label is not None and run.label != run.optimizer.name and run.label in choices.list_choices("optimizer"):
        raise UserError(
            f"label={run.label}: the name of another submission, whose records these would pass for; give another label"
        )
    return run.model_copy(
        update={
            "workload": workload,
            "modified": modified,
            "shipped": shipped.algorithm() == run.algorithm(),
            "overridden": tuple(sorted(override.key_or_group for override in overrides)),
        }
    )


def shipped_workload(name: str, scale: str, variant: str | None = None) -> dict[str, Any] | None:
    """The keys of a workload as configs/ and the user's own folders of configs have it; None where they have none by
    these names. Not validated, so that nothing of the workload is imported. Raises UserError where it cannot be
    composed.
    """
    # By the lists of names, since these can come from a stranger's record and hold path separators.
    if name not in choices.list_choices("workload") or f"{name}-{scale}" not in choices.list_choices(SCALE_GROUP):
        return None
    if variant is not None and variant not in choices.list_variants(name, scale):
        return None
    # Any submission, without which Hydra composes nothing.
    selected = {"workload": name, "scale": scale, "variant": variant or BASE_VARIANT, "optimizer": "any"}
    if messages := choices.check_choices(selected):
        raise UserError(messages)
    values = _as_dict(_compose_groups(_parse([f"{group}={choice}" for group, choice in selected.items()])))
    workload = values["workload"]
    assert isinstance(workload, dict)
    return workload


def shipped_ruleset(name: str) -> Ruleset | None:
    """A ruleset of configs/ or of the user's own folders of configs, or a stage of one; None where they have none by
    this name."""
    values = _read_choice("ruleset", name)
    return Ruleset(**values) if values is not None else stage_ruleset(name, shipped_ruleset)


def shipped_optimizer(name: str) -> dict[str, Any] | None:
    """The keys of an optimizer's YAML in configs/ or in the user's own folders of configs; None where there is none."""
    return _read_choice("optimizer", name)


def _read_choice(group: str, name: str) -> dict[str, Any] | None:
    """The content of a YAML over that of the ones that its `defaults` name; None where there is none."""
    if name not in choices.list_choices(group):
        return None
    content = OmegaConf.load(choices.config_files(group, name)[0])
    assert isinstance(content, DictConfig)
    bases = [base for base in content.pop("defaults", []) if isinstance(base, str) and base not in ("_self_", name)]
    merged = OmegaConf.merge(*(_read_choice(group, base) or {} for base in bases), content)
    values = OmegaConf.to_container(merged)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


# ---- overrides -----------------------------------------------------------------------------------------------------


def _parse(arguments: list[str]) -> list[Override]:
    """The overrides of a command line; raises UserError with a line for each argument that cannot be read."""
    # One argument at a time: Hydra's parse_overrides stops at the first one that it cannot read.
    parser, overrides, messages = OverridesParser.create(), [], []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        # Any exception: the parser lets through what Python says of a number of 5,000 digits, or of a deep nesting.
        except Exception:
            shown = shorten(argument)
            messages.append(f"{shown}: cannot be read; write key=value, and quote what has spaces or commas")
            continue
        if max(0, *itertools.accumulate((c in "[{") - (c in "]}") for c in argument)) > _DEEPEST:
            messages.append(f"{shorten(argument)}: nested more than {_DEEPEST} deep; write a flatter value")
            continue
        if override.is_delete():
            messages.append(f"{argument}: a key cannot be removed; set it to another value, for example to null")
        key = override.key_or_group
        if override.package is not None:
            messages.append(f"{argument}: there are no packages (`@`) here; write {key}=VALUE")
        if key.startswith(("hydra.", "hydra/")):
            messages.append(f"{argument}: Hydra's own settings are not used here; {_instead_of(key)}")
        overrides.append(override)
    if messages:
        raise UserError(messages)
    return overrides


def _instead_of(key: str) -> str:
    """What to use in place of a setting of Hydra's."""
    remedies = {
        "hydra.run": "records=FOLDER says where the record goes",
        "hydra.sweep": "records=FOLDER says where the records go",
        "hydra.job": "OMP_NUM_THREADS is set by threads=, and a label by label=NAME",
        "hydra/launcher": "executor=local, slurm or ray and executor.workers= say where trials run",
        "hydra/sweeper": "ruleset=external tunes in the submission's search space, and -m runs every combination",
        "hydra.sweeper": "ruleset=external tunes in the submission's search space, and -m runs every combination",
        "hydra.launcher": "executor=local, slurm or ray and executor.workers= say where trials run",
        "hydra.searchpath": "--config-dir FOLDER adds a folder of configs",
        "hydra.verbose": "-v logs what happens, -vv everything",
    }
    return next((text for prefix, text in remedies.items() if key.startswith(prefix)), "leave it out")


def _expand_experiment(overrides: list[Override]) -> list[Override]:
    """`+experiment=NAME` replaced by what the preset sets, over which the other arguments win. Raises UserError."""
    names = [o for o in overrides if o.key_or_group == EXPERIMENT_GROUP]
    others = [o for o in overrides if o.key_or_group != EXPERIMENT_GROUP]
    if not names:
        return overrides
    keys = {o.key_or_group for o in others}
    preset = [o for name in names for o in _parse(read_experiment(str(name.value()))) if o.key_or_group not in keys]
    _refuse_sweeps(preset)
    return [*preset, *others]


def _refuse_sweeps(overrides: list[Override]) -> None:
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: several values are a sweep; add -m to run them all, "
                f"or quote a text or list that has commas, like {override.key_or_group}='[a,b]'"
            )


def _iterate(override: Override) -> Iterator[Any]:
    """The values of a sweep, one after the other."""
    value = override.value()
    # Hydra shuffles and sorts a list of all values, so that a range is looked at first.
    if isinstance(value, RangeSweep):
        start, stop, step = float(value.start or 0), float(value.stop or 0), float(value.step)
        if not (step and math.isfinite(step) and abs((stop - start) / step) <= _MOST_COMBINATIONS):
            raise ValueError(f"more than {_MOST_COMBINATIONS} values")
    return override.sweep_string_iterator()


def _sweep_values(override: Override) -> list[str]:
    value = override.value()
    if not isinstance(value, Glob):
        try:
            # One more than are allowed: a range can be endless.
            return [str(value) for value in itertools.islice(_iterate(override), _MOST_COMBINATIONS + 1)]
        except (HydraException, ValueError, TypeError, ArithmeticError) as error:
            if not isinstance(error, HydraException):
                raise UserError(f"{override.input_line}: cannot be run in full ({error}); list the values") from None
            raise UserError(
                f"{override.input_line}: an interval cannot be run in full; give values, as in "
                f"{override.key_or_group}=0.1,0.2, or tune in the submission's search space with ruleset=external"
            ) from None
    # Hydra expands a glob only with a config loader, which a parser by itself does not have.
    groups = (*GROUPS, EXPERIMENT_GROUP)
    names = choices.list_choices(override.key_or_group) if override.key_or_group in groups else []
    matching: list[str] = value.filter(names)
    if not matching:
        hint = f"there are {', '.join(names)}" if names else "glob chooses files of configs/, such as optimizers"
        raise UserError(f"{override.input_line}: matches nothing; {hint}")
    return matching


# ---- composition ---------------------------------------------------------------------------------------------------

# Without `schedule`: another schedule makes the submission another one, with a hash in its label.
_SHIPPED_GROUPS = ("workload", "scale", "variant", "optimizer", "ruleset")
"""The groups that decide what a run is compared with, to see what in it is not as shipped."""


def _compose(overrides: list[Override]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the shipped configuration that the command chooses, and those with all of its overrides."""
    groups = [o for o in overrides if o.key_or_group in (*GROUPS, "variant")]
    shipped_groups = [o for o in groups if o.key_or_group in _SHIPPED_GROUPS]
    values = [o for o in overrides if o not in groups]
    # The ruleset decides how much tuning there is, and is no change of workload or submission.
    of_ruleset = [o for o in values if o.key_or_group.startswith("ruleset.")]
    composed = _compose_groups(shipped_groups)
    _apply(composed, of_ruleset)
    # A copy, since `_apply` changes `composed` in place.
    shipped = _as_dict(composed, overrides)
    if groups != shipped_groups:
        composed = _compose_groups(groups)
        _apply(composed, of_ruleset)
    _apply(composed, [o for o in values if o not in of_ruleset])
    return shipped, _as_dict(composed, overrides)


def _compose_groups(groups: list[Override]) -> DictConfig:
    """The configuration of these choices. A variant is composed over the workload at its scale."""
    lines = [
        f"{VARIANT_GROUP}@workload=${{workload}}-${{scale}}-{override.value()}"
        if override.key_or_group == "variant"
        else str(override.input_line)
        for override in groups
    ]
    # A program that uses Hydra itself may have initialized it, and Hydra refuses to be initialized twice.
    if folders := choices.user_config_dirs():
        lines.append(f"hydra.searchpath=[{','.join(quote(f'file://{folder}') for folder in folders)}]")
    # A copy, which the caller may change.
    return copy.deepcopy(_compose_lines(tuple(lines), _state_of_files([choices.CONFIG_DIR, *folders])))


# Plans and boards ask for the same choices again and again, and Hydra parses some fifteen files each time.
@functools.lru_cache(maxsize=256)
def _compose_lines(lines: tuple[str, ...], files: frozenset[tuple[str, int, int]]) -> DictConfig:
    """What Hydra composes. files: those that it may read, as `_state_of_files` has them, so that a change is seen."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(choices.CONFIG_DIR.resolve()), version_base="1.3"):
            return compose("config", list(lines))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"the configuration cannot be composed: {str(error).splitlines()[0]}") from error


def _state_of_files(folders: list[Path]) -> frozenset[tuple[str, int, int]]:
    """Path, size and time of modification of every YAML in the folders."""
    paths = [path for folder in folders for path in folder.resolve().rglob("*.yaml")]
    return frozenset((str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths)


def _apply(config: DictConfig, overrides: list[Override]) -> None:
    """Set the values of `overrides`, as Hydra does for `++key=value`: unknown keys are for the validation to report."""
    for override in overrides:
        key = override.key_or_group
        # A range has one kind, so a new one takes the place of the shipped one; other mappings are merged.
        merge = not key.startswith("optimizer.search_space")
        try:
            OmegaConf.update(config, key, override.value(), merge=merge, force_add=True)
        # OmegaConf lets built-in errors through, such as a ValueError where a list is given a word as its index.
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{override.input_line}: cannot be set ({str(error).splitlines()[0]})") from error


def _as_dict(config: DictConfig, overrides: Sequence[Override] = ()) -> dict[str, Any]:
    """The configuration with its interpolations resolved. overrides: of the command line, one of which an error names.
    Raises UserError."""
    try:
        # Missing values (???) pass here, since the validation says how to give them.
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        # With an interpolation of its own, or in the place of a mapping that the configuration refers to.
        blamed = [o.input_line for o in overrides if "${" in str(o.input_line)]
        blamed = blamed or [o.input_line for o in overrides if "." in o.key_or_group and o.key_or_group in reason]
        blamed = blamed or [f"{error.full_key or 'config'}: an interpolation"]
        raise UserError(f"{line}: does not resolve ({reason}); give the value itself" for line in blamed) from error
    except RecursionError as error:
        raise UserError("the configuration is nested too deeply, or refers to itself; give the values") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


# ---- what differs from the shipped configuration -------------------------------------------------------------------


def _differing_keys(shipped: dict[str, Any], actual: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Keys of the workload whose value is not the shipped one."""
    differing: list[str] = []
    for key in sorted(shipped.keys() | actual.keys()):
        before, after = shipped.get(key), actual.get(key)
        # It documents the target and moves no result.
        if key == "target_provenance":
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            differing += _differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differing.append(f"{prefix}{key}")
    return tuple(differing)


def _provenance_of_variant(selected: dict[str, str]) -> Any:
    """The variant's own provenance: Hydra merges mappings, and so mixes that of the base's target into it."""
    variant = OmegaConf.load(choices.target_file(selected["workload"], selected["scale"], selected["variant"]))
    return OmegaConf.to_container(variant).get("target_provenance")  # type: ignore[union-attr]


def _name_after_class(run: Run, shipped: Run) -> Run:
    """Where the command line gives a class or a file and no name (`optimizer=any`): the name of the class, or of the
    file's folder after that of the template."""
    optimizer = run.optimizer
    as_shipped = optimizer.class_path == shipped.optimizer.class_path and optimizer.path == shipped.optimizer.path
    if as_shipped or optimizer.name != shipped.optimizer.name:
        return run
    text = optimizer.class_path.rpartition(".")[2]
    if optimizer.path is not None:
        text = f"{optimizer.name}-{Path(optimizer.path).resolve().parent.name}"
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return run.model_copy(update={"optimizer": optimizer.model_copy(update={"name": name})})
