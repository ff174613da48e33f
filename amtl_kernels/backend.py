"""Which implementation answers ``torch.ops.amtl``.

``"auto"`` is PyTorch's own dispatch: the native CPU and CUDA kernels of this build, Triton for CUDA
tensors when the build has no CUDA kernels, and the reference for whatever is left. Any other
backend is forced, for tests and for comparisons: its implementations are registered over the
native ones until another backend is set.

Other packages and tests can add a backend with :func:`register_backend`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from amtl_kernels import _schema, reference
from amtl_kernels._version import __version__

Implementations = dict[str, Callable[..., object]]
"""Operator name (``amtl_kernels._schema.SCHEMAS``) to a function with that schema's arguments."""


@dataclass
class _State:
    name: str = "auto"
    overrides: list[torch.library.Library] = field(default_factory=list)


_state = _State()
_backends: dict[str, Callable[[], Implementations]] = {}
_native_error: str | None = None
native: Any = None
"""The compiled module, if it loads."""
_native_info: dict[str, str] = {}


def register_backend(name: str, load: Callable[[], Implementations]) -> None:
    """Makes a backend known to :func:`set_backend`.

    Args:
        name: Its name.
        load: Called when the backend is first set; returns its implementations. Operators that it
            leaves out keep their native implementation. May raise ImportError to say what is
            missing.
    """
    _backends[name] = load


def get_backend() -> str:
    """The backend that is set: ``"auto"`` or the name of a forced one."""
    return _state.name


def set_backend(name: str | None) -> None:
    """Forces a backend for every operator, or goes back to automatic dispatch.

    The environment variable ``AMTL_BACKEND`` does the same at import. Not for use while another
    thread runs operators.

    Args:
        name: ``"auto"`` (or None), ``"reference"``, ``"triton"``, or a registered name.

    Raises:
        ValueError: The name is unknown.
        ImportError: The backend cannot be had here; the message says why.
    """
    name = name or "auto"
    implementations: Implementations = {}
    if name != "auto":
        if name not in _backends:
            known = ", ".join(sorted(["auto", *_backends]))
            raise ValueError(f"unknown backend {name!r}; known: {known}")
        implementations = _backends[name]()
        unknown = implementations.keys() - _schema.SCHEMAS.keys() - {"_raise_found"}
        if unknown:
            raise ValueError(f"backend {name!r} implements unknown operators: {sorted(unknown)}")
    for library in _state.overrides:
        library._destroy()
    _state.overrides = []
    for key in ("CPU", "CUDA") if implementations else ():
        library = torch.library.Library("amtl", "IMPL")
        with warnings.catch_warnings():
            # Overriding is the point here.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for op, function in implementations.items():
                library.impl(op, function, key, allow_override=True)
        _state.overrides.append(library)
    _state.name = name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Context manager around :func:`set_backend` that restores what was set before."""
    before = _state.name
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Waits for a GPU, then raises, or warns of, what lookups have found on it.

    Lookups do not wait for the GPU, so they return before it has seen their indices: what
    ``bounds_check`` says of a bad one comes with a later call of this package, or with this. On
    the CPU lookups raise by themselves, and there is nothing to wait for.

    Args:
        device: Which GPU; None: the current one, if there is any.

    Raises:
        IndexError: An index was out of range, and ``bounds_check="raise"`` or the table empty.
        ValueError: Offsets were not monotone from 0 to at most L, or a size outside ``0..D``.
    """
    where = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
        where = torch.device("cuda", torch.cuda.current_device())
    torch.ops.amtl._raise_found(torch.empty(0, dtype=torch.uint8, device=where))


def build_info() -> dict[str, object]:
    """What this installation can do, and for what is missing, why.

    Returns:
        ``version``, ``torch``, ``python``; ``backend`` (what is set); ``native``: the compiled
        module's own account (compiler, torch at build, CUDA architectures), or an ``error``;
        ``cpu_capability``: instruction set that the CPU kernels chose; ``triton``: its version or
        why it is not used; ``backends``: names for :func:`set_backend`.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": get_backend(),
        "native": dict(_native_info) if _native_error is None else {"error": _native_error},
        "cpu_capability": _native_info.get("cpu_capability", "none: no native module"),
        "triton": _triton_status(),
        "backends": ["auto", *sorted(_backends)],
    }


def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    if importlib.util.find_spec("amtl_kernels.triton") is None:
        return "installed, but this build has no Triton kernels"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _load_native() -> None:
    """Imports the compiled module, whose registrations run on import."""
    global _native_error, native
    try:
        native = importlib.import_module("amtl_kernels._C")
    except ImportError as error:
        _native_error = f"{type(error).__name__}: {error}"
        if importlib.util.find_spec("amtl_kernels._C") is not None:
            warnings.warn(
                f"the native operators of amtl_kernels do not load ({error}); slow reference "
                f"implementations are used instead",
                RuntimeWarning,
                stacklevel=3,
            )
    else:
        _native_info.update(native.build_info())


def _load_triton() -> Implementations:
    if importlib.util.find_spec("triton") is None:
        raise ImportError("the triton backend needs `pip install triton`")
    from amtl_kernels import triton

    implementations: Implementations = triton.implementations()
    return implementations


def _late_triton(op: str, *args: object) -> object:
    return _triton_implementation(op)(*args)


@functools.cache
def _triton_implementation(op: str) -> Callable[..., object]:
    implementations = _load_triton()
    return implementations.get(op) or reference.IMPLEMENTATIONS[op]


_AUTOMATIC = torch.library.Library("amtl", "IMPL")


def _register_automatic() -> None:
    """The fallbacks below native code. Triton itself is imported at its first use."""
    for op, function in reference.IMPLEMENTATIONS.items():
        _AUTOMATIC.impl(op, function, "CompositeExplicitAutograd")
    _AUTOMATIC.impl("_warn_clamped", reference.warn_clamped, "CompositeExplicitAutograd")
    _AUTOMATIC.impl("_raise_found", lambda like: None, "CompositeExplicitAutograd")
    has_triton = not _triton_status().startswith(("not", "installed,"))
    for op in (*reference.IMPLEMENTATIONS, "_raise_found"):
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"amtl::{op}", "CUDA")
        if has_triton and not native:
            _AUTOMATIC.impl(op, functools.partial(_late_triton, op), "CUDA")


def initialize() -> None:
    """Registers everything, once, when the package is imported."""
    register_backend("reference", lambda: dict(reference.IMPLEMENTATIONS))
    register_backend("triton", _load_triton)
    _load_native()
    _register_automatic()
    if os.environ.get("AMTL_BACKEND"):
        set_backend(os.environ["AMTL_BACKEND"])
