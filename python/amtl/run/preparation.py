"""From a run's settings to its data: read, split, encoded, and what they are too few for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from amtl.data import calendar, hosts, moments, pairs, places
from amtl.data.columns import called as part_called
from amtl.data.copies import copies, number_of
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.labels import labelled
from amtl.data.later import for_later_rows
from amtl.data.names import with_words
from amtl.data.negatives import Negatives
from amtl.data.ordered import Floats
from amtl.data.registry import Source, load_source
from amtl.data.repeats import without_repeats
from amtl.data.splits import split_column, split_rows
from amtl.data.weights import weighed
from amtl.errors import UserError, brief
from amtl.run.config import TrainConfig
from amtl.run.earlier import Earlier
from amtl.run.learner import Task
from amtl.run.metrics import FEW, one_class, rarer

_WEIGHT = re.compile(r"(?i)(?:sample|row|example|instance|importance|case)[ _-]?weights?")
"""What columns are called that say how much a row counts, as where negative rows were left out."""
VALIDATED = 2**18
"""Rows at most of the validation split, which is looked at dozens of times: always the same ones,
so that what differs between models is told far better than the AUC itself."""


def prepare(
    config: TrainConfig,
    source: Source | None = None,
    encoder: Encoder | None = None,
    earlier: Earlier | None = None,
) -> Task:
    """Loads, splits and encodes the data of a run.

    Args:
        config: which data and how.
        source: the data if already loaded.
        encoder: reuse this one instead of fitting one on the training split.
        earlier: what training starts from, whose fields and values these data add to.

    Raises:
        UserError: the data do not suit the settings, or are not those that `encoder` was fitted on.
    """
    source = source or load_source(config.data, config.negatives)
    frame, labels, weights = rows_of(source, config)
    frame, odd = moments.without_odd(frame)
    same = copies_of(frame, labels, config)
    parts = split_rows(frame, config.split, config.split_seed, same)
    ordered = config.split.removeprefix("order:") if config.split.startswith("order:") else ""
    latest = parts[1][len(parts[1]) // 2 :] if ordered else None
    parts = (parts[0], _validated(parts[1], config.split_seed), parts[2])
    _require_both(labels, weights, parts)
    if weights is not None:
        weights = weights / weights[parts[0]].mean(dtype=torch.float64)
    if encoder is None and earlier is not None:
        # Of the same rows counts would be twice what they are.
        same_rows = earlier.encoder.has_labels(labels)
        encoder = earlier.encoder
        if not same_rows:
            encoder = encoder.extended(frame, config.min_count, parts[0])
        encoder.note_labels(labels)
    if encoder is None:
        marks = {**source.marks, **odd}
        names = config.fields or default_fields(frame, config, source)
        how = config.default_numeric, config.values
        called = {name: part_called(frame, name, *how) for name in names}
        names = [name for name in names if called[name] is None]
        numeric = {**{k: v for k, v in source.numeric.items() if k in names}, **config.numeric}
        if config.negatives:
            # Users have as many rows of either label by that, which says nothing of them.
            user = Negatives.of(config.negatives, frame.columns).user
            if user in names and frame[user].dtype.is_numeric():
                numeric = {user: "categorical", **numeric}
        known, told = _training_labels(labels, parts[0]), {*numeric, *config.separators}
        specs = infer_fields(
            frame,
            names,
            numeric=numeric,
            default_numeric=config.default_numeric,
            values=config.values,
            separators=config.separators,
            labels=known,
            marks=marks,
        )
        if config.split != "random":
            validate, kind = parts[1].numpy(), config.default_numeric
            specs = for_later_rows(
                frame,
                specs,
                known,
                validate,
                latest=None if latest is None else latest.numpy(),
                ordered=ordered,
                told=told,
                default_numeric=kind,
            )
        specs += [spec for spec in called.values() if spec]
        if not (config.fields or source.fields):
            skip = {config.label, *config.drop}
            specs += calendar.parts(frame, known, skip, marks)
            specs += places.parts(frame, *how, {*skip, *told})
            specs = hosts.with_parts(frame, specs, known, {*skip, *told})
            specs = pairs.with_parts(frame, specs, known, skip)
        specs = without_repeats(frame, specs, {*told, *(n for n in called if n not in names)})
        if not (config.fields or source.fields):
            specs = with_words(frame, specs, known, {config.label, *config.drop, *told})
        encoder = Encoder.fit(frame, specs, config.min_count, parts[0])
        encoder.note_labels(labels)
    encoder.require_labels(labels, config.data)
    whole = encoder.transform(frame, labels, weights)
    notes = [
        f"{name}: {brief(', '.join(map(repr, texts)))} among dates and times taken as missing"
        for name, texts in odd.items()
    ]
    notes += [
        f"{name!r} is taken as a field like any other; --weight {shlex.quote(name)} weighs the "
        f"rows by it, --drop {shlex.quote(name)} leaves it out"
        for name in encoder.columns
        if _WEIGHT.fullmatch(name) and not config.fields
    ]
    if config.skip_rows:
        notes.append(
            f"the first {config.skip_rows:,} rows are those that {config.warm_start} had, and are "
            f"left out; {len(labels):,} are new"
        )
    if config.weight is not None:
        notes.append(
            f"rows count as {config.weight!r} weighs them, in training and in all scores; sizes "
            "and vocabularies go by the number of rows"
        )
    if same is not None:
        notes.append(
            f"{number_of(same):,} rows are copies of others, the label included; the split has all "
            "copies of a row in one part, for what was learnt by heart tests nothing"
        )
    train, val, test = (encoder.part(whole, rows) for rows in parts)
    return Task(encoder, train, val, test, tuple(notes), earlier)


def rows_of(source: Source, config: TrainConfig) -> tuple[pl.DataFrame, Tensor, Tensor | None]:
    """The rows that a run is of, those that are new and have a label; their labels and weights."""
    frame, labels = labelled(source.frame, config.labelling)
    frame, weights = weighed(frame[config.skip_rows :], config.weight)
    return frame, labels[config.skip_rows :], weights


def copies_of(frame: pl.DataFrame, labels: Tensor, config: TrainConfig) -> NDArray[np.int64] | None:
    """Which rows a random split keeps together, see `amtl.data.copies.copies`."""
    if config.split != "random" or not config.copies_together:
        return None
    return copies(frame, config.label, labels)


def _training_labels(labels: Tensor, rows: Tensor) -> Floats:
    """The labels of the rows that train, NaN for the others."""
    known = np.full(len(labels), np.nan)
    known[rows.numpy()] = (labels[rows] > 0.5).numpy()
    return known


def _require_both(
    labels: Tensor, weights: Tensor | None, parts: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Refuse splits that an AUC cannot be of, before hours of training end in none."""
    whole, there = held(labels, weights), "" if weights is None else " that weigh anything"
    for name, rows in zip(("training", "validation", "test"), parts, strict=True):
        part = held(labels[rows], None if weights is None else weights[rows])
        if weights is not None and not part["rows"]:
            raise UserError(
                f"all {len(rows):,} rows of the {name} split weigh 0: another --split or "
                "--split-seed, or leave --weight out"
            )
        if name != "test" and (told := one_class(**part)):
            raise UserError(
                f"the {name} split has {told} (of all {whole['rows']:,} rows{there} "
                f"{whole['positive']:,} are positive): both are needed to learn and to "
                "choose by; more data, or another --split or --split-seed"
            )


