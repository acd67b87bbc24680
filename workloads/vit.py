"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) for image classification.

Patches embedded by a strided convolution, a class token (or the mean over patches), learned positions (or fixed ones),
pre-norm blocks, dropout. Image 224, patch 16, width 384, 12 layers and 6 heads are the published ViT-S/16. With fixed
positions and the mean it is that of Beyer et al. 2022 (arXiv:2205.01580); with a hidden layer in the head as well, it
is AlgoPerf's. The held-out variants, both AlgoPerf's (Dahl et al. 2023), put the norms after the additions, or pool the
patches by attention.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from workloads.image_classification import ImageClassification


class ViTOptions(BaseModel):
    """Size and architecture of the model."""

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
    pooling: Literal["token", "mean", "map"] = "token"
    """Input of the head: the class token, the mean over the patches, or multihead attention pooling by a learned probe
    (map; Zhai et al. 2022, arXiv:2106.04560)."""
    norm_placement: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)), and a norm after the last block; post: norm(x + f(x)), and no norm after the last block."""
    positions: Literal["learned", "sincos2d"] = "learned"
    """sincos2d: a fixed table of sines and cosines of the row and the column (Beyer et al. 2022)."""
    head_hidden: bool = False
    """Whether the head has a hidden layer with tanh, as wide as the model."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_sizes(self) -> ViTOptions:
        # A class token has no row and column.
        if self.positions == "sincos2d" and (self.width % 4 or self.width < 8 or self.pooling == "token"):
            raise ValueError(
                f"positions=sincos2d needs a width that is a multiple of 4 and at least 8 (width={self.width}), and "
                f"another pooling than token (pooling={self.pooling}); change these, or use positions=learned"
            )
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}; change one of them")
        if self.image % self.patch:
            raise ValueError(f"image={self.image} must be a multiple of patch={self.patch}; change one of them")
        return self


class ViTModel(nn.Module):
    """Images float [n, channels, image, image] -> logits [n, classes]."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        width = options.width
        self.pooling = options.pooling
        self.embedding = nn.Conv2d(options.channels, width, options.patch, stride=options.patch)
        token_count = int(options.pooling == "token")
        self.token = nn.Parameter(torch.zeros(1, token_count, width)) if token_count else None
        self.positions = nn.Parameter(torch.zeros(1, (options.image // options.patch) ** 2 + token_count, width))
        self.dropout = nn.Dropout(options.dropout)
        size = (width, options.heads, options.mlp_ratio * width, options.dropout)
        self.blocks = nn.Sequential(*(Block(*size, options.norm_placement) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6) if options.norm_placement == "pre" else nn.Identity()
        self.head = nn.Linear(width, options.classes)
        self.apply(_initialise)
        if options.positions == "sincos2d":
            # An untrained parameter and not a buffer, which the harness would average over micro-batches.
            table = sincos2d(options.image // options.patch, width)
            self.positions = nn.Parameter(table, requires_grad=False)
        else:
            nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.head.weight)
        # The optional parts draw last, so that the initial values of all others do not depend on them.
        self.pool = AttentionPool(*size).apply(_initialise) if options.pooling == "map" else None
        self.head_hidden = nn.Linear(width, width) if options.head_hidden else None
        if self.head_hidden is not None:
            _initialise(self.head_hidden)

    @override
    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(self.dropout(x + self.positions)))
        return self.head(self._head_input(x))

    def _head_input(self, x: Tensor) -> Tensor:
        """Pool the tokens float [n, t, width] to the input of the head [n, width]."""
        if self.pool is not None:
            x = self.pool(x)
        elif self.pooling == "token":
            x = x[:, 0]
        else:
            x = x.mean(1)
        return x if self.head_hidden is None else torch.tanh(self.head_hidden(x))


def sincos2d(side: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed positions float [1, side², width] of the patches, row by row (Beyer et al. 2022).

    For each patch sines and cosines of its column, then of its row, at width / 4 frequencies from 1 to 1 / temperature.
    """
    frequencies = temperature ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    x, y = (coordinate.reshape(-1, 1) * frequencies for coordinate in (column, row))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float().unsqueeze(0)


def _initialise(module: nn.Module) -> None:
    """Weights by Xavier's uniform rule and zero biases; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Block(nn.Module):
    """A transformer block on [n, t, width]: attention, then an MLP, each with a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, norm_placement: str = "pre") -> None:
        super().__init__()
        self.heads, self.dropout, self.norm_first = heads, dropout, norm_placement == "pre"
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self._attention(self.attention_norm(x))
            return x + self._mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self._attention(x))
        return self.mlp_norm(x + self._mlp(x))

    def _attention(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        shape = (n, t, 3, self.heads, width // self.heads)
        q, k, v = self.query_key_value(x).view(shape).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._apply_dropout(self.project(attended))

    def _mlp(self, x: Tensor) -> Tensor:
        return self._apply_dropout(self.contract(F.gelu(self.expand(x))))

    def _apply_dropout(self, x: Tensor) -> Tensor:
        # Without dropout nothing is drawn and nothing is copied.
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class AttentionPool(nn.Module):
    """Attention pooling of patches float [n, t, width] -> [n, width]: a learned probe attends to all patches; then an
    MLP with a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.probe = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, width)))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        # One query for all images.
        q = self.query(self.probe).view(1, self.heads, 1, width // self.heads).expand(n, -1, -1, -1)
        k, v = self.key_value(x).view(n, t, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        pooled = self.project(F.scaled_dot_product_attention(q, k, v).flatten(1))
        hidden = self.contract(F.gelu(self.expand(self.mlp_norm(pooled))))
        return pooled + F.dropout(hidden, self.dropout, self.training)


class ViT(ImageClassification):
    """Image classification with a Vision Transformer."""

    Model = ViTOptions

    @override
    def build_model(self) -> nn.Module:
        return ViTModel(self.model_options)

    @override
    def role_patterns(self) -> dict[str, str]:
        patterns = {"embedding.weight": "embedding", "positions": "embedding", "head.weight": "head"}
        of_pooling = {"token": {"token": "embedding"}, "map": {"pool.probe": "embedding"}, "mean": {}}
        return patterns | of_pooling[self.model_options.pooling]
