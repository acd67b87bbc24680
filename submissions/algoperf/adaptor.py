"""A submission written for AlgoPerf's interface as a submission here.

One call of `update_params` is one step. What it draws from the input queue counts to the budget, and everything that it
does is on the clock, as for every other submission.
"""

from __future__ import annotations

import inspect
import json
import random
from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from harness.errors import UserError
from harness.interface import Need, Setup
from harness.interface.own_step import OwnStep
from harness.interface.submission import FileSubmission
from submissions.algoperf import random_utils
from submissions.algoperf.facade import InputQueue, NotHere, WorkloadFacade, wrap_model
from submissions.algoperf.package import loaded_modules
from submissions.algoperf.source import (
    compiles,
    convert_search_space,
    load_module,
    missing_hyperparameters,
    passes,
    read_source,
    reads,
)
from submissions.algoperf.state import StatePacker

_WAYS = "give it with optimizer.hyperparameters.{}=VALUE, or in a tuning_search_space.json beside the file"


class AlgoPerf(FileSubmission):
    """The submission in a file, such as AlgoPerf's submission.py."""

    needs: ClassVar[frozenset[Need]] = frozenset(
        {
            Need.OWN_PASSES,
            Need.RE_EVALUATE,
            Need.SELECTION,
            Need.EVALUATION_WEIGHTS,
            Need.PARAMETER_ROLES,
            Need.TOTAL_STEPS,
        }
    )
    module: ClassVar[ModuleType]
    """The file."""
    batch_size: ClassVar[int | None] = None
    """Examples of a batch; None for the nominal batch."""

    # ---- the file ------------------------------------------------------------------------------------------------

    @classmethod
    @override
    def load(cls, path: str, options: Any, device: torch.device | None = None) -> type[FileSubmission]:
        tree = read_source(path)
        given = dict(options.effective_hyperparameters)
        problems = [f"optimizer.hyperparameters.{name} is missing: {path} reads it; {_WAYS.format(name)}"
                    for name in missing_hyperparameters(tree, given)]  # fmt: skip
        own_work = {"clip_norm": "clips gradients", "no_decay": "makes its groups", "closure": "calls its optimizers"}
        problems += [
            f"optimizer.{key}={getattr(options, key)}: a submission of AlgoPerf {does} itself; leave it out"
            for key, does in own_work.items()
            if getattr(options, key)
        ]
        if problems:
            raise UserError(problems)
        module = load_module(path, tree, device)
        remarks = []
        if reads(tree, "eval_results"):
            remarks.append("eval_results stays empty: a submission learns nothing of its evaluations")
        if any(given.get(name) for name in ("dropout_rate", "aux_dropout_rate")) or passes(tree, "dropout_rate"):
            remarks.append("dropout_rate has no effect: the dropout is the workload's, and the same for all")
        attributes = {
            "module": module,
            "modules": frozenset(loaded_modules()),
            "batch_size": options.batch_size,
            "remarks": tuple(remarks),
        }
        # The module of the class is the file's, by which its sources are found.
        return type(cls.__name__, (cls,), attributes | {"__module__": module.__name__})

    @classmethod
    @override
    def read_needs(cls, path: str) -> frozenset[Need]:
        return frozenset({Need.OWN_COMPILATION} if compiles(path, read_source(path)) else ())

    @classmethod
    @override
    def read_search_space(cls, path: str) -> dict[str, Any]:
        key = f"optimizer.tuning_search_space={path}"
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{key}: cannot be read ({error.strerror}); give a JSON file") from None
        except ValueError as error:
            raise UserError(f"{key}: is no JSON ({error}); correct it") from None
        return convert_search_space(raw, key)

    # ---- training ------------------------------------------------------------------------------------------------

    def __init__(self, setup: Setup, **hyperparameters: Any) -> None:
        """Raises UserError for a schedule, which the file has itself."""
        super().__init__(setup)
        if setup.schedule.shape != "constant" or setup.schedule.warmup_fraction:
            raise UserError(
                f"schedule={setup.schedule.shape}, schedule.warmup_fraction={setup.schedule.warmup_fraction}: a "
                "submission of AlgoPerf has a schedule of its own; leave both out"
            )
        self._batch_size = self.batch_size or setup.nominal_batch
        self._model = wrap_model(setup)
        # As the file imports it: AlgoPerf's own where that is installed.
        spec = getattr(self.module, "spec", None) or __import__("algoperf.spec", fromlist=["spec"])
        self._workload = WorkloadFacade(setup, spec, self._model, self._batch_size)
        self._hyperparameters = make_hyperparameters(hyperparameters)
        self._key = random_utils.PRNGKey(int(torch.randint(2**62, (), generator=setup.generator)))
        self._model_state: Any = None
        self._seed(0)
        self._state = self.module.init_optimizer_state(
            self._workload, self._model, self._model_state, self._hyperparameters, random_utils.fold_in(self._key, 0)
        )
        modules = {name for name in (self.module.__name__, *_beside(self.module))}
        self._packer = StatePacker(self._state, setup.parameters, modules, [setup.runner.model, self._model])
        self._prepared_at = -1
        self._is_complete = False
        self._number = 0
        self._takes_train_state = "train_state" in inspect.signature(self.module.update_params).parameters

    @override
    def step(self, ctx: Any) -> None:
        if not isinstance(ctx, OwnStep):
            raise UserError(
                "optimizer.wrappers: a submission of AlgoPerf computes its gradients itself, and no wrapper can put "
                "others in their place; leave out those that do"
            )
        self._number = ctx.number
        if self._is_complete:
            ctx.skip(self._batch_size)
            return
        self._workload.begin(ctx)
        self._seed(ctx.number)
        select_key, update_key, *_ = random_utils.split(random_utils.fold_in(self._key, ctx.number), 4)
        batch = self.module.data_selection(
            self._workload, InputQueue(ctx, self._batch_size), self._state, self._model, self._model_state,
            self._hyperparameters, ctx.number, select_key,
        )  # fmt: skip
        arguments = self._arguments(ctx.number, update_key) | {"batch": batch}
        if self._takes_train_state:
            arguments["train_state"] = TrainState()
        try:
            self._take(self.module.update_params(**arguments), "update_params")
        except Exception as error:
            if type(error).__name__ != "TrainingCompleteError":
                raise
            # The rest of the budget passes with the weights as they are.
            self._is_complete = True
        self._workload.begin(None)
        self._number = ctx.number + 1
        if ctx.first_loss is not None and self.setup.runner.ranks.size > 1:
            ctx.first_loss = ctx.first_loss.clone()
            self.setup.runner.ranks.all_reduce_sum_([ctx.first_loss])
            ctx.first_loss /= self.setup.runner.ranks.size

    @contextmanager
    @override
    def evaluation_weights(self) -> Iterator[None]:
        """What `prepare_for_eval` leaves in the model; once for all evaluations between two steps.

        As in AlgoPerf, training goes on from there: a submission that evaluates an average puts its own weights back.
        """
        prepare = getattr(self.module, "prepare_for_eval", None)
        if prepare is not None and self._prepared_at != self._number:
            self._prepared_at = self._number
            key = random_utils.split(random_utils.fold_in(self._key, self._number), 4)[2]
            self._take(prepare(**self._arguments(self._number, key)), "prepare_for_eval")
        yield

    def _arguments(self, number: int, key: random_utils.Key) -> dict[str, Any]:
        """Those that update_params and prepare_for_eval have in common."""
        return {
            "workload": self._workload,
            "current_param_container": self._model,
            "current_params_types": self._workload.model_params_types,
            "model_state": self._model_state,
            "hyperparameters": self._hyperparameters,
            "loss_type": self._workload.loss_type if self._workload.has_loss_type else None,
            "optimizer_state": self._state,
            "eval_results": NoResults(),
            "global_step": number,
            "rng": key,
        }

    def _take(self, result: Any, function: str) -> None:
        """Take what a function returned as the state to go on with."""
        if not isinstance(result, tuple) or len(result) != 3:
            raise UserError(f"{function} must return (optimizer_state, params, model_state), and returned {result!r}")
        self._state, model, self._model_state = result
        if model is not self._model and model is not self.setup.runner.model:
            raise UserError(
                f"{function} returned another model than it was given; write new values into the parameters of that one"
            )

    def _seed(self, number: int) -> None:
        """Let what the file draws from global generators be a function of the step, so that a resume repeats it."""
        seed = random_utils.fold_in(self._key, number)[0]
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002

    # ---- its state -----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Raises UserError naming what a checkpoint cannot hold."""
        try:
            state = {"optimizer_state": self._packer.pack(self._state), "model_state": self._pack_model_state()}
        except ValueError as error:
            raise UserError(
                f"optimizer_state{error}, which no checkpoint can hold; give it a state_dict and a load_state_dict, "
                "and make it in init_optimizer_state"
            ) from error
        return state | {
            "key": list(self._key),
            "number": self._number,
            "prepared_at": self._prepared_at,
            "is_complete": self._is_complete,
        }

    def _pack_model_state(self) -> Any:
        return self._packer.pack(self._model_state, "model_state")

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = self._packer.unpack(state["optimizer_state"])
        self._model_state = self._packer.unpack(state["model_state"])
        self._key = list(state["key"])
        self._number, self._prepared_at = state["number"], state["prepared_at"]
        self._is_complete = state["is_complete"]

    @override
    def state_tensors(self) -> list[Tensor]:
        return self._packer.tensors(self._state)


def _beside(module: ModuleType) -> set[str]:
    """The names of the modules that the functions and classes of a file come from."""
    return {name for value in vars(module).values() if isinstance(name := getattr(value, "__module__", None), str)}


def make_hyperparameters(values: Mapping[str, Any]) -> Any:
    """The hyperparameters as AlgoPerf hands them on: a tuple with names."""
    fields = namedtuple("Hyperparameters", list(values))  # type: ignore[misc]

    class Hyperparameters(fields):
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            raise NotHere(f"optimizer.hyperparameters.{name} is not given, and the submission reads it; "
                          f"{_WAYS.format(name)}")  # fmt: skip

    return Hyperparameters(**values)


class NoResults(list[Any]):
    """The list of results of evaluations, which stays empty."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return []
        raise NotHere("eval_results stays empty: a submission learns nothing of its evaluations; do without it")


class TrainState(dict[str, Any]):
    """What AlgoPerf tells of a training; times are not told."""

    def __init__(self) -> None:
        flags = {"validation_goal_reached": False, "test_goal_reached": False, "training_complete": False}
        super().__init__(flags | {"is_time_remaining": True})

    def __missing__(self, name: str) -> Any:
        raise NotHere(f"train_state['{name}']: a submission is not told its times; do without it")
