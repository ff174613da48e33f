"""Finding a few values among many known ones, without a pass over these for each request."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

_TIMES = 4
"""Known values to values looked up from which on hashing the known ones anew is dear."""


class Finder:
    """Maps values to rows, whichever way is cheaper for as many as are asked for.

    A batch of requests has a few values, a vocabulary may have millions: hashing these for each
    batch took 200 ms a column of a million texts. So few values are searched in a sorted index,
    which is made once, when the first few are asked for, in about the time of hashing once.

    Args:
        known: int64 or strings, distinct, none missing.
        rows: int32, of each.
    """

    def __init__(self, known: pl.Series, rows: pl.Series) -> None:
        self._known, self._rows = known, rows
        self._index: tuple[NDArray[np.uint64], NDArray[np.int32]] | None = None
        self._collide = False

    def rows(self, values: pl.Series) -> NDArray[np.int32]:
        """Rows of values of the type of the known ones, -1 for others and missing ones."""
        if self._collide or len(values) * _TIMES > len(self._known):
            found = values.replace_strict(
                self._known, self._rows, default=-1, return_dtype=pl.Int32
            )
            return found.to_numpy()
        if self._index is None:
            keys = _keys(self._known)
            order = np.argsort(keys).astype(np.int32)
            keys = keys[order]
            # Of two texts with one hash a search finds one only; of 2^64 hashes hardly any agree.
            self._collide = bool((keys[1:] == keys[:-1]).any())
            if self._collide:
                return self.rows(values)
            self._index = keys, order
        keys, order = self._index
        places = order[np.searchsorted(keys, _keys(values)).clip(max=len(keys) - 1)]
        same = (self._known.gather(places) == values).fill_null(False).to_numpy()
        return np.where(same, self._rows.gather(places).to_numpy(), np.int32(-1))


def _keys(values: pl.Series) -> NDArray[np.uint64]:
    """Numbers by which values are sorted: alike for the same ones in this process."""
    return values.hash().to_numpy()
