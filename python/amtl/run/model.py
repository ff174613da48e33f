"""The click model: embeddings of all fields, an MLP over them, what a backbone adds, one logit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from amtl.data.encoded import Batch, EncodedData
from amtl.data.encoding import Encoder
from amtl.run import methods
from amtl.run.backbones import Interaction, interaction, pooling
from amtl.run.config import TrainConfig

_LEVELS = 2**16
_EVIDENCE_SAMPLES = 50_000
_EVIDENCE_NUMBERS = 2**26
"""Of embeddings in memory at once, at most."""


class ClickModel(nn.Module):
    """Looks all fields up in one table with one call and scores them.

    With `backbone="dnn"` it is the model of the paper: embeddings, concatenation, MLP, one logit.

    Args:
        table: an embedding over the shared table of all fields: `nn.Embedding`-like if every field
            is single-valued, `nn.EmbeddingBag`-like (called with offsets) otherwise.
        num_fields: embedded fields F.
        dim: width D of the table's output.
        num_dense: numbers K that join the embeddings.
        hidden: widths of the MLP's hidden layers.
        embedding_dropout: share of the embeddings' numbers zeroed in training mode, 0 to below 1.
        backbone: what is added to the MLP, a key of `amtl.run.backbones.INTERACTIONS`.
        num_bags: how many of the fields, the last ones, have several values.
        roots: which fields are multiplied by the root of how many values they have; none if None.
        means: whether the backbone takes means over fields, as `amtl.run.backbones` has them.

    Raises:
        UserError: the backbone needs other fields or a larger `dim`.
    """

    def __init__(
        self,
        table: nn.Module,
        num_fields: int,
        dim: int,
        num_dense: int = 0,
        hidden: Sequence[int] = (128, 64),
        embedding_dropout: float = 0.0,
        backbone: str = "dnn",
        num_bags: int = 0,
        roots: Sequence[bool] | None = None,
        means: bool = True,
    ) -> None:
        super().__init__()
        self.table = table
        self.num_fields = num_fields
        self.dim = dim
        self.embedding_dropout = embedding_dropout
        self.pooling = pooling(backbone, num_fields - num_bags, num_bags, dim)
        self.interaction = interaction(backbone, num_fields, dim, num_dense, means)
        # No buffer: models of files are made without memory, and have theirs from there alone.
        self.roots = list(roots) if roots and any(roots) and self.pooling is None else None
        layers: list[nn.Module] = []
        width = num_fields * (dim - self.interaction.first_order) + num_dense
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B]` of a batch."""
        return self.score(self.embed(batch), batch.dense)

    def embed(self, batch: Batch) -> Tensor:
        """What the table gives for a batch, fields of several values pooled: `[B, F, D]`."""
        if batch.offsets is None:
            embedded = self.table(batch.indices)
        elif self.pooling is not None:
            each = torch.arange(
                batch.indices.shape[0], dtype=torch.int32, device=batch.indices.device
            )
            embedded = self.pooling(self.table(batch.indices, each), batch.offsets)
        else:
            embedded = self.table(batch.indices, batch.offsets)
        embedded = embedded.reshape(batch.labels.shape[0], self.num_fields, self.dim)
        if self.roots is None or batch.offsets is None:
            return embedded
        ends = batch.offsets.new_full((1,), batch.indices.shape[0])
        lengths = torch.diff(batch.offsets, append=ends).view(-1, self.num_fields)
        roots = torch.tensor(self.roots, device=lengths.device)
        factors = torch.where(roots, lengths.sqrt(), 1.0).to(embedded.dtype)
        return embedded * factors[:, :, None]

    def score(self, embedded: Tensor, dense: Tensor) -> Tensor:
        """Logits `[B]` of embeddings `[B, F, D]` and numbers `[B, K]`."""
        embedded = embedded.to(dense.dtype)
        if self.training and self.embedding_dropout:
            embedded = dropout(embedded, self.embedding_dropout)
        logits: Tensor = self.mlp(self._inputs(embedded, dense))
        return logits.squeeze(1) + self._interact(embedded, dense)

    def _inputs(self, embedded: Tensor, dense: Tensor) -> Tensor:
        """Of the MLP."""
        inputs = embedded[:, :, int(self.interaction.first_order) :].flatten(1)
        return torch.cat([inputs, dense.to(inputs.dtype)], 1) if dense.shape[1] else inputs

    def _interact(self, embedded: Tensor, dense: Tensor) -> Tensor:
        """What the backbone adds."""
        first = int(self.interaction.first_order)
        own, embedded = embedded[:, :, :first].flatten(1), embedded[:, :, first:]
        added: Tensor = self.interaction(own, embedded, dense)
        return added

    def scores_without(self, embedded: Tensor, dense: Tensor, means: Tensor) -> Iterator[Tensor]:
        """Logits `[B]` as `score` has them, with each field in turn replaced by its row of `means`.

        The first layer is summed once, and changes by what the field contributes: with hundreds of
        fields whole passes would take minutes.
        """
        embedded, means = embedded.to(dense.dtype), means.to(dense.dtype)
        first, linear = int(self.interaction.first_order), self.mlp[0]
        assert isinstance(linear, nn.Linear)
        width = self.dim - first
        summed = linear(self._inputs(embedded, dense))
        for field, mean in enumerate(means):
            columns = linear.weight[:, field * width : (field + 1) * width]
            change = (mean - embedded[:, field])[:, first:] @ columns.T
            logits = self.mlp[1:](summed + change).squeeze(1)
            replaced = embedded
            if type(self.interaction) is not Interaction:
                replaced = embedded.clone()
                replaced[:, field] = mean
            yield logits + self._interact(replaced, dense)

    def dense_parameters(self) -> list[nn.Parameter]:
        """Everything but the table."""
        table = {id(parameter) for parameter in self.table.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in table]


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
        options=config.layer_options,
    )
    torch.manual_seed(config.seed)
    return assemble(config, encoder, table)


