"""AlgoPerf's types of parameters, from the layers that hold them and their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.interface import Role

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# Parts of names, in this order: `query_key_value` is all three.
_ATTENTION = (
    (("query_key_value", "qkv", "in_proj"), "ATTENTION_QKV"),
    (("key_value", "kv_proj"), "ATTENTION_KV"),
    (("query", "q_proj"), "ATTENTION_Q"),
    (("key", "k_proj"), "ATTENTION_K"),
    (("value", "v_proj"), "ATTENTION_V"),
)


def parameter_types(model: nn.Module, roles: dict[str, Role], types: Any) -> dict[str, Any]:
    """The member of `types` (AlgoPerf's ParameterType) for each parameter, by name. roles: of the parameters."""
    modules = dict(model.named_modules())
    return {name: types[_type(name, modules[name.rpartition(".")[0]], role)] for name, role in roles.items()}


def _type(name: str, owner: nn.Module, role: Role) -> str:
    """The name of the type of a parameter of the layer `owner`."""
    is_bias = name.rpartition(".")[2] == "bias"
    if isinstance(owner, _BATCH_NORMS):
        return "BATCH_NORM_BIAS" if is_bias else "BATCH_NORM_SCALE"
    if isinstance(owner, _OTHER_NORMS):
        return "LAYER_NORM_BIAS" if is_bias else "LAYER_NORM_SCALE"
    if isinstance(owner, _CONVOLUTIONS):
        return "BIAS" if is_bias else "CONV_WEIGHT"
    if isinstance(owner, nn.Embedding) or role is Role.EMBEDDING:
        return "EMBEDDING"
    attention = next((kind for parts, kind in _ATTENTION if any(part in name.lower() for part in parts)), None)
    if attention is not None:
        return "ATTENTION_BIAS" if is_bias else attention
    return "BIAS" if is_bias else "WEIGHT"
