"""Generated clicks with a planted truth, for scale tests where no real data is at hand.

Numbers measured on it say nothing about real data and must be labelled as synthetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from amtl.errors import UserError

FIELDS = ("user", "item", "shop", "city", "device", "hour")
_LEVEL_ROWS = 300_000


@dataclass(frozen=True)
class PlantedField:
    """One field of a level.

    Attributes:
        size: number of values.
        zipf: exponent of their frequencies; the smaller, the longer the tail.
        widths: planted width of the rarest and of the most frequent value.
        power: how fast widths fall with the frequency rank r: `(1 - r / size) ** power`.
        main: deviation of a value's own effect.
        pair: deviation of the numbers that meet those of other fields.
    """

    size: int
    zipf: float = 1.05
    widths: tuple[int, int] = (2, 7)
    power: float = 4.0
    main: float = 0.3
    pair: float = 0.45

    def planted(self) -> np.ndarray:
        """Planted width of each value by falling frequency: int64 `[size]`."""
        low, high = self.widths
        share = np.linspace(1, 0, self.size) ** self.power
        return (low + np.floor((high - low) * share)).astype(np.int64)


_SIZES = dict(zip(FIELDS, (50_000, 20_000, 2_000, 300, 40, 24), strict=True))
LEVELS: dict[str, dict[str, PlantedField]] = {
    "": {name: PlantedField(size) for name, size in _SIZES.items()},
    "easy": {
        name: PlantedField(size, 1.2, (3, 9), 2.0, main=0.5, pair=0.5)
        for name, size in _SIZES.items()
    },
    "medium": {
        "user": PlantedField(50_000, 1.1, (1, 9), 8.0, main=0.6, pair=0.6),
        "item": PlantedField(20_000, 1.1, (1, 7), 8.0, main=0.6, pair=0.6),
        "shop": PlantedField(2_000, 1.05, (1, 5), 4.0, main=0.5),
        "city": PlantedField(300, 1.05, (0, 3), 4.0),
        "device": PlantedField(40, 1.05, (2, 2)),
        "hour": PlantedField(24, 0.3, (1, 1)),
    },
    "hard": {
        "user": PlantedField(40_000, 0.6, (1, 9), 12.0, main=0.6, pair=0.6),
        "item": PlantedField(100_000, 0.8, (0, 9), 12.0, main=0.6, pair=0.6),
    },
}
"""Fields by difficulty; "" is `synthetic:ROWS`."""


def load(argument: str | None) -> pl.DataFrame:
    """`synthetic:ROWS` (by default 200,000) or `synthetic:LEVEL[:ROWS]` (300,000), seed 0."""
    first, _, rest = (argument or "").partition(":")
    level = first if first in LEVELS else ""
    number = rest if level else argument
    try:
        rows = int(float(number)) if number else _LEVEL_ROWS if level else 200_000
    except (ValueError, OverflowError):
        raise UserError(
            f"synthetic:{argument}: write synthetic:ROWS or synthetic:LEVEL:ROWS with a number of "
            "rows, LEVEL being easy, medium or hard"
        ) from None
    return generate(rows, level=level)


def generate(rows: int, seed: int = 0, level: str = "") -> pl.DataFrame:
    """Draws fields from Zipf laws and labels from a low-rank interaction model.

    The click probability is `sigmoid(bias + Σ_f b_f[v_f] + Σ_{f<g} <u_f[v_f], u_g[v_g]>)`. Value v
    of planted width k has its own effect b if k ≥ 1 and k - 1 numbers in u; the more frequent the
    value, the wider, as is natural to detect. Column `truth` holds the probability, so the best
    possible AUC is known; `planted_widths` has the widths.

    In "easy" most rows are of frequent values with wide, strong effects; in "medium" fields
    differ in how wide they are; "hard" has only a user and an item with long tails, two thirds of
    the items occurring once or twice, so that a wide table overfits within a few epochs.

    Args:
        rows: how many.
        seed: of everything drawn.
        level: "easy", "medium" or "hard"; "" for six fields of equal laws.
    """
    return _draw(rows, seed, level)[0]


def planted_widths(rows: int, level: str = "") -> pl.DataFrame:
    """The planted width of every value of `generate(rows, level=level)`.

    Returns:
        Columns `field`, `value`, `width`, and `count`, the rows that have the value; values that
        no row has included.
    """
    frame, widths = _draw(rows, 0, level)
    parts = []
    for name, width in widths.items():
        count = np.bincount(frame[name].to_numpy(), minlength=len(width))
        values = np.arange(len(width))
        parts.append(pl.DataFrame({"value": values, "width": width, "count": count}))
        parts[-1] = parts[-1].select(pl.lit(name).alias("field"), pl.all())
    return pl.concat(parts)


def _draw(rows: int, seed: int, level: str) -> tuple[pl.DataFrame, dict[str, np.ndarray]]:
    """The data, and the planted width by value of each field."""
    if not 10 <= rows <= 1 << 30:
        raise UserError(f"synthetic data of {rows} rows: ask for at least 10 and at most 2^30")
    fields = LEVELS[level]
    rank = max(field.widths[1] for field in fields.values()) - 1
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {}
    planted: dict[str, np.ndarray] = {}
    total = np.zeros((rows, rank), dtype=np.float32)
    squares = np.zeros(rows, dtype=np.float32)
    logit = np.full(rows, -0.5, dtype=np.float32)
    for name, field in fields.items():
        weights = np.arange(1, field.size + 1) ** -field.zipf
        ranks = rng.choice(field.size, rows, p=weights / weights.sum())
        widths = field.planted()
        vectors = rng.standard_normal((field.size, rank)).astype(np.float32) * field.pair
        vectors *= np.arange(rank)[None] < widths[:, None] - 1
        picked = vectors[ranks]
        total += picked
        squares += (picked**2).sum(1)
        own = field.main * rng.standard_normal(field.size).astype(np.float32)
        logit += (own * (widths > 0))[ranks]
        values = rng.permutation(field.size)
        columns[name] = values[ranks]
        planted[name] = np.empty_like(widths)
        planted[name][values] = widths
    logit += 0.5 * ((total**2).sum(1) - squares)
    truth = 1 / (1 + np.exp(-logit))
    labels = (rng.random(rows) < truth).astype(np.int8)
    return pl.DataFrame({**columns, "truth": truth, "label": labels}), planted
