"""From a table of raw values to tensors of embedding rows, one lookup call per batch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from amtl.data import moments, pairs
from amtl.data.columns import column_of
from amtl.data.encoded import BagField, EncodedData
from amtl.data.fields import bucket_count
from amtl.data.lists import FEWEST_TIMES, WORDS
from amtl.data.readers import require_columns
from amtl.data.scales import Scale
from amtl.data.specs import FieldSpec, numbers
from amtl.data.vocabulary import Vocabulary
from amtl.errors import UserError, brief

_LARGEST = 3e38
"""That 32 bits hold."""
_FEW = 0.15
"""Share of numbers up to which a bucket at an end has few of them; of few rows it has an eighth."""
_REMEMBERED = 2**14
"""Values of a field at most whose encoding is kept."""
_SQUARED = 400
"""Power of two of which squares and their sum are no infinite floats."""

_T = TypeVar("_T")


class Encoder:
    """Turns raw tables into `EncodedData`; fitted on the training split only.

    All embedded fields share one table: the rows of field `f` are
    `field_offsets[f] .. field_offsets[f + 1]` until `renumber` moves them. After it each field
    holds a few runs of consecutive rows, one per size tier, so the map from vocabulary rank to
    embedding row stays a handful of numbers per field.

    Attributes:
        fields: embedded fields, the single-valued ones first, then the bags.
        dense_fields: columns that are numbers alone.
        valued: those of `fields` whose numbers join the embeddings.
        vocabularies: one per embedded field.
        decisions: how every column was taken, the unused ones too; empty if loaded from a file.
        labels: number and checksum of the labels of all splits, in their order, by which changed
            data are noticed; None if not known.
    """

    def __init__(
        self,
        fields: Sequence[FieldSpec],
        dense_fields: Sequence[FieldSpec],
        vocabularies: Sequence[Vocabulary],
        edges: Mapping[str, Tensor],
        scales: Mapping[str, tuple[float, float]],
        beside: Mapping[str, Scale] | None = None,
    ) -> None:
        self.fields = list(fields)
        self.dense_fields = list(dense_fields)
        self.valued = [f for f in self.fields if f.value]
        self.vocabularies = list(vocabularies)
        self.decisions: list[FieldSpec] = []
        self.labels: tuple[int, int] | None = None
        self._edges = dict(edges)
        self._scales = dict(scales)
        self._beside = dict(beside or {})
        self._ends: list[tuple[int, int, int, float, float]] | None = None
        self._requests: dict[str, dict[tuple[Any, Any], Any]] = {}
        ends = np.cumsum([0, *(v.size for v in self.vocabularies)])
        self.field_offsets = [int(e) for e in ends]
        self._runs = [
            (torch.zeros(1, dtype=torch.int64), torch.tensor([start]))
            for start in self.field_offsets[:-1]
        ]

    @classmethod
    def fit(
        cls,
        frame: pl.DataFrame,
        fields: Sequence[FieldSpec],
        min_count: int = 1,
        rows: Tensor | None = None,
    ) -> Encoder:
        """Builds vocabularies, quantile edges and scales from the training rows of `frame`.

        Args:
            frame: has every field's column.
            fields: how its columns are taken.
            min_count: see `Vocabulary.build`.
            rows: int64, the numbers of the training rows; all if None. In whatever order.
        """
        training = _of_rows(frame, rows)
        embedded = [f for f in fields if f.kind in ("categorical", "bucket")]
        embedded += [replace(f, root=_of_words(f)) for f in fields if f.kind == "bag"]
        dense = [f for f in fields if f.kind == "standardise"]
        if not fields:
            raise UserError(
                "there is no column to predict from, beside the label and what --drop and --split "
                "name: give a file that has some"
            )
        if not embedded:
            left_out = "".join(f"; {f.name!r} {f.note}" for f in fields if f.kind == "unused")
            raise UserError(
                "no field has an embedding; name at least one categorical column with --fields, or "
                f"cut numbers into buckets with --numeric bucket{brief(left_out, 300)}"
            )
        trained = frame.height if rows is None else len(rows)
        scales = {f.name: _scale(numbers(training(f), f)) for f in dense}
        edges: dict[str, Tensor] = {}
        beside: dict[str, Scale] = {}
        vocabularies = []
        for spec in embedded:
            column = training(spec)
            read = _values(column, spec)
            if spec.value:
                beside[spec.name] = Scale.fit(read.to_numpy())
            if spec.kind == "bucket":
                edges[spec.name] = _quantiles(read, bucket_count(spec, trained))
                column = _bucket(read, edges[spec.name])
            fewest = max(min_count, FEWEST_TIMES) if spec.root else min_count
            try:
                vocabularies.append(
                    Vocabulary.build(
                        column, name=spec.name, min_count=fewest, separator=spec.separator
                    )
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        encoder = cls(embedded, dense, vocabularies, edges, scales, beside)
        encoder.decisions = list(fields)
        return encoder

    def extended(
        self, frame: pl.DataFrame, min_count: int = 1, rows: Tensor | None = None
    ) -> Encoder:
        """One that has the values of a later table as well, see `Vocabulary.extended`.

        Fields are taken as they were: edges and scales of numbers are those of before, for what was
        learned is of these.

        Args:
            frame: has every field's column.
            min_count: see `Vocabulary.build`.
            rows: int64, the numbers of the training rows; all if None.

        Raises:
            UserError: a column is missing, or holds what cannot be values of its field.
        """
        require_columns(frame.columns, self.columns, "the data")
        training = _of_rows(frame, rows)
        vocabularies = []
        for spec, vocabulary in zip(self.fields, self.vocabularies, strict=True):
            column = training(spec)
            if spec.kind == "bucket":
                edges = self._edges[spec.name]
                column = _bucket(_as_in_training(_values(column, spec), edges), edges)
            fewest = max(min_count, FEWEST_TIMES) if spec.root else min_count
            try:
                vocabularies.append(
                    vocabulary.extended(column, bags=spec.kind == "bag", min_count=fewest)
                )
            except (ValueError, pl.exceptions.PolarsError) as error:
                raise UserError(str(error).splitlines()[0]) from error
        given = self._edges, self._scales, self._beside
        encoder = Encoder(self.fields, self.dense_fields, vocabularies, *given)
        encoder.decisions = [*self.fields, *self.dense_fields]
        return encoder

    @property
    def num_rows(self) -> int:
        """Rows of the shared table."""
        return self.field_offsets[-1]

    @property
    def field_sizes(self) -> list[int]:
        """Rows per embedded field."""
        return [v.size for v in self.vocabularies]

    @property
    def num_dense(self) -> int:
        """Numbers K of a sample."""
        return len(self.dense_fields) + Scale.width * len(self.valued)

    @property
    def names(self) -> list[str]:
        """Names of the embedded fields."""
        return [f.name for f in self.fields]

    @property
    def columns(self) -> list[str]:
        """Columns that are read: the embedded fields, then the standardised ones."""
        return list(dict.fromkeys(f.column for f in [*self.fields, *self.dense_fields]))

    def optional(self) -> list[str]:
        """Columns that a row may well lack: those of lists, and what rows of training lacked."""
        needed = {f.column for f in self.dense_fields}
        for spec, vocabulary in zip(self.fields, self.vocabularies, strict=True):
            if spec.kind != "bag" and vocabulary.encode_counted([None])[1]:
                needed.add(spec.column)
        return [name for name in self.columns if name not in needed]

    def counts(self) -> Tensor:
        """Training occurrences per row of the shared table: int64 `[num_rows]`."""
        counts = torch.empty(self.num_rows, dtype=torch.int64)
        for f, vocabulary in enumerate(self.vocabularies):
            counts[self._global_rows(f, torch.arange(vocabulary.size))] = vocabulary.counts
        return counts

    def row_fields(self) -> Tensor:
        """Field of each row of the shared table: int64 `[num_rows]`."""
        fields = torch.empty(self.num_rows, dtype=torch.int64)
        for f, vocabulary in enumerate(self.vocabularies):
            fields[self._global_rows(f, torch.arange(vocabulary.size))] = f
        return fields

    def field_rows(self, f: int) -> Tensor:
        """Shared-table rows of field `f` in the order of its vocabulary: int64 `[size]`."""
        return self._global_rows(f, torch.arange(self.vocabularies[f].size))

    def transform(
        self, frame: pl.DataFrame, label: Tensor | None = None, weights: Tensor | None = None
    ) -> EncodedData:
        """Encodes a table.

        Args:
            frame: must have every field's column.
            label: float32 `[n]`, or None.
            weights: float32 `[n]`, or None.

        Raises:
            UserError: if a column is missing, or holds what cannot be values of its field.
        """
        require_columns(frame.columns, self.columns, "the data")
        n, bags, beside = frame.height, [], []
        singles = sum(spec.kind != "bag" for spec in self.fields)
        rows = torch.empty(n, singles, dtype=torch.int32)
        for f, spec in enumerate(self.fields):
            found, value = self._remembered(spec, frame, partial(self._field, f, frame))
            if isinstance(found, BagField):
                bags.append(replace(found))
            else:
                rows[:, f] = found
            if value is not None:
                beside.append(value)
        dense = [
            self._remembered(spec, frame, partial(self._standardise, spec, frame))
            for spec in self.dense_fields
        ]
        dense += beside
        data = EncodedData(
            rows=rows,
            bags=bags,
            dense=torch.cat(dense, 1) if dense else torch.empty(n, 0),
            labels=torch.zeros(n) if label is None else label.to(torch.float32),
            weights=weights,
        )
        return self._counted(data)

    def _remembered(self, spec: FieldSpec, frame: pl.DataFrame, encode: Callable[[], _T]) -> _T:
        """What a field is encoded as, kept by its value where it is asked for a row at a time.

        Requests ask for the same users and items again and again, and a pass over a column of one
        row takes most of a millisecond.
        """
        if frame.height != 1:
            return encode()
        column = frame[spec.column]
        held = column[0]
        key = column.dtype, tuple(held) if isinstance(held, pl.Series) else held
        known = self._requests.setdefault(spec.name, {})
        try:
            found: _T | None = known.get(key)
        except TypeError:  # lists in lists, and objects
            return encode()
        if found is None:
            found = encode()
            if len(known) >= _REMEMBERED:
                known.clear()
            known[key] = found
        return found

    def _field(self, f: int, frame: pl.DataFrame) -> tuple[Tensor | BagField, Tensor | None]:
        """Embedding rows of a field, int32 [n] or bags, and the number beside them, [n, k]."""
        spec, vocabulary = self.fields[f], self.vocabularies[f]
        column, value = column_of(frame, spec), None
        try:
            if spec.kind == "bag":
                return self._bag(f, column), None
            read = _values(column, spec)
            if spec.kind == "bucket":
                read = _as_in_training(read, self._edges[spec.name])
            if spec.value:
                value = self._beside[spec.name].apply(read.to_numpy())
            if spec.kind == "bucket":
                column = _bucket(read, self._edges[spec.name])
            return self._global_rows(f, vocabulary.encode(column)), value
        except (ValueError, pl.exceptions.PolarsError) as error:
            raise UserError(str(error).splitlines()[0]) from error

    def part(self, data: EncodedData, samples: Tensor) -> EncodedData:
        """Some samples (int64 `[n]`) of what `transform` gave."""
        taken = EncodedData(
            rows=data.rows[samples],
            bags=[BagField(bag.codes[samples], bag.values, bag.offsets) for bag in data.bags],
            dense=data.dense[samples],
            labels=data.labels[samples],
            weights=None if data.weights is None else data.weights[samples],
        )
        return self._counted(taken)

    def _counted(self, data: EncodedData) -> EncodedData:
        """The data, with how many values there are and how many of them are unknown."""
        oov = [
            int(self._global_rows(f, torch.tensor([vocabulary.oov_row])))
            for f, vocabulary in enumerate(self.vocabularies)
        ]
        singles = data.rows.shape[1]
        missed = (data.rows == torch.tensor(oov[:singles], dtype=torch.int32)).sum(0).tolist()
        data.unknown = dict(zip(self.names, missed, strict=False))
        data.values = dict.fromkeys(data.unknown, len(data))
        for name, row, bag in zip(self.names[singles:], oov[singles:], data.bags, strict=True):
            times = torch.bincount(bag.codes, minlength=len(bag.offsets) - 1)
            times = torch.repeat_interleave(times, bag.offsets.diff())
            data.unknown[name] = int(times[bag.values == row].sum())
            data.values[name] = int(times.sum())
        return data

    def unseen_share(self, name: str) -> float:
        """Share of an embedded field's training values that have no row of their own."""
        vocabulary = self.vocabularies[self.names.index(name)]
        total = int(vocabulary.counts.sum())
        return int(vocabulary.counts[vocabulary.oov_row]) / total if total else 1.0

    def unused(self) -> list[str]:
        """Embedded fields all values of which share one row, so that they say nothing."""
        sizes = zip(self.fields, self.field_sizes, strict=True)
        return [field.name for field, size in sizes if size == 1 and not field.value]

    def examples(self, name: str, frame: pl.DataFrame) -> tuple[Any, Any]:
        """A value of an embedded field in a table that is unseen, and the most frequent known one.

        None stands for a missing value, and where there is none.
        """
        f = self.names.index(name)
        vocabulary, spec = self.vocabularies[f], self.fields[f]
        if spec.kind == "bucket":
            return None, None
        by_count = torch.argsort(vocabulary.counts, descending=True)
        known = next((v for v in vocabulary.decode(by_count[:3]) if v is not None), None)
        column = column_of(frame, spec)
        odd = vocabulary.first_unknown(column, bags=spec.kind == "bag")
        return odd, known

    def at_ends(self, data: EncodedData) -> Iterator[tuple[str, float, float, int, int]]:
        """How many numbers lie where few of training's did, below or above all but these.

        Yields:
            A bucketed field's name, the number at which its first or last bucket ends or begins,
            the share of training's that are in it, if small, and how many of the data's are, and
            how many there are in all. Moments, which go on from day to day, are left out.
        """
        if self._ends is None:
            self._ends = list(self._find_ends())
        for f, place, missing, edge, share in self._ends:
            rows = data.rows[:, f]
            there = len(rows) - int((rows == missing).sum())
            yield self.fields[f].name, edge, share, int((rows == place).sum()), there

    def _find_ends(self) -> Iterator[tuple[int, int, int, float, float]]:
        """Field, its row of numbers at an end, its row of missing ones, the end and its share."""
        for f, spec in enumerate(self.fields):
            edges = self._edges.get(spec.name, torch.empty(0)).tolist()
            if not edges or spec.moment or moments.unit(edges[0], edges[-1]) is not None:
                continue
            vocabulary = self.vocabularies[f]
            local = vocabulary.encode(pl.Series([0, len(edges), None]))
            first, last, missing = self._global_rows(f, local).tolist()
            total = max(int(vocabulary.counts.sum()), 1)
            for end, place, edge in zip(local, (first, last), (edges[0], edges[-1]), strict=False):
                share = int(vocabulary.counts[end]) / total
                if share < _FEW and end != vocabulary.oov_row:
                    yield f, place, missing, edge, share

    def reads_numbers(self, name: str, frame: pl.DataFrame) -> bool:
        """Whether most values of a field of ids join these as numbers, known ids or not."""
        spec = self.fields[self.names.index(name)]
        if spec.kind != "categorical" or not spec.value:
            return False
        read = _values(column_of(frame, spec), spec)
        return bool(read.is_not_nan().sum() * 2 > len(read))

    def renumber(self, new_rows: Tensor) -> None:
        """Moves shared-table row `i` to `new_rows[i]`: a permutation of all rows.

        Rows may also move to where their field's out-of-vocabulary row goes; their values then
        leave the vocabulary. Vocabularies are reordered so that each field's rows ascend; where a
        freeze kept rows of a field in order within each size tier, a field ends as one run per
        tier.
        """
        new_rows = torch.as_tensor(new_rows).long()
        moved = [
            torch.unique(new_rows[self.field_rows(f)], return_inverse=True)
            for f in range(len(self.vocabularies))
        ]
        taken = torch.sort(torch.cat([rows for rows, _ in moved])).values
        if not torch.equal(taken, torch.arange(len(taken))):
            raise ValueError("renumber() needs a permutation of the rows, or of fewer of them")
        for f, (rows, rank) in enumerate(moved):
            self.vocabularies[f].renumber(rank)
            self._runs[f] = _runs(rows)
        self.field_offsets = [int(e) for e in np.cumsum([0, *self.field_sizes])]
        self._ends = None
        self._requests = {}

    def note_labels(self, labels: Tensor) -> None:
        """Remember the labels [n], zeros and ones, of the data that it was fitted on a part of."""
        self.labels = _mark(labels)

    def has_labels(self, labels: Tensor) -> bool:
        """Whether labels [n] are those of all the data that it was fitted on a part of."""
        return self.labels == _mark(labels)

    def require_labels(self, labels: Tensor, data: str) -> None:
        """Refuse data whose rows are others, or elsewhere: splits would not be those of training.

        Raises:
            UserError: they are.
        """
        now = _mark(labels)
        if self.labels is not None and self.labels != now:
            then = self.labels[0]
            how = f"{then:,} rows then, {now[0]:,} now" if then != now[0] else "other labels in it"
            raise UserError(
                f"{data} is not what it was in training ({how}), so nobody can tell its splits: "
                "restore it; or amtl train --force starts anew, amtl evaluate RUN DATA scores all "
                "rows of a file"
            )

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Contents as tensors and a JSON-able dict, for a safetensors file."""
        tensors: dict[str, Tensor] = {}
        vocabularies = []
        for f, vocabulary in enumerate(self.vocabularies):
            parts, meta = vocabulary.to_tensors()
            tensors |= {f"{f}.{key}": value for key, value in parts.items()}
            tensors[f"{f}.run_starts"], tensors[f"{f}.run_rows"] = self._runs[f]
            vocabularies.append(meta)
        tensors |= {f"edges.{name}": edges for name, edges in self._edges.items()}
        tensors |= {f"beside.{name}": scale.to_tensor() for name, scale in self._beside.items()}
        meta = {
            "fields": [_stored(f) for f in self.fields],
            "dense_fields": [_stored(f) for f in self.dense_fields],
            "vocabularies": vocabularies,
            "scales": {name: list(scale) for name, scale in self._scales.items()},
        }
        if self.labels is not None:
            meta["labels"] = list(self.labels)
        return tensors, meta

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Encoder:
        """The inverse of `to_tensors`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        encoder = cls(
            [_read_spec(f) for f in meta["fields"]],
            [_read_spec(f) for f in meta["dense_fields"]],
            [Vocabulary.from_tensors(part(f"{f}."), m) for f, m in enumerate(meta["vocabularies"])],
            part("edges."),
            {name: (scale[0], scale[1]) for name, scale in meta["scales"].items()},
            {name: Scale.from_tensor(stored) for name, stored in part("beside.").items()},
        )
        if "labels" in meta:
            rows, checksum = meta["labels"]
            encoder.labels = rows, checksum
        encoder._runs = [
            (tensors[f"{f}.run_starts"].clone(), tensors[f"{f}.run_rows"].clone())
            for f in range(len(encoder.fields))
        ]
        return encoder

    def _global_rows(self, f: int, local: Tensor) -> Tensor:
        starts, rows = self._runs[f]
        run = torch.searchsorted(starts, local.long(), right=True) - 1
        return local.long() + (rows - starts)[run]

    def _bag(self, f: int, column: pl.Series) -> BagField:
        """Encodes each distinct list once; codes tell which list a sample has."""
        if column.dtype == pl.Object:
            held = next((type(v).__name__ for v in column if v is not None), "None")
            raise ValueError(
                f"column {self.names[f]!r} holds objects of Python ({brief(held)}): make lists of "
                "them, as by list(value)"
            )
        frame = pl.DataFrame({"v": column})
        if column.dtype == pl.Categorical:
            frame = frame.with_columns(pl.col("v").cast(pl.String))
        lists = frame.group_by("v", maintain_order=True).agg().with_row_index("c")
        codes = frame.join(lists, on="v", how="left", nulls_equal=True, maintain_order="left")["c"]
        local, offsets, _ = self.vocabularies[f].encode_bags(lists["v"])
        return BagField(
            torch.from_numpy(codes.to_numpy().astype(np.int64)),
            self._global_rows(f, local).to(torch.int32),
            offsets,
        )

    def _standardise(self, spec: FieldSpec, frame: pl.DataFrame) -> Tensor:
        """Numbers of a field without an embedding, float32 [n, 1]."""
        mean, scale = self._scales[spec.name]
        read = numbers(column_of(frame, spec), spec)
        values = moments.as_in_training(read, mean, mean).to_numpy()
        values = np.where(np.isfinite(values), values, mean)
        # Halves do not overflow where they are subtracted, and are exact.
        with np.errstate(over="ignore"):
            values = (values / 2 - mean / 2) / scale * 2
        return torch.from_numpy(np.clip(values, -_LARGEST, _LARGEST).astype(np.float32))[:, None]


