"""The configuration of a trial: its schema, and how the command line becomes one.

Hydra composes the groups of configs/; pydantic checks the result against the schema below. Composition lets unknown
keys through on purpose: the schema then reports all of them together, with the key that was probably meant.
Importing this module does not import torch, so that --help is quick.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.choices import BASE, CONFIG_DIR, GROUPS, VARIANT_GROUP, check, choices, target_file, unmeasured
from harness.needs import Need
from harness.problems import UserError, did_you_mean
from harness.schedules import Schedule

if TYPE_CHECKING:
    from harness.workload import Facts


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(_Strict):
    """A choice of a group that has only a name and a line for --help."""

    name: str
    description: str


class Ruleset(Named):
    """How much tuning a submission gets."""

    studies: int = Field(default=1, ge=1)
    """Independent repetitions of the tuning; their seeds count up from `seed`."""
    trials: int = Field(default=1, ge=1)
    """Trials of a study."""
    points: Literal["recipe", "search_space"] = "recipe"
    """Where the trials' hyperparameters come from."""
    budget_factor: float = Field(default=1.0, gt=0)
    """The budget in steps, as a multiple of the workload's."""
    retries: int = Field(default=0, ge=0)
    """How often a trial that crashed is run again, from its last checkpoint. Divergence is a result, no crash."""


class Executor(Named):
    """Where the trials of a command run. The environment of a trial is the same under all of them."""

    workers: int = Field(default=1, ge=1)
    """Trials at a time."""
    options: dict[str, Any] = {}
    """slurm: further parameters of submitit (partition, account, ...). ray: arguments of ray.init."""
    minutes: int = Field(default=0, ge=0)
    """slurm: time limit of a job; a job that runs into it is put in the queue again."""


class Tracker(_Strict):
    name: Literal["none", "wandb", "tensorboard"]
    description: str
    project: str = "pacemark"
    mode: Literal["online", "offline"] = "offline"
    """wandb only."""
    folder: Path | None = None
    """Where the tracker writes; default: inside the record."""


SCHEDULED = ("warmup_fraction", "horizon_fraction")
"""What a recipe says of the schedule."""


class Recipe(_Strict):
    """What runs when the user says nothing: sensible on the mini workloads, all of them alike."""

    hyperparameters: dict[str, Any] = {}
    schedule: str = "linear"
    """Shape of the schedule, which `schedule=` replaces."""
    warmup_fraction: float = 0.0
    horizon_fraction: float = 1.0
    clip_norm: float | None = Field(default=None, gt=0)


class Optimizer(_Strict):
    """A submission as configured."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    description: str
    paper: str | None = None
    class_path: str
    """A torch.optim.Optimizer or a harness.submission.Submission."""
    wrappers: list[str] = []
    """harness.submission.Wrapper classes around it, the innermost first; they share its hyperparameters' mapping."""
    paper_defaults: dict[str, Any] = {}
    """Defaults of the paper."""
    recipe: Recipe = Recipe()
    """Over the defaults."""
    hyperparameters: dict[str, Any] = {}
    """What the user sets, over the recipe and over the points of the search space."""
    search_space: dict[str, Any] | None = None
    """What a tuner may try, in the shape of the recipe (see harness.search_space)."""
    clip_norm: float | None = Field(default=None, gt=0)
    no_decay: list[str] = []
    """Parameter roles without weight decay, for example [norm, bias]."""
    needs: list[Need] = []
    """Needs beyond those the class declares."""
    closure: bool = False
    """Call optimizer.step(closure); the closure evaluates the same batch again (LBFGS and the like)."""

    @property
    def effective_hyperparameters(self) -> dict[str, Any]:
        return self.paper_defaults | self.recipe.hyperparameters | self.hyperparameters

    def at(self, point: dict[str, Any]) -> Optimizer:
        """With a point of the search space over the recipe."""
        recipe = self.recipe.model_dump() | point
        recipe["hyperparameters"] = self.recipe.hyperparameters | point.get("hyperparameters", {})
        return self.model_copy(update={"recipe": Recipe.model_construct(**recipe)})


_NO_INFLUENCE = {"records", "machine", "label", "overwrite", "data", "checkpoint_seconds", "debug", "tracker",
                 "executor", "modified", "shipped", "overridden"}  # fmt: skip


