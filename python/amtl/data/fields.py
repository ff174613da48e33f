"""How each column enters the model: by its type where that decides, by a stated rule otherwise."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from amtl.data import amounts, hosts, moments, nested, notation, places, ranges
from amtl.data.columns import fold
from amtl.data.lists import WORDS, WRITTEN_LISTS, are_written_lists, is_prose, split
from amtl.data.ordered import Floats, Labels
from amtl.data.readers import require_columns
from amtl.data.specs import (
    MOST_BUCKETS,
    TEXT,
    TREATMENTS,
    FieldSpec,
    as_typed,
    is_amount,
    numbers,
)
from amtl.data.splits import names_parts
from amtl.data.text import FEW_NUMBERS
from amtl.data.vocabulary import exact_ids
from amtl.errors import UserError, brief

_FEWEST_BUCKETS = 8
_ROWS_A_BUCKET = 300
"""Of training: of a few thousand rows, 64 buckets of each number are learned by heart."""
_FINE = 256
"""Buckets where labels ask for more."""
_WELL_KNOWN = 200
"""Rows a value from which labels are not asked whether ids are best."""
_ENOUGH_ROWS = 20
"""Rows per value from which each value can be learned, whatever its order may say."""
_NEARLY_UNIQUE = 0.9
_RARELY_AGAIN = 0.4
"""Distinct dates or times a row from which few come again: what is near them tells more."""
_SELDOM = 2.0
"""Rows a value below which values hardly come again, and have to tell something of labels to be
ids."""
_SELDOM_AS_NUMBERS = 8.0
"""The same of whole numbers that are about as frequent as their neighbours, as amounts are."""
_JOINED_BY = {"|": 1.0, ";": 0.5, ",": 0.5, " ": 0.05}
"""What text may join values by, told of where the parts are so few of the whole values that they
come again. Names of people and places have spaces. Bars in many rows are taken for that."""
_TAKEN_APART = ",;"
"""Of these, what values are taken apart at if labels do not follow the whole rather."""
_BARS, _FEWEST_BARS = 0.01, 3
"""Share of the rows, and number, from which bars join values; in fewer they are part of a text."""
_IDS = r"^\d+(?:(?:[;,] ?| )\d+)*$"
_MOSTLY = 0.8
"""Share of distinct texts that are numbers from which it is told that the others are none."""
_REWRITE = "write the column with a decimal point, and nothing between thousands"
_ROWS_TO_ASK = 200
"""Of training: fewer say nothing of values that hardly come again, nor of words."""
_ROWS_TO_JUDGE_BY = 1000
"""Fewer rows do not tell a key, of which every row has its own, from a column of many values."""
_LARGEST_ID = 2.0**64
"""Beyond that, every float is a whole number, and none an id of those 64 bits that others keep."""
_LARGEST_AMOUNT = 10**8
"""Whole numbers further from zero do not count: they are hashes, or moments."""
_ONE_SPELLING = 0.9
"""Share of distinct texts that differ in more than case and spaces, from which on they stay."""
_FEW_VALUES = 10
"""Up to so many say all by their embeddings."""


def infer_fields(
    frame: pl.DataFrame,
    names: Sequence[str],
    *,
    numeric: Mapping[str, str] | None = None,
    default_numeric: str = "bucket",
    values: bool = False,
    separators: Mapping[str, str] | None = None,
    labels: Floats | None = None,
    marks: Mapping[str, tuple[str, ...]] | None = None,
) -> list[FieldSpec]:
    """Decides how each column enters the model; what is guessed has a note.

    Lists are bags, and so are strings that all are lists of strings or whole numbers as Python or
    JSON writes them, or of which 1 % (and three) hold the separator `|` if splitting leaves fewer
    distinct values.
    Numbers with a fraction are numbers (`default_numeric`), and so is text of
    which each value is one with thousands set apart, a decimal comma, K, M or B behind, or the same
    currency or per cent sign, where that is sure. All else is categorical, with these exceptions:

    - Whole numbers held as floats or decimals (what an integer column with gaps becomes in
      pandas) are ids, hence categorical. They are amounts, hence numbers, if they have more
      distinct values than buckets and either nearly every row has its own (90 %), or there are
      fewer than 20 rows a value and the values thin out upward, as prices and counts do: 80 % of
      the distinct ones lie in the lower half of their range (from its 1st to its 99th
      percentile), where ids would be spread evenly.
    - Whole numbers too large for the float that holds them are numbers: ids would be merged.
    - Integers are amounts where they cannot well be ids: many, with few rows a value and thinning
      out upward likewise, and besides sparse in their range (under 30 % of it), and about as
      frequent as their neighbours, where some ids are popular; where more than one of many is
      below zero; and where labels of training rows say so: few rows a value, those of neighbours
      alike in their labels, and single values next to nothing by themselves; or fewer than
      two of them, or than eight where values are about as frequent as their neighbours, and single
      values nothing at all. So are whole numbers
      held as floats then, and integers of which nearly every row has its own, if they are as
      sparse as said. Other integers of many values and few rows a value have a note.
      Text of digits alone, such as codes of places with leading zeros, and of ranges, such as
      `10-15`, is a number where labels say so, too.
    - Text of several words and fewer than two rows a value is its words, if labels follow these.
    - Text that commas or semicolons cut into half as many parts as there are values is taken apart
      from 1,000 rows on, unless labels follow the whole rather.
    - Texts that differ in case and spaces around them alone are one value, if those are a tenth of
      a column's values and labels do not tell them apart.
    - Dates and times, also as seconds since 1970 or text, are numbers if there are 1,000 rows or
      more, and fewer than 2.5 a value. Of times of day and durations labels are asked beside that.
    - Columns with a single value in the rows that train, or of a type that has no ids, are left
      out, and from 1,000 rows
      on categorical columns of which nearly every row (90 %) has its own value: a model of all
      training rows learns them by heart, and a test row has none of them.

    A column named in `numeric` or `separators` is taken as said there, without exception. Numbers
    in buckets join their embeddings as such (`FieldSpec.value`), and so do whole numbers of more
    than ten values, up to 10^8, unless single values say more of labels than their neighbours do.

    Args:
        frame: the data.
        names: the columns to use.
        numeric: column to `bucket`, `standardise` or `categorical`, overriding the choice.
        default_numeric: what to do with numbers not named there.
        values: whether numbers join their embeddings.
        separators: column to separator, for bags held as strings, and for text that may come in
            the place of lists; an empty separator keeps a column of strings whole.
        labels: 0 or 1 of each row that trains, NaN of the others; None: nothing is asked of them.
        marks: column to texts of its file that were taken as missing numbers.

    Raises:
        UserError: for an unknown column or treatment, or a column named twice.
    """
    numeric = dict(numeric or {})
    separators = dict(separators or {})
    require_columns(frame.columns, [*names, *numeric, *separators], "the data")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UserError(f"--fields names {', '.join(map(repr, twice))} twice")
    for name, treatment in numeric.items():
        if treatment not in TREATMENTS:
            raise UserError(
                f"--numeric {name}: {treatment!r} is not bucket, standardise or categorical"
            )
    if default_numeric not in TREATMENTS:
        raise UserError(
            f"--numeric {default_numeric!r} is not bucket, standardise or categorical; a column's "
            "own treatment is written COLUMN=bucket"
        )
    says = None if labels is None else Labels(labels)
    trains = None if labels is None else pl.Series(labels).is_not_nan()
    fields = []
    for name in names:
        column = frame[name]
        if name in numeric:
            fields.append(_as_told(column, numeric[name], separators.get(name)))
        elif name in separators and not column.dtype.is_nested():
            fields.append(_apart(column, separators[name]))
        else:
            told = nested.advice(column)
            spec = FieldSpec(name, "unused", note=told) if told else _left_out(column, trains)
            spec = spec or _guess(column, default_numeric, says)
            if spec.kind == "bag" and name in separators:
                spec = replace(spec, separator=separators[name] or None)
            fields.append(spec)
    fields = [replace(f, marks=(marks or {}).get(f.name, ())) for f in fields]
    if says is not None:
        fields = [_as_fine_as_labels(f, frame[f.name], says) for f in fields]
    if not values or default_numeric == "categorical":
        return fields
    return [replace(f, value=_has_value(f, frame[f.name], f.name in numeric, says)) for f in fields]


def _as_fine_as_labels(spec: FieldSpec, column: pl.Series, labels: Labels) -> FieldSpec:
    """With more buckets where labels tell of structure that is finer: codes of places, heaps."""
    if spec.kind == "bucket":
        found, buckets = numbers(column, spec), bucket_count(spec, labels.rows)
        for finer in (_FINE, MOST_BUCKETS):
            if finer > buckets and labels.want_finer(found, buckets, finer):
                return replace(spec, buckets=finer)
    return spec


def bucket_count(spec: FieldSpec, rows: int) -> int:
    """Into how many buckets so many rows that train are cut."""
    if spec.buckets is not None:
        return spec.buckets
    return min(MOST_BUCKETS, max(_FEWEST_BUCKETS, rows // _ROWS_A_BUCKET))


def _has_value(spec: FieldSpec, column: pl.Series, told: bool, labels: Labels | None) -> bool:
    """Whether a column's number joins its embedding.

    So does that of whole numbers which neither the user nor labels say to be ids, and which are no
    hashes.
    """
    if spec.kind != "categorical":
        return spec.kind == "bucket"
    if told or not column.dtype.is_numeric() or _distinct(column) <= _FEW_VALUES:
        return False
    found = column.drop_nulls().cast(pl.Float64).drop_nans()
    if float(found.abs().max() or 0.0) > _LARGEST_AMOUNT:  # type: ignore[arg-type]
        return False
    return labels is None or not labels.of(column).by_itself


def _as_told(column: pl.Series, treatment: str, separator: str | None) -> FieldSpec:
    if treatment == "categorical":
        nested = isinstance(column.dtype, (pl.List, pl.Array))
        bag = nested or bool(separator)
        return FieldSpec(column.name, "bag" if bag else "categorical", separator or None)
    spec = FieldSpec(column.name, treatment)  # type: ignore[arg-type]
    if column.dtype == pl.Boolean or is_amount(column):
        return spec
    spelled = notation.find(column, padded=True) if column.dtype in TEXT else None
    if spelled and spelled.decimal:
        return _spelled(spec, spelled)
    forms = moments.find(column) if column.dtype in TEXT and not spelled else []
    if len(forms) == 1:
        return replace(spec, moment=forms[0])
    if column.dtype in TEXT and not spelled and (ends := ranges.find(column)):
        return replace(_spelled(spec, ends), ranges=True)
    doubt = f": {spelled.doubt}; {_REWRITE}" if spelled else _odd_values(column)
    if column.dtype in TEXT and not spelled and (mixed := notation.mixed(column)):
        doubt = f": {mixed}"
    if forms:
        doubt = f": {_shown(column)} may be {forms[0]} or {forms[1]}; {moments.REWRITE}"
    raise UserError(
        f"{as_typed(column.name, treatment)}: the column is {brief(column.dtype)}, no number{doubt}"
    )


def _spelled(spec: FieldSpec, found: notation.Notation) -> FieldSpec:
    """A number's field with the notation of its text."""
    return replace(spec, decimal=found.decimal, scaled=found.scaled, unit=found.unit)


