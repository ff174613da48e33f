"""Hosts of web and mail addresses, networks or blocks of IP addresses, as fields of their own."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace

import polars as pl

from amtl.data import notation
from amtl.data.ordered import Floats, Labels
from amtl.data.specs import TEXT, FieldSpec, as_typed

_HOST = r"([^\s/:?#@<>,]+\.[^\s/:?#@<>,]+)"
PARTS = {
    "host": (
        rf"(?i)^(?:[a-z][a-z\d+.-]*://(?:[^/@\s]*@)?(?:www\.)?|www\.){_HOST}(?:[/:?#].*)?$",
        rf"^[^@/\s]+@{_HOST}$",
    ),
    "network": (
        r"^(\d{1,3}\.\d{1,3})(?:\.\d{1,3}){2}(?:[:/]\d+)?$",
        r"(?i)^([\da-f]{4}:[\da-f]{1,4}):(?:[\da-f]{0,4}:){1,6}[\da-f]{0,4}(?:/\d+)?$",
    ),
    "block": (
        r"^(\d{1,3})(?:\.\d{1,3}){3}(?:[:/]\d+)?$",
        r"(?i)^([\da-f]{4}):[\da-f]{1,4}:(?:[\da-f]{0,4}:){1,6}[\da-f]{0,4}(?:/\d+)?$",
    ),
}
"""`example.org` of `https://www.example.org/a?b=1` and `me@example.org`; `192.0` of `192.0.2.7` and
`2001:db8` of `2001:db8::1`, and their `192` and `2001`. Times, and addresses of hardware, have
none."""
_MOSTLY = 0.9
"""Share of a column's distinct texts that are addresses from which it holds such."""
_COME_AGAIN = 0.5
"""Hosts, or networks, a distinct address up to which they say more than each address does."""
_SELDOM = 2.0
"""Rows an address below which single ones have to tell something of labels beside their hosts."""


def parts(frame: pl.DataFrame, skip: Collection[str] = ()) -> list[FieldSpec]:
    """A field for each column of text that holds addresses: their hosts, networks or blocks.

    Single addresses seldom come again, and from where they are does: where not even networks do,
    the blocks that these are in.

    Args:
        frame: the data.
        skip: columns that are not looked at, and fields that are not wanted.

    Returns:
        Their fields, with a note. O(n) a column of text.
    """
    found = []
    for column in frame:
        if column.name in skip or column.dtype not in TEXT:
            continue
        values = notation.texts(column).drop_nulls()
        if not _parts(values[:100].unique()):
            continue
        values = values.unique()
        again = _COME_AGAIN * len(values)
        part = next((p for p in _parts(values) if 1 < _of(values, p).n_unique() < again), "")
        name = f"{column.name}.{part}"
        if part and name not in frame.columns and name not in skip:
            note = f"the {part} of the addresses in {column.name!r}; "
            note += f"--drop {shlex.quote(name)} leaves it out"
            found.append(FieldSpec(name, part=part, of=column.name, note=note))
    return found


def with_parts(
    frame: pl.DataFrame, fields: Sequence[FieldSpec], labels: Floats, skip: Collection[str] = ()
) -> list[FieldSpec]:
    """Fields with those of `parts`; addresses that hardly come again make way for them.

    They do where labels do not tell addresses of a host apart.

    Args:
        frame: the data.
        fields: how its columns enter the model.
        labels: 0 or 1 of each row that trains, NaN of the others.
        skip: as of `parts`.
    """
    found = parts(frame, skip)
    parted, says = {field.of: field for field in found}, Labels(labels)
    result = []
    for field in fields:
        part, column = parted.get(field.name), frame[field.column]
        known = column.drop_nulls()
        if part and field.kind == "categorical" and len(known) < _SELDOM * known.n_unique():
            whole = column.cast(pl.String)
            if not says.tell_apart(whole, take(column, part)):
                rows = len(known) / known.n_unique()
                note = f"{rows:.1f} rows an address, which tell nothing of labels beside their "
                note += f"{part.part}; {as_typed(field.name, 'categorical')} keeps it"
                field = replace(field, kind="unused", note=note)
        result.append(field)
    return result + found


def take(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """The part of each address that a field is, text; null for what is none."""
    if column.dtype not in TEXT:
        return pl.Series(spec.name, [None], dtype=pl.String).new_from_index(0, len(column))
    return _of(notation.texts(column), spec.part)


def _parts(values: pl.Series) -> list[str]:
    """What nearly all of some texts have; nothing if they are no addresses."""
    enough = _MOSTLY * len(values)
    return [part for part in PARTS if len(values) and _of(values, part).count() >= enough]


def _of(values: pl.Series, part: str) -> pl.Series:
    found = pl.coalesce(values.str.extract(pattern) for pattern in PARTS[part])
    return pl.select(found.str.to_lowercase()).to_series().alias(values.name)
