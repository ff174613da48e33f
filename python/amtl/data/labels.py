"""Labels: from whatever a column holds to zeros and ones."""

from __future__ import annotations

import json
import re

import polars as pl
import torch
from torch import Tensor

from amtl.data.readers import require_columns
from amtl.data.specs import TEXT
from amtl.data.text import MISSING
from amtl.errors import UserError, brief

_PAIRS = {
    ("0", "1"),
    ("-1", "1"),
    ("1", "2"),
    ("false", "true"),
    ("f", "t"),
    ("no", "yes"),
    ("n", "y"),
    ("off", "on"),
    ("negative", "positive"),
    ("neg", "pos"),
    ("-", "+"),
    ("dislike", "like"),
}
"""Negative and positive values that need no explanation."""

_NO = frozenset({"0", "false", "f", "no", "n", "off"})
_YES = frozenset({"1", "true", "t", "yes", "y", "on"})

_SAID_NO_TO = re.compile(
    "(?:click|convert|conversion|purchase|buy|bought|order|sale|sold|pay|paid|view|watch|like|"
    "instal|subscri|active|churn|fraud|spam|default|respon|return|know|success)"
)
"""How words begin of which no, non, not and un before them, without a space, make the opposite."""
Labelling = tuple[str, float | None, str | None, str | None]
"""Arguments of `read_labels` after the data."""
_ONE_SPELLING = {"false": "0", "true": "1"}
_TO_THOSE = (
    "--label-missing drop leaves these rows out, --label-missing negative counts them as negative"
)

_OF_POSITIVE = (
    ". For a file of positive rows only, as of what was bought or played, amtl train --negatives "
    "USER:ITEM in place of --label draws others"
)
_TO_SCORE = " for an AUC: score more rows at once, or take amtl predict, which needs no label"


def read_labels(
    frame: pl.DataFrame,
    column: str,
    threshold: float | None = None,
    positive: str | None = None,
    missing: str | None = None,
    trains: bool = True,
) -> Tensor:
    """Labels as float32 zeros and ones, one for each row that has one or is given one.

    Args:
        frame: the data.
        column: booleans, numbers, or text. Without the two arguments below it must hold an obvious
            pair: 0 and 1, -1 and 1, 1 and 2, or text such as "no" and "yes", "noclick" and
            "click", in whatever case.
        threshold: a sample is positive if its number is at least this.
        positive: a sample is positive if its value is this one.
        missing: samples without a label are none if this is `drop` (see `labelled`), and negative
            if it is `negative`. With either, text that stands for no value is no label.
        trains: whether a model is to be trained on them, and not scored; for the message.

    Raises:
        UserError: if the column is missing, has gaps, or does not hold both classes; the message
            has the option that helps.
    """
    flags, _ = _decide(frame, column, threshold, positive, missing)
    if flags.n_unique() < 2:
        values = frame[column].filter(~_gaps(frame[column], missing)).unique()
        always = values[0] if len(values) == 1 else int(flags[0])
        how = "" if len(values) == 1 else f" with {_option(threshold, positive)}"
        raise UserError(
            f"label {column!r} is always {_show(always)}{how}; both classes are needed"
            f"{_OF_POSITIVE if trains else _TO_SCORE}"
        )
    return torch.from_numpy(flags.cast(pl.Float32).to_numpy().copy())


def labelled(
    frame: pl.DataFrame, labelling: Labelling, trains: bool = True
) -> tuple[pl.DataFrame, Tensor]:
    """The rows that have a label or are given one, and these labels: see `read_labels`."""
    column, *_, missing = labelling
    labels = read_labels(frame, *labelling, trains)
    if len(labels) < len(frame):
        frame = frame.filter(~_gaps(frame[column], missing))
    return frame, labels


def label_note(
    frame: pl.DataFrame,
    column: str,
    threshold: float | None = None,
    positive: str | None = None,
    missing: str | None = None,
) -> str:
    """What was guessed about the label, and how to have it otherwise; empty if nothing was."""
    return _decide(frame, column, threshold, positive, missing)[1]


def _decide(
    frame: pl.DataFrame,
    column: str,
    threshold: float | None,
    positive: str | None,
    missing: str | None,
) -> tuple[pl.Series, str]:
    """Which samples are positive, and a note on what was guessed."""
    require_columns(frame.columns, [column], "the data")
    if threshold is not None and positive is not None:
        raise UserError("give --label-threshold or --label-positive, not both")
    if missing not in (None, "drop", "negative"):
        raise UserError(f"--label-missing {missing}: drop or negative is needed")
    values = _without_spaces(frame[column])
    if not len(values):
        raise UserError("the data has no rows")
    dtype = values.dtype
    if not (dtype.is_numeric() or dtype in (pl.Boolean, pl.String, pl.Null)):
        raise UserError(
            f"label {column!r} is {brief(dtype)}; numbers, booleans or text are needed: name "
            "another column with --label"
        )
    gaps = _gaps(values, missing)
    if positive is None and dtype == pl.String:
        gaps |= (values == "").fill_null(True)
    if not (rows := int(gaps.sum())):
        return _classes(values, threshold, positive)
    if missing is None or rows == len(values):
        where, how = (f"{rows:,} rows", f"{_TO_THOSE}, or ")
        if rows == len(values):
            where, how = "every row", ""
        raise UserError(
            f"label {column!r} is missing in {where}; {how}name another column with --label"
        )
    flags, note = _classes(values.filter(~gaps), threshold, positive)
    told = "left out" if missing == "drop" else "counted as negative"
    note = f"{note}; {rows:,} rows without one {told}".removeprefix("; ")
    if missing == "drop":
        return flags, note
    return (~gaps).cast(pl.Int8).scatter((~gaps).arg_true(), flags.cast(pl.Int8)) == 1, note


