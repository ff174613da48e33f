"""Living objects of a class, wherever a process holds them."""

from __future__ import annotations

import gc
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


def instances_of(kind: type[_Kind]) -> list[_Kind]:
    """The living objects of a class and its subclasses; O(objects in the process), in C.

    An object refers to its class, which is half the time of looking at each in Python.
    """
    # Not isinstance, which asks proxies for the class of what they stand for.
    return [thing for thing in gc.get_referrers(*_classes(kind)) if issubclass(type(thing), kind)]


def _classes(kind: type[Any]) -> list[type[Any]]:
    return [kind, *(each for direct in type.__subclasses__(kind) for each in _classes(direct))]