def assemble(config: TrainConfig, encoder: Encoder, table: nn.Module) -> ClickModel:
    """The model of these settings around a table."""
    return ClickModel(
        table,
        len(encoder.fields),
        config.dim,
        encoder.num_dense,
        config.hidden,
        config.embedding_dropout or 0.0,
        config.backbone,
        sum(field.kind == "bag" for field in encoder.fields),
        [field.root for field in encoder.fields],
        config.backbone_means,
    )


@torch.no_grad()
def field_evidence(model: ClickModel, data: EncodedData) -> Tensor:
    """What each field's embeddings are worth on data that the model was not trained on.

    The rise of the mean log loss when the embeddings of field f are replaced by their mean. Unlike
    sums over gradients it sees that a field repeats what another one says, or only overfits.

    Args:
        model: trained.
        data: held out; its first 50,000 samples are used, for two passes of the table, one of the
            first layer of the MLP and F + 1 of the others.

    Returns:
        float64 `[F]` in nats a sample, weighted as the data are; negative where the model does
        better without the field.
    """
    training = model.training
    model.eval()
    samples = min(len(data), _EVIDENCE_SAMPLES)
    size = min(8192, max(256, _EVIDENCE_NUMBERS // (model.num_fields * model.dim)))

    def batches() -> Iterator[Batch]:
        for start in range(0, samples, size):
            yield data.batch(torch.arange(start, min(samples, start + size)))

    sums = torch.zeros(model.num_fields, model.dim, dtype=torch.float64)
    for batch in batches():
        embedded = model.embed(batch)
        if batch.weights is not None:
            embedded = embedded * batch.weights[:, None, None]
        sums += embedded.sum(0, dtype=torch.float64)
    total = float(samples if data.weights is None else data.weights[:samples].sum())
    means = sums / (total or 1)
    whole, without = 0.0, torch.zeros(model.num_fields, dtype=torch.float64)
    for batch in batches():
        embedded, told = model.embed(batch), (batch.labels.double(), batch.weights)

        def loss(logits: Tensor, told: tuple[Tensor, Tensor | None] = told) -> float:
            logits = logits.double()
            return float(binary_cross_entropy_with_logits(logits, *told, reduction="sum"))

        whole += loss(model.score(embedded, batch.dense))
        found = model.scores_without(embedded, batch.dense, means)
        without += torch.tensor([loss(logits) for logits in found], dtype=torch.float64)
    model.train(training)
    return (without - whole) / (total or 1)


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
    keep = (levels >= dropped - _LEVELS // 2).view(values.shape).to(values.dtype)
    return values * keep.mul_(_LEVELS / (_LEVELS - dropped))


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
