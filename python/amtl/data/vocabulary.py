"""Vocabularies: raw field values to embedding rows, in order of falling frequency.

The row number of a value is its frequency rank in the training split, so that hot rows are
neighbours in the table, frequency groups are contiguous, and a frozen table cuts into size tiers
without storing a size per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from amtl.data import notation
from amtl.data.finding import Finder
from amtl.data.lists import WORDS, WRITTEN_LISTS, are_written_lists, now_written, split, unquoted
from amtl.errors import brief

Column: TypeAlias = pl.Series | pa.Array | pa.ChunkedArray | np.ndarray | Tensor | Sequence[Any]
"""Everything a column of raw values may come as."""

_KINDS = {"int": pl.Int64, "str": pl.String}
LIST_SEPARATOR = "|"
"""Splits text where training had lists."""
_TRUTH = "(?i)^(?:true|false)$"
_NUMBER = r"^-?\d+(?:\.0+)?$"
_WHOLE_FLOAT = r"^(-?(?:\d{1,15}|[1-8]\d{15}))\.0+$"
"""Of less than 2^53 in magnitude, where a float that is written as text holds one id exactly."""
_MOMENT = (
    r"^(?:(?P<date>\d{4}-\d\d-\d\d)[T ])?(?P<clock>\d\d:\d\d)(?::(?P<second>\d\d)"
    r"(?:\.(?P<fraction>\d*?)0*)?)? ?(?P<zone>Z|UTC|[+-]\d\d:?\d\d)?$"
)
_DATE = r"^\d{4}-\d\d-\d\d$"


class Vocabulary:
    """Maps the raw values of one field to rows `0 .. size-1` by falling training count.

    One row is the out-of-vocabulary row: it answers for every value unseen in training and for
    values rarer than `min_count`, whose mass is its own count, by which it is placed like any
    other row. Missing values (nulls) get a row of their own when training has them, and the
    out-of-vocabulary row otherwise. Ties in count are ordered by value, nulls first and the
    out-of-vocabulary row last, so the same data give the same rows on every machine.

    A value that is unknown as it stands is looked up once more as what it may be in another
    container, see `_one_spelling`: a file of text and a typed table of the same rows give the same
    rows. Where known values are spelled as it is, it is unseen and nothing else.

    Args:
        name: the field's name.
        values: the known values in row order, `size - 1` of them: integers or strings, at most
            one null.
        counts: int64 `[size]`, occurrences in the training split by row.
        oov_row: row of unknown values.
        rows: int32 `[size - 1]`, the row of each entry of `values`; by default the rows other
            than `oov_row` in ascending order.
        separator: splits a string into several values (`"A|B|C"`), see `split`; None if it is one
            value.
        trimmed: values that strings are split into have no spaces around them and are not empty,
            as it was not in files of earlier versions.
        had_empty: the empty text was a value in training, though it may be none of `values`.
            Where it was not, it is a missing value, as files of text have it.

    Raises:
        ValueError: if shapes disagree, values repeat, or rows are not a permutation.
    """

    def __init__(
        self,
        name: str,
        values: Column,
        counts: Tensor,
        oov_row: int,
        rows: Tensor | None = None,
        *,
        separator: str | None = None,
        trimmed: bool = True,
        had_empty: bool = False,
    ) -> None:
        series = _normal(as_series(values), name)
        counts = torch.as_tensor(counts, dtype=torch.int64)
        size = len(counts)
        if len(series) != size - 1 or not 0 <= oov_row < size:
            raise ValueError(
                f"vocabulary {name!r}: {len(series)} values need {len(series) + 1} counts and an "
                f"out-of-vocabulary row among them, not {size} counts and row {oov_row}"
            )
        if rows is None:
            order = torch.arange(size, dtype=torch.int32)
            rows = order[order != oov_row]
        rows = torch.as_tensor(rows, dtype=torch.int32)
        taken = torch.zeros(size, dtype=torch.int64)
        taken[oov_row] = 1
        if len(rows) == len(series) and (not len(rows) or int(rows.min()) >= 0):
            taken += torch.bincount(rows.long(), minlength=size)[:size]
        if not bool((taken == 1).all()):
            raise ValueError(f"vocabulary {name!r}: rows must be a permutation of 0..{size - 1}")
        self.name = name
        self.counts = counts
        self.oov_row = oov_row
        self.separator = separator
        self.trimmed = trimmed
        self._values = series
        self._rows = rows
        self._kind = "str" if series.dtype == pl.String else "int"
        self._had_empty = had_empty or (self._kind == "str" and "" in series)
        nulls = np.flatnonzero(series.is_null().to_numpy())
        self._null_row = int(rows[int(nulls[0])]) if len(nulls) else oov_row
        self._forget()
        if series.n_unique() != len(series):
            raise ValueError(f"vocabulary {name!r}: values must be distinct")

    @classmethod
    def build(
        cls, column: Column, *, name: str = "", min_count: int = 1, separator: str | None = None
    ) -> Vocabulary:
        """Counts a training column and numbers its values; O(n) hashing plus a sort of values.

        Args:
            column: raw values, `[n]`, or lists of them (then every element counts): integers,
                strings, booleans, dates and times, bytes, and whole numbers held as floats or
                decimals. Values are kept as int64, or as text where they are none (bytes as
                hexadecimal digits, integers beyond int64).
            name: the field's name.
            min_count: values seen less often share the out-of-vocabulary row.
            separator: splits strings into several values.

        Raises:
            ValueError: for numbers with a fraction (bucket them first), whole ones that a float
                does not hold exactly, and other types.
        """
        series = as_series(column)
        flat = _flatten(series, separator, name)[0]
        if separator == WRITTEN_LISTS and _is_text(series.dtype):
            flat = flat.str.strip_chars()
        table = _counted(pl.DataFrame({"value": flat}), pl.len())
        had_empty = table["value"].dtype == pl.String and "" in table["value"]
        given: Any = {"separator": separator, "had_empty": had_empty}
        return cls._of_counts(name, table, 0, min_count, given)

    def extended(self, column: Column, *, bags: bool = False, min_count: int = 1) -> Vocabulary:
        """One that has the values of a later training column as well; O(n + size).

        Known values are found as `encode` finds them, in whatever container they come. Counts add
        up, and no value leaves.

        Args:
            column: raw values, `[n]`, or of several values each.
            bags: whether these.
            min_count: values of fewer counts share the out-of-vocabulary row.

        Raises:
            ValueError: the column holds what cannot be values of the field.
        """
        series = as_series(column)
        inner: Any = series.dtype
        if bags:
            flat = self._flat(series, self._bag_separator(series))[0]
            inner = series.dtype.inner if isinstance(series.dtype, pl.List) else inner
        else:
            flat = _normal(series, self.name, lenient=True)
        if flat.dtype == pl.String and not self._had_empty:
            flat = flat.set(flat == "", None)
        rows = self._lookup(flat, inner)[0].long()
        counts = self.counts + torch.bincount(rows, minlength=self.size)
        unknown = flat.filter(pl.Series((rows == self.oov_row).numpy()))
        counts[self.oov_row] -= len(unknown)
        fits = unknown.cast(self.dtype, strict=False).is_not_null()
        new = unknown.filter(unknown.is_null() | fits).cast(self.dtype)
        values = pl.concat([self._values.alias("value"), new.alias("value")])
        times = np.ones(len(values), dtype=np.int64)
        times[: len(self._values)] = counts[self._rows.long()].numpy()
        table = _counted(pl.DataFrame({"value": values, "count": times}), pl.col("count").sum())
        rest = int(counts[self.oov_row]) + len(unknown) - len(new)
        given = {
            "separator": self.separator,
            "trimmed": self.trimmed,
            "had_empty": self._had_empty,
        }
        return self._of_counts(self.name, table, rest, max(1, min_count), given)

    @classmethod
    def _of_counts(
        cls, name: str, table: pl.DataFrame, rest: int, min_count: int, given: Mapping[str, Any]
    ) -> Vocabulary:
        """Of values by falling `count`; `rest` is that of values which have no row already."""
        kept = table.filter(pl.col("count") >= min_count)
        rest += int(table["count"].sum()) - int(kept["count"].sum())
        kept_counts = torch.from_numpy(kept["count"].to_numpy().copy())
        oov_row = int((kept_counts >= rest).sum())
        counts = torch.cat(
            [kept_counts[:oov_row], torch.tensor([rest], dtype=torch.int64), kept_counts[oov_row:]]
        )
        return cls(name, kept["value"], counts, oov_row, **given)

    @property
    def size(self) -> int:
        """Number of rows, the out-of-vocabulary row included."""
        return len(self.counts)

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, size={self.size}, oov_row={self.oov_row})"

    @property
    def values(self) -> list[Any]:
        """The known values by ascending row, without the out-of-vocabulary row."""
        return self.known().to_list()

    def known(self) -> pl.Series:
        """As `values`, without an object of Python for each."""
        return self._values.gather(torch.argsort(self._rows).numpy())

    @property
    def dtype(self) -> Any:
        """Polars type of the values, `Int64` or `String`."""
        return _KINDS[self._kind]

    def encode(self, column: Column) -> Tensor:
        """Rows of a column of single values: int32 `[n]`. Unknown values get `oov_row`."""
        return self.encode_counted(column)[0]

    def encode_counted(self, column: Column) -> tuple[Tensor, int]:
        """As `encode`, with the number of entries that were unknown."""
        series = as_series(column)
        return self._lookup(_normal(series, self.name, lenient=True), series.dtype)

    def encode_bags(self, column: Column) -> tuple[Tensor, Tensor, int]:
        """Rows of a multi-valued column: lists, or text that is split at the separator.

        Text that holds no separator of training's, but another that makes more of it known, is
        split at that. Without a separator training had lists. Text is then read as if it had been
        split at `LIST_SEPARATOR`, unless a known value holds that, or as lists if all of it is.

        Returns:
            rows int32 `[total]`, offsets int64 `[n + 1]` with bag `b` at
            `rows[offsets[b]:offsets[b + 1]]`, and the number of unknown values. A missing list is
            an empty bag.
        """
        series = as_series(column)
        separator = self._bag_separator(series)
        flat, lengths = self._flat(series, separator)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.from_numpy(lengths), 0, out=offsets[1:])
        inner = series.dtype.inner if isinstance(series.dtype, pl.List) else series.dtype
        rows, unknown = self._lookup(flat, inner)
        return rows, offsets, unknown

    def _flat(self, series: pl.Series, separator: str | None) -> tuple[pl.Series, np.ndarray]:
        known = self._values
        # In lists of earlier versions nothing was a value.
        nothing = not self.trimmed or known.null_count() > 0
        nothing = nothing or (known.dtype == pl.String and "" in known)
        given = {"lenient": True, "trim": self.trimmed, "nothing": nothing}
        flat, lengths = _flatten(series, separator, self.name, **given)
        return (self._without_spaces(flat) if self.trimmed else flat), lengths

    def _without_spaces(self, flat: pl.Series) -> pl.Series:
        """Values without spaces around them where they are not known with these.

        Lists have them as they are, and text that training was taught by has them without.
        """
        if not flat.dtype == self._values.dtype == pl.String:
            return flat
        odd = flat.str.contains(r"^\s|\s$").fill_null(False)
        if not odd.any():
            return flat
        odd &= ~flat.is_in(self._values.drop_nulls().implode()).fill_null(False)
        return flat.str.strip_chars().zip_with(odd, flat)

    def first_unknown(self, column: Column, *, bags: bool = False) -> Any:
        """The first unknown value of a column, or of one of bags; None if that is missing."""
        series = as_series(column)
        flat = series
        if bags:
            separator = self._bag_separator(series)
            flat = self._flat(series, separator)[0]
        odd = torch.nonzero(self.encode(flat) == self.oov_row)
        return flat[int(odd[0])] if len(odd) else None

    def decode(self, rows: Tensor | Iterable[int]) -> list[Any]:
        """Raw values of rows; None for a missing value and for the out-of-vocabulary row."""
        position = torch.full((self.size,), -1, dtype=torch.int64)
        position[self._rows.long()] = torch.arange(len(self._rows))
        if not isinstance(rows, Tensor):
            rows = torch.tensor(list(rows), dtype=torch.int64)
        picked = position[rows.reshape(-1).long()]
        values = self._values
        return [values[p] if p >= 0 else None for p in picked.tolist()]

    def renumber(self, new_rows: Tensor) -> None:
        """Moves row `i` to `new_rows[i]`, a permutation of `0 .. size-1`, counts included.

        Rows may also move to where the out-of-vocabulary row goes; the others are then a
        permutation of fewer numbers. Their values leave the vocabulary: they are encoded as
        unknown ones, and their counts add up.
        """
        new_rows = torch.as_tensor(new_rows).long()
        merged = torch.zeros(self.size, dtype=torch.bool)
        if len(new_rows) == self.size:
            merged = new_rows == new_rows[self.oov_row]
            merged[self.oov_row] = False
        size = self.size - int(merged.sum())
        if len(new_rows) != self.size or not torch.equal(
            torch.sort(new_rows[~merged]).values, torch.arange(size)
        ):
            raise ValueError(
                f"renumber() needs a permutation of 0..{size - 1}; only the out-of-vocabulary row "
                "may take others in"
            )
        self.counts = torch.zeros(size, dtype=torch.int64).index_add_(0, new_rows, self.counts)
        self.oov_row = int(new_rows[self.oov_row])
        self._null_row = int(new_rows[self._null_row])
        stays = ~merged[self._rows.long()]
        self._rows = new_rows[self._rows.long()][stays].to(torch.int32)
        self._values = self._values.filter(pl.Series(stays.numpy()))
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of values and rows to look them up."""
        self._table: tuple[int, np.ndarray] | None = None
        self._finders: dict[bool, Finder] = {}
        self._spellings: tuple[pl.DataFrame, pl.Series, bool] | None = None

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Contents as compact tensors and a JSON-able dict, as a safetensors file wants them.

        Values are stored in row order, so rows take no space: strings as UTF-8 bytes and lengths,
        integers as int64; counts as int32 where they fit.
        """
        values = self.known()
        null = values.is_null()
        tensors = {"counts": _narrow(self.counts)}
        if self._kind == "str":
            # Millions of them are too many to be objects of Python one by one.
            texts = values.fill_null("")
            joined = str(texts.str.join("").item()).encode()
            tensors["bytes"] = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy())
            lengths = texts.str.len_bytes().to_numpy().astype(np.int64)
            tensors["lengths"] = _narrow(torch.from_numpy(lengths))
        else:
            ints = values.fill_null(0).to_numpy().astype(np.int64, copy=True)
            tensors["ints"] = torch.from_numpy(ints)
        meta = {
            "name": self.name,
            "oov_row": self.oov_row,
            "separator": self.separator,
            "trimmed": self.trimmed,
            "null_at": int(null.arg_max() or 0) if null.any() else None,
        }
        if self._had_empty:
            meta["had_empty"] = True
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Vocabulary:
        """The inverse of `to_tensors`."""
        if "ints" in tensors:
            values = pl.Series("value", tensors["ints"].numpy(), dtype=pl.Int64)
        else:
            ends = np.zeros(len(tensors["lengths"]) + 1, dtype=np.int64)
            np.cumsum(tensors["lengths"].numpy(), out=ends[1:])
            parts = (pa.py_buffer(ends), pa.py_buffer(tensors["bytes"].numpy().tobytes()))
            texts = pa.LargeStringArray.from_buffers(len(ends) - 1, *parts)
            texts.validate(full=True)
            values = pl.Series("value", texts, dtype=pl.String)
        null_at = meta.get("null_at")
        if null_at is not None:
            keep = pl.Series(np.arange(len(values)) != null_at)
            values = pl.select(pl.when(keep).then(values).alias("value"))["value"]
        return cls(
            str(meta["name"]),
            values,
            tensors["counts"].to(torch.int64),
            int(meta["oov_row"]),
            separator=meta.get("separator"),
            trimmed=meta.get("trimmed", False),
            had_empty=meta.get("had_empty", False),
        )

    def _bag_separator(self, series: pl.Series) -> str | None:
        if not _is_text(series.dtype) or self.separator == WORDS:
            return self.separator
        if self.separator:
            return now_written(series.cast(pl.String), self.separator, self._values)
        texts = series.cast(pl.String)
        if self.trimmed and are_written_lists(texts):
            return WRITTEN_LISTS
        if self._values.cast(pl.String).str.contains(LIST_SEPARATOR, literal=True).any():
            return None
        return now_written(texts, LIST_SEPARATOR, self._values) if self.trimmed else LIST_SEPARATOR

    def _lookup(self, flat: pl.Series, dtype: Any) -> tuple[Tensor, int]:
        """Rows of normal values, which came as `dtype`, and the number of unknown ones."""
        if len(flat) == 0:
            return torch.empty(0, dtype=torch.int32), 0
        if self._kind == "int" and flat.dtype == pl.String:
            # As a file of text is read whose other values are integers.
            flat = notation.texts(flat)
        elif flat.dtype == pl.String and not self._had_empty and self._null_row != self.oov_row:
            flat = flat.set(flat == "", None)
        null = flat.is_null()
        nulls = int(null.sum())
        if len(self._values) == self._values.null_count():
            rows = np.full(len(flat), -1, dtype=np.int32)
        elif self._kind == "int" and flat.dtype == pl.Int64:
            rows = self._lookup_int(flat)
        else:
            flat = flat.cast(pl.String)
            rows = self._finder(as_text=True).rows(flat)
            rows = self._look_again(flat, rows, dtype)
        if nulls:
            rows = np.where(null.to_numpy(), np.int32(self._null_row), rows)
        unknown = rows < 0
        n_unknown = int(unknown.sum()) + (nulls if self._null_row == self.oov_row else 0)
        rows = np.where(unknown, np.int32(self.oov_row), rows)
        return torch.from_numpy(np.array(rows, dtype=np.int32)), n_unknown

    def _look_again(self, flat: pl.Series, rows: np.ndarray, dtype: Any) -> np.ndarray:
        """`rows` (int32 `[n]`, -1 if unknown) of text, with those of other spellings filled in."""
        odd = flat.filter(pl.Series(rows < 0)).unique().drop_nulls().cast(pl.String)
        if not len(odd):
            return rows
        if dtype.is_float() or dtype.is_decimal():
            # The others are no ids, or several ids share them.
            odd = odd.filter(odd.str.contains(r"^-?\d+$"))
        keys = _one_spelling(odd)
        if self._kind == "int":
            low, high = self._values.min(), self._values.max()
            if (low, high) in ((0, 0), (0, 1), (1, 1)):
                keys = _as_bits(keys)
            pairs = pl.DataFrame({"value": odd, "key": keys.cast(pl.Int64, strict=False)})
            pairs = pairs.drop_nulls()
            pairs = pairs.with_columns(row=pl.Series(self._lookup_int(pairs["key"])))
            pairs = pairs.filter(pl.col("row") >= 0)
        else:
            spelled = keys.is_not_null()
            if not spelled.any():
                return rows
            known, forms, bits = self._known_spellings()
            found = _as_bits(keys) if bits else keys
            spelled &= ~_form(odd).is_in(forms.to_list())
            found = pl.select(pl.when(spelled).then(found).alias("key"))["key"]
            pairs = pl.DataFrame({"value": odd, "key": found}).join(known, on="key")
        if not len(pairs):
            return rows
        again = flat.cast(pl.String).replace_strict(
            pairs["value"], pairs["row"], default=-1, return_dtype=pl.Int32
        )
        return np.where(rows < 0, again.to_numpy(), rows)

    def _known_spellings(self) -> tuple[pl.DataFrame, pl.Series, bool]:
        """Of known text: `key` to `row` where one value has it, forms, and whether booleans."""
        if self._spellings is None:
            frame = pl.DataFrame({"value": self._values, "row": pl.Series(self._rows.numpy())})
            frame = frame.drop_nulls().with_columns(_one_spelling(frame["value"].drop_nulls()))
            bits = bool(_as_bits(frame["key"]).is_in(["0", "1"]).fill_null(False).all())
            if bits:
                frame = frame.with_columns(_as_bits(frame["key"]))
            frame = frame.drop_nulls()
            forms = _form(frame["value"]).unique()
            single = frame.select("key", "row").unique("key", keep="none")
            self._spellings = single, forms, bits
        return self._spellings

    def _finder(self, as_text: bool) -> Finder:
        """What finds known values as they are, or as text."""
        as_text = as_text and self._kind == "int"
        if as_text not in self._finders:
            known = self._values.drop_nulls()
            known = known.cast(pl.String) if as_text else known
            self._finders[as_text] = Finder(known, self._known_rows())
        return self._finders[as_text]

    def _lookup_int(self, flat: pl.Series) -> np.ndarray:
        """Integers: a direct table where the range of values is dense enough, else a search."""
        if self._table is None and not self._finders.get(False):
            known = self._values.drop_nulls()
            low, high = int(known.min()), int(known.max())  # type: ignore[arg-type]
            if high - low < max(1 << 20, 8 * len(known)):
                table = np.full(high - low + 1, -1, dtype=np.int32)
                table[known.to_numpy() - low] = self._known_rows().to_numpy()
                self._table = (low, table)
        if self._table is None:
            return self._finder(as_text=False).rows(flat)
        low, table = self._table
        values = flat.fill_null(low - 1 if low > np.iinfo(np.int64).min else low).to_numpy()
        inside = (values >= low) & (values <= low + (len(table) - 1))
        return np.where(inside, table[np.where(inside, values, low) - low], np.int32(-1))

    def _known_rows(self) -> pl.Series:
        rows = pl.Series("row", self._rows.numpy())
        return rows.filter(self._values.is_not_null())


def _counted(values: pl.DataFrame, count: pl.Expr) -> pl.DataFrame:
    """Distinct values (`value`) and how often they come (`count`), the most frequent ones first."""
    grouped = values.lazy().group_by("value").agg(count.cast(pl.Int64).alias("count"))
    order = ["count", "value"]
    return grouped.sort(order, descending=[True, False], nulls_last=False).collect()


def _one_spelling(texts: pl.Series) -> pl.Series:
    """One text (`key`) for all spellings of a value; null for text that has only one.

    `true` for `True` and `TRUE`, `12` for `12.0` (if a float holds it exactly), the date for its
    midnight, and for other moments `2024-01-31 12:30:00.5`, with its zone unless that is UTC.
    Times of day likewise.
    """
    text = pl.col("text")
    parts = text.str.extract_groups(_MOMENT).struct
    date, clock, second, fraction, zone = (
        parts.field(name) for name in ("date", "clock", "second", "fraction", "zone")
    )
    zone = pl.when(~zone.is_in(["Z", "UTC", "+00:00", "+0000"])).then(zone.str.replace(":", ""))
    time = pl.concat_str(
        clock,
        pl.lit(":"),
        second.fill_null("00"),
        pl.when(fraction != "").then("." + fraction).otherwise(pl.lit("")),
        zone.fill_null(""),
    )
    moment = (
        pl.when(date.is_null())
        .then(time)
        .when(time == "00:00:00")
        .then(date)
        .otherwise(date + " " + time)
    )
    key = (
        pl.when(text.str.contains(_TRUTH))
        .then(text.str.to_lowercase())
        .when(text.str.contains(_NUMBER))
        .then(text.str.replace(_WHOLE_FLOAT, "$1"))
        .when(text.str.contains(_DATE))
        .then(text)
        .when(clock.is_not_null())
        .then(moment)
    )
    return pl.DataFrame({"text": texts}).select(key.alias("key"))["key"]


def _as_bits(keys: pl.Series) -> pl.Series:
    return keys.replace({"true": "1", "false": "0"})


def _form(texts: pl.Series) -> pl.Series:
    """How a value is spelled, whatever it is: digits as 0, numbers of any length alike."""
    return texts.str.replace(r"^-?\d+(\.0)?0*$", "0$1").str.replace_all(r"\d", "0")


def _is_text(dtype: Any) -> bool:
    return dtype in (pl.String, pl.Categorical, pl.Enum)


def _narrow(numbers: Tensor) -> Tensor:
    """Non-negative int64 numbers in the smallest of uint8, int32 and int64."""
    top = int(numbers.max()) if len(numbers) else 0
    if top <= 255:
        return numbers.to(torch.uint8)
    return numbers.to(torch.int32) if top < 1 << 31 else numbers.contiguous()


def as_series(column: Column) -> pl.Series:
    """Any column as a polars Series, lists of fixed length as lists."""
    if isinstance(column, Tensor):
        column = column.detach().cpu().numpy()
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        converted = pl.from_arrow(column)
        assert isinstance(converted, pl.Series)
        series = converted
    else:
        series = column if isinstance(column, pl.Series) else pl.Series(column)
    return series.arr.to_list() if isinstance(series.dtype, pl.Array) else series


def _normal(series: pl.Series, name: str = "", *, lenient: bool = False) -> pl.Series:
    """Single values as Int64 or String, so that equal values of any type are equal.

    Args:
        series: single values.
        name: of the column, for messages.
        lenient: numbers that are no ids become text, which no id equals, instead of an error.

    Raises:
        ValueError: for types that have no ids, and unless `lenient` for numbers that are none.
    """
    dtype = series.dtype
    if dtype in (pl.UInt64, pl.Int128) or dtype == getattr(pl, "UInt128", pl.Int128):
        return series.cast(pl.String)
    if dtype.is_integer() or dtype in (pl.Boolean, pl.Null):
        return series.cast(pl.Int64)
    if dtype.is_float() or dtype.is_decimal():
        return _whole(series, name, lenient)
    if dtype == pl.Duration:
        return series.dt.total_nanoseconds()
    if _is_text(dtype) or dtype.is_temporal():
        return series.cast(pl.String)
    if dtype == pl.Binary:
        return series.bin.encode("hex")
    raise ValueError(
        f"{_where(name)} is {brief(dtype)}; a vocabulary takes integers, strings and dates"
    )


def _whole(series: pl.Series, name: str, lenient: bool) -> pl.Series:
    """Whole numbers held as floats or decimals as integers, NaN as missing."""
    if series.dtype.is_float():
        series = series.fill_nan(None)
    ids = exact_ids(series)
    if bool(ids.all()):
        whole = series.cast(pl.Int128)
        small = whole.cast(pl.Int64, strict=False)
        return small if small.null_count() == whole.null_count() else whole.cast(pl.String)
    if not lenient:
        odd = series.filter(~ids)[0]
        if float(odd).is_integer():
            raise ValueError(
                f"{_where(name)} holds {odd:.0f} as {series.dtype}, which cannot tell it from its "
                "neighbours; store such ids as integers or text"
            )
        raise ValueError(
            f"{_where(name)} holds numbers such as {odd}, which are no ids; bucket or standardise "
            "numbers first"
        )
    text = pl.when(ids).then(series.cast(pl.Int128, strict=False).cast(pl.String))
    return pl.select(text.otherwise(series.cast(pl.String)).alias("value"))["value"]


def exact_ids(series: pl.Series) -> pl.Series:
    """Which entries of a float or decimal column are ids it holds exactly, or missing.

    An id is a whole number. A float holds one exactly below 2^53 (Float32: 2^24) in magnitude:
    beyond, neighbours share one float.
    """
    if series.dtype.is_float():
        limit = 2.0**24 if series.dtype == pl.Float32 else 2.0**53
        ids = (series == series.floor()) & (series.abs() < limit)
        return ids.fill_null(True) | series.is_nan().fill_null(False)
    whole = series.cast(pl.Int128, strict=False)
    return ((whole.cast(series.dtype, strict=False) == series).fill_null(False)) | series.is_null()


def _where(name: str) -> str:
    return f"column {name!r}" if name else "the column"


def _flatten(
    series: pl.Series,
    separator: str | None,
    name: str,
    *,
    lenient: bool = False,
    trim: bool = True,
    nothing: bool = False,
) -> tuple[pl.Series, np.ndarray]:
    """Elements of a multi-valued column and the int64 number of elements per entry.

    Empty strings and missing entries are empty bags, and no elements of lists unless `nothing` is
    one; single-valued columns have one element each.
    """
    # What already is a list has its values as they are, quotation marks and all.
    written = separator == WRITTEN_LISTS and _is_text(series.dtype)
    if series.dtype == pl.Null:
        # Nothing but missing lists, as in the one row of a request.
        series = series.cast(pl.List(pl.String))
    if separator and _is_text(series.dtype):
        series = split(series.cast(pl.String), separator, trim=trim)
    if not isinstance(series.dtype, pl.List):
        return _normal(series, name, lenient=lenient), np.ones(len(series), dtype=np.int64)
    if not nothing:
        series = _without_nothing(series)
    lengths = series.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = series.filter(series.list.len() > 0).explode()
    if written:
        flat = unquoted(flat)
    return _normal(flat, name, lenient=lenient), lengths


def _without_nothing(lists: pl.Series) -> pl.Series:
    """Lists without missing and empty elements."""
    full = lists.filter(lists.list.len() > 0).explode()
    nothing = full.is_null()
    if full.dtype == pl.String:
        nothing |= (full.str.strip_chars() == "").fill_null(False)
    if not nothing.any():
        return lists
    element = pl.element()
    keep = element.is_not_null()
    if full.dtype == pl.String:
        keep &= element.str.strip_chars() != ""
    return lists.list.eval(element.filter(keep))
