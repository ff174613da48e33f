"""Encoded samples: tensors of embedding rows, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch of inputs.

    Attributes:
        indices: embedding rows, int32: `[B, F]`, or flat `[total]` if `offsets` is given.
        offsets: int32 `[B·F]` starts of the bags in `indices`, sample-major; None if every field
            is single-valued.
        dense: float32 `[B, K]` numbers.
        labels: float32 `[B]`.
        weights: float32 `[B]`; None if all samples weigh the same.
    """

    indices: Tensor
    offsets: Tensor | None
    dense: Tensor
    labels: Tensor
    weights: Tensor | None = None


@dataclass
class BagField:
    """A multi-valued field, its distinct lists stored once.

    Attributes:
        codes: int64 `[n]`, the list of each sample.
        values: int32 `[total]`, embedding rows of the lists.
        offsets: int64 `[lists + 1]`.
    """

    codes: Tensor
    values: Tensor
    offsets: Tensor


@dataclass
class EncodedData:
    """Samples ready for training: tensors in memory, batches by index, no loader in between.

    Attributes:
        rows: int32 `[n, S]` embedding rows of the single-valued fields.
        bags: the multi-valued fields, placed after the single-valued ones.
        dense: float32 `[n, K]`.
        labels: float32 `[n]`, zeros where the data has no label.
        weights: float32 `[n]`; None if all samples weigh the same.
        unknown: number of values per field that training had not seen.
        values: number of values per field.
    """

    rows: Tensor
    bags: list[BagField]
    dense: Tensor
    labels: Tensor
    weights: Tensor | None = None
    unknown: dict[str, int] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, samples: Tensor) -> Batch:
        """The batch of the given samples (int64 `[B]`); O(B · lookups)."""
        rows = self.rows[samples]
        dense, labels = self.dense[samples], self.labels[samples]
        weights = None if self.weights is None else self.weights[samples]
        if not self.bags:
            return Batch(rows, None, dense, labels, weights)
        n, singles = rows.shape
        lengths = torch.ones(n, singles + len(self.bags), dtype=torch.int64)
        starts = []
        for b, bag in enumerate(self.bags):
            codes = bag.codes[samples]
            start = bag.offsets[codes]
            starts.append(start)
            lengths[:, singles + b] = bag.offsets[codes + 1] - start
        ends = torch.cumsum(lengths.view(-1), 0)
        offsets = (ends - lengths.view(-1)).view(n, -1)
        indices = torch.empty(int(ends[-1]) if n else 0, dtype=torch.int32)
        indices[offsets[:, :singles]] = rows
        for b, bag in enumerate(self.bags):
            count = lengths[:, singles + b]
            first = torch.repeat_interleave(offsets[:, singles + b], count)
            source = torch.repeat_interleave(starts[b], count)
            within = torch.arange(len(first)) - torch.repeat_interleave(
                torch.cumsum(count, 0) - count, count
            )
            indices[first + within] = bag.values[source + within]
        return Batch(indices, offsets.view(-1).to(torch.int32), dense, labels, weights)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All samples in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(torch.arange(start, min(start + batch_size, len(self))))

    def renumber(self, new_rows: Tensor) -> None:
        """Replaces embedding row `i` by `new_rows[i]` everywhere."""
        new_rows = new_rows.to(torch.int32)
        self.rows = new_rows[self.rows]
        for bag in self.bags:
            bag.values = new_rows[bag.values]
