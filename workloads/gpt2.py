"""GPT-2 on bytes of English text (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Pre-norm blocks, learned positions, GELU in its tanh form, output head tied to the token embedding, and the weights
that write into the residual stream initialised smaller by 1/sqrt(2 x layers). Validation metric: nats per byte.
The published 124M model is vocab 50257, context 1024, 12 layers, width 768, 12 heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from harness.workload import Batch, Facts, Split, Workload
from workloads.data import text


class GPT2Model(BaseModel):
    """Size of the transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab: int = Field(ge=2)
    """Number of tokens."""
    context: int = Field(ge=1)
    """Tokens the model sees at once, and predicts in one example."""
    layers: int = Field(ge=1)
    """Transformer blocks."""
    width: int = Field(ge=1)
    """Size of the residual stream."""
    heads: int = Field(ge=1)
    """Attention heads; each is width / heads wide."""
    dropout: float = Field(ge=0, lt=1)
    """On embeddings, attention weights and both branches of a block."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPT2Model:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; make it one")
        return self


class TextData(BaseModel):
    """How the text is split and evaluated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: int = Field(ge=4)
    """Equal pieces the text is cut into."""
    period: int = Field(ge=4)
    """Of so many neighbouring blocks, one is validation and one is test."""
    evaluation_windows: int = Field(ge=1)
    """Windows of one context evaluated per split, spread evenly over the held-back text."""
    evaluation_batch: int = Field(ge=1)
    """Windows per forward in evaluation."""

    @model_validator(mode="after")
    def _whole_period(self) -> TextData:
        if self.blocks < self.period:
            raise ValueError(f"blocks={self.blocks} is less than period={self.period}, so that no block would be test")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head self-attention, [n, time, width] -> the same."""

    def __init__(self, options: GPT2Model) -> None:
        super().__init__()
        self.heads, self.dropout = options.heads, options.dropout
        self.qkv = nn.Linear(options.width, 3 * options.width)
        self.projection = nn.Linear(options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        n, time, width = x.shape
        # [n, time, 3 * width] -> three of [n, heads, time, width / heads]
        q, k, v = self.qkv(x).view(n, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.projection(y.transpose(1, 2).reshape(n, time, width))


class MLP(nn.Module):
    """Four times as wide inside, [n, time, width] -> the same."""

    def __init__(self, options: GPT2Model) -> None:
        super().__init__()
        self.expansion = nn.Linear(options.width, 4 * options.width)
        self.projection = nn.Linear(4 * options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.gelu(self.expansion(x), approximate="tanh"))


class Block(nn.Module):
    """Communicate, then think; each normalised first and added to the stream."""

    def __init__(self, options: GPT2Model) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(options.width)
        self.attention = Attention(options)
        self.norm_mlp = nn.LayerNorm(options.width)
        self.mlp = MLP(options)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class GPT(nn.Module):
    """Tokens int64 [n, time <= context] -> logits [n, time, vocab]."""

    def __init__(self, options: GPT2Model) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(options.vocab, options.width)
        self.position_embedding = nn.Embedding(options.context, options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, options.vocab, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialise(options.layers)

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):
                # Each block adds two terms to the stream; this keeps its variance independent of the depth.
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Workload
# ---------------------------------------------------------------------------------------------------------------------


class GPT2(Workload):
    """Next-byte prediction. Batch: ``inputs`` and ``labels``, int64 [n, context]; metric ``loss`` in nats per byte."""

    Model = GPT2Model
    Data = TextData
    role_patterns: ClassVar = {"token_embedding.weight": "embedding", "position_embedding.weight": "embedding"}

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.context: int = self.model_options.context

    def load(self, source: str, device: torch.device) -> None:
        content, way = text.load(source)
        self._fingerprint = {"source": way, "text": text.SHA256}
        parts = text.split(content, self.data_options.blocks, self.data_options.period)
        # Bytes stay bytes on the device; a batch is widened when it is cut out.
        self._bytes = {name: torch.from_numpy(part.copy()).to(device) for name, part in parts.items()}
        self._offsets = torch.arange(self.context + 1, device=device)

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    @property
    def train_size(self) -> int:
        return len(self._bytes["train"]) // self.context - 1  # One less leaves room for the jitter of the last one.

    def build_model(self) -> nn.Module:
        return GPT(self.model_options)

    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """Example i starts at byte i x context, moved on by up to context - 1 bytes, as its key says."""
        return self._cut("train", indices * self.context + keys % self.context)

    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        losses = F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction=reduction)
        # Every example has the same number of tokens, so the mean over tokens is the mean over examples.
        return losses if reduction == "mean" else losses.view_as(batch["labels"]).mean(1)

    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = outputs.detach().float().softmax(-1)
        return torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(outputs.shape[:-1])

    def evaluation_batches(self, split: Split) -> Iterator[Batch]:
        last = len(self._bytes[split]) - self.context - 1
        count = min(self.data_options.evaluation_windows, last // self.context + 1)
        starts = torch.arange(count) * last // max(count - 1, 1)
        for some in starts.split(self.data_options.evaluation_batch):
            yield self._cut(split, some)

    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        losses = self.loss(outputs, batch, reduction="none")
        return {"loss": losses.sum(), "num_examples": torch.tensor(len(losses), device=losses.device)}

    def _cut(self, split: str, starts: Tensor) -> Batch:
        content = self._bytes[split]
        windows = content[starts.to(content.device, non_blocking=True)[:, None] + self._offsets].long()
        return {"inputs": windows[:, :-1], "labels": windows[:, 1:]}
