"""Tests of the CUDA sources on the host simulator, with the inputs of ``tests/kernels``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
