"""The ``backend`` fixture: every test that takes it runs once for each backend.

Built in are ``reference`` (plain PyTorch), ``cpu`` (the native kernels at their best) and
``cpu-avx2`` / ``cpu-generic`` (the same for lesser processors). The fixture's value is a
:class:`Backend`; for the time of the test ``torch.ops.amtl`` is answered by it.

Another room adds its own by a file ``tests/<room>/kernel_backend.py`` with

    def backends() -> list[dict]:
        return [{"name": "hostsim",            # test id and name for set_backend
                 "load": implementations,      # () -> {operator: function}; registered if new
                 "device": "cpu",
                 "max_lookups": 300,           # inputs are cut to this many lookups
                 "max_dim": 129,
                 "examples": 10,               # hypothesis examples per test
                 "late": False}]               # True: bad input is told of by a later call

An empty list says that the backend cannot run on this machine. ``AMTL_TEST_BACKENDS=cpu,hostsim``
runs only those named, ``AMTL_TEST_EXAMPLES=5`` at most so many examples. The inputs come from
``kernel_cases.py`` and ``few_bit_tables.py``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import amtl_kernels

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, and how much of it a test can afford."""

    name: str
    force: str = "auto"
    cpu_capability: str = ""
    device: str = "cpu"
    max_lookups: int = 100_000
    max_dim: int = 300
    examples: int = 20
    late: bool = False


def _native() -> list[Backend]:
    if "error" in amtl_kernels.build_info()["native"]:  # type: ignore[operator]
        return []
    native = importlib.import_module("amtl_kernels._C")
    found = [
        Backend(f"cpu-{capability}", cpu_capability=capability, examples=8)
        for capability in ("avx2", "generic")
        if native.use_cpu_capability(capability)
    ]
    native.use_cpu_capability("")
    return [Backend("cpu"), *found]


def _from_other_rooms() -> list[Backend]:
    found = []
    for path in sorted(HERE.parent.glob("*/kernel_backend.py")):
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_kernel_backend", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for options in module.backends():
            options = dict(options)
            load = options.pop("load", None)
            if load is not None:
                amtl_kernels.register_backend(options["name"], load)
            found.append(Backend(force=options["name"], **options))
    return found


def _chosen() -> list[Backend]:
    every = [
        Backend("reference", force="reference", examples=8),
        *_native(),
        *_from_other_rooms(),
    ]
    most = int(os.environ.get("AMTL_TEST_EXAMPLES", "1000"))
    every = [replace(backend, examples=min(backend.examples, most)) for backend in every]
    names = os.environ.get("AMTL_TEST_BACKENDS")
    if not names:
        return every
    return [backend for backend in every if backend.name in names.split(",")]


BACKENDS = _chosen()


@pytest.fixture(
    params=[
        pytest.param(b, id=b.name, marks=pytest.mark.gpu if b.device == "cuda" else ())
        for b in BACKENDS
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    chosen: Backend = request.param
    if chosen.cpu_capability:
        importlib.import_module("amtl_kernels._C").use_cpu_capability(chosen.cpu_capability)
    with amtl_kernels.use_backend(chosen.force):
        yield chosen
    if chosen.cpu_capability:
        importlib.import_module("amtl_kernels._C").use_cpu_capability("")
