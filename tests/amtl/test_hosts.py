"""Hosts of addresses, networks and blocks of these, as fields of their own."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from amtl.data.columns import called, column_of
from amtl.data.encoding import Encoder
from amtl.data.hosts import parts, take
from amtl.data.registry import Source
from amtl.data.specs import FieldSpec
from amtl.run.preparation import prepare
from amtl.settings import make_config

ROWS = 1000
GIVEN = {"fields": [], "drop": [], "numeric": {}, "options": {}, "laws": {}, "method": "amtl"}


def visits() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    site, page, net = rng.integers(0, 9, ROWS), rng.integers(0, 500, ROWS), rng.integers(0, 5, ROWS)
    return pl.DataFrame(
        {
            "from": [f"https://www.Site{a}.org/{b}?c=1" for a, b in zip(site, page, strict=True)],
            "ip": [f"192.{a}.{b % 256}.{b // 7}" for a, b in zip(net, page, strict=True)],
            "clicked": (rng.random(ROWS) < 0.2 + 0.6 * (site > 4)).astype(int),
        }
    )


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("https://www.example.org/a?b=1", "host", "example.org"),
        ("http://me:pass@Example.org:80", "host", "example.org"),
        ("www.example.org#top", "host", "example.org"),
        ("android-app://org.example", "host", "org.example"),
        ("some.body+x@mail.example.org", "host", "mail.example.org"),
        ("192.0.2.7", "network", "192.0"),
        ("192.0.2.7:443", "network", "192.0"),
        ("2001:DB8::1", "network", "2001:db8"),
        ("2001:db8:0:0:0:0:0:1", "network", "2001:db8"),
        ("192.0.2.7", "block", "192"),
        ("2001:DB8::1", "block", "2001"),
        ("(direct)", "host", None),
        ("http://localhost/a", "host", None),
        ("a@b, c@example.org", "host", None),
        ("20:24:53", "network", None),
        ("00:1b:44:11:3a:b7", "network", None),
        ("1.10.2", "network", None),
    ],
)
def test_what_of_an_address_it_is(text, part, found):
    spec = FieldSpec("x.part", part=part, of="x")
    assert take(pl.Series("x", [text, None, ""]), spec).to_list() == [found, None, None]


def test_hosts_and_networks_are_fields():
    data = visits()
    source = Source("visits", data)
    encoder = prepare(make_config(source, {}, label="clicked", **GIVEN), source).encoder
    sizes = dict(zip(encoder.names, (len(v) for v in encoder.vocabularies), strict=True))
    assert (sizes["from.host"], sizes["ip.network"]) == (10, 6)
    assert "--drop from.host" in encoder.fields[encoder.names.index("from.host")].note
    again = Encoder.from_tensors(*encoder.to_tensors())
    assert again.transform(data).rows.equal(encoder.transform(data).rows)
    # All rows to score may lack them.
    assert len(again.transform(data.with_columns(ip=pl.lit(None))).rows)


def test_blocks_are_fields_where_networks_hardly_come_again():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 256, (ROWS, 4))
    y = (rng.random(ROWS) < 0.2 + 0.6 * (numbers[:, 0] > 99)).astype(int)
    data = pl.DataFrame({"ip": [".".join(map(str, row)) for row in numbers], "clicked": y})
    assert [field.name for field in parts(data)] == ["ip.block"]
    assert parts(data, skip=["ip.block"]) == []
    source = Source("visits", data)
    encoder = prepare(make_config(source, {}, label="clicked", **GIVEN), source).encoder
    kinds = {field.name: field.kind for field in encoder.decisions}
    assert kinds == {"ip": "unused", "ip.block": "categorical"}
    assert called(data, "ip.block") is not None
    six = [f"{a:04x}:{b:04x}::{c:x}:{d:x}" for a, b, c, d in numbers * [1, 256, 256, 256]]
    assert [field.name for field in parts(pl.DataFrame({"ip": six}))] == ["ip.block"]


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_addresses_that_hardly_come_again_make_way_for_their_hosts(own):
    """Unless single ones tell of labels, too."""
    rng = np.random.default_rng(5)
    page, liked = np.arange(ROWS), rng.random(ROWS) < 0.5
    page[::2] = np.arange(ROWS // 2) % 25
    text = [f"https://site{a % 9}.org/{a}" for a in page]
    data = visits().with_columns(pl.Series("from", text))
    rate = 0.3 + 0.2 * (page % 9 > 4) + own * (liked[page] - 0.5)
    data = data.with_columns(clicked=pl.Series((rng.random(ROWS) < rate).astype(int)))
    source = Source("visits", data)
    encoder = prepare(make_config(source, {}, label="clicked", **GIVEN), source).encoder
    (whole,) = (field for field in encoder.decisions if field.name == "from")
    assert whole.kind == ("categorical" if own else "unused") and "from.host" in encoder.names
    assert own or "tell nothing of labels beside their host; --numeric from=cat" in whole.note
    given = GIVEN | {"numeric": {"from": "categorical"}}
    assert (
        "from" in prepare(make_config(source, {}, label="clicked", **given), source).encoder.names
    )


@pytest.mark.parametrize("name", ["from.host", "where.1"])
def test_parts_can_be_dropped_and_taken_alone(name):
    rng = np.random.default_rng(1)
    where = [f"{a:.4f},{b:.4f}" for a, b in rng.normal(40, 3, (ROWS, 2)).tolist()]
    data = visits().with_columns(where=pl.Series(where))
    source = Source("visits", data)
    config = make_config(source, {}, label="clicked", **GIVEN | {"drop": [name]})
    assert name not in prepare(config, source).encoder.names
    config = make_config(source, {}, label="clicked", **GIVEN | {"fields": ["ip", name]})
    assert prepare(config, source).encoder.names == ["ip", name]
    assert called(data, "ip.host") is None and called(data, "ip.1") is None


@pytest.mark.parametrize("values", [["a.b", "c.d"], ["me@a.org"], ["https://a.org/1", "no", "b"]])
def test_other_text_has_none(values):
    assert not parts(pl.DataFrame({"x": (values * 99)[:99], "y": range(99)}))


def test_addresses_of_one_host_each_have_none():
    frame = pl.DataFrame({"x": [f"https://a{i}.org/" for i in range(50)]})
    assert not parts(frame)
    assert called(frame, "x.host") is None
    assert column_of(frame, parts(visits())[0].__class__("x")).equals(frame["x"])