def _of_rows(frame: pl.DataFrame, rows: Tensor | None) -> Callable[[FieldSpec], pl.Series]:
    """What gives a field's column, of the rows that train alone, or of all.

    A column at a time: a second frame would be most of the memory that is taken.
    """
    if rows is None:
        return lambda spec: column_of(frame, spec)
    mask = np.zeros(frame.height, dtype=bool)
    mask[rows.numpy()] = True
    trains = pl.Series(mask)
    return lambda spec: column_of(frame, spec).filter(trains)


def _of_words(spec: FieldSpec) -> bool:
    return spec.separator == WORDS or spec.part in pairs.PARTS


def _stored(spec: FieldSpec) -> dict[str, Any]:
    """A field for a file, which readers that know less open unless it has what they lack."""
    later = (
        "decimal",
        "scaled",
        "unit",
        "ranges",
        "moment",
        "value",
        "part",
        "of",
        "zone",
        "folded",
        "root",
        "marks",
    )
    return {key: value for key, value in asdict(spec).items() if key not in later or value}


def _read_spec(stored: Mapping[str, Any]) -> FieldSpec:
    """The inverse of `_stored`."""
    return FieldSpec(**{**stored, "marks": tuple(stored.get("marks", ()))})


def _values(column: pl.Series, spec: FieldSpec) -> pl.Series:
    """A column's numbers where its field asks for any, NaN for what is missing or no number.

    As it is where none are asked for. What is no number is an error but among ids.
    """
    if spec.kind == "bucket":
        return numbers(column, spec)
    if not spec.value:
        return column
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype == pl.String:
        column = column.str.strip_chars()
    elif not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        return pl.Series(column.name, [math.nan]).new_from_index(0, len(column))
    return column.cast(pl.Float64, strict=False).fill_null(math.nan)


