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
    # architecture, dimension, dtype, index type, rules of fused updates; all forms of a call (and
    # in soak the whole tuning space), or one call for each kernel and the space's first choice
    (90, 64, torch.float32, torch.int64, RULES, True),
    (90, 64, torch.float16, torch.int32, RULES, False),
    (90, 64, torch.bfloat16, torch.int64, RULES, False),
    (80, 64, torch.float32, torch.int64, MOST, False),
    (100, 64, torch.float32, torch.int64, MOST, False),
    (90, 17, torch.float32, torch.int32, MOST, False),
    (90, 1024, torch.bfloat16, torch.int32, MOST, False),
    (90, 1100, torch.float32, torch.int64, (reference.ROWWISE_ADAGRAD, *MOST), False),
)
"""A cover, since each kernel costs most of a second: all forms of a call in one dtype on one
architecture; all dtypes, both index types and all rules; rows that are unaligned, as wide as a
tile, and wider."""
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
ONLY_IN_SOAK = ((64, torch.float16), (1100, torch.float32))
"""Whose like is compiled anyway: 16 bits, and rows as wide as a tile."""
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

    def masked(self, count: int = 1) -> tuple[Any, ...]:
        """Arguments that describe ``count`` tables with sizes by row."""
        return [self.weight] * count, [1] * count, [], [self.sizes] * count, [], 0

    def adaptive(self, sizes: Tensor, count: int = 1) -> tuple[Any, ...]:
        """The same, with sizes by group."""
        groups = ([sizes] * count, [self.row_group] * count, 3)
        return ([self.weight] * count, [1] * count, [], *groups)

    def tiered(self, count: int = 1) -> tuple[Any, ...]:
        """The same, in tiers."""
        return self.blocks * count, [3] * count, [self.dim] * count, [], [], 0

    def lookups(self, every: bool) -> None:
        indices, offsets, psw = self.indices, self.offsets, self.psw
        lookup, masks, sparse = self.ops["lookup"], [], True

        def plain(tables: tuple[Any, ...], bounds: int) -> None:
            lookup(*tables, masks, indices, None, None, 0, [-1], False, bounds, sparse)

        def both(tables: tuple[Any, ...], *bags: Any, bounds: int) -> None:
            lookup(*tables, masks, self.hot, self.bags, *bags, True, bounds, sparse)

        def pooled(tables: tuple[Any, ...], *bags: Any, bounds: int) -> None:
            lookup(*tables, masks, *bags, False, bounds, sparse)

        plain(self.masked(), 1)
        pooled(self.masked(), indices.repeat(20), offsets, None, 1, [-1], bounds=1)
        pooled(self.adaptive(self.many), indices, offsets, None, 1, [2], bounds=2)
        both(self.adaptive(self.many, 2), None, 1, [2, -1], bounds=2)
        # Tables of few bits: numbers that share a byte, bytes, and numbers of two of them.
        floats = torch.zeros(indices.numel())
        weighted = (indices, offsets, floats)
        for bits, bags in ((4, (indices, None, None)), (8, weighted), (16, weighted)):
            blocks = [torch.zeros(n, self.dim * bits // 8, dtype=torch.uint8) for n in (10, 20)]
            tables = (blocks, [2], [self.dim], [], [], 0)
            lookup(*tables, masks, *bags, 0, [3], False, 1, sparse, [torch.ones(2)], [bits])
        # And numbers that are rounded to such.
        steps = [torch.ones(4)]
        for bags in ((indices, None, None), (indices, offsets, psw)):
            few = (steps, [4], [4, 10, 30, 64])
            lookup(*self.tiered(), masks, *bags, 0, [3], False, 1, sparse, *few)
        if not every:
            return
        plain(self.adaptive(self.many), 2)
        plain(self.tiered(), 1)
        pooled(self.masked(), indices, offsets, psw, 0, [-1], bounds=1)
        pooled(self.adaptive(self.one), indices, offsets, None, 1, [-1], bounds=2)
        pooled(self.tiered(), indices, offsets, psw, 0, [3], bounds=1)
        both(self.masked(2), self.wide_psw, 0, [-1, -1], bounds=1)
        both(self.tiered(2), None, 0, [2, -1], bounds=2)

    def backwards(self, every: bool) -> None:
        backward = self.ops["lookup_backward"]
        few = (self.indices, self.offsets, self.psw, 0, [3], False)
        hot = (self.hot, None, None, 0, [-1], False)
        backward(*self.adaptive(self.many), self.grad, *few, True, True, True)
        backward(*self.tiered(), self.wide, *hot, True, False, False)
        both = (self.hot, self.bags, None, 1, [2, -1], True)
        backward(*self.adaptive(self.many, 2), self.grad_of_both, *both, True, True, False)
        if not every:
            return
        backward(*self.masked(), self.grad, *few, True, False, True)
        flat = torch.zeros(self.indices.numel(), self.dim, dtype=self.dtype)
        plain = (self.indices, None, None, 0, [3], False)
        backward(*self.adaptive(self.one), flat, *plain, True, True, False)
        backward(*self.tiered(), self.grad, *few, True, False, True)
        backward(*self.masked(), self.wide, *hot, True, False, False)
        for group_dims in (self.one, self.many):
            backward(*self.adaptive(group_dims), self.wide, *hot, True, True, False)
        weighted = (self.hot, self.bags, self.wide_psw, 0, [2, -1], True)
        backward(*self.masked(2), self.grad_of_both, *weighted, True, False, True)
        backward(*self.tiered(2), self.grad_of_both, *weighted, True, False, True)

    def state(self, rule: int, tables: Sequence[Tensor]) -> list[Tensor]:
        by_row = rule == reference.ROWWISE_ADAGRAD
        shapes = [t.shape[:1] if by_row else t.shape for t in tables]
        return [torch.zeros(shape) for shape in shapes for _ in range(OPTIMIZERS[rule])]

    def updates(self, rule: int, every: bool) -> None:
        hyper = [0.1, 0.1, 0.1, 0.9, 0.99, 1.0]
        hot = (self.hot, None, None, 0, [-1], False)

        def update(
            tables: tuple[Any, ...], grad: Tensor, bags: Any, mask: bool, *step: Any
        ) -> None:
            wants = (mask, False, False)
            self.ops["lookup_update_"](*tables, grad, *bags, *wants, *step)

        state = self.state(rule, [self.weight])
        update(self.masked(), self.wide, hot, False, state, rule, hyper)
        # Rounded stochastically, and by steps that are counted on the device.
        counted = [*self.state(rule, self.blocks), torch.ones((), dtype=torch.int64)]
        update(self.tiered(), self.wide, hot, False, counted, rule, [*hyper, 1.0])
        if every or rule == reference.ADAM:
            tables, both = (
                self.adaptive(self.many, 2),
                (self.hot, self.bags, None, 0, [2, -1], True),
            )
            of_both = self.state(rule, tables[0])
            update(tables, self.grad_of_both, both, True, of_both, rule, hyper)
        if every:
            few = (self.indices, self.offsets, self.psw, 0, [3], False)
            update(self.adaptive(self.many), self.grad, few, True, state, rule, hyper)

    def optimizers(self) -> None:
        """Also with a step that is counted on the device, and with stochastic rounding."""
        touched, grads = [torch.arange(20)], [torch.zeros(20, self.dim, dtype=self.dtype)]
        hyper, counter = [0.1, 0.1, 0.1, 0.9, 0.99, 1.0], torch.ones((), dtype=torch.int64)
        apply = self.ops["apply_"]
        for rule in RULES:
            apply([self.weight], touched, grads, self.state(rule, [self.weight]), rule, hyper)
        state = [*self.state(reference.ADAM, [self.weight]), counter]
        apply([self.weight], touched, grads, state, reference.ADAM, [*hyper, 1.0])


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

    share, shares, *architectures = map(int, sys.argv[1:] or (0, 1))
    tuned = {lookup._gather: launch.WIDE_SPACE, lookup._pooled: launch.NARROW_SPACE}
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
