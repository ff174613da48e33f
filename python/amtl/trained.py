"""A trained model with its vocabularies: from a run folder or a packed file to predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from amtl import checkpoint, methods
from amtl.config import TrainConfig
from amtl.data.encoding import EncodedData, Encoder
from amtl.data.registry import load_source, read_labels
from amtl.data.splits import split_rows
from amtl.errors import UserError
from amtl.metrics import auc, log_loss
from amtl.model import ClickModel, predict
from amtl.storage import load_encoder


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
        """The test rows of the data it was trained on, loaded anew."""
        source = load_source(self.config.data)
        config = self.config
        labels = read_labels(
            source.frame, config.label, config.label_threshold, config.label_positive
        )
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


def load_run(folder: Path) -> Trained:
    """Loads the best model of a run folder.

    Raises:
        UserError: if the folder is no run, or has no model yet.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {str(folder)!r}; make one with amtl train --out")
    config = TrainConfig.from_dict(checkpoint.read_json(folder / "config.json"))
    encoder = load_encoder(folder / "vocabulary.safetensors")
    if not (folder / "best.pt").exists():
        raise UserError(
            f"{folder} has no trained model yet; go on with amtl train --resume --out {folder}"
        )
    best = checkpoint.load_checkpoint(folder / "best.pt")
    model = methods.build_model(config, encoder)
    model.load_state_dict(best["model"])
    if methods.is_adaptive(model.table):
        if not methods.is_frozen(model.table):
            model.table.freeze()  # type: ignore[operator]
        encoder.renumber(model.table.absorb_order())  # type: ignore[operator]
    model.eval()
    path = folder / "metrics.json"
    return Trained(config, encoder, model, checkpoint.read_json(path) if path.exists() else None)
