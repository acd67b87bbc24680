"""What a submission written for AlgoPerf sees of a workload: its functions and figures, made of ours.

The passes are those of the step (`harness.interface.own_step`): the dropout, the statistics of BatchNorm by micro-batch
and the counting are the same as for every other submission. What AlgoPerf's workloads have and ours do not is refused
in one sentence where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.errors import UserError
from harness.interface import Role, Setup
from harness.interface import Workload as OurWorkload
from harness.interface.own_step import DrawnBatch, OwnStep
from submissions.algoperf import spec as own_spec
from submissions.algoperf.parameter_types import parameter_types


class NotHere(UserError, AttributeError):
    """Something that a submission asked for and that is not here; `hasattr` finds that it is missing."""


class OneDevice(nn.DataParallel):
    """The model on one device, wrapped as AlgoPerf wraps it: `.module` is the model itself."""

    def __init__(self, module: nn.Module) -> None:
        # Without that of DataParallel, which would look for GPUs and move the model to them.
        nn.Module.__init__(self)
        self.module = module
        self.device_ids: list[Any] = []
        self.dim = 0

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The model's outputs."""
        return self.module(*inputs, **kwargs)


def wrap_model(setup: Setup) -> nn.Module:
    """The model as AlgoPerf hands it to a submission: in DistributedDataParallel where several processes share the
    trial, which averages the gradients over them."""
    runner = setup.runner
    if runner.ranks.size == 1:
        return OneDevice(runner.model)
    # The statistics of BatchNorm are averaged by the step.
    return DistributedDataParallel(runner.model, broadcast_buffers=False)


class AlgoPerfBatch(dict[str, Tensor]):
    """The examples of a drawn batch: `inputs`, `targets`, and whatever else the workload has."""

    def __init__(self, drawn: DrawnBatch) -> None:
        named = {"targets" if name == "labels" else name: tensor for name, tensor in drawn.tensors.items()}
        super().__init__(named)
        self.drawn = drawn


class InputQueue(Iterator[AlgoPerfBatch]):
    """The training examples, batch after batch without an end. Each batch that is taken counts to the budget."""

    def __init__(self, step: OwnStep, batch_size: int) -> None:
        self._step, self._batch_size = step, batch_size

    def __next__(self) -> AlgoPerfBatch:
        return AlgoPerfBatch(self._step.draw(self._batch_size))


