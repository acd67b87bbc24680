from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.interface import Role
from submissions.adamw_8bit import AdamW8bit, AdamW8bitRule, _quantise, quantisation_levels
from tests.submissions.parity import assert_parity, both_decays, make_setup, transcription

LR, BETAS, BLOCK = 0.01, (0.9, 0.95), 20


def quantise_and_dequantise(x: Tensor, signed: bool) -> Tensor:
    """Quantise and dequantise number by number."""
    values, flat = quantisation_levels(signed), x.flatten()
    out = torch.zeros_like(flat)
    for start in range(0, len(flat), BLOCK):
        piece = flat[start : start + BLOCK]
        scale = float(piece.abs().max())
        for i, number in enumerate(piece):
            index = int((values - float(number) / scale).abs().argmin()) if scale else int((values == 0).nonzero())
            out[start + i] = values[index] * scale
    return out.view(x.shape)


def adamw_8bit(theta: Tensor, g: Tensor, t: int, memory: dict[str, Any], decay: float) -> Tensor:
    if not theta.numel():
        return theta
    m = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * g
    v = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * g**2
    memory |= {"m": quantise_and_dequantise(m, True), "v": quantise_and_dequantise(v, False)}
    update = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
    return theta - LR * (update + decay * theta)


@both_decays
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_adamw_8bit(decay: float, dtype: torch.dtype) -> None:
    """Not in float32, where rounding may lead to the other of two neighbouring levels."""
    hyperparameters = {"lr": LR, "betas": BETAS, "eps": 1e-8, "weight_decay": decay, "block_size": BLOCK}
    assert_parity(
        lambda p: AdamW8bitRule(p, hyperparameters), transcription(adamw_8bit, decay=decay), dtype, tolerance=1e-7
    )


def test_small_tensors_and_embeddings_keep_32_bits() -> None:
    named = {name: nn.Parameter(torch.ones(8, 5)) for name in ("matrix", "embedding")}
    named["bias"] = nn.Parameter(torch.ones(5))
    roles = {"matrix": Role.HIDDEN_MATRIX, "embedding": Role.EMBEDDING, "bias": Role.BIAS}
    submission = AdamW8bit(make_setup(named, roles, needs=AdamW8bit.needs), block_size=16, min_8bit_size=30)
    rule, adamw = submission.optimizers
    assert rule.param_groups[0]["params"] == [named["matrix"]]
    assert adamw.param_groups[0]["params"] == [named["embedding"], named["bias"]]
    named["matrix"].grad = torch.ones(8, 5)
    rule.step()
    dtypes = {name: value.dtype for name, value in rule.state[named["matrix"]].items() if name != "step"}
    assert dtypes == {
        "momentum": torch.uint8, "momentum_scale": torch.float32,
        "second_moment": torch.uint8, "second_moment_scale": torch.float32,
    }  # fmt: skip
    assert submission.state_bytes() == 2 * (48 + 3 * 4)


@pytest.mark.parametrize("signed", [True, False])
def test_there_are_256_levels_dense_near_zero(signed: bool) -> None:
    values = quantisation_levels(signed)
    assert len(values.unique()) == 256 and values.max() == 1 and (values == 0).any()
    assert (values.min() < -0.99) == signed
    magnitudes = values.abs().unique()
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        expected = 2**decade if signed else 2 ** (decade + 1)
        assert ((magnitudes > low) & (magnitudes < high * (1 - 1e-12))).sum() == expected


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_is_quantised_to_the_nearest_level(signed: bool) -> None:
    """Against a binary search, on numbers of all decades and on both sides of every border."""
    values = quantisation_levels(signed).float()
    borders = (values[1:] + values[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100_000, generator=generator) * 10.0 ** torch.randint(-9, 1, (100_000,), generator=generator)
    x = torch.cat([x, borders, *(torch.nextafter(borders, torch.tensor(to)) for to in (-2.0, 2.0)), values])
    x = (torch.cat([x, -x]) if signed else x.abs()).clamp(-1, 1)
    assert torch.equal(_quantise(x, signed).int(), torch.bucketize(x, borders, out_int32=True))
