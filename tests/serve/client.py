"""The C functions of csrc/serve by ctypes, and a program that opens damaged files with them.

Without torch, so that it can run under the sanitizers: python client.py LIBRARY FILE...
"""

from __future__ import annotations

import array
import ctypes
import os
import random
import sys
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p

OK, ARGUMENT, INDEX, IO, FORMAT, VERSION, DAMAGED, UNSUPPORTED, MEMORY = range(9)
SUM, MEAN = 0, 1
VERIFY = 1
_MOST_VALUES = 1 << 20


class ServeError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Library:
    """The shared library."""

    def __init__(self, path: str) -> None:
        self.c = ctypes.CDLL(path)
        for name in ("amtl_error", "amtl_version", "amtl_kind", "amtl_name"):
            getattr(self.c, name).restype = c_char_p
        for name in ("amtl_layer_at", "amtl_find", "amtl_table_at", "amtl_find_table"):
            getattr(self.c, name).restype = c_void_p
        for name in ("amtl_layer_count", "amtl_table_count"):
            getattr(self.c, name).restype = c_size_t
        for name in ("amtl_rows", "amtl_dim", "amtl_padding"):
            getattr(self.c, name).restype = c_int64
        for name in ("amtl_layer_at", "amtl_table_at"):
            getattr(self.c, name).argtypes = [c_void_p, c_size_t]
        for name in ("amtl_find", "amtl_find_table"):
            getattr(self.c, name).argtypes = [c_void_p, c_char_p]
        one = ("close", "kind", "layer_count", "table_count", "name", "rows", "dim", "bits")
        for name in (*one, "padding", "layer_mode"):
            getattr(self.c, f"amtl_{name}").argtypes = [c_void_p]
        for suffix, index in (("", c_int64), ("_i32", c_int32)):
            many = POINTER(index)
            lookup = getattr(self.c, f"amtl_lookup{suffix}")
            lookup.argtypes = [c_void_p, many, c_size_t, POINTER(c_float)]
            bags = getattr(self.c, f"amtl_lookup_bags{suffix}")
            bags.argtypes = [c_void_p, many, c_size_t, many, c_size_t, POINTER(c_float), c_int]
            bags.argtypes += [POINTER(c_float)]

    def check(self, status: int) -> None:
        if status != OK:
            raise ServeError(status, self.c.amtl_error().decode(errors="replace"))

    def open(self, path: object, flags: int = VERIFY) -> File:
        handle = c_void_p()
        self.check(self.c.amtl_open(os.fsencode(str(path)), flags, byref(handle)))
        return File(self, handle)


class File:
    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library, self.handle = library, handle

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.library.c.amtl_close(self.handle)

    @property
    def kind(self) -> str:
        return self.library.c.amtl_kind(self.handle).decode()

    def layers(self) -> list[Layer]:
        c = self.library.c
        count = c.amtl_layer_count(self.handle)
        assert c.amtl_layer_at(self.handle, count) is None
        return [Layer(self.library, c.amtl_layer_at(self.handle, i)) for i in range(count)]

    def find(self, name: str) -> Layer:
        return Layer(self.library, self.library.c.amtl_find(self.handle, name.encode()))


