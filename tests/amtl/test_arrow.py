"""Types of Arrow that polars does not read."""

from __future__ import annotations

from decimal import Decimal

import pyarrow as pa
import pyarrow.feather
import pytest
from amtl.data.readers import as_frame, read_file
from amtl.errors import UserError

TWICE = [1, 1, 2, 2]
ODD = {
    "large": (pa.array([Decimal(i) for i in TWICE], pa.decimal256(60, 2)), [1.0, 1.0, 2.0, 2.0]),
    "lists of them": (
        pa.array([[Decimal(i)] for i in TWICE], pa.list_(pa.decimal256(60, 2))),
        [[1.0], [1.0], [2.0], [2.0]],
    ),
    "runs": (pa.RunEndEncodedArray.from_arrays(pa.array([2, 4], pa.int32()), [1, 2]), TWICE),
    "json": (pa.array(list("1122"), pa.json_(pa.string())), list("1122")),
    "bool8": (pa.array(TWICE, pa.bool8()), TWICE),
}
"""Columns of types that polars does not read, or as types of their own, and their values."""


@pytest.mark.parametrize("kind", ODD)
def test_types_of_arrow_that_polars_does_not_read(tmp_path, kind):
    column, values = ODD[kind]
    table = pa.table({"x": TWICE, "odd": column})
    pa.feather.write_feather(table, tmp_path / "a.arrow", compression="uncompressed")
    assert read_file(tmp_path / "a.arrow").frame["odd"].to_list() == values
    assert as_frame(table)["odd"].to_list() == values
    assert as_frame(table.to_batches()[0])["odd"].to_list() == values


def test_of_other_types_it_is_said_which_column_has_them(tmp_path):
    table = pa.table({"x": TWICE, "odd": pa.array([(1, 2, 3)] * 4, pa.month_day_nano_interval())})
    pa.feather.write_feather(table, tmp_path / "a.arrow")
    with pytest.raises(UserError, match="column 'odd' is of a type that is not read, month_day"):
        read_file(tmp_path / "a.arrow")
