"""Files of libsvm and libFM: a label and `index:value` pairs a line."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from amtl.errors import UserError

LABEL = "label"
BAG = "features"
_LINE = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?(\s+\d+:[-+]?[\d.]+(e[-+]?\d+)?)*\s*(#.*)?", re.I)
_DENSE = 256
"""Most distinct indices that become a column each, where values differ from 1."""


def looks_like(first: str) -> bool:
    """Whether the first lines of a file are such lines."""
    lines = [line for line in first.splitlines()[:50] if line.strip()]
    pairs = any(":" in line.partition("#")[0] for line in lines)
    return pairs and all(_LINE.fullmatch(line.strip()) for line in lines)


def read(source: Path | io.BytesIO, where: str) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Reads a file into `label` and its features, and says as what.

    - Every line has as many pairs, and their indices lie in ranges of their own by position (a
      table, one-hot): a column `f0`, `f1`, … each. An index alone in its range whose value varies
      is a number; the others are categories.
    - Values other than 1, and at most 256 distinct indices: a column of numbers `x<index>` each,
      0 where a line does not have it.
    - Otherwise the indices are one multi-valued column `features`; those of value 0 are dropped,
      other values than 1 are ignored.

    Args:
        source: the file, or its contents.
        where: its name, for messages.

    Raises:
        UserError: for a line of another form, by its number, and if there is none.
    """
    lines = pl.read_csv(
        source,
        has_header=False,
        new_columns=["text"],
        separator="\x01",
        quote_char=None,
        glob=False,
        schema={"text": pl.String},
    )["text"]
    lines = lines.str.replace(r"#.*", "").str.strip_chars()
    numbers = pl.Series(np.arange(1, len(lines) + 1))
    kept = (lines != "").fill_null(False)
    lines, numbers = lines.filter(kept), numbers.filter(kept)
    if not len(lines):
        raise UserError(f"{where!r} holds no sample")
    words = lines.str.replace_all(r"\s+", " ").str.split(" ")
    labels = words.list.first().cast(pl.Float64, strict=False)
    if labels.null_count():
        _refuse(where, lines, numbers, labels.is_null())
    pairs = words.list.slice(1)
    counts = pairs.list.len().to_numpy().astype(np.int64)
    line = np.repeat(np.arange(len(lines)), counts)
    flat = pairs.filter(pairs.list.len() > 0).explode().str.splitn(":", 2).struct.unnest()
    ids = flat["field_0"].cast(pl.Int64, strict=False)
    values = flat["field_1"].cast(pl.Float64, strict=False)
    bad = (ids.is_null() | values.is_null()).to_numpy()
    if bad.any():
        odd = np.zeros(len(lines), dtype=bool)
        odd[line[bad]] = True
        _refuse(where, lines, numbers, pl.Series(odd))
    columns, note = _columns(counts, line, ids.to_numpy(), values.to_numpy())
    return pl.DataFrame({LABEL: labels, **columns}), (note,)


def _refuse(where: str, lines: pl.Series, numbers: pl.Series, odd: pl.Series) -> None:
    at = int(odd.arg_max() or 0)
    shown = lines[at][:40]
    raise UserError(
        f"{where!r}, line {numbers[at]}: {shown!r} is no 'label index:value index:value …'"
    )


def _columns(
    counts: np.ndarray, line: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> tuple[dict[str, pl.Series], str]:
    n = len(counts)
    width = int(counts[0])
    plain = bool((values == 1).all())
    if width and (counts == width).all():
        order = np.lexsort((ids, line))
        table, held = ids[order].reshape(n, width), values[order].reshape(n, width)
        if (table[:, :-1].max(0) < table[:, 1:].min(0)).all():
            return _positions(table, held)
    distinct = np.unique(ids)
    if not plain and len(distinct) <= _DENSE:
        dense = np.zeros((n, len(distinct)))
        dense[line, np.searchsorted(distinct, ids)] = values
        named = {f"x{i}": pl.Series(dense[:, c]) for c, i in enumerate(distinct)}
        return named, f"{len(distinct)} indices with values: a column of numbers x<index> each"
    present = values != 0
    note = f"indices are one multi-valued column {BAG!r}"
    if not plain:
        note += "; those of value 0 are dropped, other values are ignored"
    ends = np.cumsum(np.bincount(line[present], minlength=n))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int64())
    lists = pa.LargeListArray.from_arrays(offsets, pa.array(ids[present]))
    return {BAG: pl.Series(BAG, pl.from_arrow(lists))}, note


def _positions(table: np.ndarray, values: np.ndarray) -> tuple[dict[str, pl.Series], str]:
    """A column per position: numbers where one index has varying values, categories elsewhere."""
    columns: dict[str, pl.Series] = {}
    numbers, ignored = 0, 0
    for position in range(table.shape[1]):
        ids, held = table[:, position], values[:, position]
        alone = bool((ids == ids[0]).all())
        varies = bool((held != held[0]).any())
        columns[f"f{position}"] = pl.Series(held if alone and varies else ids)
        numbers += alone and varies
        ignored += varies and not alone
    note = f"every line has {table.shape[1]} indices in ranges of their own: columns f0 to "
    note += f"f{table.shape[1] - 1}"
    if numbers:
        note += f", {numbers} of them numbers"
    if ignored:
        note += f"; the values of {ignored} are ignored"
    return columns, note
