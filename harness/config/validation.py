"""What is wrong with a composed configuration: every problem, each with its key, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from harness.config import hyperparameters, probe, search_space
from harness.config.choices import BASE_VARIANT, target_not_measured
from harness.config.schema import FOREIGN_KEYS, INTERNAL_KEYS, PATTERN_MEANINGS, SCHEDULE_KEYS, Optimizer, Recipe, Run
from harness.config.submission_files import file_problems
from harness.errors import UserError, did_you_mean, shorten
from harness.interface.roles import Role
from harness.interface.schedules import Schedule
from harness.interface.submission import Submission
from harness.interface.workload import Workload, WorkloadSpec

Model = TypeVar("Model", bound=BaseModel)


def validate_run(values: dict[str, Any]) -> Run:
    """The configuration that Hydra composed, as a `Run`; raises UserError with all that is wrong with it."""
    messages: list[str] = []
    # Each check adds to the messages and none stops the next, so that a user sees all problems at once.
    run = validate(Run, values, messages)
    _check_workload(values, messages)
    _check_submission(values.get("optimizer"), run, messages)
    _check_numbers(values, messages)
    if run is not None and not messages:
        _check_sizes(run, messages)
    if messages:
        raise UserError(messages)
    assert run is not None
    return run


_LARGEST_INTEGER = 10**12
"""Above it a number is a slip of the finger: no count of steps, examples or features comes near."""
_LARGEST = {"threads": 4096, "executor.workers": 10_000, "executor.minutes": 10**7, "ruleset.budget_factor": 10**6}
_MOST_TRIALS = 100_000
"""Of one command."""
_LONGEST_NAME = 255
"""Of a file, in every file system that matters."""


def _check_numbers(values: dict[str, Any], messages: list[str]) -> None:
    """Add a line for each number that is not finite or absurdly large. The submission checks its hyperparameters."""
    for key, number in _numbers(values):
        if key.startswith(("optimizer.hyperparameters.", "optimizer.search_space.", "executor.options.")):
            continue
        largest = _LARGEST.get(key, _LARGEST_INTEGER)
        if not math.isfinite(number):
            line = f"{key}={number}: must be finite; give a number"
        elif abs(number) > largest and (isinstance(number, int) or key in _LARGEST):
            line = f"{key}={number}: must be at most {largest}; lower it"
        else:
            continue
        # Where the schema has refused the same value already.
        if not any(message.startswith(f"{key}=") for message in messages):
            messages.append(line)


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in a configuration, with its key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from _numbers(value, f"{key}[{i}]")
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield key, values


def _check_sizes(run: Run, messages: list[str]) -> None:
    """Add a line for each combination of keys that asks for too much, and for names that no file can have."""
    rules, steps = run.ruleset, run.spec.max_steps
    if rules.studies * rules.trials > _MOST_TRIALS:
        messages.append(
            f"ruleset.studies={rules.studies}, ruleset.trials={rules.trials}: a command has at most {_MOST_TRIALS} "
            "trials; lower one"
        )
    if run.seed + rules.studies > 2**31:
        messages.append(f"seed={run.seed}: the seeds of {rules.studies} studies must lie below 2**31; lower it")
    if rules.budget_factor * steps > _LARGEST_INTEGER:
        messages.append(
            f"ruleset.budget_factor={rules.budget_factor}: {steps} steps times it are more than {_LARGEST_INTEGER}; "
            "lower it"
        )
    texts = {"label": run.label, "machine": run.machine, "optimizer.name": run.optimizer.name}
    texts |= {"workload.name": run.spec.name, "records": run.records.name, "scale.name": run.scale.name}
    messages += [
        f"{key}={shorten(text)}: {len(text)} characters; a name of a folder has at most {_LONGEST_NAME - 55}"
        for key, text in texts.items()
        # With room for what is put before and after it.
        if text is not None and len(text.encode()) > _LONGEST_NAME - 55
    ]


def runs_on_incomplete_data(run: Run) -> bool:
    """Whether the trial would run on less than the published data; no table takes that."""
    cls = hyperparameters.import_class(run.workload["class_path"], "workload.class_path")
    return bool(cls.missing_data(run.workload["data"], run.data))


def validate(schema: type[Model], values: dict[str, Any], messages: list[str], prefix: str = "") -> Model | None:
    """`values` as `schema`; None if they do not fit, with a line for each problem added to `messages`."""
    # A value of the command line can take the place of the whole mapping.
    if not isinstance(values, dict):
        key = prefix.rstrip(".")
        messages.append(f"{key}={shorten(values)}: must be a mapping; set a key below it, as in {key}.KEY=VALUE")
        return None
    try:
        return schema(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        messages += _lines(error, schema, prefix, values)
        return None


def _check_workload(values: dict[str, Any], messages: list[str]) -> None:
    """Add a line for each problem of the workload, its model and its data; a target that is not measured is one."""
    workload = values["workload"]
    if not isinstance(workload, dict) or not isinstance(values["scale"], dict):
        return  # the schema of the run has said so
    if workload.get("target") in (None, "???"):
        scale = values["scale"].get("name")
        variant = workload.get("variant", BASE_VARIANT)
        messages.append(target_not_measured(str(workload.get("name")), str(scale), variant))
        # Any number, so that the rest is checked all the same.
        workload = workload | {"target": 0.0}
    validate(WorkloadSpec, workload, messages, "workload.")
    if not isinstance(workload.get("class_path"), str):
        return  # likewise
    try:
        cls = hyperparameters.import_class(workload["class_path"], "workload.class_path")
    except UserError as error:
        messages += error.messages
        return
    if not (issubclass(cls, Workload) and hasattr(cls, "Model") and hasattr(cls, "Data")):
        messages.append(
            f"workload.class_path={workload['class_path']}: this is no workload; give a class that inherits from "
            "harness.interface.Workload and has the schemas Model and Data"
        )
        return
    validate(cls.Model, workload.get("model", {}), messages, "workload.model.")
    validate(cls.Data, workload.get("data", {}), messages, "workload.data.")


def _check_submission(values: Any, run: Run | None, messages: list[str]) -> None:
    """Add a line for each problem of the submission. run: None where the configuration does not fit its schema."""
    if not isinstance(values, dict) or not isinstance(values.get("class_path"), str):
        return  # the schema of the run has said so
    if values["class_path"] == "???":
        messages.append("optimizer.class_path is not given; add optimizer.class_path=package.Class")
        return
    try:
        optimizer = Optimizer(**values)
    except ValidationError:
        return  # likewise
    own_messages = hyperparameters.check_hyperparameters(
        optimizer.class_path, optimizer.effective_hyperparameters, optimizer.wrappers
    )
    for key, part in (("optimizer.base", optimizer.base), ("optimizer.fallback", optimizer.fallback)):
        if part is not None:
            own_messages += hyperparameters.check_part(key, part.class_path, part.hyperparameters)
    messages += own_messages
    messages += [
        f"optimizer.no_decay={role}: no such role; {did_you_mean(role, Role)}"
        for role in optimizer.no_decay
        if role not in set(Role)
    ]
    messages += _search_space_problems(optimizer, run, own_messages)
    messages += _foreign_problems(optimizer, run, complete=not messages)


def _foreign_problems(optimizer: Optimizer, run: Run | None, *, complete: bool) -> list[str]:
    """What keeps a torch.optim.Optimizer from being trained. complete: there is nothing else to complain of, so that it
    can be tried."""
    try:
        cls = hyperparameters.import_algorithm(optimizer.class_path)
    except UserError:
        return []  # the check of the hyperparameters has said so
    # A file is not run where a hyperparameter is refused already.
    if messages := file_problems(optimizer, cls) if complete or optimizer.path is None else []:
        return messages
    if issubclass(cls, Submission):
        return [
            f"optimizer.{key}: {cls.__name__} is a submission, which builds its optimizers itself; leave it out"
            for key in FOREIGN_KEYS
            if getattr(optimizer, key)
        ]
    if messages := probe.base_problem(cls, optimizer):
        return messages
    # What only a GPU can do is tried there, by the trial itself.
    if not complete or run is None or (run.device != "cpu" and torch.cuda.is_available()):
        return []
    return list(probe.examine(run).problems)


def _search_space_problems(optimizer: Optimizer, run: Run | None, reported: list[str]) -> list[str]:
    """What is wrong with the search space, its ends and choices included, and with what the ruleset asks of it.

    reported: problems of the hyperparameters that the user sets, which are those of every point too.
    """
    drawn_from = run is not None and run.ruleset.points == "search_space"
    if optimizer.search_space is None:
        if run is None or not drawn_from:
            return []
        return [
            f"ruleset={run.ruleset.name} draws from a search space, and optimizer={optimizer.name} has none; "
            "add `search_space:` to its YAML, or take ruleset=quick"
        ]
    try:
        space = search_space.parse_search_space(optimizer.search_space)
        # The last trial's point is asked for only for its UserError, which says how many points the list has.
        if run is not None and drawn_from:
            trials = max(run.ruleset.trials, run.ruleset.tuning.trials if run.ruleset.tuning is not None else 1)
            if trials > len(space.points) > 0:
                space.point(optimizer.name, 0, trials)
    except UserError as error:
        return error.messages
    messages: list[str] = []
    for point in space.corners():
        lines = [line for line in _point_problems(optimizer, run, point) if line not in reported]
        messages += [f"optimizer.search_space: {line}" for line in lines]
    # Corners share values, so the same problem comes up at several of them.
    return list(dict.fromkeys(messages))


def _point_problems(optimizer: Optimizer, run: Run | None, point: dict[str, Any]) -> list[str]:
    messages: list[str] = []
    at_point = optimizer.with_point(point)
    # `with_point` does not validate the recipe that it makes.
    if validate(Recipe, at_point.recipe.model_dump(), messages) is not None:
        messages += hyperparameters.check_hyperparameters(
            optimizer.class_path, at_point.effective_hyperparameters, optimizer.wrappers
        )
    if run is not None and not messages:
        drawn = {key: point[key] for key in SCHEDULE_KEYS if key in point}
        validate(Schedule, run.schedule.model_dump() | drawn, messages, "schedule.")
    return messages


# ---- messages ------------------------------------------------------------------------------------------------------


def _lines(error: ValidationError, schema: type[BaseModel], prefix: str, values: dict[str, Any]) -> list[str]:
    """A line for each problem that pydantic found, with key, value and remedy. prefix: what the keys begin with.
    values: the whole that does not fit `schema`."""
    lines = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        key = prefix + ".".join(location)
        if detail["type"] == "extra_forbidden":
            owner = _owner_of_field(schema, location[:-1])
            known = [name for name in owner.model_fields if name not in INTERNAL_KEYS] if owner is not None else []
            elsewhere = _key_elsewhere(values, location[-1])
            remedy = f"did you mean `{elsewhere}`?" if elsewhere else did_you_mean(location[-1], known)
            lines.append(f"{key}={shorten(detail['input'])}: unknown key; {remedy}")
        elif detail["type"] == "missing":
            lines.append(f"{key} is missing; add {key}=VALUE")
        # The exception itself, since pydantic's text begins with `Value error, `. An error of a whole model has no key.
        elif detail["type"] == "value_error":
            lines.append(f"{key.rstrip('.') or 'config'}: {detail['ctx']['error']}")
        elif detail["type"] == "string_pattern_mismatch" and detail["ctx"]["pattern"] in PATTERN_MEANINGS:
            lines.append(f"{key}={shorten(detail['input'])}: {PATTERN_MEANINGS[detail['ctx']['pattern']]}")
        else:
            text = detail["msg"].replace("Input should", "must").replace("String should", "must")
            lines.append(f"{key}={shorten(detail['input'])}: {text}")
    return lines


def _key_elsewhere(values: dict[str, Any], name: str) -> str | None:
    """The whole key of what is called `name` in a configuration: a hyperparameter, or a key of one of its sections."""
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict):
        for settings in (optimizer.get("paper_defaults"), (optimizer.get("recipe") or {}).get("hyperparameters")):
            if isinstance(settings, dict) and name in settings:
                return f"optimizer.hyperparameters.{name}"
    for section in ("optimizer", "schedule", "workload", "ruleset", "executor", "tracker"):
        content = values.get(section)
        # The misspelt key itself is among the values, where the user has put it.
        if isinstance(content, dict) and name in content and (section != "optimizer" or name in Optimizer.model_fields):
            return f"{section}.{name}"
    return None


def _owner_of_field(schema: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The nested model at `location`, whose fields are what a misspelt key could have meant."""
    for part in location:
        field = schema.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        schema = annotation
    return schema
