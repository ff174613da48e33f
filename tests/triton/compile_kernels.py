"""Compiles every kernel that the operators launch, for GPUs that need not be there.

    python tests/triton/compile_kernels.py > report.json      (TRITON_INTERPRET unset)

Calls every operator with a recorder in place of launches, so that what is compiled is what would
have been launched: the same types, constants, tiles, warps and register ceilings. Prints a JSON
list, one entry per kernel, specialisation and architecture.
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
HALF, FULL, SINGLE = (torch.bfloat16,), FLOATS, (torch.float32,)
PLAN = (
    # architecture, dimension, dtypes, index type, all optimizers or the one with the most state,
    # the whole tuning space or its first choice
    (80, 64, SINGLE, torch.int64, False, False),
    (90, 64, SINGLE, torch.int64, True, True),
    (90, 64, FULL[1:], torch.int64, True, False),
    (100, 64, SINGLE, torch.int64, False, False),
    (90, 17, SINGLE, torch.int32, False, False),
    (90, 1024, HALF, torch.int32, False, False),
    (90, 1100, SINGLE, torch.int64, False, False),
)
"""A cover, since each kernel costs a third of a second: all dtypes and optimizers on one
architecture, one dtype on the others; rows that are unaligned, as wide as a tile, and wider."""
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


def call_operators(dim: int, dtype: torch.dtype, index: torch.dtype, optimizers: set[int]) -> None:
    """Every operator, in the forms that differ in what is compiled. Results are garbage."""
    ops = amtl_kernels.triton.implementations()
    rows, lookups, groups = 64, 40, 5
    weight = torch.zeros(rows, dim, dtype=dtype)
    indices = torch.arange(lookups, dtype=index) % 7
    offsets = torch.tensor([0, 0, 5, 20], dtype=index)
    sizes = torch.ones(rows, dtype=torch.uint8)
    row_group = torch.zeros(rows, dtype=torch.int32)
    one, many = torch.ones(groups, dtype=torch.int32), torch.ones(groups, 4, dtype=torch.int32)
    mask = torch.zeros(groups, dim)
    psw = torch.zeros(lookups, dtype=dtype)
    widths = [dim, max(1, dim // 16 * 8), 8] if dim % 8 == 0 else [dim, 5, 1]
    blocks = [torch.zeros(n, w, dtype=dtype) for n, w in zip((10, 20, 34), widths, strict=True)]
    ends = [10, 30, 64]
    grad = torch.zeros(4, dim, dtype=dtype)
    flat = torch.zeros(lookups, dim, dtype=dtype)

    ops["masked_embedding"](weight, indices, sizes, -1, 1)
    ops["adaptive_embedding"](weight, indices, row_group, many, mask, 3, -1, 2)
    ops["tiered_embedding"](blocks, ends, indices, dim, -1, 1)
    ops["masked_embedding_bag"](weight, indices, offsets, sizes, psw, 0, -1, False, 1)
    for group_dims, padding in ((one, -1), (many, 2)):
        ops["adaptive_embedding_bag"](
            weight, indices, offsets, row_group, group_dims, mask, None, 1, padding, False, 3, 2
        )
    ops["tiered_embedding_bag"](blocks, ends, indices, offsets, psw, dim, 0, 3, False, 1)
    long = indices.repeat(20)
    ops["masked_embedding_bag"](weight, long, offsets, sizes, None, 1, -1, False, 1)

    both, twice, bags = [weight, weight], [sizes, sizes], torch.tensor([0, 5, 20, 20, 30])
    bags = bags.to(index)
    ops["masked_embedding_bag_tables"](both, twice, indices, bags, psw, 0, [-1, -1], 1)
    ops["adaptive_embedding_bag_tables"](
        *(both, [row_group] * 2, [many, many], [mask, mask], indices, bags, None, 1, [2, -1], 3, 2),
    )
    ops["tiered_embedding_bag_tables"](
        *(blocks * 2, [3, 3], ends * 2, [dim, dim], indices, bags, None, 0, [2, -1], 2),
    )

    ops["masked_embedding_backward"](
        grad, weight, indices, offsets, sizes, psw, 0, 3, False, True, True
    )
    ops["adaptive_embedding_backward"](
        grad, weight, indices, offsets, row_group, many, psw, 0, 3, False, 4, True, True, True
    )
    ops["adaptive_embedding_backward"](
        flat, weight, indices, None, row_group, one, None, 0, 3, False, 4, True, True, False
    )
    ops["tiered_embedding_backward"](
        grad, blocks, ends, indices, offsets, psw, dim, 0, 3, False, True, True
    )
    # One row owns 200 lookups: more than a window holds, so the second pass runs too.
    hot = torch.zeros(200, dtype=index)
    wide = torch.zeros(200, dim, dtype=dtype)
    ops["masked_embedding_backward"](
        wide, weight, hot, None, sizes, None, 0, -1, False, True, False
    )
    ops["tiered_embedding_backward"](
        wide, blocks, ends, hot, None, None, dim, 0, -1, False, True, False
    )
    for group_dims in (one, many):
        ops["adaptive_embedding_backward"](
            *(wide, weight, hot, None, row_group, group_dims, None, 0, -1, False, 4),
            *(True, True, False),
        )
    for optimizer in optimizers:
        states, by_row = OPTIMIZERS[optimizer], optimizer == reference.ROWWISE_ADAGRAD
        state = [torch.zeros(rows) if by_row else torch.zeros(rows, dim) for _ in range(states)]
        tiers = [
            torch.zeros(b.shape[:1] if by_row else b.shape) for b in blocks for _ in range(states)
        ]
        hyper = [0.1, 0.1, 0.1, 0.9, 0.99, 1.0]
        step = (optimizer, hyper)
        bags = (0, -1, False, False, *step)
        ops["masked_embedding_update_"](weight, state, wide, hot, None, sizes, None, *bags)
        # Rounded stochastically, and by steps that are counted on the device.
        hyper.append(1.0)
        tiers.append(torch.ones((), dtype=torch.int64))
        ops["tiered_embedding_update_"](blocks, tiers, wide, ends, hot, None, None, dim, *bags)
        hyper.pop()
        ops["adaptive_embedding_update_"](
            *(weight, state, grad, indices, offsets, row_group, many, psw, 0, 3, False, 4),
            *(True, False, *step),
        )

    touched = torch.arange(20)
    grads = torch.zeros(20, dim, dtype=dtype)
    state, more = torch.zeros(rows, dim), torch.zeros(rows, dim)
    ops["apply_sgd_"](weight, touched, grads, 0.1, 0.1)
    ops["apply_adagrad_"](weight, state, touched, grads, 0.1, 0.1, 0.1)
    ops["apply_rowwise_adagrad_"](weight, torch.zeros(rows), touched, grads, 0.1, 0.1, 0.1)
    ops["apply_adam_"](weight, state, more, touched, grads, 1, 0.1, 0.9, 0.99, 0.1, 0.1, 1)


def compile_recorded(recorder: Recorder, arch: int) -> Iterator[dict[str, Any]]:
    for kernel, signature, constants, options in recorder.found.values():
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
        ptx = compiled.asm["ptx"]
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
            "barrier_before_store": "bar.sync" in ptx.split("ld.global")[-1].split("st.global")[0],
            "vector_stores": len(re.findall(r"st\.global[.:\w]*\.v4\.b32", ptx)),
        }


def main() -> None:
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    report = []
    spaces = {name: getattr(launch, name) for name in ("WIDE_SPACE", "NARROW_SPACE")}
    from amtl_kernels.triton import lookup

    for arch, dim, dtypes, index, every_rule, whole in PLAN:
        recorder = Recorder()
        launch.recorder = recorder
        for tuned, space in ((lookup._gather, "WIDE_SPACE"), (lookup._pooled, "NARROW_SPACE")):
            tuned.space = spaces[space] if whole else spaces[space][:1]
        for dtype in dtypes:
            rules = set(OPTIMIZERS) if every_rule else {reference.ADAM}
            call_operators(dim, dtype, index, rules)
        report.extend(compile_recorded(recorder, arch))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
