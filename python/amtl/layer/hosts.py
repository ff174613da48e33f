"""Libraries whose models may hold AMTL layers, and what a change of layers asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import nn


class Host(NamedTuple):
    """What a library wants to be asked.

    Attributes:
        check: given a model and embeddings in it, raises ValueError if the library would lose the
            layers that take their place.
        settle: what a model needs whose embeddings became layers, or layers embeddings, in place.
    """

    check: Callable[[nn.Module, Iterable[nn.Module]], None]
    settle: Callable[[nn.Module], None]


_hosts: list[Host] = []


def register(host: Host) -> None:
    """From now on the library is asked."""
    _hosts.append(host)


def check(model: nn.Module, embeddings: Iterable[nn.Module]) -> None:
    """Whether AMTL layers may take the place of these embeddings of a model.

    Raises:
        ValueError: the library that the model is of would lose them.
    """
    for host in _hosts:
        host.check(model, embeddings)


def settle(model: nn.Module) -> None:
    """What a model needs whose embeddings became AMTL layers, or layers embeddings, in place."""
    for host in _hosts:
        host.settle(model)
