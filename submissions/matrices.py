"""What rules for matrices share: hidden matrices and convolutions go to the rule, everything else to AdamW, and
matrices of one shape are updated as one batch.

Filters [out, in, h, w] count as matrices [out, in·h·w].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from harness.interface import Need, OptimizerSubmission, Role, Setup, StepContext
from submissions.rule import Bucket, Rule, Tensors

MATRIX_ROLES = frozenset({Role.HIDDEN_MATRIX, Role.CONVOLUTION})


class MatrixRule(Rule):
    """A rule for parameters of two dimensions. A subclass defines `batch_direction` in the place of `direction`."""

    def batch_direction(self, bucket: Bucket, gradient: Tensor) -> Tensor:
        """What `lr` multiplies, [n, rows, columns], from the gradients [n, rows, columns] of the n matrices `at`."""
        raise NotImplementedError

    @override
    def direction(self, bucket: Bucket) -> Tensors:
        directions = list(bucket.theta)  # stays so where it is empty
        for places in by_shape(bucket.theta):
            batch = bucket.subset(places)
            g = torch.stack(batch.g) if len(places) > 1 else batch.g[0].unsqueeze(0)
            for place, found in zip(places, self.batch_direction(batch, g).unbind(), strict=True):
                directions[place] = found
        return directions


def by_shape(tensors: Tensors) -> list[list[int]]:
    """Places of the tensors of each shape, but for empty ones."""
    shapes: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            shapes.setdefault(tensor.shape, []).append(place)
    return list(shapes.values())


def stacked(bucket: Bucket, name: str) -> Tensor:
    """The state `name` of all matrices as one tensor [n, ...], to be changed in place.

    The state of each matrix becomes a slice of it, so that nothing is copied from step to step.
    """
    buckets = bucket.state(name)
    whole = _joined(buckets)
    if whole is None:
        whole = torch.stack(buckets)
        for state, part in zip(bucket.states, whole.unbind(), strict=True):
            state[name] = part
    return whole


class MatrixSubmission(OptimizerSubmission):
    """Hidden matrices and convolutions by `rule`, made from parameter groups; embeddings, stem, head, norms and biases
    by AdamW with the arguments `adamw`.

    block_size: cut matrices into blocks of at most this many rows and columns, each a matrix of its own.
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
        # Parameters that share their memory with the model's: updating them in place updates the model.
        self._views: list[tuple[nn.Parameter, nn.Parameter, int]] = []
        self._block_size = block_size
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            groups = setup.decay_groups(matrices)
            optimizers.append(rule([group | {"params": self._views_of(group["params"])} for group in groups]))
        if rest:
            optimizers.append(torch.optim.AdamW(setup.decay_groups(rest), fused=True, **adamw))
        super().__init__(setup, optimizers)

    @override
    def update(self, ctx: StepContext) -> None:
        gradients: dict[nn.Parameter, list[Tensor]] = {}
        for view, parameter, block in self._views:
            if parameter.grad is not None and parameter not in gradients:
                gradients[parameter] = self._blocks(as_matrix(parameter.grad, like=parameter))
            view.grad = None if parameter.grad is None else gradients[parameter][block]
        super().update(ctx)
        for view, _, _ in self._views:
            view.grad = None  # or the gradients would live on until the next step

    def _views_of(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        made = [
            (nn.Parameter(block), parameter, index)
            for parameter in parameters
            for index, block in enumerate(self._blocks(as_matrix(parameter.detach(), like=parameter)))
        ]
        self._views += made
        return [view for view, _, _ in made]

    def _blocks(self, matrix: Tensor) -> list[Tensor]:
        if self._block_size is None or not matrix.numel():
            return [matrix]
        return [block for rows in matrix.split(self._block_size) for block in rows.split(self._block_size, 1)]


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """[out, ...] as [out, the rest], columns in the order of `like`'s memory; a view of a tensor laid out so."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))


def square(theta: Tensor, side: int) -> Tensor:
    """A square matrix of zeros for the rows (side 0) or the columns (side 1) of a matrix."""
    return theta.new_zeros(theta.shape[side], theta.shape[side])


def tall(matrix: Tensor) -> tuple[Tensor, bool]:
    """[..., rows, columns] with rows ≥ columns, and whether it was transposed for that."""
    transposed = matrix.shape[-2] < matrix.shape[-1]
    return (matrix.mT if transposed else matrix), transposed


def orthogonalised(matrix: Tensor) -> Tensor:
    """[n, rows, columns]: nearly U Vᵀ of the singular value decompositions U S Vᵀ, by five Newton-Schulz steps of
    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), which bring the singular values near 1. Float32 is
    taken to bfloat16 for them, as its authors do."""
    x = matrix.bfloat16() if matrix.dtype == torch.float32 else matrix
    # A batch saves calls, which is much for small matrices; of large ones the products alone are faster.
    alone = x[0].numel() >= 2**16
    return (torch.stack([_newton_schulz(one) for one in x]) if alone else _newton_schulz(x)).to(matrix)


def _newton_schulz(matrix: Tensor) -> Tensor:
    x, transposed = tall(matrix)
    x = x.mT / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT
        x = product(x, product(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if transposed else x.mT


def leading_right_vectors(matrix: Tensor, rank: int) -> Tensor:
    """[n, columns, rank]: the right singular vectors of the largest singular values; NaN as in `eigenvectors`."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False).Vh[:, :rank].mT
    except torch.linalg.LinAlgError:
        return matrix.new_full((len(matrix), matrix.shape[2], rank), torch.nan)


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices [n, d, d], the largest first.

    NaN where there is none for numbers that are not finite: a trial that diverges ends as that and not as a crash.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    return values.flip(-1), vectors.flip(-1)


def _joined(buckets: list[Tensor]) -> Tensor | None:
    """The tensor [n, ...] whose slices these are, one after the other in memory; None if they are not."""
    first = buckets[0]
    address, size = first.data_ptr(), first.numel() * first.element_size()
    for index, part in enumerate(buckets):
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_memory and part.data_ptr() == address + index * size and part.is_contiguous()):
            return None
    return first.as_strided((len(buckets), *first.shape), (first.numel(), *first.stride()))
