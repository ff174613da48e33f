"""How the stages of a GPU run: on one, or rehearsed without."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from bench.stages import LeftOutError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Setting:
    """How the stages run.

    Attributes:
        dry: Without a GPU.
        out: Folder of the results.
        flush: Whether what is timed begins with an empty L2; else with that of a call on other ids.
    """

    dry: bool
    out: Path
    flush: bool = True

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry else "cuda"

    def backend(self, name: str) -> None:
        """Has ``cuda`` or ``triton`` answer the operators, or what stands for it in a rehearsal."""
        os.environ["AMTL_BACKEND"] = "auto"
        if name == "triton":
            if importlib.util.find_spec("triton") is None:
                raise LeftOutError("triton is not installed")
            if self.dry:
                os.environ["TRITON_INTERPRET"] = "1"
        import amtl_kernels

        if name == "cuda" and self.dry:
            name = _simulator()
        # The CUDA kernels are there for CUDA tensors without being asked.
        amtl_kernels.set_backend("auto" if name == "cuda" else name)


def _simulator() -> str:
    """Registers the host simulator; its name."""
    import amtl_kernels

    path = ROOT / "tests" / "hostsim" / "kernel_backend.py"
    if not path.exists():
        raise LeftOutError("the host simulator is part of a checkout")
    spec = importlib.util.spec_from_file_location("hostsim_backend", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.backends()
    if not found:
        raise LeftOutError("amtl_kernels._tools is not built: AMTL_TOOLS=on builds it")
    amtl_kernels.register_backend(found[0]["name"], found[0]["load"])
    return str(found[0]["name"])
