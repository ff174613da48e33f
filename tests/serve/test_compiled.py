"""A whole frozen model, exported and compiled ahead of time: the same in Python and in C++."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from torch import nn

from amtl_kernels import _C, _schema

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("AMTL_TEST_CACHE", ROOT / "build")) / "serve-tests"
ROWS, DIM = 300, 16
TRAINED = slice(3 * DIM, 4 * DIM)  # where `Model.tables` has the layer of that name
# Quick to compile; what it computes is the same.
QUICKLY = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class Model(nn.Module):
    """Rows of one layer and bags of another, under an MLP: integer tiers of three kinds."""

    def __init__(self):
        super().__init__()
        counts = 20000 // torch.arange(1, ROWS + 1)
        shared = {"counts": counts, "budget": 0.1}
        rows = AMTLEmbedding(ROWS, DIM, bits=4, shared_rows="rarest", **shared)
        bags = AMTLEmbeddingBag(ROWS, DIM, bits=8, mode="mean", padding_idx=3, **shared)
        pairs = AMTLEmbedding(ROWS, DIM, bits=16, **shared)
        self.rows, self.bags, self.pairs = (
            layer.freeze().to_integers() for layer in (rows, bags, pairs)
        )
        # Frozen, in numbers that training rounds.
        self.trained = AMTLEmbedding(ROWS, DIM, bits=2, **shared).freeze()
        self.floats = AMTLEmbedding(ROWS, DIM, bits=None, **shared).freeze()
        self.mlp = nn.Sequential(nn.Linear(5 * DIM, 8), nn.ReLU(), nn.Linear(8, 1))

    def tables(self, rows, bags):
        of_rows = (self.rows, self.pairs, self.trained, self.floats)
        return torch.cat([self.bags(bags), *(layer(rows) for layer in of_rows)], -1)

    def forward(self, rows, bags):
        found = self.tables(rows, bags)
        return self.mlp(found), found


def drawn(batch):
    return torch.randint(ROWS, (batch,)), torch.randint(ROWS, (batch, 3))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, drawn(8), dynamic_shapes=({0: batch}, {0: batch}))
    path = tmp_path_factory.mktemp("compiled") / "model.pt2"
    return torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=QUICKLY
    )


@pytest.mark.slow
def test_compiled_models_give_what_the_layers_give(model, package):
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (1, 8, 50):
        inputs = drawn(batch)
        with torch.no_grad():
            out, tables = model(*inputs)
        found, found_tables = compiled(*inputs)
        # A trained layer's step sizes are the generated code's, whose roots the compiler may take
        # from estimates (it does where vectors have 16 numbers): the last bits are its own.
        torch.testing.assert_close(found_tables[:, TRAINED], tables[:, TRAINED], rtol=4e-7, atol=0)
        found_tables[:, TRAINED] = tables[:, TRAINED]
        assert torch.equal(found_tables, tables)
        torch.testing.assert_close(found, out)
    with pytest.raises(RuntimeError):
        compiled(torch.tensor([ROWS]), torch.zeros(1, 3, dtype=torch.int64))


def example() -> Path:
    """`examples/serve_compiled.cpp`, built anew where it or torch has changed."""
    source, root = ROOT / "examples" / "serve_compiled.cpp", Path(torch.__file__).parent
    program = CACHE / f"serve_compiled-{torch.__version__}"
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [
        *("c++", "-std=c++20", "-O0", "-Wall", str(source), "-o", str(program)),
        *(f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"),
        *("-ltorch", "-ltorch_cpu", "-lc10", "-ldl"),
    ]
    with (CACHE / "serve_compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(command, check=True)
    return program


@pytest.mark.slow
def test_compiled_models_run_without_python(model, package, tmp_path):
    program, files = example(), [tmp_path / "inputs", tmp_path / "output"]
    command = [str(program), _C.__file__, package, *map(str, files)]
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (1, 50):
        inputs = drawn(batch)
        torch.save(inputs, files[0])
        subprocess.run(command, check=True)
        assert torch.equal(torch.load(files[1]), compiled(*inputs)[0])
    torch.save((torch.tensor([ROWS]), torch.zeros(1, 3, dtype=torch.int64)), files[0])
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"index {ROWS} at position 0 is out of range for a table" in result.stderr


OPERATORS_ALONE = """
import ctypes, sys, torch
native = ctypes.CDLL(sys.argv[1])
print(native.amtl_define_operators(), native.amtl_define_operators())
for name in sys.argv[2:]:
    print(getattr(torch.ops.amtl, name).default._schema)
block, none = torch.arange(12.0).view(4, 3), None
given = ([block], [1], none, none, none, 0, none, torch.tensor([2, 9]))
print(torch.ops.amtl.lookup(*given, none, none, 0, [-1], False, 2, False).tolist())
torch.ops.amtl._raise_found(block)
assert "amtl_kernels" not in sys.modules
"""


def test_the_native_module_defines_the_operators_of_python(tmp_path):
    names = [definition.split("(")[0] for definition in _schema.DEFINITIONS]
    result = subprocess.run(
        [sys.executable, "-c", OPERATORS_ALONE, _C.__file__, *names],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    schemas = [str(getattr(torch.ops.amtl, name).default._schema) for name in names]
    assert result.stdout.splitlines() == ["0 1", *schemas, "[[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]"]
    assert "index 9 at position 1 is out of range for a table of 4 rows" in result.stderr
