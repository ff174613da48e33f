"""Living objects of a class, wherever a process holds them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_Kind = TypeVar("_Kind")


class _Known:
    """What was found, by class, and whether garbage was collected since nothing was known."""

    def __init__(self) -> None:
        self.found: dict[type[Any], list[weakref.ref[Any]]] = {}
        self.swept = False


_known: ContextVar[_Known | None] = ContextVar("_known", default=None)
_of_load: tuple[object, _Known] = object(), _Known()
"""What one load of a state has found, and what it was known by."""


def instances_of(kind: type[_Kind]) -> list[_Kind]:
    """The living objects of a class and its subclasses; O(objects in the process), in C.

    An object refers to its class, which is half the time of looking at each in Python.
    """
    known = _known.get()
    if known is not None and kind in known.found:
        there = [reference() for reference in known.found[kind]]
        return [thing for thing in there if thing is not None]
    # Not isinstance, which asks proxies for the class of what they stand for.
    found = [thing for thing in gc.get_referrers(*_classes(kind)) if issubclass(type(thing), kind)]
    if known is not None:
        known.found[kind] = [weakref.ref(thing) for thing in found]
    return found


def collect_garbage() -> None:
    """After it `instances_of` finds no garbage; within `looked_for_once` it is collected once.

    O(objects in the process), several times what looking for instances takes.
    """
    known = _known.get()
    if known is None or not known.swept:
        gc.collect()
    if known is not None:
        known.swept = True


@contextmanager
def looked_for_once(load: object = None) -> Iterator[None]:
    """Within it no such object is made, so that each class is looked for once, not once a table.

    Args:
        load: what one load of a state hands to all modules, if this is a part of one: what a part
            has found holds for the others.
    """
    global _of_load
    known = _Known()
    if load is not None:
        if _of_load[0] is not load:
            _of_load = load, known
        known = _of_load[1]
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def _classes(kind: type[Any]) -> list[type[Any]]:
    return [kind, *(each for direct in type.__subclasses__(kind) for each in _classes(direct))]