def _odd_values(column: pl.Series) -> str:
    """What of a column of text is no number, for a message."""
    if column.dtype not in TEXT:
        return ""
    text = column.cast(pl.String)
    odd = notation.odd(text, ".", scaled=True)
    odd = odd if len(odd) else notation.odd(text, ".")
    shown = ", ".join(brief(repr(text)) for text in odd.unique(maintain_order=True)[:3])
    return f" in {len(odd):,} rows, such as {shown}; leave empty what is missing" if shown else ""


def _apart(column: pl.Series, separator: str) -> FieldSpec:
    """A column that is taken apart, or kept whole if there is no separator."""
    note = ""
    text = column.cast(pl.String) if column.dtype in TEXT else pl.Series([], dtype=pl.String)
    if separator and are_written_lists(text):
        separator = WRITTEN_LISTS
        note = f"lists such as {_shown(column)}, read as such"
    elif (
        separator not in ("", WORDS)
        and len(text)
        and not text.str.contains(separator, literal=True).any()
    ):
        note = f"no value holds the separator {separator!r}, so each is one; --multi "
        note += f"{shlex.quote(f'{column.name}=;')} would name another"
    return FieldSpec(
        column.name, "bag" if separator else "categorical", separator or None, note=note
    )


def _left_out(column: pl.Series, trains: pl.Series | None) -> FieldSpec | None:
    """The spec of a column that cannot teach anything, or None.

    Args:
        column: the values.
        trains: whether each row trains; None: all do.
    """
    name, dtype = column.name, column.dtype
    inner = _inner(dtype)
    if inner.is_nested() or inner == pl.Object:
        note = f"{brief(dtype)} has no ids: make lists or plain columns"
        return FieldSpec(name, "unused", note=note)
    if column.null_count() == len(column):
        return FieldSpec(name, "unused", note="holds nothing")
    if dtype.is_nested() and (inner.is_float() or inner.is_decimal()):
        if not exact_ids(_leaves(column)).all():
            return FieldSpec(name, "unused", note="lists of numbers that are no ids")
    elif not dtype.is_nested() and _distinct(column) == 1 and not _has_gaps(column):
        return FieldSpec(name, "unused", note=f"always {_shown(column)}")
    if trains is None:
        return None
    spec = _left_out(column.filter(trains), None)
    # What a row that trains never held has no row, and the model no idea of it.
    return spec and replace(spec, note=f"{spec.note} in the rows that train")