class Run(_Strict):
    """One trial, whole."""

    workload: dict[str, Any]
    scale: Named
    optimizer: Optimizer
    schedule: Schedule
    ruleset: Ruleset
    tracker: Tracker
    executor: Executor = Executor(name="local", description="")
    pruning: Literal["none", "exact", "futility"] = "none"
    """Whether a trial may be stopped that can no longer, or will hardly, be the best of its study."""
    seed: int = Field(ge=0, lt=2**31)
    """Study seed; the record goes to study_<seed>."""
    trial: int = Field(ge=1)
    """Number of the trial in its study."""
    device: str = Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["fp32", "tf32", "bf16"]
    """fp32: every product in full. tf32: matrix products and convolutions of a GPU in TF32. bf16: autocast."""
    compile: bool
    deterministic: bool
    threads: int = Field(ge=1)
    """CPU threads of the trial; the bits depend on it, so it is a fact and not the machine's core count."""
    run_to_end: bool
    records: Path = Path("results/records")
    machine: str = Field(default="auto", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the machine's folder of records; auto describes this machine."""
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    overwrite: bool
    data: str = "auto"
    checkpoint_seconds: float = Field(ge=0)
    """At an evaluation, write a checkpoint when the last one is older than this."""
    debug: bool

    # What the command line made of it; not keys of the config.
    modified: tuple[str, ...] = ()
    shipped: bool = True
    overridden: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        from harness.workload import Facts

        return Facts(**self.workload)

    def identity(self) -> dict[str, Any]:
        """Everything that can move the result, and nothing else."""
        everything = self.model_dump(mode="json", exclude=_NO_INFLUENCE)
        # The rest of the ruleset says which trials there are, and nothing about this one.
        everything["ruleset"] = self.ruleset.model_dump(include={"name", "description"})
        if self.pruning == "none":
            del everything["pruning"]
        everything["workload"].pop("target_provenance", None)
        everything["workload"].pop("description", None)
        everything["optimizer"] = self.algorithm()["optimizer"]
        return everything

    def algorithm(self) -> dict[str, Any]:
        """The submission alone, as it takes effect."""
        irrelevant = {"paper_defaults", "recipe", "description", "paper"}
        if self.ruleset.points == "recipe":
            irrelevant.add("search_space")
        optimizer = self.optimizer.model_dump(mode="json", exclude=irrelevant)
        optimizer["hyperparameters"] = self.optimizer.effective_hyperparameters
        if not self.optimizer.wrappers:
            del optimizer["wrappers"]
        return {"optimizer": optimizer, "schedule": self.schedule.model_dump(mode="json")}

    def at(self, point: dict[str, Any]) -> Run:
        """The trial at a point of the search space; what the command line sets stays as it is."""
        optimizer = self.optimizer.at(point)
        if "clip_norm" in point and "optimizer.clip_norm" not in self.overridden:
            optimizer = optimizer.model_copy(update={"clip_norm": point["clip_norm"]})
        taken = {key: point[key] for key in SCHEDULED if key in point and f"schedule.{key}" not in self.overridden}
        schedule = self.schedule.model_copy(update=taken)
        return self.model_copy(update={"optimizer": optimizer, "schedule": schedule, "label": self.submission_label})

    @property
    def submission_label(self) -> str:
        """The submission's folder name: plain as shipped, with a short hash of its configuration otherwise."""
        if self.label is not None:
            return self.label
        return self.optimizer.name if self.shipped else f"{self.optimizer.name}-{short_hash(self.algorithm())}"

    @property
    def scale_folder(self) -> str:
        """A changed workload has a folder of its own, so that no table mixes it with the real one."""
        if not self.modified:
            return self.scale.name
        return f"{self.scale.name}-modified-{short_hash(self.identity()['workload'])}"


def config_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def short_hash(value: Any) -> str:
    return config_hash(value)[:8]


def expand(arguments: list[str]) -> list[list[str]]:
    """The runs of a sweep: every combination of `a=1,2` style arguments, in order."""
    combinations: list[list[str]] = [[]]
    for override in _parse(arguments):
        values = _swept(override) if override.is_sweep_override() else None
        lines = [override.input_line] if values is None else [f"{override.key_or_group}={v}" for v in values]
        combinations = [[*combination, str(line)] for combination in combinations for line in lines]
    return combinations


def _swept(override: Override) -> list[str]:
    value = override.value()
    if not isinstance(value, Glob):
        return list(override.sweep_string_iterator())
    known = choices(override.key_or_group) if override.key_or_group in GROUPS else []
    found: list[str] = value.filter(known)
    if not found:
        there = f"there are {', '.join(known)}" if known else "glob chooses files of configs/, such as optimizers"
        raise UserError(f"{override.input_line}: matches nothing; {there}")
    return found


def load(arguments: list[str]) -> Run:
    """Compose and check; raises UserError with every problem found."""
    overrides = _parse(arguments)
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line}: several values are a sweep; add -m to run them all, "
                f"or quote a text or list that has commas, like {override.key_or_group}='[a,b]'"
            )
    given = {o.key_or_group: str(o.value()) for o in overrides if o.key_or_group in (*GROUPS, "variant")}
    chosen = {"scale": "mini", "variant": BASE} | given
    if problems := check(chosen):
        raise UserError(problems)
    composed = _compose([_as_override(override) for override in overrides])
    for override in overrides:
        if override.key_or_group.startswith("optimizer.search_space"):  # a range replaces the former, they do not mix
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=False, force_add=True)
    fixed = ("workload", "scale", "variant", "optimizer", "ruleset")
    groups = [o for o in overrides if o.key_or_group in fixed or o.key_or_group.startswith("ruleset.")]
    shipped = _compose([_as_override(override) for override in groups])
    run = _validated(_container(composed))
    plain = _validated(_container(shipped), complete=False)
    changed = _changes(plain["workload"], run.workload)
    if _lacks_data(run):
        changed = (*changed, "data")
    if run.optimizer.class_path != plain["class_path"] and run.optimizer.name == plain["name"]:
        name = re.sub(r"[^a-z0-9]+", "-", run.optimizer.class_path.rpartition(".")[2].lower()).strip("-")
        run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"name": name})})
    as_shipped = plain["algorithm"] == run.algorithm()
    # The ruleset's budget is no change of the workload.
    facts = run.workload | {"max_steps": max(1, round(run.ruleset.budget_factor * run.workload["max_steps"]))}
    if chosen["variant"] != BASE:
        # Hydra merges mappings, and so mixes the provenance of the base's target into that of the variant's.
        own = OmegaConf.load(target_file(chosen["workload"], chosen["scale"], chosen["variant"]))
        facts["target_provenance"] = OmegaConf.to_container(own).get("target_provenance")  # type: ignore[union-attr]
    keys = tuple(sorted(override.key_or_group for override in overrides))
    return run.model_copy(update={"modified": changed, "shipped": as_shipped, "workload": facts, "overridden": keys})


