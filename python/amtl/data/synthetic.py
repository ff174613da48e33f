"""Generated clicks with a planted truth, for scale tests where no real data is at hand.

Numbers measured on it say nothing about real data and must be labelled as synthetic.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from amtl.errors import UserError

FIELDS = ("user", "item", "shop", "city", "device", "hour")
_SIZES = (50_000, 20_000, 2_000, 300, 40, 24)
_ZIPF = 1.05
_RANK = 6


def load(argument: str | None) -> pl.DataFrame:
    """`synthetic:ROWS`, by default 200,000 rows of seed 0."""
    try:
        rows = int(float(argument)) if argument else 200_000
    except ValueError:
        raise UserError(f"synthetic:{argument}: write synthetic:ROWS with a number") from None
    return generate(rows)


def generate(rows: int, seed: int = 0) -> pl.DataFrame:
    """Draws fields from Zipf laws and labels from a low-rank interaction model.

    The click probability is `sigmoid(bias + Σ_f b_f[v_f] + Σ_{f<g} <u_f[v_f], u_g[v_g]>)`; a
    value's planted vector has more active dimensions the more frequent the value, as is natural
    to detect. Column `truth` holds the probability, so the best possible AUC is known.

    Args:
        rows: how many.
        seed: of everything drawn.
    """
    if rows < 10:
        raise UserError(f"synthetic data of {rows} rows is too little; ask for at least 10")
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {}
    total = np.zeros((rows, _RANK), dtype=np.float32)
    squares = np.zeros(rows, dtype=np.float32)
    logit = np.full(rows, -0.5, dtype=np.float32)
    for name, size in zip(FIELDS, _SIZES, strict=True):
        weights = np.arange(1, size + 1) ** -_ZIPF
        ranks = rng.choice(size, rows, p=weights / weights.sum())
        depth = 1 + np.floor((_RANK - 1) * np.linspace(1, 0, size) ** 4)
        vectors = rng.standard_normal((size, _RANK)).astype(np.float32) * 0.45
        vectors *= np.arange(_RANK)[None] < depth[:, None]
        picked = vectors[ranks]
        total += picked
        squares += (picked**2).sum(1)
        logit += (0.3 * rng.standard_normal(size).astype(np.float32))[ranks]
        columns[name] = rng.permutation(size)[ranks]
    logit += 0.5 * ((total**2).sum(1) - squares)
    truth = 1 / (1 + np.exp(-logit))
    labels = (rng.random(rows) < truth).astype(np.int8)
    return pl.DataFrame({**columns, "truth": truth, "label": labels})