def _guess(column: pl.Series, default_numeric: str, labels: Labels | None) -> FieldSpec:
    name, dtype = column.name, column.dtype
    if dtype.is_nested():
        return FieldSpec(name, "bag")
    if dtype.is_float() or dtype.is_decimal():
        spec = _guess_number(column, default_numeric)
        return _labels_say(spec, column, default_numeric, labels) or spec
    note = ""
    if dtype in TEXT:
        values = column.cast(pl.String).drop_nulls().unique(maintain_order=True)
        if are_written_lists(values):
            note = f"lists such as {_shown(column)} are several values; "
            note += f"--multi {shlex.quote(f'{name}=')} keeps them whole"
            return FieldSpec(name, "bag", WRITTEN_LISTS, note=note)
        if _has_bars(column) and _holds_lists(values, "|"):
            note = f"strings such as {_shown(column, '|')} hold several values; "
            note += f"--multi {shlex.quote(f'{name}=')} keeps them whole"
            return FieldSpec(name, "bag", "|", note=note)
        if len(values) <= 3 and names_parts(values):
            note = f"--split {shlex.quote(f'column:{name}')} would split by it"
        spelled = notation.find(values) if default_numeric != "categorical" else None
        if spelled and spelled.unit and len(values) <= FEW_NUMBERS:
            spelled = None
        if spelled and spelled.marks and not spelled.doubt:
            note = f"numbers with {spelled.marks}, read as numbers; "
            note += f"{as_typed(name, 'categorical')} keeps the text"
            kind: Any = default_numeric
            return _spelled(FieldSpec(name, kind, note=note), spelled)
        if spelled and notation.has_fractions(values, spelled):
            note = f"text of plain numbers, read as such; {as_typed(name, 'categorical')} keeps it"
            return _spelled(FieldSpec(name, default_numeric, note=note), spelled)  # type: ignore[arg-type]
        mixed = "" if spelled or default_numeric == "categorical" else notation.mixed(values)
        note = mixed or note
        ids = bool(values.str.contains(_IDS).all())
        for separator, share in ({} if mixed else _JOINED_BY).items():
            if separator == "|" and is_prose(column):
                continue
            if _holds_lists(values, separator, share, ids=ids) and not _says_when(values):
                lists = None if spelled else _several(column, separator, labels)
                if lists:
                    return lists
                note = f"{_shown(column, separator)} and its like may be several values each"
                note += f": --multi {shlex.quote(f'{name}={separator}')} takes them apart"
                break
        if spelled and spelled.doubt:
            apart = f", --multi {shlex.quote(f'{name}=,')} takes it apart"
            remedy = f"{as_typed(name, 'bucket')} reads it{apart}" if spelled.decimal else _REWRITE
            note = f"{spelled.doubt}: {remedy}"
        if not note and not spelled and (odd := _few_odd(values)):
            note = f"most values are numbers, but not {odd}; were those empty, it would be one"
    amount = None
    if dtype.is_integer():
        amount = _integer_amount(column, default_numeric) or _below_zero(column, default_numeric)
    spec = amount or _keys_left_out(FieldSpec(name, note=note), column, default_numeric)
    if dtype.is_integer():
        spec = _labels_say(spec, column, default_numeric, labels) or spec
        if not spec.note:
            spec = replace(spec, note=_integer_note(spec, column, default_numeric))
    elif default_numeric != "categorical" and _is_scattered(column, _WELL_KNOWN):
        what = "ranges of numbers" if dtype in TEXT and ranges.find(values) else ""
        if not what and _is_scattered(column):
            what = _moments(column) if spec.kind == "categorical" else ""
            what = what or _digits(column)
        if what:
            number = _as_told(column, default_numeric, None)
            found = numbers(column, number).fill_nan(None)
            said = _labels_say(spec, found, default_numeric, labels, what, column)
            if said:
                earlier = _earlier(spec.name) if what == "dates or times" else ""
                spec = replace(number, note="; ".join(filter(None, [said.note, earlier])))
    if dtype in TEXT and labels is not None and not (spelled or mixed):
        spec = _words(spec, column, labels) or spec
    if dtype in TEXT and spec.kind == "categorical" and not spec.note and labels is not None:
        spec = _in_one_spelling(spec, column, values, labels)
    return spec


