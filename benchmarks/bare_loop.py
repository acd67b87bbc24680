"""Training loops written by hand, which the harness is measured against: own batches, own schedule, own loop.

Nothing here comes from the harness or the workloads. The model may be handed over, so that the same one is trained;
`PlainGPT` is one written in the manner of nanoGPT.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

Examples = tuple[Tensor, Tensor]
"""Inputs and labels of a step, on the device."""


def text_batches(tokens: Tensor, context: int, batch: int) -> Callable[[], Examples]:
    """Windows int64 [batch, context] at random places of a text on the device, and the same moved by one token."""
    offsets = torch.arange(context, device=tokens.device)

    def next_batch() -> Examples:
        start = torch.randint(len(tokens) - context - 1, (batch, 1), device=tokens.device)
        places = start + offsets
        return tokens[places].long(), tokens[places + 1].long()

    return next_batch


def image_batches(images: Tensor, labels: Tensor, batch: int, pad: int, flip: bool) -> Callable[[], Examples]:
    """Random images [batch, channels, h, w], cropped at random out of a padded frame and mirrored half of the time.

    images: float [n, channels, h, w] on the device.
    """
    height, width = images.shape[2:]
    framed = F.pad(images, [pad] * 4).contiguous()
    device = images.device

    def next_batch() -> Examples:
        chosen = torch.randint(len(images), (batch,), device=device)
        x = framed[chosen]
        if pad:
            top, left = torch.randint(2 * pad + 1, (2, batch), device=device)
            rows = (top[:, None] + torch.arange(height, device=device))[:, None, :, None]
            x = x.gather(2, rows.expand(-1, x.shape[1], -1, x.shape[3]))
            columns = (left[:, None] + torch.arange(width, device=device))[:, None, None, :]
            x = x.gather(3, columns.expand(-1, x.shape[1], height, -1))
        if flip:
            x = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        return x, labels[chosen]

    return next_batch


def fixed_batch(examples: Examples) -> Callable[[], Examples]:
    """The same examples at every step."""
    return lambda: examples


class BareLoop:
    """AdamW with decoupled weight decay on matrices, clipping, warm-up and a cosine, over a model's micro-batches."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        parameters: list[nn.Parameter],
        next_batch: Callable[[], Examples],
        *,
        micro_batch: int,
        steps: int,
        precision: str = "fp32",
        compiled: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        clip_norm: float | None = 1.0,
    ) -> None:
        """loss: of inputs and labels, a scalar. steps: of the schedule. precision: fp32 or bf16."""
        self.loss = torch.compile(loss) if compiled else loss
        self.parameters, self.next_batch, self.micro_batch = parameters, next_batch, micro_batch
        self.precision, self.clip_norm = precision, clip_norm
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

        def factor(step: int) -> float:
            warmup = max(1, steps // 20)
            return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def train(self, steps: int) -> Tensor:
        """Make `steps` steps; the sum of their losses, a scalar on the device."""
        device = self.parameters[0].device.type
        total = torch.zeros((), device=device)
        for _ in range(steps):
            inputs, labels = self.next_batch()
            pieces = list(zip(inputs.split(self.micro_batch), labels.split(self.micro_batch), strict=True))
            for x, y in pieces:
                with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = self.loss(x, y) / len(pieces)
                loss.backward()
                total += loss.detach()
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


class PlainGPT(nn.Module):
    """GPT-2's architecture, with the loss inside the model: tokens and labels int64 [n, t] -> the mean loss."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(_PlainLayer(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
        self.register_buffer("places", torch.arange(context), persistent=False)

    @override
    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        places: Any = self.places
        x = self.embed_tokens(tokens) + self.embed_positions(places[: tokens.shape[1]])
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.reshape(-1))


class _PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attention_in(self.norm_1(x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))
