"""Points in one column as fields of their two numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from amtl.data.encoding import Encoder
from amtl.data.places import parts, take
from amtl.data.registry import Source
from amtl.run.preparation import prepare
from amtl.settings import make_config

ROWS = 2000
WRITTEN: dict[str, Callable[[float, float], str]] = {
    "a comma": lambda a, b: f"{a:.4f},{b:.4f}",
    "parentheses": lambda a, b: f"({a:.4f}, {b:.4f})",
    "a database": lambda a, b: f"POINT ({a:.4f} {b:.4f})",
    "a space": lambda a, b: f" {a:.4f} {b:.4f}",
}


def points(rows: int = ROWS) -> np.ndarray:
    """Some of them, as often as it comes, of two places."""
    rng = np.random.default_rng(0)
    return np.array([41.88, -87.63]) + rng.choice([-0.5, 0.5], (rows, 2)) + rng.normal(size=2) / 9


def frame(write: Callable[[float, float], str], rows: int = ROWS) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    some = points(rows) + rng.normal(size=(rows, 2)) / 9
    clicked = rng.random(rows) < 0.3 + 0.4 * ((some[:, 0] > 41.88) != (some[:, 1] > -87.63))
    text = [write(a, b) for a, b in some.tolist()]
    return pl.DataFrame(
        {"where": text, "x": rng.integers(0, 9, rows), "clicked": clicked.astype(int)}
    )


@pytest.mark.parametrize("written", WRITTEN)
def test_points_are_two_numbers(written: str) -> None:
    data = frame(WRITTEN[written])
    source = Source("visits", data)
    given = {"fields": [], "drop": [], "numeric": {}, "options": {}, "laws": {}, "method": "amtl"}
    config = make_config(source, {}, label="clicked", **given)
    encoder = prepare(config, source).encoder
    kinds = {field.name: field.kind for field in encoder.decisions}
    assert (kinds["where"], kinds["where.1"], kinds["where.2"]) == ("unused", "bucket", "bucket")
    first = encoder.fields[encoder.names.index("where.1")]
    assert first.value and "--drop where.1" in first.note
    again = Encoder.from_tensors(*encoder.to_tensors())
    expected = encoder.transform(data).rows
    for other in WRITTEN.values():
        assert again.transform(frame(other)).rows.equal(expected)


def test_what_is_no_point_is_none() -> None:
    for texts in (["3,4", "5,6"], ["1.5", "2.5"], ["1.5,2.5,3.5"], ["a 1.5 2.5"], ["1.5,2.5"]):
        column = pl.Series("where", texts * 30)
        assert parts(column.to_frame(), "bucket", values=True) == []
    data = frame(WRITTEN["a comma"])
    (first, second) = parts(data, "bucket", values=False)
    assert (first.value, second.of, second.part) == (False, "where", "2")
    assert [f.name for f in parts(data, "bucket", True, {"where.1"})] == ["where.2"]
    assert parts(data, "bucket", True, {"where"}) == parts(data, "categorical", True) == []
    scored = pl.Series("where", ["41.5,-87.5", "somewhere", "", None])
    assert take(scored, first).to_list() == [41.5, None, None, None]
    assert take(pl.Series("where", [41.5]), first).to_list() == [None]