def _several(column: pl.Series, separator: str, labels: Labels | None) -> FieldSpec | None:
    """The spec of text that may join values, unless labels say that the whole tells more."""
    rows = len(column) - column.null_count()
    if labels is None or separator not in _TAKEN_APART or rows < _ROWS_TO_JUDGE_BY:
        return None
    texts = column.cast(pl.String)
    if places.are_points(column) or labels.follow_rather(texts, split(texts, separator)):
        return None
    note = f"strings such as {_shown(column, separator)} hold several values; "
    note += f"--multi {shlex.quote(f'{column.name}=')} keeps them whole"
    return FieldSpec(column.name, "bag", separator, note=note)


def _words(spec: FieldSpec, column: pl.Series, labels: Labels) -> FieldSpec | None:
    """The spec of text that hardly comes again, and whose words say something of labels."""
    rows, distinct = len(column) - column.null_count(), _distinct(column)
    if spec.kind not in ("categorical", "unused") or rows < _ROWS_TO_ASK:
        return None
    if rows > _SELDOM * distinct or not is_prose(column) or _says_when(column):
        return None
    if hosts.parts(column.to_frame()) or not labels.follow(split(column.cast(pl.String), WORDS)):
        return None
    note = f"text of {rows / distinct:.1f} rows a value, whose words tell of labels: a value each; "
    note += f"{as_typed(spec.name, 'categorical')} keeps it whole, --drop leaves it out"
    return FieldSpec(spec.name, "bag", WORDS, note=note)