def _lacks_data(run: Run) -> bool:
    """Whether the trial would run on less than the published data; no table takes that."""
    from harness import hyperparameters

    cls = hyperparameters.import_class(run.workload["class_path"], "workload.class_path")
    return bool(cls.lacks(run.workload["data"], run.data))


def _parse(arguments: list[str]) -> list[Override]:
    parser, overrides, problems = OverridesParser.create(), [], []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            problems.append(f"{argument}: cannot be read; write key=value, and quote what has spaces or commas")
            continue
        if override.is_delete():
            problems.append(f"{argument}: a key cannot be removed; set it to another value, for example to null")
        overrides.append(override)
    if problems:
        raise UserError(problems)
    return overrides


def _as_override(override: Override) -> str:
    """Groups as they are; values so that unknown keys get through to the schema, which reports all of them."""
    line = str(override.input_line)
    if override.key_or_group == "variant":
        return f"{VARIANT_GROUP}@workload=${{workload}}-${{scale}}-{override.value()}"
    return line if override.key_or_group in GROUPS else "++" + line.lstrip("+")


def _compose(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"the configuration cannot be composed: {str(error).splitlines()[0]}") from error


def _container(config: DictConfig) -> dict[str, Any]:
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _validated(values: dict[str, Any], complete: bool = True) -> Any:
    """The Run, all problems at once. complete=False: only what comparing with the shipped configuration needs."""
    from harness import hyperparameters, roles, workload

    if not complete:
        names = {"class_path": values["optimizer"]["class_path"], "name": values["optimizer"]["name"]}
        return {"workload": values["workload"], "algorithm": Run(**values).algorithm(), **names}
    problems: list[str] = []
    run: Run | None = None
    try:
        run = Run(**values)
    except ValidationError as error:
        problems += _messages(error, Run)
    facts = values["workload"]
    if facts.get("target") in (None, "???"):
        problems.append(unmeasured(facts.get("name"), values["scale"].get("name"), facts.get("variant", BASE)))
        facts = facts | {"target": 0.0}  # the rest is checked all the same
    try:
        workload.Facts(**facts)
    except ValidationError as error:
        problems += _messages(error, workload.Facts, "workload.")
    try:
        cls = hyperparameters.import_class(str(facts.get("class_path")), "workload.class_path")
        for part, schema in (("model", cls.Model), ("data", cls.Data)):
            try:
                schema(**facts.get(part, {}))
            except ValidationError as error:
                problems += _messages(error, schema, f"workload.{part}.")
    except UserError as error:
        problems += error.problems
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("class_path"), str):
        if optimizer["class_path"] == "???":
            raise UserError([*problems, "optimizer.class_path is not given; add optimizer.class_path=package.Class"])
        try:
            algorithm = Optimizer(**optimizer)
            own = hyperparameters.check(algorithm.class_path, algorithm.effective_hyperparameters, algorithm.wrappers)
            problems += own
            problems += [
                f"optimizer.no_decay={role}: no such role; {did_you_mean(role, roles.Role)}"
                for role in algorithm.no_decay
                if role not in set(roles.Role)
            ]
            problems += _search_space_problems(algorithm, run, reported=own)
        except ValidationError:
            pass  # reported above
    if problems:
        raise UserError(problems)
    assert run is not None
    return run


