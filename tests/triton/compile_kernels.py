"""Compiles every kernel that the operators launch, for GPUs that need not be there.

    python tests/triton/compile_kernels.py [share shares [80] [90] [100]] > report.json

(With TRITON_INTERPRET unset.)

Calls every operator with a recorder in place of launches, so that what is compiled is what would
have been launched: the same types, constants, tiles, warps and register ceilings. Prints a JSON
list, one entry per kernel, specialisation and architecture; of ``shares`` processes, each with
its own ``share`` from 0 on, every one compiles a part.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_cases import RULES, applying, call, in_order, states

import amtl_kernels.triton
from amtl_kernels.triton import launch
from amtl_kernels.triton.lookup import _gather, _pooled

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HYPER = [0.1, 0.1, 0.1, 0.9, 0.99, 1.0]
MOST = ("adam",)  # state
PLAN = (
    # architecture, dimension, dtype, index type, rules of fused updates; all forms of a call (and
    # in soak the whole tuning space), or one call for each kernel and the space's first choice
    (90, 64, torch.float32, torch.int64, RULES, True),
    (90, 64, torch.float16, torch.int32, RULES, False),
    (90, 64, torch.bfloat16, torch.int64, RULES, False),
    (80, 64, torch.float32, torch.int64, MOST, False),
    (100, 64, torch.float32, torch.int64, MOST, False),
    (90, 17, torch.float32, torch.int32, MOST, False),
    (90, 1024, torch.bfloat16, torch.int32, MOST, False),
    (90, 1100, torch.float32, torch.int64, ("rowwise_adagrad", *MOST), False),
)
"""A cover, since each kernel costs most of a second: all forms of a call in one dtype on one
architecture; all dtypes, both index types and all rules; rows that are unaligned, as wide as a
tile, and wider."""
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
ONLY_IN_SOAK = ((64, torch.float16), (1024, torch.bfloat16), (1100, torch.float32))
"""Types of 16 bits beside another, and rows as wide as a tile and wider."""
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Recorder:
    """Collects launches as compilation requests, each once."""

    def __init__(self) -> None:
        self.found: dict[Any, tuple[Any, dict[str, str], dict[str, Any], dict[Any, Any]]] = {}

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: Mapping[str, Any]
    ) -> None:
        options = {name: meta[name] for name in ("num_warps", "maxnreg")}
        values = dict(zip(kernel.arg_names, args, strict=False))
        values.update((name, value) for name, value in meta.items() if name not in options)
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = values[name]
            if kernel.params[i].is_constexpr or value is None:
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                assert i in kernel.do_not_specialize or name in kernel.do_not_specialize, name
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                signature[name] = "fp32"
        key = (
            kernel.fn.__name__,
            *signature.items(),
            *constants.items(),
            *options.items(),
        )
        self.found[key] = (kernel, signature, constants, {**options, "attributes": attributes})


class Calls:
    """Every operator, in forms that differ in what is compiled. Results are garbage."""

    rows, groups = 64, 5

    def __init__(self, dim: int, dtype: torch.dtype, index: torch.dtype) -> None:
        rows, groups, lookups = self.rows, self.groups, 40
        self.ops = amtl_kernels.triton.implementations()
        self.dim, self.dtype = dim, dtype
        self.weight = torch.zeros(rows, dim, dtype=dtype)
        self.indices = torch.arange(lookups, dtype=index) % 7
        self.offsets = torch.tensor([0, 0, 5, 20], dtype=index)
        self.sizes = torch.ones(rows, dtype=torch.uint8)
        self.row_group = torch.zeros(rows, dtype=torch.int32)
        self.one = torch.ones(groups, dtype=torch.int32)
        self.many = torch.ones(groups, 4, dtype=torch.int32)
        self.psw = torch.zeros(lookups, dtype=dtype)
        widths = [dim, max(1, dim // 16 * 8), 8] if dim % 8 == 0 else [dim, 5, 1]
        shapes = zip((10, 20, 34), widths, strict=True)
        self.blocks = [torch.zeros(n, w, dtype=dtype) for n, w in shapes]
        self.grad = torch.zeros(4, dim, dtype=dtype)
        # One row owns 200 lookups: more than a window holds, so the second pass runs too.
        self.hot = torch.zeros(200, dtype=index)
        self.wide = torch.zeros(200, dim, dtype=dtype)
        self.wide_psw = torch.zeros(200, dtype=dtype)
        # Of two tables.
        self.bags = torch.tensor([0, 5, 20, 20, 200], dtype=index)
        self.grad_of_both = torch.zeros(2, 2 * dim, dtype=dtype)

        padded = {"offsets": self.offsets, "per_sample_weights": self.psw, "padding_idx": [3]}
        self.few_bags = {"indices": self.indices, **padded}
        self.both_bags = {"indices": self.hot, "offsets": self.bags, "padding_idx": [2, -1]}

    def masked(self, count: int = 1) -> dict[str, Any]:
        """What describes ``count`` tables with sizes by row."""
        return {"blocks": [self.weight] * count, "sizes": [self.sizes] * count}

    def adaptive(self, sizes: Tensor, count: int = 1) -> dict[str, Any]:
        """The same, with sizes by group."""
        groups = {"sizes": [sizes] * count, "row_groups": [self.row_group] * count}
        return {"blocks": [self.weight] * count, **groups, "seed": 3}

    def tiered(self, count: int = 1) -> dict[str, Any]:
        """The same, in tiers."""
        blocks, counts = self.blocks * count, [3] * count
        return {"blocks": blocks, "block_counts": counts, "dims": [self.dim] * count}

    def run(self, op: str, arguments: dict[str, Any]) -> None:
        self.ops[op](*in_order(op, arguments))

    def lookups(self, every: bool) -> None:
        def lookup(tables: dict[str, Any], bounds: int = 1, **bags: Any) -> None:
            bags = {"indices": self.indices, **bags}
            self.run("lookup", call(**tables, **bags).lookup(bounds))

        indices, offsets = self.indices, self.offsets
        means = {"offsets": offsets, "pooling": 1}
        lookup(self.masked())
        lookup(self.masked(), **means, indices=indices.repeat(20))
        lookup(self.adaptive(self.many), 2, **means, padding_idx=[2])
        both = {**self.both_bags, "pooling": 1}
        lookup(self.adaptive(self.many, 2), 2, **both)
        # Tables of few bits: numbers that share a byte, bytes, and numbers of two of them.
        weighted = {"offsets": offsets, "per_sample_weights": torch.zeros(indices.numel())}
        bags: dict[str, Any]
        for bits, bags in ((4, {}), (8, weighted), (16, weighted)):
            blocks = [torch.zeros(n, self.dim * bits // 8, dtype=torch.uint8) for n in (10, 20)]
            few = {"dims": [self.dim], "steps": [torch.ones(2)], "bits": [bits]}
            lookup({"blocks": blocks, **few}, padding_idx=[3], **bags)
        # And numbers that are rounded to such.
        few = {"steps": [torch.ones(4)], "bits": [4], "step_ends": [4, 10, 30, 64]}
        for bags in ({"padding_idx": [3]}, self.few_bags):
            lookup({**self.tiered(), **few}, **bags)
        few = {"steps": [torch.ones(3)] * 2, "bits": [4, 4]}
        lookup({**self.tiered(2), **few}, 2, **self.both_bags)
        if not every:
            return
        lookup(self.adaptive(self.many), 2)
        lookup(self.tiered())
        lookup(self.masked(), offsets=offsets, per_sample_weights=self.psw)
        lookup(self.adaptive(self.one), 2, **means)
        lookup(self.tiered(), **self.few_bags)
        wide = {"per_sample_weights": self.wide_psw, "padding_idx": None}
        lookup(self.masked(2), **{**self.both_bags, **wide})
        lookup(self.tiered(2), 2, **self.both_bags)

    def backwards(self, every: bool) -> None:
        def backward(
            tables: dict[str, Any], bags: dict[str, Any], grad: Tensor, **given: Any
        ) -> None:
            self.run("lookup_backward", call(**tables, **bags, grad=grad, **given).backward())

        few, both, hot = self.few_bags, self.both_bags, {"indices": self.hot}
        backward(self.adaptive(self.many), few, self.grad)
        backward(self.tiered(), hot, self.wide)
        backward(self.adaptive(self.many, 2), both, self.grad_of_both, pooling=1)
        if not every:
            return
        backward(self.masked(), few, self.grad)
        flat = torch.zeros(self.indices.numel(), self.dim, dtype=self.dtype)
        backward(self.adaptive(self.one), {"indices": self.indices, "padding_idx": [3]}, flat)
        backward(self.tiered(), few, self.grad)
        backward(self.masked(), hot, self.wide)
        for group_dims in (self.one, self.many):
            backward(self.adaptive(group_dims), hot, self.wide)
        for tables in (self.masked(2), self.tiered(2)):
            backward(tables, both, self.grad_of_both, per_sample_weights=self.wide_psw)

    def updates(self, rule: str, every: bool) -> None:
        def update(
            tables: dict[str, Any],
            bags: dict[str, Any],
            grad: Tensor,
            *more: float,
            counter: Sequence[Tensor] = (),
        ) -> None:
            of = call(**tables, **bags, grad=grad)
            state = [*states(rule, of.tables["blocks"], torch.zeros), *counter]
            arguments = of.update(rule, [*HYPER, *more], state, psw_grad=False)
            self.run("lookup_update_", arguments)

        hot = {"indices": self.hot}
        update(self.masked(), hot, self.wide)
        # Rounded stochastically, and by steps that are counted on the device.
        counter = [torch.ones((), dtype=torch.int64)]
        update(self.tiered(), hot, self.wide, 1.0, counter=counter)
        if every or rule == "adam":
            update(self.adaptive(self.many, 2), self.both_bags, self.grad_of_both)
        if every:
            update(self.adaptive(self.many), self.few_bags, self.grad)

    def optimizers(self) -> None:
        """Also with a step that is counted on the device, and with stochastic rounding."""
        touched, grads = [torch.arange(20)], [torch.zeros(20, self.dim, dtype=self.dtype)]
        given = ([self.weight], touched, grads)
        for rule in RULES:
            state = states(rule, [self.weight], torch.zeros)
            self.run("apply_", applying(*given, rule, HYPER, state))
        counted = [*state, torch.ones((), dtype=torch.int64)]
        self.run("apply_", applying(*given, "adam", [*HYPER, 1.0], counted))


def compile_recorded(requests: Sequence[tuple[int, Any]]) -> Iterator[dict[str, Any]]:
    """What comes out of the compiler, for architectures and recorded launches."""
    for arch, (kernel, signature, constants, options) in requests:
        source = ASTSource(kernel, signature, constants, options["attributes"])
        flags = {name: options[name] for name in ("num_warps", "maxnreg")}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=flags)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [BIN / "cuobjdump", "-res-usage", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert found is not None, usage
        ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
        yield {
            "kernel": kernel.fn.__name__,
            "arch": arch,
            "dtype": next(t[1:] for t in signature.values() if t.startswith("*")),
            "constants": {k: v for k, v in constants.items() if v is not None},
            "warps": options["num_warps"],
            "ceiling": options["maxnreg"],
            "registers": int(found[1]),
            "stack": int(found[2]),
            "local": int(found[4]),
            "vector_loads": len(re.findall(r"ld\.global[.:\w]*\.v4\.b32", ptx)),
            # Of the last load and the stores after it, in program order, which machine code is not.
            "barrier_before_store": "barrier" in ttgir.split("tt.load")[-1].split("tt.store")[0]
            and "bar.sync" in ptx,
            "vector_stores": len(re.findall(r"st\.global[.:\w]*\.v4\.b32", ptx)),
        }


def main() -> None:
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    share, shares, *architectures = map(int, sys.argv[1:] or (0, 1))
    tuned = {_gather: launch.WIDE_SPACE, _pooled: launch.NARROW_SPACE}
    requests: dict[Any, tuple[int, Any]] = {}
    for arch, dim, dtype, index, rules, every in PLAN:
        if architectures and arch not in architectures:
            continue
        if not SOAK and (dim, dtype) in ONLY_IN_SOAK:
            continue
        recorder = Recorder()
        launch.recorder = recorder
        for kernel, space in tuned.items():
            kernel.space = space if every and SOAK else space[:1]
        calls = Calls(dim, dtype, index)
        calls.lookups(every)
        calls.backwards(every)
        for rule in rules:
            calls.updates(rule, every)
        calls.optimizers()
        requests |= {(arch, key): (arch, found) for key, found in recorder.found.items()}
    json.dump(list(compile_recorded(list(requests.values())[share::shares])), sys.stdout)


if __name__ == "__main__":
    main()