def _in_one_spelling(
    spec: FieldSpec, column: pl.Series, values: pl.Series, labels: Labels
) -> FieldSpec:
    """With distinct values that differ in case or spaces alone as one, unless labels tell more."""
    spellings, texts = fold(values).n_unique(), column.cast(pl.String)
    if spellings > _ONE_SPELLING * len(values) or labels.tell_apart(texts, fold(texts)):
        return spec
    note = (
        f"{len(values):,} texts are {spellings:,} but for case and spaces, which tell nothing of "
    )
    note += f"labels: one value each; {as_typed(spec.name, 'categorical')} keeps them apart"
    return replace(spec, folded=True, note=note)


def _digits(column: pl.Series) -> str:
    """What text is that has digits alone, as codes of places; empty for other columns."""
    if column.dtype not in TEXT:
        return ""
    texts = notation.texts(column).drop_nulls()
    return "digits" if texts.str.contains(r"^-?\d{1,15}$").all() else ""


def _moments(column: pl.Series) -> str:
    """What of moments, or durations, a column holds; empty for other columns."""
    if _is_clock(column):
        return "times or durations"
    when = column.dtype in TEXT and (_says_when(column) or is_amount(column))
    return "dates or times" if when or column.dtype.is_temporal() else ""


def _is_clock(column: pl.Series) -> bool:
    """Whether a column holds times of day or durations, perhaps as text."""
    if column.dtype in TEXT:
        return any(form in moments.CLOCKS for form in moments.find(column.cast(pl.String)))
    return column.dtype in (pl.Time, pl.Duration)


