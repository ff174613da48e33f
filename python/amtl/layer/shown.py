"""The weight of a frozen layer, to read: all rows as lookups show them, made where they are used.

Models that score every row, or propagate all of them through a graph, read the weight of an
embedding in place of looking rows up. Of a frozen layer that is a lookup of all rows, gradients
included; who picks rows, as by `weight[ids]` or `F.embedding(ids, weight)`, has those looked up.
Scores of all rows, `h @ weight.T` or `F.linear(h, weight)`, take some rows at a time where nothing
has to be kept for gradients: they stay in a cache, and never need the memory of all of them.
Nobody can write to it: what is stored is less than it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class NoWeightError(AttributeError, RuntimeError):
    """What only a dense weight can be asked for was asked of a frozen layer."""


_OF_ITS_SHAPE: tuple[Any, ...] = (
    *(Tensor.shape, Tensor.ndim, Tensor.dtype, Tensor.device, Tensor.layout, Tensor.is_meta),
    *(Tensor.is_cuda, Tensor.is_cpu, Tensor.is_sparse, Tensor.is_quantized, Tensor.itemsize),
)
_PLAIN = {
    *(attribute.__get__ for attribute in _OF_ITS_SHAPE),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
}
"""What is known without the rows; of tables of millions of them nobody wants them for that."""

_IS_LEAF = cast(Any, Tensor.is_leaf).__get__

_OPERATORS = "add,sub,mul,truediv,floordiv,mod,pow,matmul,and,or,xor,lshift,rshift"
_IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in _OPERATORS.split(","))}

_PICKED = {F.embedding: (1, 0), torch.index_select: (0, 2), Tensor.index_select: (0, 2)}
"""Where the rows and the indices are among the arguments."""
_NUMBERS = (torch.int64, torch.int32)

_TURNED = {
    *(Tensor.t, torch.t, Tensor.adjoint, torch.adjoint),
    *(cast(Any, each).__get__ for each in (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH)),
}
_TURNS = {Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes}
_AXES = {(0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0), (1, -2), (-2, 1)}
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_PART_BYTES = {"cpu": 1 << 22}
"""Of rows that are made at a time to be scored: what caches hold and an allocator hands out again;
elsewhere launches are what costs."""
_OTHER_PART_BYTES = 1 << 26

_DATA, _GRAD = cast(Any, Tensor.data), cast(Any, Tensor.grad)
_REQUIRES_GRAD = cast(Any, Tensor.requires_grad)
_DETACHED = {_DATA.__get__, Tensor.detach, torch.detach}
_OF_A_PARAMETER = {
    *(attribute.__set__ for attribute in (_DATA, _GRAD, _REQUIRES_GRAD)),
    # An optimizer asks for the last of these where something is no leaf.
    *(_GRAD.__get__, Tensor.retain_grad, cast(Any, Tensor).retains_grad.__get__),
    *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
}


class ShownRows(Tensor):
    """All rows of a frozen layer, [N, D]; what is computed of it is a plain tensor.

    Attributes:
        make: gives the rows at indices of any shape, or of a range, with gradients where those are
            on; all rows for None.
        refuse: raises what to do in place of writing to it.
        trains: whether the rows have gradients.
        turned: whether they are columns, [D, N], of what this shows.
    """

    make: Callable[[Tensor | range | None], Tensor]
    refuse: Callable[[], None]
    trains: bool
    turned: bool

    @staticmethod
    def of(
        shape: tuple[int, int],
        like: Tensor,
        make: Callable[[Tensor | range | None], Tensor],
        refuse: Callable[[], None],
        trains: bool,
        turned: bool = False,
    ) -> ShownRows:
        """Rows of a shape, of the type and on the device of a tensor."""
        rows: ShownRows = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            ShownRows, shape[::-1] if turned else shape, dtype=like.dtype, device=like.device
        )
        rows.make, rows.refuse, rows.trains, rows.turned = make, refuse, trains, turned
        return rows

    def like(self, trains: bool, turned: bool) -> ShownRows:
        """The same rows, with gradients or without, as rows or as columns."""
        with torch._C.DisableTorchFunctionSubclass():
            shape: Any = tuple(self.shape)
            make = self.make if trains or not self.trains else torch.no_grad()(self.make)
            shape = shape[::-1] if self.turned else shape
            return ShownRows.of(shape, self, make, self.refuse, trains, turned)

    def whole(self) -> Tensor:
        """All that this shows, made now."""
        return self.make(None).T if self.turned else self.make(None)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else next(iter(kwargs.values()), None)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _PLAIN:
                return func(*args, **kwargs)
            if func == _REQUIRES_GRAD.__get__:
                return args[0].trains
            if func == _IS_LEAF:
                # Or an optimizer would take it.
                return False
            if func in (torch.autograd.grad, torch.autograd.backward):
                # Rows that are made anew are in no graph of before.
                for shown in _among(kwargs.get("inputs", args[1:2])):
                    shown.refuse()
            name = getattr(func, "__name__", "")
            writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
            if isinstance(first, ShownRows) and (writes or func in _OF_A_PARAMETER):
                first.refuse()
            if isinstance(kwargs.get("out"), ShownRows):
                kwargs["out"].refuse()
            if func in _DETACHED and isinstance(first, ShownRows):
                # Of a parameter these are its memory: whoever writes to them has to be told, too.
                return first.like(False, first.turned)
            if isinstance(first, ShownRows) and _turns(func, args, kwargs):
                return first.like(first.trains, not first.turned)
            for some in (_picked, _scores):
                found = some(func, args, kwargs)
                if found is not None:
                    return found
            made: dict[int, Tensor] = {}
            return func(*_read(args, made), **_read(kwargs, made))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NoWeightError(
            f"{func} was called past PyTorch's functions on rows that a frozen AMTL layer shows: "
            "clone() them first"
        )


def _picked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Some of the rows, looked up; None where a function picks none, or in a way of its own."""
    if func is Tensor.__getitem__:
        rows, index = args
        if not isinstance(rows, ShownRows) or rows.turned:
            return None
        return _at(rows, index)
    # `F.embedding` hands on all of its arguments, those of the norm and of gradients by name.
    wishes = [kwargs[name] for name in kwargs if name != "norm_type"]
    plain = all(wish is None or wish is False for wish in wishes)
    if func not in _PICKED or not plain or len(args) != (2 if func is F.embedding else 3):
        return None
    at, indices = _PICKED[func]
    rows, index = args[at], args[indices]
    if not isinstance(rows, ShownRows) or rows.turned or type(index) is not Tensor:
        return None
    if index.dtype not in _NUMBERS or index.device != rows.device:
        return None
    if func is F.embedding:
        return rows.make(index)
    return rows.make(index) if args[1] in (0, -2) and index.dim() == 1 else None


