"""The schema of a trial's configuration, and what identifies a trial.

How a command line becomes a `Run`: harness/config/compose.py. Importing this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness.hashing import short_hash
from harness.interface.needs import Need
from harness.interface.schedules import Schedule

if TYPE_CHECKING:
    from harness.interface.workload import WorkloadSpec


class _Strict(BaseModel):
    """Refuses keys that it does not know, so that a misspelt one is an error and not a value without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named(_Strict):
    """A choice of a config group that has only a name and a line for --help."""

    name: str
    description: str


Judge = Literal["process", "replay", "none"]


class Tuning(_Strict):
    """What a ruleset does before its own trials: tune, and try the best points again on other seeds."""

    ruleset: str | None = None
    """Of the tuning's trials; null: one of its own, named after this ruleset."""
    studies: int = Field(ge=1)
    trials: int = Field(ge=1)
    """Points of each study."""
    seed: int = Field(ge=0)
    """Of the first study."""
    finalists: int = Field(ge=1)
    """Points that are tried again, equally many of each study."""
    finalist_studies: int = Field(ge=1)
    """Other seeds that each of them is tried on."""


class Ruleset(Named):
    """How much tuning a submission gets."""

    studies: int = Field(default=1, ge=1)
    """Independent repetitions of the tuning; their seeds count up from `seed`."""
    trials: int = Field(default=1, ge=1)
    """Trials of a study."""
    points: Literal["recipe", "search_space"] = "recipe"
    """Where the trials' hyperparameters come from."""
    tuning: Tuning | None = None
    """Stages before this one (harness/config/confirmation.py): all trials of a submission on a workload are at the one
    point that came out of them; null: none."""
    kept: int = Field(default=1, ge=1)
    """Best trials of a study that are looked at, which pruning spares."""
    budget_factor: float = Field(default=1.0, gt=0)
    """The budget in steps, as a multiple of the workload's."""
    judge: Judge = "none"
    """Who evaluates, where the command does not say it; see `Run.judge`."""
    retries: int = Field(default=0, ge=0)
    """How often a trial that crashed is run again, from its last checkpoint. Divergence is a result, no crash."""


class Executor(Named):
    """Where the trials of a command run. The environment of a trial is the same under all of them."""

    workers: int = Field(default=1, ge=1)
    """Trials that run at the same time."""
    options: dict[str, Any] = {}
    """slurm: further parameters of submitit (partition, account, ...). ray: arguments of ray.init."""
    minutes: int = Field(default=0, ge=0)
    """slurm: time limit of a job; a job that runs into it is requeued."""
    stall_minutes: float = Field(default=60, gt=0)
    """A trial's process that shows no progress for so long hangs: it is stopped, and the trial is tried again from its
    checkpoint, as after a crash. A step, a batch of an evaluation and a phase, such as compilation, are progress."""


class Tracker(_Strict):
    """Where a trial's rows are mirrored."""

    name: Literal["none", "wandb", "tensorboard"]
    description: str
    project: str = "pacemark"
    mode: Literal["online", "offline"] = "offline"
    """wandb only."""
    folder: Path | None = None
    """Where the tracker writes; default: inside the record."""


SCHEDULE_KEYS = ("warmup_fraction", "horizon_fraction")
"""The keys of a recipe, and of a point, that set the schedule."""


class Recipe(_Strict):
    """What runs when the user sets nothing: values that are sensible on all mini workloads."""

    hyperparameters: dict[str, Any] = {}
    schedule: str = "linear"
    """Shape of the schedule, which `schedule=` replaces."""
    warmup_fraction: float = 0.0
    horizon_fraction: float = 1.0
    clip_norm: float | None = Field(default=None, gt=0)


class OptimizerPart(_Strict):
    """A torch.optim.Optimizer that is a part of another submission."""

    class_path: str
    hyperparameters: dict[str, Any] = {}


class FallbackOptimizer(OptimizerPart):
    """The optimizer of some of the parameters."""

    parameters: list[str] = []
    """Roles and patterns of names; empty for all but hidden matrices."""


FOREIGN_KEYS = ("takes", "param_groups", "base", "fallback")
"""How a torch.optim.Optimizer of any library is built; identities leave unused ones out."""


FILE_KEYS = ("path", "tuning_search_space", "point", "batch_size", "file_sha256")
"""What belongs to a file of the user's (harness.interface.submission.FileSubmission)."""
_NOT_OF_FILE = ("path", "tuning_search_space", "point")
"""Those of them that say where something comes from, and nothing about the algorithm."""


