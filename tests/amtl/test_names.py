"""Words of names that come again as fields of their own."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from amtl.data.columns import called
from amtl.data.encoding import Encoder
from amtl.data.registry import Source
from amtl.run.preparation import prepare
from amtl.settings import make_config

GIVEN = {"fields": [], "drop": [], "numeric": {}, "options": {}, "laws": {}, "method": "amtl"}
COLOURS = [f"{a}{b}" for a in ("Red", "Blue", "Green", "Grey") for b in ("", "ish", "ness", "er")]
KINDS = {"Bakery": 0.8, "Bank": 0.2, "Books": 0.6, "Bar": 0.3}


def visits(rows: int = 3000, names: int = 500, by_kind: bool = True) -> pl.DataFrame:
    """Shops of some rows each, and labels that follow what is in their names, or each name."""
    rng = np.random.default_rng(0)
    shop, kinds = rng.integers(0, names, rows), list(KINDS)
    kind = [kinds[i] for i in rng.integers(0, len(kinds), names)]
    own = rng.random(names)
    rates = np.array([KINDS[k] for k in kind]) if by_kind else own
    return pl.DataFrame(
        {
            "shop": [f"{COLOURS[i % 16]} {kind[i]} of no. {i}" for i in shop],
            "day": rng.integers(0, 7, rows),
            "bought": (rng.random(rows) < rates[shop]).astype(int),
        }
    )


def prepared(data: pl.DataFrame, **given: object) -> Encoder:
    source = Source("visits", data)
    return prepare(make_config(source, {}, label="bought", **{**GIVEN, **given}), source).encoder


def test_words_of_names_are_a_field_beside_these() -> None:
    encoder = prepared(visits())
    assert encoder.names == ["shop", "day", "shop.words"]
    (note,) = (spec.note for spec in encoder.decisions if spec.name == "shop.words")
    assert "labels follow the words of 'shop', also of those that are new" in note
    again = Encoder.from_tensors(*encoder.to_tensors())
    new = pl.DataFrame({"shop": ["Red Bakery of no. 9999", "Nothing", None], "day": [1, 2, 3]})
    data = again.transform(new)
    assert data.unknown["shop"] == 2 or data.unknown["shop"] == 3
    (bag,) = data.bags
    known = [len(bag.values[bag.offsets[c] : bag.offsets[c + 1]]) for c in bag.codes]
    assert known == [5, 1, 0] and again.columns == ["shop", "day"]


@pytest.mark.parametrize(
    "given", [{"drop": ["shop.words"]}, {"numeric": {"shop": "categorical"}}, {"fields": ["shop"]}]
)
def test_who_says_how_names_are_taken_has_them_so(given: dict[str, object]) -> None:
    assert "shop.words" not in prepared(visits(), **given).names


def test_words_of_names_can_be_named() -> None:
    data = visits(by_kind=False)
    assert prepared(data, fields=["day", "shop.words"]).names == ["day", "shop.words"]
    assert called(data, "day.words") is None and called(data, "none.words") is None
    assert called(data.with_columns(pl.lit(1).alias("shop.words")), "shop.words") is None


@pytest.mark.parametrize(
    "data",
    [
        visits(by_kind=False),
        visits(names=150),
        visits(rows=9000, names=400),
        visits().with_columns(pl.col("shop").str.replace_all(" ", "")),
        visits().with_columns(shop="https://" + pl.col("shop").str.replace(" ", ".org/")),
    ],
    ids=["own", "few", "well known", "one word", "addresses"],
)
def test_other_text_has_none(data: pl.DataFrame) -> None:
    assert "shop.words" not in prepared(data).names
