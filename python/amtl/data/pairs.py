"""Neighbouring words of texts, two by two: a field beside their words, where labels follow it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import polars as pl

from amtl.data.lists import WORDS, split, two_by_two
from amtl.data.ordered import Floats, Labels
from amtl.data.specs import TEXT, FieldSpec, of_text

PARTS = ("pairs",)


def parts(column: pl.Series) -> list[FieldSpec]:
    """The field of a column of text; nothing for others."""
    says = f"neighbouring words of {column.name!r} two by two, which tell of labels beside them"
    return of_text(column, PARTS[0], says)


def with_parts(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], labels: Floats, skip: Collection[str] = ()
) -> list[FieldSpec]:
    """Fields with one more for each that is words, if labels follow pairs of these as well.

    Args:
        frame: the data.
        fields: how its columns enter the model.
        labels: 0 or 1 of each row that trains, NaN of the others.
        skip: fields that are not wanted.
    """
    result, says = list(fields), Labels(labels)
    for field in fields:
        if field.kind != "bag" or field.separator != WORDS:
            continue
        for found in parts(frame[field.column]):
            words = split(frame[field.column].cast(pl.String), WORDS)
            both = words.list.concat(two_by_two(words))
            if found.name not in {*frame.columns, *skip} and says.follow_rather(both, words):
                result.append(found)
    return result


def take(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """Pairs of the words of each text, lists; null for what is none."""
    if column.dtype not in TEXT:
        empty = pl.Series(spec.name, [None], dtype=pl.List(pl.String))
        return empty.new_from_index(0, len(column))
    return two_by_two(split(column.cast(pl.String), WORDS)).rename(spec.name)
