"""The names of AlgoPerf's `spec` module that submissions use (github.com/mlcommons/algorithmic-efficiency).

It is what `algoperf.spec` and `algorithmic_efficiency.spec` are where AlgoPerf is not installed. Enumerations have the
same members and numbers as there.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

LossType = Enum(
    "LossType",
    ["SOFTMAX_CROSS_ENTROPY", "SIGMOID_CROSS_ENTROPY", "MEAN_SQUARED_ERROR", "CTC_LOSS", "MEAN_ABSOLUTE_ERROR"],
    start=0,
)
ForwardPassMode = Enum("ForwardPassMode", ["TRAIN", "EVAL"], start=0)
ParameterType = Enum(
    "ParameterType",
    [
        "WEIGHT", "BIAS", "CONV_WEIGHT", "BATCH_NORM_SCALE", "BATCH_NORM_BIAS", "LAYER_NORM_SCALE", "LAYER_NORM_BIAS",
        "EMBEDDING", "ATTENTION_Q", "ATTENTION_K", "ATTENTION_V", "ATTENTION_OUT", "ATTENTION_QKV", "ATTENTION_KV",
        "ATTENTION_BIAS",
    ],
    start=0,
)  # fmt: skip


class ShapeTuple:
    """The shape of a parameter."""

    def __init__(self, shape_tuple: Any) -> None:
        self.shape_tuple = shape_tuple

    def __repr__(self) -> str:
        return f"ShapeTuple({self.shape_tuple})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapeTuple) and self.shape_tuple == other.shape_tuple

    def __hash__(self) -> int:
        return hash(tuple(self.shape_tuple))


class TrainingCompleteError(Exception):
    """Raised by a submission that wants to train no further."""


class Workload:
    """The base of what a submission gets as its workload."""


# Names of annotations, which nothing here looks at.
Tensor = Shape = ParameterShapeTree = ParameterContainer = ParameterTypeTree = Any
ParameterKey = RandomState = OptimizerState = Hyperparameters = Timing = Steps = Any
ModelAuxiliaryState = ModelInitState = UpdateReturn = Any
InitOptimizerFn = UpdateParamsFn = PrepareForEvalFn = DataSelectionFn = Any
