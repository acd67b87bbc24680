"""Vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), from a toy for small pictures to ViT-S/16.

Patches become tokens by one strided convolution; learned positions, pre-norm blocks, and a class token or the mean
over tokens as read-out. ViT-S/16 (Touvron et al. 2020) is picture 224, patch 16, 12 layers, width 384, 6 heads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.image_classification import ImageClassification


class ViTModel(BaseModel):
    """Size of the transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(ge=1)
    """Of the pictures: 1 grey, 3 colour."""
    classes: int = Field(ge=2)
    """Number of classes."""
    picture: int = Field(ge=1)
    """Side of the square pictures in pixels."""
    patch: int = Field(ge=1)
    """Side of the square patches in pixels."""
    layers: int = Field(ge=1)
    """Transformer blocks."""
    width: int = Field(ge=1)
    """Size of the residual stream."""
    heads: int = Field(ge=1)
    """Attention heads; each is width / heads wide."""
    mlp_ratio: int = Field(ge=1)
    """How many times wider the inside of an MLP is."""
    dropout: float = Field(ge=0, lt=1)
    """On embeddings and both branches of a block."""
    readout: Literal["class_token", "mean"]
    """What the head sees: an extra token, or the mean over all patches."""

    @model_validator(mode="after")
    def _whole_parts(self) -> ViTModel:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; make it one")
        if self.picture % self.patch:
            raise ValueError(f"picture={self.picture} is not a multiple of patch={self.patch}; make it one")
        return self


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, [n, tokens, width] -> the same."""

    def __init__(self, options: ViTModel) -> None:
        super().__init__()
        self.heads = options.heads
        self.qkv = nn.Linear(options.width, 3 * options.width)
        self.projection = nn.Linear(options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        # [n, tokens, 3 * width] -> three of [n, heads, tokens, width / heads]
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.projection(y.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """Attention, then an MLP; each normalised first and added to the stream."""

    def __init__(self, options: ViTModel) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(options.width, eps=1e-6)
        self.attention = Attention(options)
        self.norm_mlp = nn.LayerNorm(options.width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(options.width, options.mlp_ratio * options.width),
            nn.GELU(),
            nn.Linear(options.mlp_ratio * options.width, options.width),
        )
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class Transformer(nn.Module):
    """Pictures [n, channels, picture, picture] -> logits [n, classes]."""

    def __init__(self, options: ViTModel) -> None:
        super().__init__()
        patches = (options.picture // options.patch) ** 2
        self.patch_embedding = nn.Conv2d(options.channels, options.width, options.patch, options.patch)
        # An embedding of one row, so that its type tells its role.
        self.class_token = nn.Embedding(1, options.width) if options.readout == "class_token" else None
        tokens = patches + (self.class_token is not None)
        self.position_embedding = nn.Embedding(tokens, options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.Sequential(*(Block(options) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(options.width, eps=1e-6)
        self.head = nn.Linear(options.width, options.classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position_embedding.weight, std=0.02)
        if self.class_token is not None:
            nn.init.zeros_(self.class_token.weight)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch_embedding(pictures).flatten(2).transpose(1, 2)  # [n, patches, width]
        if self.class_token is not None:
            x = torch.cat([self.class_token.weight.expand(len(x), 1, -1), x], dim=1)
        x = self.norm(self.blocks(self.dropout(x + self.position_embedding.weight)))
        return self.head(x[:, 0] if self.class_token is not None else x.mean(1))


class ViT(ImageClassification):
    """Fashion-MNIST with pad-crop-flip; metric ``accuracy``."""

    Model = ViTModel
    role_patterns: ClassVar = {"patch_embedding.weight": "embedding", "head.weight": "head"}

    def build_model(self) -> nn.Module:
        return Transformer(self.model_options)