def _guess_number(column: pl.Series, default_numeric: str) -> FieldSpec:
    """Ids or amounts: see `infer_fields`."""
    name = column.name
    number = FieldSpec(name, default_numeric)  # type: ignore[arg-type]
    if default_numeric == "categorical":
        return number
    values = column.drop_nulls()
    values = values.drop_nans() if column.dtype.is_float() else values
    whole = values.cast(pl.Float64)
    if not len(values) or not bool((whole == whole.floor()).all()) or whole.is_infinite().any():
        return number
    if whole.abs().max() > _LARGEST_ID:  # type: ignore[operator]
        return number
    if not exact_ids(values).all():
        note = f"ids this large are merged in {_type(column)}; store them as integers or text"
        return replace(number, note=note)
    ids = f"{as_typed(name, 'categorical')} takes it as ids"
    distinct = whole.unique().sort()
    if len(distinct) <= 2:
        return FieldSpec(name)
    rows = len(whole) / len(distinct)
    if len(distinct) > MOST_BUCKETS:
        if len(distinct) > _NEARLY_UNIQUE * len(whole) and len(whole) >= _ROWS_TO_JUDGE_BY:
            return replace(number, note=f"nearly every row has its own value; {ids}")
        if rows < _ENOUGH_ROWS and amounts.thin_out(distinct):
            note = f"whole numbers that thin out upward, as amounts do, {rows:.1f} rows a value"
            return replace(number, note=f"{note}; {ids}")
    note = (
        f"whole numbers held as {_type(column)}; {as_typed(name, 'bucket')} takes them as amounts"
    )
    return FieldSpec(name, note=note)


def _labels_say(
    spec: FieldSpec,
    column: pl.Series,
    default_numeric: str,
    labels: Labels | None,
    what: str = "whole numbers",
    ids: pl.Series | None = None,
) -> FieldSpec | None:
    """The spec of whole numbers that labels say are amounts, None for others; named in its note.

    `ids` are what would be ids otherwise, where that is not the numbers themselves.
    """
    if labels is None or default_numeric == "categorical":
        return None
    ids = column if ids is None else ids
    if not _is_scattered(ids, _WELL_KNOWN):
        return None
    if spec.kind == "unused":
        # Rows may be numbered in the order of their labels.
        if not amounts.are_sparse(column):
            return None
    elif spec.kind != "categorical":
        return None
    told, rows = labels.of(column), (len(ids) - ids.null_count()) / _distinct(ids)
    # In few rows labels say nothing of popular ids, either.
    several = rows < _SELDOM_AS_NUMBERS and ids is column and amounts.are_alike(column)
    seldom = (rows < _SELDOM or several) and labels.rows >= _ROWS_TO_ASK
    note = f"{what}, {rows:.1f} rows a value, "
    if told.by_order:
        note += "near which labels are alike: a number; "
    elif seldom and spec.kind == "categorical" and not told.of_single:
        note += "of which single ones tell nothing of labels: a number; "
    else:
        return None
    kind: Any = default_numeric
    return FieldSpec(spec.name, kind, note=f"{note}{as_typed(spec.name, 'categorical')} for ids")


