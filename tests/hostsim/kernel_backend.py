"""Lets the tests of ``tests/kernels`` run on the CUDA sources, by way of the host simulator."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _implementations() -> dict[str, Callable[..., object]]:
    if "hostsim" not in sys.modules:
        # As the package that pytest makes of this folder when it runs the tests in it.
        path = Path(__file__).with_name("__init__.py")
        spec = importlib.util.spec_from_file_location("hostsim", path)
        assert spec is not None and spec.loader is not None
        sys.modules["hostsim"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["hostsim"])
    modules = ("hostsim.simulated", "hostsim.simulated_tables")
    single, several = (importlib.import_module(name).IMPLEMENTATIONS for name in modules)
    return {**single, **several}


def backends() -> list[dict[str, Any]]:
    try:
        implementations = _implementations()
    except ImportError:
        return []
    return [
        {
            "name": "hostsim",
            "load": lambda: implementations,
            "device": "cpu",
            "max_lookups": 300,
            "max_dim": 129,
            "examples": 10,
        }
    ]