class Optimizer(_Strict):
    """A submission as configured."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    description: str
    paper: str | None = None
    class_path: str
    """A torch.optim.Optimizer or a harness.interface.Submission."""
    wrappers: list[str] = []
    """Classes (harness.interface.Wrapper) around it, the innermost first; they share its mapping of hyperparameters."""
    paper_defaults: dict[str, Any] = {}
    """The paper's defaults."""
    recipe: Recipe = Recipe()
    """Over the defaults."""
    recipe_provenance: dict[str, Any] = {}
    """What chose the recipe (scripts/tune_recipes.py); empty for one that somebody chose."""
    hyperparameters: dict[str, Any] = {}
    """What the user sets, over the recipe and over the points of the search space."""
    search_space: dict[str, Any] | None = None
    """What a tuner may try, in the shape of the recipe (see harness.config.search_space)."""
    clip_norm: float | None = Field(default=None, gt=0)
    no_decay: list[str] = []
    """Parameter roles without weight decay, for example [norm, bias]."""
    needs: list[Need] = []
    """Needs beyond those that the class declares."""
    closure: bool = False
    """Call optimizer.step(closure); the closure evaluates the same batch again. Set by itself where `step` requires a
    closure (LBFGS and the like)."""
    takes: Literal["parameters", "named_parameters", "model"] | None = None
    """What a torch.optim.Optimizer is built on; null: what the name of its first argument says."""
    param_groups: dict[str, dict[str, Any]] = {}
    """Keys of its parameter groups, by role or pattern of names; `rest` for all other parameters."""
    base: OptimizerPart | None = None
    """The optimizer that it goes around (SAM, Lookahead and the like)."""
    fallback: FallbackOptimizer | None = None
    """The optimizer of the parameters that it cannot update, such as all that are no matrices."""
    path: str | None = None
    """The file that holds the algorithm, for a class that stands for files of another interface
    (optimizer=algoperf)."""
    tuning_search_space: str | None = None
    """A file of that interface with what a tuner may try; null: tuning_search_space.json beside `path`, if it is
    there."""
    point: int | None = Field(default=None, ge=1)
    """Which point of a list in that file is the recipe; null: the first."""
    batch_size: int | None = Field(default=None, ge=1)
    """Examples of a batch that the file draws; null: the workload's nominal batch."""
    file_sha256: str | None = None
    """Of the file at `path`; made of the file itself."""

    @property
    def effective_hyperparameters(self) -> dict[str, Any]:
        """Those that the algorithm is built with: defaults, recipe and the user's own, the later ones winning."""
        return self.paper_defaults | self.recipe.hyperparameters | self.hyperparameters

    @property
    def class_paths(self) -> list[str]:
        """The classes that it is made of, its own first."""
        parts = [part.class_path for part in (self.base, self.fallback) if part is not None]
        return [self.class_path, *self.wrappers, *parts]

    def with_point(self, point: dict[str, Any]) -> Optimizer:
        """The same with a point of the search space over the recipe. The point is not validated."""
        recipe = self.recipe.model_dump() | point
        recipe["hyperparameters"] = self.recipe.hyperparameters | point.get("hyperparameters", {})
        # Not validated here: harness.config.validation does it, and reports a problem as one of the search space.
        return self.model_copy(update={"recipe": Recipe.model_construct(**recipe)})


_WITHOUT_INFLUENCE = {"records", "machine", "label", "overwrite", "data", "checkpoint_seconds", "debug", "tracker",
                      "executor", "judge", "modified", "shipped", "overridden"}  # fmt: skip
"""Keys that cannot move a trial's result."""
NOT_RECORDED = {"modified", "shipped", "overridden", "overwrite", "debug", "records", "data"}
"""Keys that no manifest holds: options of the command, and paths of the machine that ran it."""


DEVICE_PATTERN, NAME_PATTERN = r"^(auto|cpu|cuda(:\d+)?)$", r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
PATTERN_MEANINGS = {
    DEVICE_PATTERN: "must be auto, cpu, cuda, or cuda:N for one GPU of several",
    NAME_PATTERN: "must be letters, digits, `_`, `.` and `-`, and begin with a letter or a digit",
}
"""What a message says in place of a regular expression."""
INTERNAL_KEYS = ("modified", "shipped", "overridden")
"""Fields of `Run` that are made of the command line; no user sets them."""