def _search_space_problems(algorithm: Optimizer, run: Run | None, reported: list[str]) -> list[str]:
    """What is wrong with the search space, its ends and choices included, and with what the ruleset asks of it.

    reported: problems of the hyperparameters that the user sets, which are those of every point too.
    """
    from harness import hyperparameters, search_space

    if algorithm.search_space is None:
        if run is not None and run.ruleset.points == "search_space":
            return [f"ruleset={run.ruleset.name} draws from a search space, and optimizer={algorithm.name} has none; "
                    "add `search_space:` to its YAML, or take ruleset=quick"]  # fmt: skip
        return []
    try:
        space = search_space.parse(algorithm.search_space)
        if run is not None and run.ruleset.points == "search_space" and run.ruleset.trials > len(space.points) > 0:
            space.point(algorithm.name, 0, run.ruleset.trials)
    except UserError as error:
        return error.problems
    problems: list[str] = []
    for point in search_space.corners(space):
        try:
            tried = algorithm.at(point)
            Recipe(**tried.recipe.model_dump())
            found = hyperparameters.check(algorithm.class_path, tried.effective_hyperparameters, algorithm.wrappers)
        except ValidationError as error:
            found = _messages(error, Recipe)
        if run is not None and not found:
            try:
                Schedule(**run.schedule.model_dump() | {key: point[key] for key in SCHEDULED if key in point})
            except ValidationError as error:
                found = _messages(error, Schedule, "schedule.")
        problems += [f"optimizer.search_space: {line}" for line in found if line not in reported]
    return list(dict.fromkeys(problems))


def _messages(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    messages = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"]]
        key = prefix + ".".join(location)
        if detail["type"] == "extra_forbidden":
            owner = _field_owner(model, location[:-1])
            known = owner.model_fields if owner is not None else ()
            messages.append(f"{key}={detail['input']}: unknown key; {did_you_mean(location[-1], known)}")
        elif detail["type"] == "missing":
            messages.append(f"{key} is missing; add {key}=VALUE")
        elif detail["type"] == "value_error":
            messages.append(f"{key.rstrip('.') or 'config'}: {detail['ctx']['error']}")
        else:
            text = detail["msg"].replace("Input should", "must").replace("String should", "must")
            messages.append(f"{key}={detail['input']}: {text}")
    return messages


def _field_owner(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        field = model.model_fields.get(part)
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def _changes(shipped: dict[str, Any], actual: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Keys of the workload whose value is not the shipped one."""
    changed: list[str] = []
    for key in sorted(shipped.keys() | actual.keys()):
        before, after = shipped.get(key), actual.get(key)
        if key == "target_provenance":
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return tuple(changed)