def _as_in_training(read: pl.Series, edges: Tensor) -> pl.Series:
    """Numbers of a bucket's column, moments in the unit that the edges are in."""
    if not len(edges):
        return read
    return moments.as_in_training(read, float(edges[0]), float(edges[-1]))


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and first rows of the runs of consecutive numbers in ascending `rows`."""
    breaks = torch.ones(len(rows), dtype=torch.bool)
    breaks[1:] = rows[1:] != rows[:-1] + 1
    starts = torch.nonzero(breaks).view(-1)
    return starts, rows[starts]


def _mark(labels: Tensor) -> tuple[int, int]:
    return len(labels), zlib.crc32(labels.to(torch.uint8).numpy().tobytes())


def _quantiles(numbers: pl.Series, buckets: int) -> Tensor:
    """Edges of buckets, amid the values on either side: in 32 bits a value is none quite the same.

    None is above the largest value, so that larger ones of later rows share its bucket.
    """
    values = np.sort(numbers.drop_nans().to_numpy())
    if not len(values):
        return torch.empty(0, dtype=torch.float64)
    cuts = np.unique(np.quantile(values, np.arange(1, buckets) / buckets, method="lower"))
    below = cuts[cuts < values[-1]]
    above = values[np.searchsorted(values, below, side="right")]
    with np.errstate(invalid="ignore"):  # of what is infinite on both sides
        amid = below / 2 + above / 2
    return torch.from_numpy(np.where((below < amid) & (amid < above), amid, below))


def _bucket(numbers: pl.Series, edges: Tensor) -> pl.Series:
    """Numbers of buckets as integers; NaN is missing."""
    values = numbers.fill_nan(None)
    places = np.searchsorted(edges.numpy(), values.fill_null(0).to_numpy(), side="left")
    buckets = pl.DataFrame({"b": places.astype(np.int64), "null": values.is_null()})
    return buckets.select(pl.when(~pl.col("null")).then(pl.col("b")))["b"].alias(numbers.name)


def _scale(numbers: pl.Series) -> tuple[float, float]:
    values = numbers.to_numpy()
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    # The sum, and the squares, of numbers as large as floats go are beyond that.
    unit = 2.0 ** max(0, math.frexp(float(np.abs(values).max()))[1] - 1 - _SQUARED)
    values = values / unit
    return float(values.mean()) * unit, float(values.std()) * unit or 1.0