class Run(_Strict):
    """The configuration of one trial, whole; of a study, where `trial` is only the first of several.

    Three notions tell whether two trials are alike. `identity` is everything that can move the result: a folder is
    continued only by the same identity. `modified` lists the keys of the workload that differ from the shipped one: no
    table takes such a trial. `shipped` is whether the submission is as its YAML has it: if not, a hash of it is part of
    its label.
    """

    workload: dict[str, Any]
    """Keys of `harness.interface.WorkloadSpec`."""
    scale: Named
    optimizer: Optimizer
    schedule: Schedule
    ruleset: Ruleset
    tracker: Tracker
    executor: Executor = Executor(name="local", description="")
    pruning: Literal["none", "exact", "futility"] = "none"
    """Early stopping of trials. exact: that provably cannot become the best of their study; futility: also those that
    hardly will."""
    seed: int = Field(ge=0, lt=2**31)
    """Study seed; the record goes to study_<seed>."""
    trial: int = Field(ge=1)
    """Number of the trial in its study."""
    device: str = Field(pattern=DEVICE_PATTERN)
    precision: Literal["fp32", "tf32", "bf16"]
    """fp32: every product in full. tf32: matrix products and convolutions of a GPU in TF32. bf16: autocast."""
    compile: bool
    deterministic: bool
    threads: int = Field(ge=1)
    """CPU threads of the trial. The bits depend on it, so it is part of the trial and not the machine's core count."""
    run_to_end: bool
    judge: Judge = "none"
    """Who evaluates. process: a process that the submission cannot reach, with a model of its own; replay: the
    submission's process, and the weights of two evaluations are kept; none: the submission's process."""
    records: Path = Path("results/records")
    machine: str = Field(default="auto", pattern=NAME_PATTERN)
    """Name of the machine's folder of records; auto: a description of this machine."""
    label: str | None = Field(default=None, pattern=NAME_PATTERN)
    overwrite: bool
    data: str = "auto"
    checkpoint_seconds: float = Field(ge=0)
    """At an evaluation, write a checkpoint when the last one is older than this."""
    debug: bool

    # What was made of the command line; not keys of the config.
    modified: tuple[str, ...] = ()
    """Keys of the workload whose value is not the shipped one."""
    shipped: bool = True
    """Whether the submission is as its YAML has it."""
    overridden: tuple[str, ...] = ()
    """Keys that the command line sets."""

    @property
    def spec(self) -> WorkloadSpec:
        """The workload's specification, validated."""
        # Imported here, since it brings torch.
        from harness.interface.workload import WorkloadSpec

        return WorkloadSpec(**self.workload)

    def identity(self) -> dict[str, Any]:
        """Everything that can move the result, and nothing else, as plain data for the JSON of a manifest."""
        everything = self.model_dump(mode="json", exclude=_WITHOUT_INFLUENCE)
        # The rest of the ruleset decides which trials there are, and nothing about this one.
        everything["ruleset"] = self.ruleset.model_dump(include={"name", "description"})
        # Left out where unused, as are wrappers below: a trial recorded before there was such a key keeps its identity.
        if self.pruning == "none":
            del everything["pruning"]
        everything["workload"].pop("target_provenance", None)
        everything["workload"].pop("description", None)
        everything["optimizer"] = self.algorithm()["optimizer"]
        return everything

    def algorithm(self) -> dict[str, Any]:
        """The submission alone: the `optimizer`, as it takes effect, and the `schedule`. A part of the identity."""
        irrelevant = {"paper_defaults", "recipe", "recipe_provenance", "description", "paper"}
        # A trial at the recipe draws nothing from it.
        if self.ruleset.points == "recipe":
            irrelevant.add("search_space")
        optimizer = self.optimizer.model_dump(mode="json", exclude=irrelevant)
        optimizer["hyperparameters"] = self.optimizer.effective_hyperparameters
        for key in ("wrappers", *FOREIGN_KEYS, *FILE_KEYS):
            if not optimizer[key] or key in _NOT_OF_FILE:
                del optimizer[key]
        return {"optimizer": optimizer, "schedule": self.schedule.model_dump(mode="json")}

    def with_point(self, point: dict[str, Any]) -> Run:
        """The trial at a point of the search space; what the command line sets stays as it is."""
        optimizer = self.optimizer.with_point(point)
        # config.yaml took clip_norm and the schedule's fractions from the recipe on composition, so a point has to
        # replace them too.
        if "clip_norm" in point and "optimizer.clip_norm" not in self.overridden:
            optimizer = optimizer.model_copy(update={"clip_norm": point["clip_norm"]})
        drawn = {key: point[key] for key in SCHEDULE_KEYS if key in point and f"schedule.{key}" not in self.overridden}
        schedule = self.schedule.model_copy(update=drawn)
        # The label before the point: all trials of a study share it, though each has another configuration.
        return self.model_copy(update={"optimizer": optimizer, "schedule": schedule, "label": self.submission_label})

    @property
    def submission_label(self) -> str:
        """The submission's folder name: plain as shipped, otherwise with a short hash of its configuration."""
        if self.label is not None:
            return self.label
        return self.optimizer.name if self.shipped else f"{self.optimizer.name}-{short_hash(self.algorithm())}"

    @property
    def scale_folder(self) -> str:
        """The scale's folder name, with whatever keeps a trial from being compared with others: precision, compilation
        and determinism other than the default, and a modified workload. No table mixes them."""
        parts = [self.scale.name, *([] if self.precision == "fp32" else [self.precision])]
        parts += ["compiled"] * self.compile + ["nondeterministic"] * (not self.deterministic)
        if self.modified:
            parts += ["modified", short_hash(self.identity()["workload"])]
        return "-".join(parts)
