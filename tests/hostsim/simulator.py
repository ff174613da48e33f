"""The CUDA operators on simulated devices: the product's own host code, launchers and kernels.

Importing the tool module registers ``csrc/torch/cuda_*.cpp`` as ``torch.ops.amtl_sim`` for CPU
tensors. Here their schemas are those of ``torch.ops.amtl``, and their arguments become memory of
the simulated device: a kernel may touch them and what the call allocates, and may write only what
the schema says is written.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from amtl_kernels._schema import SCHEMAS


def _load() -> Any:
    path = os.environ.get("AMTL_TOOLS_MODULE")
    if path is None:
        return importlib.import_module("amtl_kernels._tools")
    spec = importlib.util.spec_from_file_location("_tools", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools = _load()
LIBRARY = torch.library.Library("amtl_sim", "DEF")


def _on_device(name: str, schema: str) -> Callable[..., Any]:
    """The operator, for CPU tensors that stand for the device's."""
    LIBRARY.define(name + schema)
    operator = getattr(torch.ops.amtl_sim, name).default
    arguments = operator._schema.arguments

    def run(*values: Any) -> Any:
        tools.clear_buffers()
        for argument, value in zip(arguments, values, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.numel():
                    size = tensor.numel() * tensor.element_size()
                    tools.register_buffer(argument.name, tensor.data_ptr(), size, written)
        try:
            return operator(*values)
        finally:
            tools.clear_buffers()

    return run


IMPLEMENTATIONS = {
    name: _on_device(name, schema)
    for name, schema in (*SCHEMAS.items(), ("_raise_found", "(Tensor like) -> ()"))
}
"""Operator name to the operator on the simulated device."""


def raise_found() -> None:
    """Raises what lookups have found, as a later call would."""
    IMPLEMENTATIONS["_raise_found"](torch.empty(0))


@contextlib.contextmanager
def simulation(
    seed: int = 0,
    thread_order: str = "random",
    track_races: bool = False,
    track_traffic: bool = False,
    watch_bounds: bool = True,
    capturing: bool = False,
) -> Iterator[None]:
    """Sets how the simulator runs, for a while."""
    tools.configure(seed, thread_order, track_races, track_traffic, watch_bounds, capturing)
    try:
        yield
    finally:
        tools.configure()
