"""Labelled rows to score a trained model by: those of a file, or of its own test split."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from amtl.data import labelled, load_rows
from amtl.data.columns import numbered
from amtl.data.encoded import EncodedData
from amtl.data.negatives import has_labels, with_negatives
from amtl.data.readers import require_columns
from amtl.data.weights import weighed
from amtl.errors import UserError
from amtl.run.trained import Trained


@dataclass(frozen=True)
class Scored:
    """Rows to score.

    Attributes:
        encoded: the rows, with labels and weights.
        groups: int64 `[n]`, which rows are of one value of a column, -1 where it is missing; None
            without such a column.
        strange: what is odd about them, a sentence each.
    """

    encoded: EncodedData
    groups: Tensor | None = None
    strange: tuple[str, ...] = ()


def of_test_split(trained: Trained, by: str | None = None) -> Scored:
    """The test rows of the data that a model was trained on.

    Raises:
        UserError: the data are not what they were, or have no column `by`.
    """
    frame, labels, weights = trained.test_rows()
    groups = None if by is None else grouped(frame, by)
    return Scored(trained.encoder.transform(frame, labels, weights), groups)


def of_file(
    trained: Trained,
    data: str,
    labelling: tuple[str | None, float | None, str | None, str | None],
    by: str | None = None,
) -> Scored:
    """The rows of a file.

    Args:
        trained: the model.
        data: the file. If all its rows are positive, negative ones are drawn as in training.
        labelling: see `read_labels`, each None as in training.
        by: the column that groups rows; None: none does.

    Raises:
        UserError: the file lacks a column, or a label says nothing.
    """
    config = trained.config
    label, threshold, positive, missing = labelling
    frame, told = load_rows(data, trained.encoder.optional())
    if config.negatives and label is None and not has_labels(frame):
        frame, _ = with_negatives(frame, config.negatives)
    if threshold is None and positive is None:
        threshold, positive = config.label_threshold, config.label_positive
    if label is not None and label in trained.encoder.columns:
        raise UserError(f"--label {label}: that is a field, from which the model predicts")
    missing = config.label_missing if missing is None else missing
    label = label or config.label
    frame, labels = labelled(frame, (label, threshold, positive, missing), trains=False)
    frame, weights = weighed(frame, config.weight, trains=False)
    groups = None if by is None else grouped(frame, by)
    encoded = trained.encoder.transform(frame, labels, weights)
    strange = [*told, *trained.unseen_columns(frame, encoded).values()]
    if trained.encoder.has_labels(encoded.labels):
        seen = "the model was trained on most of these rows, or chosen by them, as their labels"
        strange.append(f"{seen} tell; without a file amtl evaluate scores its test split")
    if config.weight and weights is None:
        absent = f"{data} has no column {config.weight!r}, which weighs rows in training"
        strange.append(f"{absent}: all rows weigh the same in these scores")
    return Scored(encoded, groups, tuple(strange))


def grouped(frame: pl.DataFrame, by: str) -> Tensor:
    """Which rows have the same value in a column: int64 `[n]`, -1 where it is missing.

    Raises:
        UserError: there is no such column, or it holds lists.
    """
    require_columns(frame.columns, [by], "the data")
    column = frame[by].fill_nan(None) if frame[by].dtype.is_float() else frame[by]
    if column.dtype.is_nested():
        raise UserError(f"--by {by}: that column holds lists; name one of single values")
    return torch.from_numpy(numbered(column))
