"""The average of a model's numbers over its last steps: what is validated, and what is kept.

Steps of a training jump around what they have in common, most of all where numbers are rounded to
few bits; their mean is nearer to it than any of them (Polyak and Juditsky 1992; arXiv 1803.05407).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LAPS = 2.0
"""How far back it reaches, about."""

_PART = 0.5
"""Of the steps since it began, at most: the first of them are far from all that follows."""

_EVERY = 4
"""Steps between two additions, at least; each million of numbers makes it one more, so that a pass
over all of a large table costs little beside steps that touch some of its rows."""


class Average:
    """An exponential moving average of numbers that are trained.

    Args:
        steps: how far back it reaches.
    """

    def __init__(self, steps: float) -> None:
        self._steps = steps
        self._since = 0
        self._values: list[Tensor] = []

    def begin(self) -> None:
        """Forgets all."""
        self._since, self._values = 0, []

    @torch.no_grad()
    def step(self, numbers: Sequence[Tensor]) -> None:
        """Takes in what a training step has left, if it is the turn of one.

        Args:
            numbers: all that the average is of, the same ones in every call.
        """
        self._since += 1
        every = _EVERY + (sum(each.numel() for each in numbers) >> 20)
        if self._since % every:
            return
        if not self._values:
            self._values = [each.detach().clone() for each in numbers]
            return
        reach = min(self._steps, _PART * self._since)
        share = min(1.0, every / max(reach, 1.0))
        torch._foreach_lerp_(self._values, [each.detach() for each in numbers], share)

    @contextmanager
    def shown(self, numbers: Sequence[Tensor]) -> Iterator[None]:
        """Numbers are their average within, and what they were behind it."""
        self._exchange(numbers)
        try:
            yield
        finally:
            self._exchange(numbers)

    @torch.no_grad()
    def _exchange(self, numbers: Sequence[Tensor]) -> None:
        # Before the first of them is taken in there is nothing to exchange.
        for each, value in zip(numbers if self._values else (), self._values, strict=True):
            kept = each.detach().clone()
            each.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What it takes to go on."""
        return {"since": self._since, "values": self._values}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._since = state["since"]
        self._values = [value.clone() for value in state["values"]]
