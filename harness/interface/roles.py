"""Parameter roles, by which a submission can treat matrices, norms and biases differently."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from fnmatch import fnmatchcase

from torch import nn


class Role(StrEnum):
    """The purpose of a parameter."""

    EMBEDDING = "embedding"
    """Token, position and patch embeddings, class tokens; a head tied to an embedding counts as embedding."""
    HEAD = "head"
    """The weight of the last layer."""
    STEM = "stem"
    """The first convolution."""
    NORM = "norm"
    """Scale of a normalisation layer."""
    BIAS = "bias"
    """Bias of any layer, a normalisation's shift included."""
    HIDDEN_MATRIX = "hidden_matrix"
    """Any other matrix."""
    CONVOLUTION = "convolution"
    """A convolution's filters [out, in, ...]."""
    OTHER = "other"
    """Any other parameter."""


MATRIX_ROLES = frozenset({Role.HIDDEN_MATRIX, Role.CONVOLUTION})
"""The parameters that rules for matrices take."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def parameter_roles(model: nn.Module, patterns: Mapping[str, str] | None = None) -> dict[str, Role]:
    """The role of every parameter by name, each parameter once (shared ones under their first name).

    patterns: role by pattern of the name (fnmatch), from the workload; they win over the type of the module. Raises
    ValueError for a pattern that matches nothing, for patterns of different roles that match the same parameter, and
    for an unknown role: each would silently change a method.
    """
    claims = {pattern: Role(role) for pattern, role in (patterns or {}).items()}
    # The module that holds each parameter itself, since its type gives the role.
    owners: dict[str, nn.Module] = {
        (f"{prefix}.{name}" if prefix else name): module
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    roles: dict[str, Role] = {}
    unused = set(claims)
    for name, parameter in model.named_parameters():
        # fnmatchcase: fnmatch ignores case on some systems.
        matching = [pattern for pattern in claims if fnmatchcase(name, pattern)]
        unused -= set(matching)
        if len({claims[pattern] for pattern in matching}) > 1:
            raise ValueError(f"parameter {name} is claimed by patterns of different roles: {matching}")
        roles[name] = claims[matching[0]] if matching else _role_by_type(name, owners[name], parameter.ndim)
    if unused:
        raise ValueError(f"role patterns that match no parameter: {sorted(unused)}")
    return roles


def _role_by_type(name: str, owner: nn.Module, ndim: int) -> Role:
    # Before the norms: the shift of a normalisation layer counts as a bias.
    if name.rpartition(".")[2] == "bias":
        return Role.BIAS
    if isinstance(owner, _NORMS):
        return Role.NORM
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING
    if isinstance(owner, _CONVOLUTIONS):
        return Role.CONVOLUTION
    # HEAD and STEM cannot be seen from the type; workloads name them by patterns.
    return Role.HIDDEN_MATRIX if ndim == 2 else Role.OTHER