def _at(rows: ShownRows, index: Any) -> Tensor | None:
    """Rows at an index: a number, a slice, or a tensor of numbers or of one boolean a row."""
    count, device = rows.shape[0], rows.device
    if type(index) is int and -count <= index < count:
        return rows.make(torch.tensor([index % count], device=device))[0]
    if type(index) is slice:
        return rows.make(torch.arange(count, device=device)[index])
    if type(index) is not Tensor or index.device != device:
        return None
    if index.dtype == torch.bool and index.shape == (count,):
        return rows.make(index.nonzero().squeeze(1))
    if index.dtype not in _NUMBERS:
        return None
    return rows.make(torch.where(index < 0, index + count, index))


def _turns(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function makes columns of rows, or rows of columns."""
    return not kwargs and (func in _TURNED or (func in _TURNS and args[1:] in _AXES))


def _scores(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Products [..., N] of vectors and every row, of some rows at a time.

    None where a function asks for others, or gradients need all rows at once.
    """
    linear = func is F.linear
    if not (linear or func in _PRODUCTS) or not 2 <= len(args) <= 2 + linear:
        return None
    if set(kwargs) - ({"bias"} if linear else set()):
        return None
    h, rows, *more = args
    bias = more[0] if more else kwargs.get("bias")
    if type(h) is not Tensor or not isinstance(rows, ShownRows) or rows.turned == linear:
        return None
    count, dim = rows.shape[:: -1 if rows.turned else 1]
    size = _PART_BYTES.get(rows.device.type, _OTHER_PART_BYTES) // max(dim * rows.itemsize, 1)
    learns = rows.trains or h.requires_grad or (bias is not None and bias.requires_grad)
    whole = count <= size or (torch.is_grad_enabled() and learns)
    plain = h.dim() >= 1 and h.shape[-1] == dim and h.device == rows.device
    if whole or not plain or (func in (torch.mm, Tensor.mm) and h.dim() != 2):
        return None
    out: Tensor | None = None
    for first in range(0, count, size):
        part = range(first, min(first + size, count))
        each = bias if bias is None or bias.dim() == 0 else bias[part.start : part.stop]
        scores = F.linear(h, rows.make(part), each)
        if out is None:
            out = scores.new_empty(*scores.shape[:-1], count)
        out[..., part.start : part.stop] = scores
    return out


def _among(value: Any) -> Iterator[ShownRows]:
    """All that shows rows in a list of some."""
    if isinstance(value, ShownRows):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _among(each)


def _read(value: Any, made: dict[int, Tensor]) -> Any:
    """A value with the rows in place of all that shows them.

    Made once a call, and anew in the next: whoever holds the weight sees what training made of it.
    """
    if isinstance(value, ShownRows):
        if id(value) not in made:
            made[id(value)] = value.whole()
        return made[id(value)]
    if isinstance(value, dict):
        return {key: _read(each, made) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_read(each, made) for each in value)
    return value
