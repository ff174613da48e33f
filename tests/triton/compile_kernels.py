"""Compiles every kernel that the operators launch, for GPUs that need not be there.

    python tests/triton/compile_kernels.py [share shares] > report.json  (TRITON_INTERPRET unset)

Calls every operator with a recorder in place of launches, so that what is compiled is what would
have been launched: the same types, constants, tiles, warps and register ceilings. Prints a JSON
list, one entry per kernel, specialisation and architecture; of ``shares`` processes, each with
its own ``share`` from 0 on, every one compiles a part.
"""

from __future__ import annotations

import json
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

import amtl_kernels.triton
from amtl_kernels import reference
from amtl_kernels.triton import launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
RULES = (reference.SGD, reference.ADAGRAD, reference.ROWWISE_ADAGRAD, reference.ADAM)
MOST = (reference.ADAM,)  # state
PLAN = (
    # architecture, dimension, dtype, index type, rules of fused updates; all forms of a call and
    # the whole tuning space, or one call for each kernel and the space's first choice
    (90, 64, torch.float32, torch.int64, RULES, True),
    (90, 64, torch.float16, torch.int32, RULES, False),
    (90, 64, torch.bfloat16, torch.int64, RULES, False),
    (80, 64, torch.float32, torch.int64, MOST, False),
    (100, 64, torch.float32, torch.int64, MOST, False),
    (90, 17, torch.float32, torch.int32, MOST, False),
    (90, 1024, torch.bfloat16, torch.int32, MOST, False),
    (90, 1100, torch.float32, torch.int64, (reference.ROWWISE_ADAGRAD, *MOST), False),
)
"""A cover, since each kernel costs a third of a second: all forms of a call in one dtype on one
architecture; all dtypes, both index types and all rules; rows that are unaligned, as wide as a
tile, and wider."""
OPTIMIZERS = {
    reference.SGD: 0,
    reference.ADAGRAD: 1,
    reference.ROWWISE_ADAGRAD: 1,
    reference.ADAM: 2,
}
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
        self.mask = torch.zeros(groups, dim)
        self.psw = torch.zeros(lookups, dtype=dtype)
        widths = [dim, max(1, dim // 16 * 8), 8] if dim % 8 == 0 else [dim, 5, 1]
        shapes = zip((10, 20, 34), widths, strict=True)
        self.blocks = [torch.zeros(n, w, dtype=dtype) for n, w in shapes]
        self.ends = [10, 30, 64]
        self.grad = torch.zeros(4, dim, dtype=dtype)
        # One row owns 200 lookups: more than a window holds, so the second pass runs too.
        self.hot = torch.zeros(200, dtype=index)
        self.wide = torch.zeros(200, dim, dtype=dtype)
        # Two tables.
        self.bags = torch.tensor([0, 5, 20, 20, 200], dtype=index)
        self.both = [self.weight, self.weight]
        self.groups_of_both = [[self.row_group] * 2, [self.many] * 2]
        self.tiers_of_both = [self.blocks * 2, [3, 3], self.ends * 2, [dim, dim]]
        self.grad_of_both = torch.zeros(2, 2 * dim, dtype=dtype)

    def lookups(self, every: bool) -> None:
        ops, dim, weight, indices, offsets = (
            self.ops,
            self.dim,
            self.weight,
            self.indices,
            self.offsets,
        )
        group, mask, psw = self.row_group, self.mask, self.psw
        ops["masked_embedding"](weight, indices, self.sizes, -1, 1)
        long = indices.repeat(20)
        ops["masked_embedding_bag"](weight, long, offsets, self.sizes, None, 1, -1, False, 1)
        ops["adaptive_embedding_bag"](
            *(weight, indices, offsets, group, self.many, mask, None, 1, 2, False, 3, 2)
        )
        pooled = (self.hot, self.bags, None)
        ops["adaptive_embedding_bag_tables"](
            *(self.both, *self.groups_of_both, [mask] * 2, *pooled, 1, [2, -1], 3, 2)
        )
        if not every:
            return
        ops["adaptive_embedding"](weight, indices, group, self.many, mask, 3, -1, 2)
        ops["tiered_embedding"](self.blocks, self.ends, indices, dim, -1, 1)
        ops["masked_embedding_bag"](weight, indices, offsets, self.sizes, psw, 0, -1, False, 1)
        ops["adaptive_embedding_bag"](
            *(weight, indices, offsets, group, self.one, mask, None, 1, -1, False, 3, 2)
        )
        tiered = (self.blocks, self.ends, indices, offsets, psw, dim)
        ops["tiered_embedding_bag"](*tiered, 0, 3, False, 1)
        psw = self.wide[:, 0].contiguous()
        ops["masked_embedding_bag_tables"](
            *(self.both, [self.sizes] * 2, self.hot, self.bags, psw, 0, [-1, -1], 1)
        )
        ops["tiered_embedding_bag_tables"](*self.tiers_of_both, *pooled, 0, [2, -1], 2)

    def backwards(self, every: bool) -> None:
        ops, dim, weight, grad = self.ops, self.dim, self.weight, self.grad
        bags = (self.indices, self.offsets)
        group, psw, wide, hot = self.row_group, self.psw, self.wide, self.hot
        ops["adaptive_embedding_backward"](
            *(grad, weight, *bags, group, self.many, psw, 0, 3, False, 4, True, True, True)
        )
        ops["tiered_embedding_backward"](
            *(wide, self.blocks, self.ends, hot, None, None, dim, 0, -1, False, True, False)
        )
        both = (self.hot, self.bags, None, 1, [2, -1])
        ops["adaptive_embedding_bag_tables_backward"](
            *(self.grad_of_both, self.both, *self.groups_of_both, *both, 7, True, True, False)
        )
        if not every:
            return
        ops["masked_embedding_backward"](
            *(grad, weight, *bags, self.sizes, psw, 0, 3, False, True, True)
        )
        flat = torch.zeros(self.indices.numel(), dim, dtype=self.dtype)
        ops["adaptive_embedding_backward"](
            *(flat, weight, self.indices, None, group, self.one, None, 0, 3, False, 4),
            *(True, True, False),
        )
        ops["tiered_embedding_backward"](
            *(grad, self.blocks, self.ends, *bags, psw, dim, 0, 3, False, True, True)
        )
        ops["masked_embedding_backward"](
            *(wide, weight, hot, None, self.sizes, None, 0, -1, False, True, False)
        )
        for group_dims in (self.one, self.many):
            ops["adaptive_embedding_backward"](
                *(wide, weight, hot, None, group, group_dims, None, 0, -1, False, 4),
                *(True, True, False),
            )
        weighted = (self.hot, self.bags, wide[:, 0].contiguous(), 0, [2, -1])
        ops["masked_embedding_bag_tables_backward"](
            *(self.grad_of_both, self.both, [self.sizes] * 2, *weighted, True, True)
        )
        ops["tiered_embedding_bag_tables_backward"](
            *(self.grad_of_both, *self.tiers_of_both, *weighted, True, True)
        )

    def state(self, rule: int, tables: Sequence[Tensor]) -> list[Tensor]:
        by_row = rule == reference.ROWWISE_ADAGRAD
        shapes = [t.shape[:1] if by_row else t.shape for t in tables]
        return [torch.zeros(shape) for shape in shapes for _ in range(OPTIMIZERS[rule])]

    def updates(self, rule: int, every: bool) -> None:
        ops, weight, hot, wide = self.ops, self.weight, self.hot, self.wide
        hyper = [0.1, 0.1, 0.1, 0.9, 0.99, 1.0]
        state = self.state(rule, [weight])
        plain = (0, -1, False, False, rule, hyper)
        ops["masked_embedding_update_"](weight, state, wide, hot, None, self.sizes, None, *plain)
        # Rounded stochastically, and by steps that are counted on the device.
        counted = [*self.state(rule, self.blocks), torch.ones((), dtype=torch.int64)]
        rounded = (0, -1, False, False, rule, [*hyper, 1.0])
        ops["tiered_embedding_update_"](
            *(self.blocks, counted, wide, self.ends, hot, None, None, self.dim, *rounded)
        )
        if every or rule == reference.ADAM:
            both = (self.grad_of_both, hot, self.bags, None, 0, [2, -1])
            ops["adaptive_embedding_bag_tables_update_"](
                *(self.both, *self.groups_of_both, self.state(rule, self.both), *both, 4),
                *(True, False, rule, hyper),
            )
        if every:
            ops["adaptive_embedding_update_"](
                *(weight, state, self.grad, self.indices, self.offsets, self.row_group, self.many),
                *(self.psw, 0, 3, False, 4, True, False, rule, hyper),
            )

    def optimizers(self) -> None:
        touched = torch.arange(20)
        step = (touched, torch.zeros(20, self.dim, dtype=self.dtype))
        state, more = (torch.zeros(self.rows, self.dim) for _ in range(2))
        by_row = torch.zeros(self.rows)
        self.ops["apply_sgd_"](self.weight, *step, 0.1, 0.1)
        self.ops["apply_adagrad_"](self.weight, state, *step, 0.1, 0.1, 0.1)
        self.ops["apply_rowwise_adagrad_"](self.weight, by_row, *step, 0.1, 0.1, 0.1)
        self.ops["apply_adam_"](self.weight, state, more, *step, 1, 0.1, 0.9, 0.99, 0.1, 0.1, 1)


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
    from amtl_kernels.triton import lookup

    share, shares = map(int, sys.argv[1:] or (0, 1))
    tuned = {lookup._gather: launch.WIDE_SPACE, lookup._pooled: launch.NARROW_SPACE}
    requests: dict[Any, tuple[int, Any]] = {}
    for arch, dim, dtype, index, rules, every in PLAN:
        recorder = Recorder()
        launch.recorder = recorder
        for kernel, space in tuned.items():
            kernel.space = space if every else space[:1]
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
