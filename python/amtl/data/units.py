"""Numbers with a unit behind them: `25.3 kg`, `1248 CC`, `12.5 kB` among `3 MB`, `2h 5m`."""

from __future__ import annotations

import polars as pl

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0
_TIMES = {
    "ms": 0.001,
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), _MINUTE),
    **dict.fromkeys(("h", "hr", "hour"), _HOUR),
    **dict.fromkeys(("d", "day"), _DAY),
    **dict.fromkeys(("w", "wk", "week"), 7 * _DAY),
    **dict.fromkeys(("mo", "month"), 30.4375 * _DAY),
    **dict.fromkeys(("y", "yr", "year"), 365.25 * _DAY),
}
KINDS: dict[str, dict[str, float]] = {
    "seconds": _TIMES,
    "bytes": {
        **dict.fromkeys(("b", "byte"), 1.0),
        **dict(zip(("kb", "mb", "gb", "tb"), (1e3, 1e6, 1e9, 1e12), strict=True)),
        **dict(
            zip(("kib", "mib", "gib", "tib"), (2.0**10, 2.0**20, 2.0**30, 2.0**40), strict=True)
        ),
    },
    "metres": {
        **dict(zip(("mm", "cm", "m", "km"), (0.001, 0.01, 1.0, 1000.0), strict=True)),
        **dict.fromkeys(("mi", "mile"), 1609.344),
        **dict.fromkeys(("in", "inch", "inche", '"', "”"), 0.0254),
        **dict.fromkeys(("ft", "foot", "feet", "'", "’"), 0.3048),
    },
    "grams": {"mg": 0.001, "g": 1.0, "kg": 1000.0, "oz": 28.349523, "lb": 453.59237},
    "litres": {"ml": 0.001, "cl": 0.01, "dl": 0.1, "l": 1.0, "litre": 1.0, "liter": 1.0},
    "hertz": {"hz": 1.0, "khz": 1e3, "mhz": 1e6, "ghz": 1e9},
    "watts": {"w": 1.0, "kw": 1e3, "mw": 1e6, "gw": 1e9},
}
"""What a unit is of one of its kind, without the s of a plural."""
_ALONE = {
    *("cc", "ccm", "ps", "hp", "bhp", "kmpl", "kmph", "kmh", "km/h", "mph", "mpg", "kwh", "wh"),
    *("mah", "px", "dpi", "mp", "mbps", "gbps", "bar", "psi", "°c", "°f", "°", "sqft", "sqm"),
    *("m²", "km²", "m2", "kcal", "cal", "kj", "pcs", "pc", "pt", "rpm", "nm", "db", "%"),
    *(name for kind in KINDS.values() for name in kind if len(name) > 1),
}
"""Units known to stand behind whole numbers without a space, where other letters may be of ids."""
_FEW_UNITS = 5
_ONE = r"^([+-]?\s?[\d.,]*\d)(\s?)([^\d\s.,;:()+-][^\d,;:()]{0,11})$"
_TIMEDELTA = r"^(\d+) days?,? (\d{1,2}):(\d\d):(\d\d(?:\.\d+)?)$"
_PIECE = r"(\d+(?:\.\d+)?)\s?([A-Za-z'’\"”]+)"


def find(values: pl.Series) -> str:
    """The unit that all of these distinct texts have, or their kind where it has several units.

    Empty where they have none, or what may be a part of ids.
    """
    values = _with_units(values)
    few = values[:100]
    if not len(few) or not (few.str.contains(_ONE) | _is_compound(few)).all():
        return ""
    one = values.str.extract_groups(_ONE).struct.unnest()
    single = one["3"].is_not_null()
    if not (single | _is_compound(values)).all():
        return ""
    named = _spelled(one["3"].filter(single))
    sure = one["2"].filter(single) != ""
    sure |= one["1"].filter(single).str.contains("[.,]") | named.is_in(list(_ALONE))
    if single.all() and named.n_unique() == 1:
        return str(one["3"][0]).strip() if sure.any() else ""
    for kind, units in KINDS.items():
        if taken_off(values, kind)[1].is_not_null().all():
            compound = (~single).any()
            return kind if compound or sure.all() or len(units.keys() & set(named)) > 1 else ""
    return ""


def taken_off(cells: pl.Series, unit: str) -> tuple[pl.Series, pl.Series]:
    """Texts `[n]` without the unit, and what each is to be multiplied by.

    A text without a unit stays as it is, unless training had several; that of another one, or of no
    number, is missing.
    """
    cells = _with_units(cells)
    one = cells.str.extract_groups(_ONE).struct.unnest()
    named, plain = _spelled(one["3"]), one["3"].is_null()
    units = KINDS.get(unit)
    if units is None:
        other = ~plain & (named != _spelled(pl.Series([unit]))[0])
        ones = pl.Series([1.0]).new_from_index(0, len(cells))
        return one["1"].zip_with(~plain, cells).set(other.fill_null(False), None), ones
    factors = named.replace_strict(units, default=None, return_dtype=pl.Float64)
    compound = _is_compound(cells) & plain.fill_null(True)
    digits = one["1"].set(factors.is_null(), None)
    if compound.any():
        sums = _sums(cells.filter(compound), units)
        where = compound.arg_true()
        digits = digits.scatter(where, sums)
        factors = factors.scatter(where, sums.cast(pl.Float64) * 0 + 1)
    return digits, factors


def differ(values: pl.Series) -> list[str]:
    """A text of each unit, if all of these distinct texts are numbers with one, or one of a few."""
    one = values.str.extract_groups(_ONE).struct.unnest()
    named = _spelled(one["3"])
    if not len(values) or named.null_count() or not 1 < named.n_unique() <= _FEW_UNITS:
        return []
    return values.filter(named.is_first_distinct()).to_list()


def _with_units(cells: pl.Series) -> pl.Series:
    """Durations as pandas writes them, such as `5 days 06:59:00`, as numbers with units."""
    return cells.str.replace(_TIMEDELTA, "$1 d $2 h $3 min $4 s")


def _is_compound(cells: pl.Series) -> pl.Series:
    """Which texts are several numbers with units: `2h 5m`, `6 lb 4 oz`."""
    return cells.str.contains(rf"^{_PIECE}(?:(?:,| and)?\s?{_PIECE})+$").fill_null(False)


def _sums(cells: pl.Series, units: dict[str, float]) -> pl.Series:
    """The sum of such a text's numbers as text; missing where a unit is none of these."""
    frame = pl.DataFrame({"piece": cells.str.extract_all(_PIECE)}).with_row_index("row")
    pieces = frame.explode("piece").with_columns(
        number=pl.col("piece").str.extract(_PIECE, 1).cast(pl.Float64),
        unit=_spelled(frame.explode("piece")["piece"].str.extract(_PIECE, 2)),
    )
    factor = pl.col("unit").replace_strict(units, default=None, return_dtype=pl.Float64)
    pieces = pieces.with_columns(part=pl.col("number") * factor)
    sums = pieces.group_by("row", maintain_order=True).agg(
        pl.when(pl.col("part").is_null().any()).then(None).otherwise(pl.col("part").sum())
    )
    return sums.to_series(1).cast(pl.String)


def _spelled(units: pl.Series) -> pl.Series:
    """Units without the point of an abbreviation, the s of a plural, and their case."""
    lower = units.str.strip_chars(" .").str.to_lowercase()
    return lower.str.replace(r"^(\pL{2,})s$", "$1")
