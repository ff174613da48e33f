"""Words of names that come again, as those of shops and schools, as fields beside the names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import polars as pl

from amtl.data import hosts, moments
from amtl.data.lists import WORDS, is_prose, split
from amtl.data.ordered import Floats, Labels
from amtl.data.specs import FieldSpec, of_text

_SELDOM, _ENOUGH = 2.0, 10.0
"""Rows a name between which it is a value of its own, and its words tell of those that are new or
rare: text of fewer rows is its words, and of more what it stands for is known. Of five files four
gained by words, with 2 to 5 rows a name, and one with 17 lost as often as it gained."""
_FEWEST = 200
"""Names that have to train: fewer do not tell what their words say."""


PARTS = (WORDS,)


def parts(column: pl.Series) -> list[FieldSpec]:
    """The words of a column of text as a field beside it; nothing of others."""
    says = f"labels follow the words of {column.name!r}, also of those that are new"
    return of_text(column, WORDS, says, WORDS)


def with_words(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], labels: Floats, skip: Collection[str] = ()
) -> list[FieldSpec]:
    """Fields with the words of those that are names, where these tell of labels of other names.

    Args:
        frame: the data.
        fields: how its columns enter the model.
        labels: 0 or 1 of each row that trains, NaN of the others.
        skip: columns that are not looked at, and fields that are not wanted.

    Returns:
        As `fields`, and a field, with a note, for each that is found. O(n) a column of text.
    """
    result = list(fields)
    for field in fields:
        if field.kind != "categorical" or field.part or field.name in skip:
            continue
        column = frame[field.name]
        for found in parts(column) if _are_names(column, labels) else ():
            words = split(column.cast(pl.String), WORDS)
            wanted = found.name not in {*frame.columns, *skip}
            if wanted and Labels(_once(column, labels)).follow(words):
                result.append(found)
    return result


def _are_names(column: pl.Series, labels: Floats) -> bool:
    """Whether a column is text of several words that comes again, but seldom."""
    if not is_prose(column):
        return False
    trained = column.filter(pl.Series(~np.isnan(labels))).drop_nulls()
    distinct = trained.n_unique()
    if distinct < _FEWEST or not _SELDOM * distinct < len(trained) < _ENOUGH * distinct:
        return False
    return not hosts.parts(column.to_frame()) and not moments.find(column.cast(pl.String))


def _once(column: pl.Series, labels: Floats) -> Floats:
    """The labels of one row of each text, NaN of the others, so that no text tells of itself."""
    rows = np.flatnonzero(~np.isnan(labels))
    chosen = rows[column.gather(rows).is_first_distinct().to_numpy()]
    result = np.full(len(labels), np.nan)
    result[chosen] = labels[chosen]
    return result