def held(labels: Tensor, weights: Tensor | None = None) -> dict[str, int]:
    """Rows of a split that weigh anything, and positive ones among them."""
    if weights is not None:
        labels = labels[weights > 0]
    return {"rows": len(labels), "positive": int((labels > 0.5).sum())}


def split_counts(task: Task) -> dict[str, int]:
    """Rows of the splits, validation rows that are not looked at included."""
    train, val, test = len(task.train), len(task.val), len(task.test)
    if task.encoder.labels is not None:
        val = task.encoder.labels[0] - train - test
    return {"train": train, "val": val, "test": test}


def scarce(held_out: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What the rows that models are validated and tested on are too few for."""
    few = []
    for name, held in held_out.items():
        split = {"val": "validation"}.get(name, name)
        if told := one_class(**held):
            yield f"the {split} split has {told}, so there will be no AUC; try another --split"
            continue
        count, words = rarer(**held)
        if count < FEW:
            few.append(f"{words} of {held['rows']:,} in {split}")
    if few:
        yield (
            f"only {', '.join(few)}: differences between models mean little on so few, and "
            "probabilities may be far too sure"
        )


def _validated(rows: Tensor, seed: int) -> Tensor:
    """What of the validation split is looked at: all of it, or as many as tell enough."""
    if len(rows) <= VALIDATED:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:VALIDATED]]


def default_fields(frame: pl.DataFrame, config: TrainConfig, source: Source) -> list[str]:
    """The fields used if none are named: the set's own or all, but label, split and weight."""
    skip = {config.label, split_column(config.split), config.weight, *config.drop}
    return [name for name in source.fields or frame.columns if name not in skip]
