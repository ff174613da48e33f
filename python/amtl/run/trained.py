"""A trained model with its vocabularies: from raw rows to predictions."""

from __future__ import annotations

import re
import shlex
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from amtl.data.columns import column_of
from amtl.data.encoded import EncodedData
from amtl.data.encoding import Encoder
from amtl.data.moments import without_odd
from amtl.data.readers import Rows, as_frame
from amtl.data.registry import load_source
from amtl.data.specs import numbers
from amtl.data.splits import split_rows
from amtl.data.threads import require_threads
from amtl.errors import brief
from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.metrics import auc, auc_error, grouped_auc, log_loss
from amtl.run.model import ClickModel, predict
from amtl.run.preparation import copies_of, held, rows_of

_UNSEEN = 0.9
"""Share of unseen values from which on a column is taken to be written in another way; and of
numbers beyond nearly all of training's."""
_SEEN_THEN = 0.5
"""Share of unseen values in training and test below which that is no trait of the column."""
_ENOUGH = 50
"""Values from which such a share says something."""


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
    _tally: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    _told: set[str] = field(default_factory=set, repr=False, compare=False)

    def logits(self, frame: Rows) -> Tensor:
        """Logits `[n]` of raw rows, float32.

        Args:
            frame: a DataFrame of polars or pandas, a polars LazyFrame, a pyarrow Table, a dict of
                lists or arrays, or a list of dicts, with the columns it was trained on. They need
                not be of the types they had then: text such as `12.0`, `True` and `A|B` stands for
                the number, the boolean and the list. A column of which nearly no value was seen in
                training is warned of once.

        Raises:
            RuntimeError: in a process forked from one that had used polars, as by opening a model.
            TypeError: if `frame` is no such table.
            UserError: if a column is missing, or holds what cannot be values of its field.
        """
        return self._logits(frame)

    def probabilities(self, frame: Rows) -> Tensor:
        """Click probabilities `[n]` of raw rows, float32; otherwise as `logits`."""
        return torch.sigmoid(self._logits(frame))

    def _logits(self, rows: Rows) -> Tensor:
        require_threads()
        frame = as_frame(rows)
        data = self.encoder.transform(frame)
        for column, sentence in self.unseen_columns(frame, data).items():
            if column not in self._told:
                self._told.add(column)
                warnings.warn(sentence, stacklevel=3)
        return predict(self.model, data)

    def unseen_columns(self, frame: pl.DataFrame, data: EncodedData) -> dict[str, str]:
        """Columns with hardly a value seen in training (10 %), where that is no trait of theirs.

        Values of small batches are counted up until there are 50. Of 50 and more in one batch, so
        are numbers nearly all of which are larger, or smaller, than nearly all of training's.

        Args:
            frame: raw rows.
            data: the same, encoded.

        Returns:
            Column to a sentence with a value of either side, and what to do.
        """
        result = {}
        metrics = self.metrics or {}
        tested = metrics.get("unknown_test_values", {})
        # Runs that do not say how many rows trained are taken to be split 80/10/10.
        parts = metrics.get("split_rows", {"train": 8, "test": 1})
        times = parts["train"] / max(parts["test"], 1)
        # Not over batches: one row that is asked for again and again may well be at an end.
        ends = self.encoder.at_ends(data) if len(frame) >= _ENOUGH else ()
        for name, edge, share, beyond, values in ends:
            if values < _ENOUGH or beyond <= _UNSEEN * values:
                continue
            spec = self.encoder.fields[self.encoder.names.index(name)]
            read = numbers(column_of(frame, spec), spec).to_numpy()
            amid = float(np.nanmedian(read))
            result[name] = (
                f"column {name!r}: {beyond:,} of {values:,} numbers are "
                f"{'above' if amid > edge else 'at most'} {edge:g}, where training had {share:.1%} "
                f"of its own. Here they are such as {amid:g}: if their unit is another one, write "
                "them as the training data have them, else train on data such as these"
            )
        for name, unknown in data.unknown.items():
            before = self._tally.pop(name, (0, 0))
            unknown, values = before[0] + unknown, before[1] + data.values[name]
            if values < _ENOUGH:
                self._tally[name] = unknown, values
                continue
            if unknown <= _UNSEEN * values:
                continue
            f = self.encoder.names.index(name)
            vocabulary = self.encoder.vocabularies[f]
            test = times * tested.get(name, 0) / max(int(vocabulary.counts.sum()), 1)
            if max(self.encoder.unseen_share(name), test) >= _SEEN_THEN:
                continue
            odd, known = self.encoder.examples(name, frame)
            here = "missing"
            if odd is not None:
                dtype = column_of(frame, self.encoder.fields[f]).dtype
                here = f"such as {brief(repr(odd))} ({brief(dtype)})"
            there = "" if known is None else f", in training such as {brief(repr(known))}"
            remedy = "write the column as the training data have it, or train on data such as these"
            if _alike(odd, known):
                remedy = (
                    f"written alike, they are new ones; if rows to score always have new ones, "
                    f"train with --drop {shlex.quote(name)}, or split as they come: --split "
                    "order:COLUMN or column:COLUMN, by which validation has new ones, too"
                )
            so = "predictions do without it"
            if self.encoder.reads_numbers(name, frame):
                so = "predictions know it by its number only"
            result[name] = (
                f"column {name!r}: {unknown:,} of {values:,} values were not seen in training, so "
                f"{so}. Here they are {here}{there}: {remedy}"
            )
        return result

    def test_split(self) -> EncodedData:
        """The test rows of the data it was trained on, loaded anew: see `test_rows`."""
        return self.encoder.transform(*self.test_rows())

    def test_rows(self) -> tuple[pl.DataFrame, Tensor, Tensor | None]:
        """The test rows of the data it was trained on, with their labels and weights.

        Raises:
            UserError: the data are not what they were.
        """
        config = self.config
        source = load_source(config.data, config.negatives)
        frame, labels, weights = rows_of(source, config)
        self.encoder.require_labels(labels, config.data)
        frame, _ = without_odd(frame)
        same = copies_of(frame, labels, config)
        rows = split_rows(frame, config.split, config.split_seed, same)[2]
        part = None if weights is None else weights[rows]
        return frame[rows.numpy()], labels[rows], part

    def evaluate(self, data: EncodedData, groups: Tensor | None = None) -> dict[str, Any]:
        """AUC with its standard error, log loss, rows by class, and values unseen in training.

        Of rows that weigh anything, by their weights. With `groups` (see `grouped_auc`) also the
        AUC within these, how many have one, and which share of the rows they are.
        """
        logits, labels, weights = predict(self.model, data), data.labels, data.weights
        rate = labels.mean() if weights is None else (labels * weights).sum() / weights.sum()
        within: dict[str, Any] = {}
        if groups is not None:
            names = ("grouped_auc", "groups", "grouped_rows")
            within = dict(zip(names, grouped_auc(logits, labels, groups, weights), strict=True))
        return {
            **held(labels, weights),
            **within,
            "auc": auc(logits, labels, weights),
            "auc_error": auc_error(logits, labels, weights),
            "logloss": log_loss(logits, labels, weights),
            "positive_rate": float(rate),
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


def _alike(one: object, other: object) -> bool:
    """Whether two values have letters, digits and marks in the same places."""
    if one is None or other is None:
        return False
    shapes = (re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", str(v))) for v in (one, other))
    return len(set(shapes)) == 1
