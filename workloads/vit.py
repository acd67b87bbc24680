"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) for image classification.

Patches embedded by a strided convolution, a class token (or the mean over patches), learned positions, pre-norm blocks,
dropout. Image 224, patch 16, width 384, 12 layers and 6 heads make the published ViT-S/16.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.image_classification import ImageClassification


class ViTOptions(BaseModel):
    """Size of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: int = Field(ge=1)
    """Height and width of the images."""
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    patch: int = Field(ge=1)
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_ratio: int = Field(default=4, ge=1)
    pooling: Literal["token", "mean"] = "token"
    """What the head reads: the class token, or the mean over the patches."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> ViTOptions:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.image % self.patch:
            raise ValueError(f"image={self.image} must be a multiple of patch={self.patch}")
        return self


class ViTModel(nn.Module):
    """Images float [n, channels, image, image] -> logits [n, classes]."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        width = options.width
        self.pooling = options.pooling
        self.embedding = nn.Conv2d(options.channels, width, options.patch, stride=options.patch)
        extra = int(options.pooling == "token")
        self.token = nn.Parameter(torch.zeros(1, extra, width)) if extra else None
        self.positions = nn.Parameter(torch.zeros(1, (options.image // options.patch) ** 2 + extra, width))
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.Sequential(
            *(Block(width, options.heads, options.mlp_ratio * width, options.dropout) for _ in range(options.layers))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, options.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(self.dropout(x + self.positions)))
        return self.head(x[:, 0] if self.pooling == "token" else x.mean(1))


class Block(nn.Module):
    """Attention, then two linear layers, each after a LayerNorm and around a residual."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        shape = (n, t, 3, self.heads, width // self.heads)
        q, k, v = self.query_key_value(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._dropped(self.project(attended))
        return x + self._dropped(self.contract(F.gelu(self.expand(self.mlp_norm(x)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class ViT(ImageClassification):
    Model = ViTOptions

    def build_model(self) -> nn.Module:
        return ViTModel(self.model_options)

    def role_patterns(self) -> dict[str, str]:
        patterns = {"embedding.weight": "embedding", "positions": "embedding", "head.weight": "head"}
        return patterns | ({"token": "embedding"} if self.model_options.pooling == "token" else {})