class Layer:
    def __init__(self, library: Library, handle: int | None) -> None:
        if handle is None:
            raise KeyError
        self.library, self.handle, c = library, handle, library.c
        self.name = c.amtl_name(handle).decode(errors="replace")
        self.rows, self.dim = c.amtl_rows(handle), c.amtl_dim(handle)
        self.bits, self.padding = c.amtl_bits(handle), c.amtl_padding(handle)
        self.mode = c.amtl_layer_mode(handle)

    def tables(self) -> list[Layer]:
        c = self.library.c
        count = c.amtl_table_count(self.handle)
        return [Layer(self.library, c.amtl_table_at(self.handle, i)) for i in range(count)]

    def table(self, name: str) -> Layer:
        return Layer(self.library, self.library.c.amtl_find_table(self.handle, name.encode()))

    def lookup(self, indices: Sequence[int], narrow: bool = False) -> array.array[float]:
        """[count * D], written exactly: what nobody wrote is NaN."""
        given, out = _integers(indices, narrow), _floats(len(indices) * self.dim)
        function = self.library.c.amtl_lookup_i32 if narrow else self.library.c.amtl_lookup
        self.library.check(function(self.handle, given, len(indices), _pointer(out)))
        return out

    def bags(
        self,
        indices: Sequence[int],
        offsets: Sequence[int],
        mode: int = SUM,
        weights: Sequence[float] | None = None,
        narrow: bool = False,
    ) -> array.array[float]:
        """[bags * D]."""
        c = self.library.c
        function = c.amtl_lookup_bags_i32 if narrow else c.amtl_lookup_bags
        out = _floats((len(offsets) - 1) * self.dim)
        status = function(
            self.handle,
            _integers(indices, narrow),
            len(indices),
            _integers(offsets, narrow),
            len(offsets) - 1,
            None if weights is None else (c_float * len(weights))(*weights),
            mode,
            _pointer(out),
        )
        self.library.check(status)
        return out


def _integers(values: Sequence[int], narrow: bool) -> object:
    return ((c_int32 if narrow else c_int64) * len(values))(*values)


def _floats(count: int) -> array.array[float]:
    return array.array("f", [float("nan")]) * count


def _pointer(values: array.array[float]) -> object:
    # Of heap memory of the exact size, which the sanitizers watch.
    return ctypes.cast(values.buffer_info()[0], POINTER(c_float))


def _result(call: Callable[..., array.array[float]], *arguments: object) -> bytes | int:
    try:
        return call(*arguments).tobytes()
    except ServeError as error:
        return error.status


def everything(file: File) -> list[object]:
    """What a file gives for some rows of every table, and some bags; errors by their status."""
    found: list[object] = [file.kind]
    for layer in file.layers():
        for view in (layer, *layer.tables()):
            rows = sorted({r % view.rows for r in (*range(70), -1, -2)}) if view.rows else []
            found += [view.name, view.rows, view.dim, view.bits, view.padding, view.mode]
            if len(rows) * view.dim > _MOST_VALUES:
                continue
            ends = [0, 0, len(rows) // 2, len(rows)]
            found += [
                _result(view.lookup, rows),
                _result(view.lookup, [*rows, view.rows]),
                _result(view.lookup, [-1]),
                _result(view.bags, rows, ends, MEAN),
                _result(view.bags, rows, ends, SUM, [0.5] * len(rows)),
            ]
    return found


def outcome(library: Library, path: str, flags: int) -> list[object] | int:
    """What a file gives, or the status of opening it."""
    try:
        with library.open(path, flags) as file:
            return everything(file)
    except ServeError as error:
        assert error.status != MEMORY and str(error) and "\n" not in str(error), error
        return error.status


def mutations(content: bytes, step: int, seed: int):
    """Damaged copies: single bits, cuts, more bytes, holes."""
    draw = random.Random(seed)
    for at in range(0, len(content), step):
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        yield bytes(changed), f"bit of byte {at}"
    for at in range(0, len(content), 4 * step):
        yield content[:at], f"cut at {at}"
        changed = bytearray(content)
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
        yield bytes(changed), f"zeros at {at}"
    yield content + b"\0", "a byte more"
    yield content[:8] + b" " + content[8:], "a byte between"


def main(library: Library, paths: list[str]) -> None:
    scratch = f"{paths[0]}.damaged"
    opened = 0
    for path in paths:
        for flags in (0, VERIFY):
            opened += not isinstance(outcome(library, path, flags), int)
    with open(paths[0], "rb") as file:
        content = file.read()
    whole = outcome(library, paths[0], VERIFY)
    for changed, what in mutations(content, 13, 0):
        with open(scratch, "wb") as file:
            file.write(changed)
        outcome(library, scratch, 0)
        found = outcome(library, scratch, VERIFY)
        assert isinstance(found, int) or found == whole, what
    os.unlink(scratch)
    print("opened", opened, "clean")


if __name__ == "__main__":
    main(Library(sys.argv[1]), sys.argv[2:])
