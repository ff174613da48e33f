"""The click model of the paper: embeddings, concatenation, MLP, one logit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amtl import methods
from amtl.config import TrainConfig
from amtl.data.encoding import Batch, EncodedData, Encoder

_LEVELS = 2**16


class ClickModel(nn.Module):
    """Looks all fields up in one table with one call, concatenates and scores them.

    Args:
        table: an embedding over the shared table of all fields: `nn.Embedding`-like if every field
            is single-valued, `nn.EmbeddingBag`-like (called with offsets) otherwise.
        num_fields: embedded fields F.
        dim: width D of the table's output.
        num_dense: standardised numbers K that join the embeddings.
        hidden: widths of the MLP's hidden layers.
        embedding_dropout: share of the embeddings' numbers zeroed in training mode, 0 to below 1.
    """

    def __init__(
        self,
        table: nn.Module,
        num_fields: int,
        dim: int,
        num_dense: int = 0,
        hidden: Sequence[int] = (128, 64),
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.table = table
        self.num_fields = num_fields
        self.dim = dim
        self.embedding_dropout = embedding_dropout
        layers: list[nn.Module] = []
        width = num_fields * dim + num_dense
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B]` of a batch."""
        if batch.offsets is None:
            embedded = self.table(batch.indices)
        else:
            embedded = self.table(batch.indices, batch.offsets)
        inputs = embedded.reshape(len(batch.labels), self.num_fields * self.dim)
        inputs = inputs.to(self.mlp[0].weight.dtype)
        if self.training and self.embedding_dropout:
            inputs = dropout(inputs, self.embedding_dropout)
        if batch.dense.shape[1]:
            inputs = torch.cat([inputs, batch.dense.to(inputs.dtype)], 1)
        logits: Tensor = self.mlp(inputs)
        return logits.squeeze(1)


def build_model(config: TrainConfig, encoder: Encoder) -> ClickModel:
    """A fresh model, the same for the same seed."""
    torch.manual_seed(config.seed)
    table = methods.build_table(
        config.method,
        encoder,
        config.dim,
        budget=config.budget,
        init_std=config.init_std,
        seed=config.seed,
        freeze_at=config.freeze_at,
        options=config.table_options,
    )
    torch.manual_seed(config.seed)
    return assemble(config, encoder, table)


def assemble(config: TrainConfig, encoder: Encoder, table: nn.Module) -> ClickModel:
    """The model of these settings around a table."""
    return ClickModel(
        table,
        len(encoder.fields),
        config.dim,
        len(encoder.dense_fields),
        config.hidden,
        config.embedding_dropout,
    )


def dropout(values: Tensor, share: float) -> Tensor:
    """Zeroes a random share of `values` and scales the rest up to keep the mean.

    `torch.nn.functional.dropout` draws a random number for each value, which on a CPU costs half a
    training step; here one of 64 bits serves four values.

    Args:
        values: any shape.
        share: 0 to below 1, rounded to multiples of 2^-16.
    """
    dropped = min(round(share * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    levels = words.random_(-(2**63), None).view(torch.int16)[: values.numel()]
    keep = (levels >= dropped - _LEVELS // 2).view(values.shape)
    return values * (keep.to(values.dtype) * (_LEVELS / (_LEVELS - dropped)))


@torch.no_grad()
def predict(model: nn.Module, data: EncodedData, batch_size: int = 16_384) -> Tensor:
    """Logits `[n]` of all samples, in evaluation mode; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        parts = [model(batch) for batch in data.batches(batch_size)]
    finally:
        model.train(training)
    return torch.cat(parts) if parts else torch.empty(0)
