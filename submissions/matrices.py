"""The common base of rules for matrices. The rule updates hidden matrices and convolutions, AdamW everything else.

Matrices of equal shape are updated as one batch. Filters [out, in, h, w] count as matrices [out, in·h·w].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from harness.interface import MATRIX_ROLES, Need, OptimizerSubmission, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors


class MatrixRule(Rule):
    """A rule for two-dimensional parameters. A subclass defines `batch_direction` instead of `direction`."""

    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        """The direction [n, rows, columns] that `lr` multiplies, for the n matrices of a bucket, all of one shape.

        gradient: their gradients [n, rows, columns].
        """
        raise NotImplementedError

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        # Empty matrices keep these entries, which move nothing.
        directions = list(bucket.theta)
        for indices in group_by_shape(bucket.theta):
            batch = bucket.subset(indices)
            # A single matrix needs no copy.
            g = torch.stack(batch.g) if len(indices) > 1 else batch.g[0].unsqueeze(0)
            for index, direction in zip(indices, self.batch_direction(batch, g).unbind(), strict=True):
                directions[index] = direction
        return directions


def group_by_shape(tensors: Tensors) -> list[list[int]]:
    """For each shape the indices of the tensors that have it; empty tensors are left out."""
    shapes: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            shapes.setdefault(tensor.shape, []).append(index)
    return list(shapes.values())


def stack_state(bucket: Bucket, name: str) -> Tensor:
    """The state `name` of all matrices of a bucket as one tensor [n, ...], to be changed in place.

    The state of each matrix becomes a slice of it, so that nothing is copied from step to step.
    """
    states = bucket.state(name)
    stack = _contiguous_stack(states)
    # At the first step, after a load, and when other matrices than before have a gradient.
    if stack is None:
        stack = torch.stack(states)
        for state, part in zip(bucket.states, stack.unbind(), strict=True):
            state[name] = part
    return stack


class MatrixSubmission(OptimizerSubmission):
    """A rule for hidden matrices and convolutions; AdamW for embeddings, stem, head, norms and biases.

    rule: makes the rule from parameter groups. adamw: the arguments of AdamW. block_size: cut matrices into blocks of
    at most this many rows and columns, each of which is updated like a separate matrix.
    """

    needs = frozenset({Need.PARAMETER_ROLES})

    def __init__(
        self,
        setup: Setup,
        rule: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        adamw: dict[str, Any],
        *,
        block_size: int | None = None,
    ) -> None:
        matrices = [name for name in setup.named_parameters if setup.roles[name] in MATRIX_ROLES]
        rest = [name for name in setup.named_parameters if setup.roles[name] not in MATRIX_ROLES]
        # Two-dimensional parameters for the rule, which share their memory with the model's: an in-place update of a
        # view updates the model. Each with its parameter and the number of its block.
        self._views: list[tuple[nn.Parameter, nn.Parameter, int]] = []
        self._block_size = block_size
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            groups = setup.decay_groups(matrices)
            optimizers.append(rule([group | {"params": self._make_views(group["params"])} for group in groups]))
        if rest:
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)

    @override
    def update(self, ctx: StepContext) -> None:
        gradients: dict[nn.Parameter, list[Tensor]] = {}
        for view, parameter, block in self._views:
            if parameter.grad is not None and parameter not in gradients:
                gradients[parameter] = self._split_into_blocks(as_matrix(parameter.grad, like=parameter))
            view.grad = None if parameter.grad is None else gradients[parameter][block]
        super().update(ctx)
        # Otherwise the gradients would keep their memory until the next step.
        for view, _, _ in self._views:
            view.grad = None

    def _make_views(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The views of `parameters` as matrices, or of their blocks; adds them to `_views`."""
        views = [
            (nn.Parameter(block), parameter, index)
            for parameter in parameters
            for index, block in enumerate(self._split_into_blocks(as_matrix(parameter.detach(), like=parameter)))
        ]
        self._views += views
        return [view for view, _, _ in views]

    def _split_into_blocks(self, matrix: Tensor) -> list[Tensor]:
        """Views of the blocks of a matrix, row by row; the matrix itself without a block size."""
        if self._block_size is None or not matrix.numel():
            return [matrix]
        return [block for rows in matrix.split(self._block_size) for block in rows.split(self._block_size, 1)]


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor [out, ...] as a matrix [out, the rest], with the columns in the memory order of `like`.

    A view if the tensor itself has that memory order, else a copy.
    """
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def zero_square(theta: Tensor, side: int) -> Tensor:
    """A square matrix of zeros, as large as theta [rows, columns] has rows (side 0) or columns (side 1)."""
    return theta.new_zeros(theta.shape[side], theta.shape[side])


def to_tall(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrices [..., rows, columns] with rows ≥ columns, transposed if necessary; and whether they were."""
    transposed = matrix.shape[-2] < matrix.shape[-1]
    return (matrix.mT if transposed else matrix), transposed


def leading_right_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """The right singular vectors [n, columns, rank] of the largest singular values of matrices [n, rows, columns].

    All NaN where the matrices are not finite, see `eigendecomposition`.
    """
    try:
        return torch.linalg.svd(matrix, full_matrices=False).Vh[:, :rank].mT
    except torch.linalg.LinAlgError:
        return matrix.new_full((len(matrix), matrix.shape[2], rank), torch.nan)


def eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n, d] and eigenvectors [n, d, d] of symmetric matrices [n, d, d], the largest first.

    All NaN where the matrices are not finite, so that a diverging trial ends as diverged and not with a crash.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    return values.flip(-1), vectors.flip(-1)


def _contiguous_stack(slices: list[Tensor]) -> Tensor | None:
    """One tensor [n, ...] over slices that follow each other in the same memory; None if they do not."""
    first = slices[0]
    address, size = first.data_ptr(), first.numel() * first.element_size()
    for index, part in enumerate(slices):
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_memory and part.data_ptr() == address + index * size and part.is_contiguous()):
            return None
    return first.as_strided((len(slices), *first.shape), (first.numel(), *first.stride()))
