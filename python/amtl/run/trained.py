"""A trained model with its vocabularies: from raw rows to predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from amtl.data.encoding import EncodedData, Encoder
from amtl.data.registry import load_source, read_labels
from amtl.data.splits import split_rows
from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.metrics import auc, log_loss
from amtl.run.model import ClickModel, predict


@dataclass
class Trained:
    """What it takes to score raw rows.

    Attributes:
        config: settings it was trained with.
        encoder: vocabularies, numbered as the model's table is.
        model: in evaluation mode.
        metrics: of the run, where known.
    """

    config: TrainConfig
    encoder: Encoder
    model: ClickModel
    metrics: dict[str, Any] | None = None

    def logits(self, frame: pl.DataFrame) -> Tensor:
        """Logits `[n]` of raw rows."""
        return predict(self.model, self.encoder.transform(frame))

    def probabilities(self, frame: pl.DataFrame) -> Tensor:
        """Click probabilities `[n]` of raw rows."""
        return torch.sigmoid(self.logits(frame))

    def test_split(self) -> EncodedData:
        """The test rows of the data it was trained on, loaded anew.

        Raises:
            UserError: the data are not what they were.
        """
        source = load_source(self.config.data)
        config = self.config
        labels = read_labels(
            source.frame, config.label, config.label_threshold, config.label_positive
        )
        self.encoder.require_labels(labels, config.data)
        rows = split_rows(source.frame, self.config.split, self.config.split_seed)[2]
        return self.encoder.transform(source.frame[rows.numpy()], labels[rows])

    def evaluate(self, data: EncodedData) -> dict[str, Any]:
        """AUC, log loss, rows, and values unseen in training."""
        logits = predict(self.model, data)
        return {
            "rows": len(data),
            "auc": auc(logits, data.labels),
            "logloss": log_loss(logits, data.labels),
            "positive_rate": float(data.labels.mean()),
            "unknown_values": data.unknown,
        }


def size_table(trained: Trained) -> list[dict[str, Any]]:
    """Rows, bytes and sizes per field, for `amtl inspect`."""
    widths = methods.row_widths(trained.model.table)
    bits = methods.number_bits(trained.model.table)
    counts = trained.encoder.counts()
    result = []
    for f, name in enumerate(trained.encoder.names):
        rows = trained.encoder.field_rows(f)
        w, c = widths[rows].double(), counts[rows].double()
        result.append(
            {
                "field": name,
                "kind": trained.encoder.fields[f].kind,
                "rows": len(rows),
                "lookups": int(c.sum()),
                "mean_size": float(w.mean()),
                "mean_size_of_lookups": float((w * c).sum() / c.sum().clamp(min=1)),
                "min_size": int(w.min()),
                "max_size": int(w.max()),
                "bytes": int(w.sum()) * bits // 8,
            }
        )
    return result