class WorkloadFacade(own_spec.Workload):
    """A workload as AlgoPerf's submissions use it."""

    def __init__(self, setup: Setup, spec: Any, model: nn.Module, batch_size: int) -> None:
        """spec: AlgoPerf's module of this name, as the submission imports it. model: what `wrap_model` returned."""
        self._setup, self._spec, self._model = setup, spec, model
        self._facts = setup.runner.workload.spec
        self._step: OwnStep | None = None
        self._types = parameter_types(setup.runner.model, setup.roles, spec.ParameterType)
        self.metrics_logger = None
        # Steps are those of the submission, and the budget is in examples.
        self.step_hint = max(1, setup.total_steps * self._facts.nominal_batch // batch_size)

    def __getattr__(self, name: str) -> NoReturn:
        raise NotHere(
            f"workload.{name}: the workloads here have no such thing (docs/algoperf_submissions.md lists what they "
            "have); take what the submission needs of it from elsewhere"
        )

    def begin(self, step: OwnStep | None) -> None:
        """Run the passes of this step from now on; None between two steps."""
        self._step = step

    @property
    def _workload(self) -> OurWorkload:
        return self._setup.runner.workload

    # ---- figures -------------------------------------------------------------------------------------------------

    @property
    def loss_type(self) -> Any:
        """A member of `spec.LossType`."""
        if self._workload.loss_type is None:
            raise NotHere(
                f"workload.loss_type: that of workload={self._facts.name} is not known; set loss_type in its class"
            )
        return self._spec.LossType[self._workload.loss_type.upper()]

    @property
    def has_loss_type(self) -> bool:
        """Whether the workload says what its loss is."""
        return self._workload.loss_type is not None

    @property
    def num_train_examples(self) -> int:
        """The size of the training set."""
        return self._workload.train_size

    @property
    def target_metric_name(self) -> str:
        """The metric of the target."""
        return self._facts.metric

    @property
    def validation_target_value(self) -> float:
        """The target."""
        return self._facts.target

    def has_reached_validation_target(self, eval_result: Mapping[str, float]) -> bool:
        """Whether the results of an evaluation meet the target."""
        return self._facts.meets_target(eval_result[f"validation/{self._facts.metric}"])

    @property
    def max_allowed_runtime_sec(self) -> float:
        """Seconds that a trial may take; only their relation to `step_hint` and `eval_period_time_sec` means
        something."""
        return self._facts.max_seconds

    @property
    def eval_period_time_sec(self) -> float:
        """The same share of `max_allowed_runtime_sec` as the steps between two evaluations are of the budget."""
        return self._facts.max_seconds * self._facts.eval_every / self._facts.max_steps

    @property
    def param_shapes(self) -> dict[str, Any]:
        """The shape of each parameter."""
        parameters = self._setup.named_parameters.items()
        return {name: self._spec.ShapeTuple(parameter.shape) for name, parameter in parameters}

    @property
    def model_params_types(self) -> dict[str, Any]:
        """The member of `spec.ParameterType` for each parameter."""
        return self._types

    def is_output_params(self, param_key: str) -> bool:
        """Whether a parameter is the weight of the last layer."""
        return self._setup.roles.get(param_key.removeprefix("module.")) is Role.HEAD

    # ---- functions -----------------------------------------------------------------------------------------------

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Mapping[str, Tensor],
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[Tensor, Any]:
        """The model's outputs on a batch, and the model's state as it was given."""
        if params is not self._model and params is not self._setup.runner.model:
            raise UserError(
                "workload.model_fn: `params` is not the model that the submission was given; pass that one, with other "
                "values in its parameters where it is to be evaluated at them"
            )
        # The dropout is the workload's, and the record has a remark that says so.
        del rng, dropout_rate
        if self._step is None:
            raise UserError("workload.model_fn: there are passes within update_params and data_selection alone")
        batch = augmented_and_preprocessed_input_batch
        training = mode.name == "TRAIN"
        if not training and update_batch_norm:
            raise UserError("workload.model_fn: an evaluation updates no statistics of BatchNorm; use mode TRAIN")
        params.train(training)
        tensors = {"labels" if name == "targets" else name: tensor for name, tensor in batch.items()}
        # Examples without targets are examples too.
        tensors.setdefault("labels", batch["inputs"])
        with nullcontext() if training else torch.no_grad():
            outputs = self._step.outputs(
                tensors,
                of=getattr(batch, "drawn", None),
                update_buffers=training and update_batch_norm,
                model=self._model if isinstance(self._model, DistributedDataParallel) else None,
            )
        return outputs, model_state

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """The workload's loss: summed over the examples, by example, and the number of examples that it is of."""
        with self._setup.runner.precision_context():
            losses = self._workload.loss(logits_batch, {"labels": label_batch}, "none")
            if label_smoothing:
                losses = self._smoothed(losses, logits_batch, label_smoothing)
        count = torch.tensor(float(len(losses)), device=losses.device)
        if mask_batch is not None:
            losses, count = losses * mask_batch, mask_batch.sum()
        summed = losses.sum()
        if self._step is not None and self._step.first_loss is None:
            self._step.first_loss = summed.detach() / count
        return {"summed": summed, "n_valid_examples": count, "per_example": losses}

    def _smoothed(self, losses: Tensor, outputs: Tensor, label_smoothing: float) -> Tensor:
        """The losses [n] with the labels moved towards the uniform distribution over the classes."""
        if self._workload.loss_type != "softmax_cross_entropy":
            raise UserError(
                f"workload.loss_fn(label_smoothing={label_smoothing}): the loss of workload={self._facts.name} is no "
                "cross-entropy over classes; leave label_smoothing out"
            )
        uniform = -outputs.float().log_softmax(-1).mean(-1).flatten(1).mean(1) if outputs.ndim > 2 else (
            -outputs.float().log_softmax(-1).mean(-1)
        )  # fmt: skip
        return (1 - label_smoothing) * losses + label_smoothing * uniform

    def output_activation_fn(self, logits_batch: Tensor, framework: str = "pytorch") -> Tensor:
        """Probabilities of the classes."""
        if self.loss_type.name != "SOFTMAX_CROSS_ENTROPY":
            raise NotHere("workload.output_activation_fn: only known for a cross-entropy over classes; leave it out")
        return logits_batch.softmax(-1)
