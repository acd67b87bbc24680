"""GPT-2 (Radford et al. 2019) on text: next-token prediction, loss in nats per token.

At scale=mini the tokens are bytes, at scale=full those of GPT-2's byte-pair encoding. The architecture is the published
one: pre-norm blocks, learned positions, GELU (tanh form), the head tied to the token embedding, and weights from
N(0, 0.02²), scaled by 1/sqrt(2 · layers) where they end a residual branch. 12 layers, width 768, 12 heads, context 1024
and 50,257 tokens are the published 124M model; padding the vocabulary to a multiple of 128 only changes the speed. The
held-out variants change the activation or the placement of the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from typing_extensions import override

from harness.errors import PreparationError
from harness.interface import Batch, Split, Workload, WorkloadError, sample_classes, to_device
from workloads.data import bpe, kjv, openwebtext, prepared
from workloads.data.openwebtext import Tokens
from workloads.data.read_ahead import ReadAhead

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": partial(F.gelu, approximate="tanh"), "silu": F.silu}


class GPT2Options(BaseModel):
    """Size and architecture of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: int = Field(ge=2)
    context: int = Field(ge=1)
    """Tokens that a prediction can depend on, and tokens per training example."""
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    activation: Literal["gelu", "silu"] = "gelu"
    norm_placement: Literal["pre", "res-post"] = "pre"
    """pre: x + f(norm(x)); res-post: x + norm(f(x)) (Liu et al. 2022, Swin Transformer V2, arXiv:2111.09883)."""

    @model_validator(mode="after")
    def _check_sizes(self) -> GPT2Options:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}; change one of them")
        return self


class GPT2Model(nn.Module):
    """Tokens int64 [n, t] -> logits [n, t, vocabulary], t <= context."""

    def __init__(self, options: GPT2Options) -> None:
        super().__init__()
        width = options.width
        self.tokens = nn.Embedding(options.vocabulary, width)
        self.positions = nn.Embedding(options.context, width)
        self.dropout = nn.Dropout(options.dropout)
        architecture = (options.activation, options.norm_placement)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.dropout, *architecture) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        # The layers that end a residual branch.
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.project, block.contract):
                nn.init.normal_(last.weight, std=0.02 / (2 * options.layers) ** 0.5)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        # The head is the token embedding.
        return F.linear(self.norm(x), self.tokens.weight)