def _below_zero(column: pl.Series, default_numeric: str) -> FieldSpec | None:
    """The spec of integers of which several are below zero, and none a hash; None for others."""
    below = column.filter(column < 0)
    several = below.n_unique() > 1 and _distinct(column) > MOST_BUCKETS
    # One alone may stand for what is missing.
    if default_numeric == "categorical" or not several or int(below.min()) < -_LARGEST_AMOUNT:  # type: ignore[arg-type]
        return None
    note = f"integers, some of them below zero; {as_typed(column.name, 'categorical')} for ids"
    return FieldSpec(column.name, default_numeric, note=note)  # type: ignore[arg-type]


def _integer_amount(column: pl.Series, default_numeric: str) -> FieldSpec | None:
    """The spec of integers that cannot well be ids, see `infer_fields`; None for others."""
    if default_numeric == "categorical" or not _is_scattered(column):
        return None
    if not amounts.cannot_be_ids(column):
        return None
    rows = (len(column) - column.null_count()) / _distinct(column)
    note = f"integers that thin out upward with gaps, as amounts do, {rows:.1f} rows a value; "
    note += f"{as_typed(column.name, 'categorical')} for ids"
    return FieldSpec(column.name, default_numeric, note=note)  # type: ignore[arg-type]


def _integer_note(spec: FieldSpec, column: pl.Series, default_numeric: str) -> str:
    """What integers were taken as, where they may be something else or numbers were spoken of."""
    treatment = "standardise" if default_numeric == "standardise" else "bucket"
    other = f"{as_typed(spec.name, treatment)} takes it as a number"
    if _is_scattered(column):
        rows = (len(column) - column.null_count()) / _distinct(column)
        return f"integers, {rows:.1f} rows a value; {other}"
    if default_numeric == "standardise" and _distinct(column) > 2:
        return f"integers; {other}"
    return ""


def _is_scattered(column: pl.Series, enough: int = _ENOUGH_ROWS) -> bool:
    """Whether a column has more values than buckets, and few rows for each."""
    distinct = _distinct(column)
    few = len(column) - column.null_count() < enough * distinct
    return distinct > MOST_BUCKETS and few


def _few_odd(values: pl.Series) -> str:
    """Some of the distinct texts that are no numbers, where 80 % and more than 64 are."""
    odd = notation.odd(values, ".")
    if len(values) - len(odd) <= max(MOST_BUCKETS, _MOSTLY * len(values)) or not len(odd):
        return ""
    shown = ", ".join(brief(repr(text)) for text in odd[:3])
    return shown + (f" and {len(odd) - 3:,} more" if len(odd) > 3 else "")


