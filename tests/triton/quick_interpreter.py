"""Takes from Triton's interpreter what it repeats for every operation of a kernel.

It replaces the functions of `triton.language` by its own at each call of a function within a
kernel, which finds them replaced already: more than half of the time of small kernels. Here only
the first of a launch does. Types of NumPy are looked up once each. And it computes sums and
products of integers twice, in 64 bits to see whether they overflow: a fourth of what is left, so
that is for AMTL_SOAK=1 (`make soak`).
"""

from __future__ import annotations

import functools
import os
from typing import Any

SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")


class _Nothing:
    def restore(self) -> None:
        """Nothing was replaced."""


def install() -> None:
    """For this process; where another version of Triton works otherwise, nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    own = getattr(interpreter, "_patch_lang", None)
    if own is None or own.__name__ == "once" or not hasattr(interpreter, "_LangPatchScope"):
        return
    replaced: set[int] = set()

    def once(fn: Any) -> Any:
        modules = [m for m in fn.__globals__.values() if m is tl or m is tl.core]
        mine = {id(module) for module in modules}
        if mine and mine <= replaced:
            return _Nothing()
        scope = own(fn)
        outermost = not replaced
        replaced.update(mine)
        if outermost:
            restore = scope.restore

            def ended() -> None:
                replaced.clear()
                restore()

            scope.restore = ended
        return scope

    interpreter._patch_lang = once
    numpy_of, known = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def numpy_type(kind: Any) -> Any:
        kind = kind.scalar
        return numpy_of(kind) if isinstance(kind, tl.pointer_type) else known(kind)

    interpreter._get_np_dtype = numpy_type
    if not SOAK:
        unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
        interpreter.interpreter_builder.options = unchecked