def _gaps(values: pl.Series, missing: str | None) -> pl.Series:
    """Which rows have no label."""
    values = _without_spaces(values)
    gaps = values.is_null()
    if values.dtype.is_float():
        gaps |= values.is_nan().fill_null(True)
    elif values.dtype == pl.String and missing is not None:
        gaps |= values.is_in(["", *MISSING]).fill_null(True)
    return gaps


def _without_spaces(values: pl.Series) -> pl.Series:
    """Text without spaces around; anything else as it is."""
    return values.cast(pl.String).str.strip_chars() if values.dtype in TEXT else values


def _classes(
    values: pl.Series, threshold: float | None, positive: str | None
) -> tuple[pl.Series, str]:
    """Which of some labels are positive, and a note on what was guessed."""
    if values.dtype == pl.Boolean and positive is None:
        return (values if threshold is None else values.cast(pl.Float64) >= threshold), ""
    numbers = values.cast(pl.Float64, strict=False)
    if threshold is not None:
        if numbers.null_count():
            text = values.filter(numbers.is_null())[0]
            raise UserError(
                f"label {values.name!r} holds text such as {_show(text)}, which --label-threshold "
                "cannot compare; --label-positive VALUE names the value that is positive"
            )
        return numbers >= threshold, ""
    if positive is not None:
        return _equal(values, positive), ""
    if numbers.null_count():
        return _text_pair(values)
    return _number_pair(values, numbers)


def _number_pair(values: pl.Series, numbers: pl.Series) -> tuple[pl.Series, str]:
    distinct = numbers.unique().sort().to_list()
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (1.0, 2.0)):
        if set(distinct) <= {low, high}:
            note = f"{high:g} is positive, {low:g} negative; --label-threshold X changes it"
            return numbers == high, note if low else ""
    raise UserError(
        f"label {values.name!r} has values such as {_listed(distinct)}, not 0 and 1; "
        "--label-threshold X calls values of X and more positive, --label-positive X the value X"
    )


def _text_pair(values: pl.Series) -> tuple[pl.Series, str]:
    distinct = sorted(values.unique().to_list())
    if len(distinct) > 2:
        lower = values.str.to_lowercase()
        for folded in (lower, lower.replace(_ONE_SPELLING)):
            pair = sorted(folded.unique().to_list())
            if len(pair) == 2 and (_obvious(*pair) or _obvious(*pair[::-1])):
                return _text_pair(folded)
    if len(distinct) == 2:
        for negative, positive in (distinct, distinct[::-1]):
            if _obvious(negative, positive):
                note = f"{_show(positive)} is positive, {_show(negative)} negative; "
                return values == positive, note + "--label-positive VALUE changes it"
    if len(distinct) == 1:
        return values == distinct[0], ""
    marks = [text for text in distinct if text in MISSING]
    if marks and len(distinct) - len(marks) <= 2:
        rows = int(values.is_in(marks).sum())
        raise UserError(
            f"label {values.name!r} is {_listed(marks)} in {rows:,} rows, by its look missing; "
            f"{_TO_THOSE}, or --label-positive VALUE says what is positive"
        )
    how = "--label-positive VALUE says which one is positive"
    spelled = [text.strip().lower() for text in distinct]
    said = set(spelled)
    # Of one spelling of yes, the option says enough.
    if said <= _NO | _YES and said & _NO and sum(text in _YES for text in spelled) > 1:
        name = json.dumps(brief(values.name), ensure_ascii=False)
        how = "yes and no in several spellings; write it as one, by polars: frame.with_columns("
        how += f"pl.col({name}).str.strip_chars().str.to_lowercase().is_in("
        how += f"{json.dumps(sorted(said & _YES))}))"
    raise UserError(
        f"label {values.name!r} holds {len(distinct):,} texts such as {_listed(distinct)}; {how}"
    )


def _obvious(negative: str, positive: str) -> bool:
    """Whether two texts are a known pair, or one is the other with no, non, not or un before."""
    low, high = (text.strip().lower() for text in (negative, positive))
    if (low, high) in _PAIRS:
        return True
    plain, known = re.sub(r"[\W_]", "", high), _SAID_NO_TO.match(high)
    for prefix in ("no", "non", "not", "un"):
        rest = low.removeprefix(prefix)
        apart = known or re.match(r"[\W_]", rest)
        if rest != low and apart and plain and re.sub(r"[\W_]", "", rest) == plain:
            return True
    return False


def _equal(values: pl.Series, positive: str) -> pl.Series:
    if values.dtype == pl.Boolean:
        flags = values.cast(pl.String) == positive.strip().lower()
    elif values.dtype == pl.String:
        flags = values == positive.strip()
    else:
        try:
            flags = values.cast(pl.Float64) == float(positive)
        except ValueError:
            flags = pl.repeat(False, len(values), eager=True)
    if not flags.any():
        raise UserError(
            f"--label-positive {positive}: label {values.name!r} has no such value; it has "
            f"values such as {_listed(values.unique().sort().to_list())}"
        )
    return flags


def _option(threshold: float | None, positive: str | None) -> str:
    if threshold is not None:
        return f"--label-threshold {threshold:g}"
    return f"--label-positive {positive}"


def _listed(values: list[object]) -> str:
    return ", ".join(_show(v) for v in values[:4])


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 24 else text[:20] + "…" + text[:1]