def _keys_left_out(spec: FieldSpec, column: pl.Series, default_numeric: str) -> FieldSpec:
    """Leaves out a key, of which nearly every row has its own value; notes what may be a number.

    Moments of which few come again are numbers.
    """
    rows, distinct = len(column), _distinct(column)
    amount = f"{as_typed(spec.name, 'bucket')} takes it as a number"
    earlier = _earlier(spec.name)
    many = distinct > max(MOST_BUCKETS, rows / _ENOUGH_ROWS)
    key = rows >= _ROWS_TO_JUDGE_BY and distinct > _NEARLY_UNIQUE * rows
    if not many and not key:
        return spec
    measures = is_amount(column) or _says_when(column)
    dated = _may_say_when(column, measures) and not _is_clock(column)
    unlike_ids = measures and not column.dtype.is_numeric()
    if key and not (unlike_ids and default_numeric != "categorical"):
        much = "every row has its own value: nothing"
        if distinct < rows:
            much = f"{distinct:,} values in {rows:,} rows: next to nothing"
        keep = f"{as_typed(spec.name, 'categorical')} keeps it"
        other = f"{keep}, {amount}" if measures else keep
        other += f", {earlier}" if dated else ""
        if not measures and not spec.note and is_prose(column):
            other += f", --multi {shlex.quote(f'{spec.name}={WORDS}')} splits it into words"
        note = f"{much} to learn; {other}"
        return replace(spec, kind="unused", note="; ".join(filter(None, [spec.note, note])))
    if not (unlike_ids or dated):
        return spec
    what = "dates or times" if unlike_ids else "numbers that may be times since 1970"
    note, told = f"{distinct:,} {what}, each its own; {amount}", spec.note
    judged = rows >= _ROWS_TO_JUDGE_BY and distinct > _RARELY_AGAIN * rows
    if judged and default_numeric != "categorical":
        spec = _as_told(column, default_numeric, None)
        note = f"{distinct:,} {what}, {rows / distinct:.1f} rows each, taken as numbers; "
        note += f"{as_typed(spec.name, 'categorical')} for ids"
    note = f"{note}; {earlier}" if dated else note
    return replace(spec, note="; ".join(filter(None, [told, note])))


def _earlier(name: str) -> str:
    return f"--split {shlex.quote(f'order:{name}')} trains on the earlier rows"


def _says_when(column: pl.Series) -> bool:
    """Whether text is dates or times in one form of those that people write."""
    return column.dtype == pl.String and len(moments.find(column)) == 1


def _may_say_when(column: pl.Series, measures: bool) -> bool:
    """Whether a column may hold dates, or parts of seconds since 1970; see `is_amount`."""
    if not column.dtype.is_integer() or column.null_count() == len(column):
        return measures and column.dtype in (pl.Date, pl.Datetime, pl.String)
    low, high = (int(x) for x in (column.min(), column.max()))  # type: ignore[arg-type]
    return moments.unit(low, high) is not None


def _inner(dtype: Any) -> Any:
    return dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else dtype


def _leaves(column: pl.Series) -> pl.Series:
    lists = column.arr.to_list() if isinstance(column.dtype, pl.Array) else column
    return lists.filter(lists.list.len() > 0).explode()


def _distinct(column: pl.Series) -> int:
    """Distinct values, missing ones apart."""
    values = column.drop_nulls()
    return (values.drop_nans() if column.dtype.is_float() else values).n_unique()


def _has_gaps(column: pl.Series) -> bool:
    nan = column.dtype.is_float() and bool(column.is_nan().any())
    return nan or column.null_count() > 0


def _type(column: pl.Series) -> str:
    return str(column.dtype).partition("(")[0].lower()


def _shown(column: pl.Series, holding: str = "") -> str:
    """A value of the column as text, cut short; one that holds `holding`."""
    values = column.drop_nulls()
    if holding:
        values = values.filter(values.cast(pl.String).str.contains(holding, literal=True))
    text = repr(values[0])
    return text if len(text) <= 32 else text[:28] + "…" + text[:1]


def _has_bars(column: pl.Series) -> bool:
    """Whether enough rows hold the separator `|` for it to be one."""
    bars = column.drop_nulls().cast(pl.String).str.contains("|", literal=True)
    return int(bars.sum()) >= max(_FEWEST_BARS, _BARS * len(bars))


def _holds_lists(
    values: pl.Series, separator: str, share: float = 1.0, *, ids: bool = False
) -> bool:
    """Whether distinct strings, taken apart, are fewer than this share of what they are whole.

    Of `ids` there may be more than rows: the parts must occur twice on average.
    """
    if not values.str.contains(separator, literal=True).any():
        return False
    values = values.filter(values.str.strip_chars() != "")
    parts = split(values, separator).explode().drop_nulls()
    return parts.n_unique() < (len(parts) / 2 if ids else share * len(values))
