"""What a column of the data is to a model, and its numbers as that says."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Literal

import polars as pl

from amtl.data import moments, notation, ranges, units
from amtl.errors import UserError, brief

Kind = Literal["categorical", "bag", "bucket", "standardise", "unused"]
TREATMENTS = ("bucket", "standardise", "categorical")

MOST_BUCKETS = 64
"""Of a number, unless labels ask for more. What has no more values may well be ids."""

TEXT = (pl.String, pl.Categorical, pl.Enum)


@dataclass(frozen=True)
class FieldSpec:
    """How one column enters the model.

    Attributes:
        name: the column.
        kind: `categorical` (one embedding per value), `bag` (several values, their embeddings
            averaged), `bucket` (a number, cut at training quantiles into categories),
            `standardise` (a number, scaled to mean 0 and deviation 1, without embedding) or
            `unused` (left out).
        separator: of a `bag` held as strings, `[]` where these are lists as Python or JSON writes
            them, `words` where they are text, see `amtl.data.lists`. None for one held as lists;
            text that comes in their place is split at `|`.
        buckets: number of quantile buckets; None: as many as training rows allow, see
            `bucket_count`.
        decimal: mark of numbers held as text, `.` or `,`; thousands may be set apart by the other
            one. None where they were no text.
        scaled: whether numbers held as text may be thousands, millions and billions, as `5K`.
        unit: what stands behind numbers held as text, or its kind where they have several, such as
            `kg` or `seconds`; see `amtl.data.units`.
        ranges: whether some of these are ranges, which are their middle; see `amtl.data.ranges`.
        moment: form of dates and times held as text, such as `%d.%m.%Y`; None for others, and
            where year, month and day come first.
        value: whether the number itself joins the embedding, of a `bucket` or `categorical`; see
            `amtl.data.scales`.
        part: `hour`, `weekday`, `day` or `month` of the moments in the column `of`, `1` or `2` of
            its points, `host`, `network` or `block` of its addresses, `pairs` of its words, or
            `words` of its names, where it is no column itself; see `amtl.data.calendar`,
            `amtl.data.places`, `amtl.data.hosts`, `amtl.data.pairs` and `amtl.data.names`.
        of: that column.
        zone: whose clocks tell that part, such as `Europe/Berlin`; empty for UTC.
        folded: whether texts that differ in their case, or spaces around them, are one value.
        root: whether the average of a `bag` is multiplied by the root of the number of its values:
            texts say the more the longer they are. Of words and their pairs, in runs that are not
            of earlier versions.
        marks: unusual texts that stand for missing numbers, as training had them.
        note: why, and how to have it otherwise; empty where nothing was guessed.
    """

    name: str
    kind: Kind = "categorical"
    separator: str | None = None
    buckets: int | None = None
    decimal: str | None = None
    scaled: bool = False
    unit: str = ""
    ranges: bool = False
    moment: str | None = None
    value: bool = False
    part: str = ""
    of: str = ""
    zone: str = ""
    folded: bool = False
    root: bool = False
    marks: tuple[str, ...] = ()
    note: str = ""

    @property
    def column(self) -> str:
        """The column of the data that is read."""
        return self.of or self.name


def numbers(column: pl.Series, spec: FieldSpec | None = None) -> pl.Series:
    """A column as float64, missing values as NaN; dates and times in microseconds.

    Dates may be text that begins with year, month and day, as in `2017-01-31 12:00:00`.

    Args:
        column: the column.
        spec: how it is written if it is text. Text in which all values are numbers, or moments, in
            another notation, and in that alone, is read by that.

    Raises:
        UserError: if it holds no numbers.
    """
    spec = spec or FieldSpec(column.name)
    if column.dtype in TEXT:
        column = column.cast(pl.String)
    read = column
    try:
        if column.dtype == pl.String:
            dated = moments.iso(column)
            read = _read(column, spec) if dated is None else dated
        if read.dtype.is_numeric() and spec.unit in units.KINDS and column.dtype not in TEXT:
            # In which unit they are nobody says.
            raise pl.exceptions.ComputeError
        if read.dtype == pl.Date:
            read = read.cast(pl.Datetime("us"))
        if read.dtype in (pl.Datetime, pl.Duration):
            read = read.dt.cast_time_unit("us")
        if read.dtype.is_temporal():
            read = read.to_physical()
        return read.cast(pl.Float64).fill_null(math.nan)
    except pl.exceptions.PolarsError:
        raise UserError(_no_numbers(column, spec)) from None


def _no_numbers(column: pl.Series, spec: FieldSpec) -> str:
    """What is wrong with a column that is to hold numbers."""
    odd, needed = "", f"numbers in {spec.unit}" if spec.unit else "numbers"
    if spec.unit in units.KINDS:
        needed = f"numbers with their units, which training had converted to {spec.unit},"
    if column.dtype == pl.String:
        known = ranges if spec.ranges else notation
        other = known.odd(column, spec.decimal or ".", spec.scaled, spec.unit)
        if spec.moment:
            other, needed = moments.odd(column, spec.moment), f"moments as {spec.moment}"
        elif len(few := moments.odd_ones(column)):
            other, needed = pl.Series(few), "dates or times"
        undated = other.filter(~other.str.contains(moments.ISO))
        odd = f" such as {brief(repr([*undated, *other, *column.drop_nulls()][0]))}"
    return (
        f"column {column.name!r} holds {brief(column.dtype)} values{odd} where {needed} are needed"
    )


def _read(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """Text as the numbers it stands for; as it is if some of it stands for none."""
    decimal, scaled, unit = spec.decimal, spec.scaled, spec.unit
    if spec.ranges and decimal and not len(ranges.odd(column, decimal, scaled, unit)):
        return ranges.read(column, decimal, scaled, unit)
    if spec.moment and not len(moments.odd(column, spec.moment)):
        return moments.read(column, spec.moment)
    if decimal is None and (plain := notation.plain(column)) is not None:
        return plain
    if decimal is None or len(notation.odd(column, decimal, scaled, unit)):
        spelled = notation.find(column)
        if spelled is None and decimal is None and len(forms := moments.find(column)) == 1:
            return moments.read(column, forms[0])
        if unit in units.KINDS and (spelled is None or spelled.unit != unit):
            raise pl.exceptions.ComputeError
        if spelled is None or not spelled.decimal or spelled.unit not in ("", unit):
            return column
        decimal, scaled = spelled.decimal, spelled.scaled
    return notation.read(column, decimal, scaled, unit)


def is_amount(column: pl.Series) -> bool:
    """Whether a column has numbers, dates or times, the latter perhaps as text."""
    if column.dtype != pl.String:
        return column.dtype.is_numeric() or column.dtype.is_temporal()
    return moments.iso(column) is not None


def of_text(
    column: pl.Series, part: str, says: str, separator: str | None = None
) -> list[FieldSpec]:
    """A part of a column of text, a bag beside it; nothing of other columns.

    Args:
        column: the column.
        part: `FieldSpec.part`.
        says: why, for its note.
        separator: `FieldSpec.separator`.
    """
    if column.dtype not in TEXT:
        return []
    name = f"{column.name}.{part}"
    note = f"{says}; --drop {shlex.quote(name)} leaves them out"
    return [FieldSpec(name, "bag", separator, part=part, of=column.name, note=note)]


def as_typed(name: str, treatment: str) -> str:
    """The option `--numeric` of a column, as one types it."""
    return f"--numeric {shlex.quote(f'{name}={treatment}')}"