class Block(nn.Module):
    """A transformer block on [n, t, width]: causal attention, then an MLP, each with a LayerNorm and a residual."""

    def __init__(
        self, width: int, heads: int, dropout: float, activation: str = "gelu", norm_placement: str = "pre"
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.activation, self.norm_first = ACTIVATIONS[activation], norm_placement == "pre"
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self._attention(self.attention_norm(x))
            return x + self._mlp(self.mlp_norm(x))
        x = x + self.attention_norm(self._attention(x))
        return x + self.mlp_norm(self._mlp(x))

    def _attention(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.query_key_value(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self._apply_dropout(self.project(attended.transpose(1, 2).flatten(2)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self._apply_dropout(self.contract(self.activation(self.expand(x))))

    def _apply_dropout(self, x: Tensor) -> Tensor:
        # Without dropout nothing is drawn and nothing is copied.
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02²) and zero biases; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class TextData(BaseModel):
    """Options of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Literal["kjv", "openwebtext"] = "kjv"
    blocks: int | None = Field(default=None, ge=10)
    """kjv: the text is cut into so many blocks; of every ten, one is for validation and one for the test."""
    evaluation_examples: int = Field(ge=1)
    """Windows of `context` tokens per evaluation, spread evenly over the split."""
    evaluation_batch: int = Field(ge=1)
    """Windows per forward of an evaluation."""

    @model_validator(mode="after")
    def _check_blocks(self) -> TextData:
        if (self.blocks is None) == (self.dataset == "kjv"):
            raise ValueError(
                f"blocks={self.blocks} with dataset={self.dataset}: kjv needs a number, openwebtext needs null"
            )
        return self


EVALUATION_SPLITS: tuple[Split, ...] = ("validation", "test")


class GPT2(Workload):
    """Next-token prediction on text."""

    Model = GPT2Options
    Data = TextData
    loss_type = "softmax_cross_entropy"

    @override
    def load(self, source: str, device: torch.device) -> None:
        self._device = device
        load_splits = self._load_kjv if self.data_options.dataset == "kjv" else self._load_openwebtext
        splits = load_splits(source)
        context, train = self.model_options.context, len(self._train)
        if min(train, *map(len, splits.values())) < 2 * context + 1:
            lengths = ", ".join(f"{len(tokens):,} for {split}" for split, tokens in splits.items())
            raise WorkloadError(
                f"workload.model.context={context} is too long for these data, which have {train:,} tokens for "
                f"training, {lengths}; lower it, or prepare more data"
            )
        self._evaluation_windows = {split: self._spread_windows(tokens) for split, tokens in splits.items()}

    def _load_kjv(self, source: str) -> dict[str, Tokens | Tensor]:
        """Load the training split onto the device; returns the evaluation splits."""
        options: TextData = self.data_options
        assert options.blocks is not None
        name, text = kjv.load_text(source)
        # The path of a folder is not recorded.
        self._fingerprint = {"name": "kjv", "source": name if name == "package" else "folder", "text": kjv.SHA256}
        splits = kjv.split_text(text, options.blocks, {"validation": 4, "test": 9})
        self._train: Tensor | Tokens = torch.from_numpy(splits["train"].copy()).to(self._device)
        return {split: torch.from_numpy(splits[split].copy()).long().to(self._device) for split in EVALUATION_SPLITS}

    def _load_openwebtext(self, source: str) -> dict[str, Tokens | Tensor]:
        """Open the training split, which stays on the disk; returns the evaluation splits."""
        try:
            data, shards = openwebtext.load_shards(source)
        except PreparationError as error:
            raise WorkloadError(str(error)) from error
        if (vocabulary := self.model_options.vocabulary) < bpe.SIZE:
            raise WorkloadError(
                f"workload.model.vocabulary={vocabulary} is smaller than the vocabulary of the prepared tokens; set it "
                f"to {bpe.SIZE}, or to 50304, the next multiple of 128"
            )
        self._fingerprint = data.fingerprint
        self._train = Tokens(shards["train"])
        self._read_ahead = ReadAhead(self._read_windows, self.lookahead, self._device)
        return {split: Tokens(shards[split]) for split in EVALUATION_SPLITS}

    @classmethod
    @override
    def missing_data(cls, data: dict[str, Any], source: str) -> str:
        dataset = data.get("dataset", "kjv")
        return "" if dataset == "kjv" else prepared.missing_data(dataset, source)

    @override
    def discard_held_back(self) -> None:
        self._evaluation_windows = {}

    @property
    @override
    def lookahead(self) -> int:
        return 0 if self.data_options.dataset == "kjv" else 2

    @override
    def prefetch(self, indices: Tensor, keys: Tensor) -> None:
        if self.lookahead:
            self._read_ahead.prefetch(indices, keys)

    @property
    @override
    def fingerprint(self) -> dict[str, str]:
        return self._fingerprint

    @property
    @override
    def train_size(self) -> int:
        # Adjacent windows, less one to leave room for the shift.
        return len(self._train) // self.model_options.context - 1

    @override
    def build_model(self) -> nn.Module:
        return GPT2Model(self.model_options)

    @override
    def batch(self, indices: Tensor, keys: Tensor) -> Batch:
        """As `Workload.batch`; inputs and labels int64 [n, context].

        Window i starts at token i · context + key mod context. The shift makes every epoch cut the text differently.
        """
        if self.lookahead:
            windows = self._read_ahead.get(indices, keys).to(self._device, non_blocking=True).long()
        else:
            assert isinstance(self._train, Tensor)
            context = self.model_options.context
            start = to_device(indices * context + keys.remainder(context), self._device)
            windows = self._train.unfold(0, context + 1, 1).index_select(0, start).long()
        return {"inputs": windows[:, :-1], "labels": windows[:, 1:]}

    def _read_windows(self, indices: Tensor, keys: Tensor) -> Tensor:
        """The windows of a batch from the disk, int32 [n, context + 1] on the CPU, pinned where there is a GPU."""
        assert isinstance(self._train, Tokens)
        context = self.model_options.context
        starts = (indices * context + keys.remainder(context)).numpy()
        windows = torch.from_numpy(self._train.windows(starts, context + 1).astype(np.int32))
        return windows.pin_memory() if self._device.type == "cuda" else windows

    @override
    def loss(self, outputs: Tensor, batch: Batch, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """As `Workload.loss`: the cross-entropy in nats per token."""
        losses = F.cross_entropy(outputs.float().flatten(0, 1), batch["labels"].flatten(), reduction=reduction)
        return losses if reduction == "mean" else losses.view_as(batch["labels"]).mean(1)

    @override
    def sample_labels(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        probabilities = outputs.float().softmax(-1).flatten(0, 1)
        return sample_classes(probabilities, generator).view(outputs.shape[:2])

    @override
    def evaluation_batches(self, split: Split, part: slice = slice(None)) -> Iterator[Batch]:
        for windows in self._evaluation_windows[split].split(self.data_options.evaluation_batch)[part]:
            yield {"inputs": windows[:, :-1], "labels": windows[:, 1:]}

    @override
    def evaluation_sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As `Workload.evaluation_sums`, for `loss` in nats per token; the examples that are counted are tokens."""
        labels = batch["labels"]
        return {
            "loss": F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten(), reduction="sum"),
            "num_examples": torch.tensor(labels.numel()),
        }

    def _spread_windows(self, text: Tokens | Tensor) -> Tensor:
        """Windows int64 [evaluation_examples, context + 1] on the device, spread evenly over the tokens of a split."""
        context, count = self.model_options.context, self.data_options.evaluation_examples
        last = len(text) - context - 1
        start = torch.arange(count) * last // max(1, count - 1)
        if isinstance(text, Tokens):
            windows = text.windows(start.numpy(), context + 1).astype(np.int64)
            return torch.from_numpy(windows).to(self._device)
        return text[(start[:, None] + torch.arange(context + 1)).to(self._device)]
