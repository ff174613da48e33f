"""Takes from Triton's interpreter what it repeats at every call of a function within a kernel.

It replaces the functions of `triton.language` by its own for each such call, which finds them
replaced already: more than half of the time of small kernels. Here only the first of a launch does.
"""

from __future__ import annotations

from typing import Any


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
