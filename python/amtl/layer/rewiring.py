"""Objects that a model keeps in containers of its own, beside its parameters and modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn


def rewire(model: nn.Module, replacements: Mapping[int, Sequence[Any]]) -> set[int]:
    """Replace objects (by id) in containers that modules keep beside their parameters and modules.

    An object that makes way for several is spread out in lists and sets; a tuple that holds it is
    repeated, as `(name, parameter)` would be, and goes where it makes way for none. Objects there
    that are no modules, such as descriptions of features, may hold it as an attribute.

    Returns:
        Those that were there.
    """
    seen: set[int] = set()
    for module in model.modules():
        for key, value in list(module.__dict__.items()):
            if key not in ("_parameters", "_buffers", "_modules"):
                moved = _moved(value, replacements, seen)
                if len(moved) == 1 and moved[0] is not value:
                    module.__dict__[key] = moved[0]
    return seen & replacements.keys()


def _moved(value: Any, replacements: Mapping[int, Sequence[Any]], seen: set[int]) -> list[Any]:
    """What takes the place of a value: mostly the value itself."""
    if id(value) in replacements:
        seen.add(id(value))
        return list(replacements[id(value)])
    kind = type(value)
    if kind not in (list, tuple, dict, set) or (kind is not tuple and id(value) in seen):
        if not isinstance(value, nn.Module | Tensor | type | ModuleType):
            held = getattr(value, "__dict__", {})
            for key, part in list(held.items()):
                if len(replacements.get(id(part), ())) == 1:
                    seen.add(id(part))
                    held[key] = replacements[id(part)][0]
        return [value]
    seen.add(id(value))
    before = list(value.values()) if kind is dict else list(value)
    parts = [_moved(item, replacements, seen) for item in before]
    if all(len(p) == 1 and p[0] is b for p, b in zip(parts, before, strict=True)):
        return [value]
    if kind is list:
        value[:] = [item for part in parts for item in part]
    elif kind is set:
        value.clear()
        value.update(item for part in parts for item in part)
    elif kind is dict:
        for key, part in zip(list(value), parts, strict=True):
            value[key] = part[0] if len(part) == 1 else part
    elif not all(parts):
        return []
    else:
        times = max(len(part) for part in parts)
        return [tuple(part[i % len(part)] for part in parts) for i in range(times)]
    return [value]
