"""Lets the tests of ``tests/kernels`` run on the CUDA sources, by way of the host simulator."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def _simulator() -> Any:
    if "hostsim" not in sys.modules:
        # As the package that pytest makes of this folder when it runs the tests in it.
        path = Path(__file__).with_name("__init__.py")
        spec = importlib.util.spec_from_file_location("hostsim", path)
        assert spec is not None and spec.loader is not None
        sys.modules["hostsim"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["hostsim"])
    return importlib.import_module("hostsim.simulator")


def backends() -> list[dict[str, Any]]:
    try:
        simulator = _simulator()
    except ImportError:
        return []
    return [
        {
            "name": "hostsim",
            "load": lambda: simulator.IMPLEMENTATIONS,
            "device": "cpu",
            "max_lookups": 300,
            "max_dim": 129,
            "examples": 10,
            "late": True,
        }
    ]
