"""Every kernel once, on small inputs, against the reference: a minute on a GPU, and telling.

    python -m bench.gpu_smoke             as compute-sanitizer runs it: without the reference
    python -m bench.gpu_smoke --dry-run   the same on the host simulator

What is running is noted before it runs, so that a crash or a hang has a name.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import amtl_kernels
from amtl_kernels import reference
from bench.setting import Setting

GROUPS = 9
SGD, ROWWISE, ADAM = reference.SGD, reference.ROWWISE_ADAGRAD, reference.ADAM
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}

EVERY_KIND = tuple(
    itertools.product((torch.float32, torch.bfloat16), (1, 17, 64, 160, 300)),
)
"""Types of tables and their widths."""
COMPILED_KINDS = ((torch.float32, 64), (torch.bfloat16, 64), (torch.float32, 17))
"""Where each makes a compiler translate some seventy kernels first, as Triton's."""
SIMULATED_KINDS = ((torch.float32, 160),)
"""Where each takes long; every kernel all the same."""

Call = tuple[str, str, tuple[Any, ...]]


@dataclass(frozen=True)
class Scale:
    """How much is looked up where."""

    rows: int
    lookups: int
    bags: int


def calls(dtype: torch.dtype, dim: int, scale: Scale) -> Iterator[Call]:
    """What is called: a name, the operator, its arguments on the CPU."""
    rows, lookups, bags_ = scale.rows, scale.lookups, scale.bags
    g = torch.Generator().manual_seed(dim)
    weight = torch.randn(rows, dim, generator=g).to(dtype)
    # Skewed, so that some rows have many lookups and most a few.
    ids = (torch.rand(lookups, generator=g) ** 4 * rows).long().clamp(max=rows - 1)
    offsets = torch.arange(0, lookups, lookups // bags_)
    kept = torch.randint(1, dim + 1, (rows,), generator=g).int()
    group = torch.randint(0, GROUPS, (rows,), generator=g).int()
    sizes = torch.randint(1, dim + 1, (GROUPS, 4), generator=g).int()
    weights = torch.randn(lookups, generator=g).to(dtype)
    grad, plain_grad = (torch.randn(n, dim, generator=g).to(dtype) for n in (bags_, lookups))
    masks = [torch.zeros(GROUPS, dim)]

    by_row = ([weight], [1], [], [kept], [], 0)
    by_group = ([weight], [1], [], [sizes], [group], 5)
    in_order = ([weight], [1], [], [sizes], [group.sort().values], 5)
    half = max(1, dim // 2)
    third = rows // 3
    blocks = [weight[:third].contiguous(), weight[third:, :half].contiguous()]
    tiers = (blocks, [2], [dim], [], [], 0)
    many = ([weight[:4].contiguous()] * 130, [130], [dim], [], [], 0)

    plain = (ids, None, None, 0, [3], False)
    bags = (ids, offsets, None, 0, [-1], False)
    weighted = (ids, offsets, weights, 0, [3], False)
    mean = (ids, offsets, None, 1, [3], False)
    long = (ids, offsets[:1], None, 0, [-1], False)
    twice = (torch.cat([ids, ids]), torch.cat([offsets, offsets + lookups]), None, 0, [-1, 2])
    both_bags = (*twice[:1], torch.cat([twice[1], torch.tensor([2 * lookups])]), *twice[2:], True)
    both_tiers = ([weight, *blocks], [1, 2], [], [], [], 0)
    both_groups = ([weight, weight.clone()], [1, 1], [], [sizes] * 2, [group] * 2, 5)
    pair = torch.cat([grad, grad], 1)

    def lookup(name: str, tables: Any, of: Any, mask: Any = ()) -> Call:
        return f"lookup, {name}", "lookup", (*tables, list(mask), *of, 1, True)

    yield lookup("plain, sizes by row", by_row, plain)
    yield lookup("bags, sizes by group, weighted", by_group, weighted, masks)
    yield lookup("one long bag", by_row, long)
    yield lookup("means, tiers", tiers, mean)
    yield lookup("130 tiers", many, (ids % 520, *plain[1:]))
    yield lookup("two tables of groups", both_groups, both_bags, masks * 2)
    yield lookup("two tables, one of tiers", both_tiers, both_bags)
    if dtype == torch.float32 and dim % 4 == 0:
        for bits in (2, 4, 8, 16):
            codes = torch.randint(0, 256, (rows, dim * bits // 8), generator=g).byte()
            coded = ([codes], [1], [dim], [], [], 0)
            for of in (plain, mean):
                arguments = (*coded, [], *of, 1, True, [torch.ones(1)], [bits])
                yield f"lookup of {bits} bits", "lookup", arguments

    yield "gradients, groups", "lookup_backward", (*by_group, grad, *weighted, True, True, True)
    yield "gradients, in order", "lookup_backward", (*in_order, grad, *mean, True, True, False)
    yield "gradients, plain", "lookup_backward", (*by_row, plain_grad, *plain, True, False, False)
    yield "gradients, tiers", "lookup_backward", (*tiers, grad, *weighted, True, False, True)
    of_both = (*both_groups, pair, *both_bags, True, True, False)
    yield "gradients, two tables", "lookup_backward", of_both

    def update(name: str, tables: Any, of: Any, rule: int, order: bool, mask: bool) -> Call:
        hyper = [0.1, 1e-8, 0.01, 0.9, 0.99, 2.0, float(rule == ADAM)]
        wide = [torch.ones(block.shape) for block in tables[0] for _ in range(2)]
        state = {SGD: [], ROWWISE: [torch.ones(len(b)) for b in tables[0]], ADAM: wide}[rule]
        state = state if rule != ADAM else [*state, torch.tensor(2)]
        given = pair if len(tables[1]) > 1 else grad
        arguments = (*tables, given, *of, mask, False, order, state, rule, hyper)
        return f"update, {name}", "lookup_update_", arguments

    yield update("groups in any order", by_group, mean, ROWWISE, order=False, mask=True)
    yield update("groups in order, Adam", in_order, weighted, ADAM, order=True, mask=True)
    yield update("tiers, Adam", tiers, bags, ADAM, order=False, mask=False)
    yield update("tiers, SGD", tiers, bags, SGD, order=False, mask=False)
    yield update("two tables", both_groups, both_bags, ROWWISE, order=False, mask=True)
    if dtype == torch.float32 and dim % 4 == 0:
        for bits in (2, 4, 8, 16):
            codes = torch.randint(0, 256, (rows, dim * bits // 8), generator=g).byte()
            coded = update("", ([codes], [1], [dim], [], [], 0), mean, ROWWISE, False, False)[2]
            few = [torch.ones(1)], [bits]
            yield f"update of {bits} bits", "lookup_update_", (*coded, *few)

    touched = torch.arange(0, rows, 3)
    grads = torch.randn(len(touched), dim, generator=g).to(dtype)
    moments = [torch.ones(rows, dim) for _ in range(2)]
    hyper = [0.1, 1e-8, 0.01, 0.9, 0.99, 2.0]
    yield "apply", "apply_", ([weight], [touched], [grads], moments, ADAM, hyper)
    state = [torch.ones(rows)]
    yield "apply, row-wise", "apply_", ([weight], [touched], [grads], state, ROWWISE, hyper)


def every_call(
    kinds: Iterable[tuple[torch.dtype, int]], scale: Scale
) -> Iterator[tuple[str, torch.dtype, Call]]:
    """All of them, on tables of each kind."""
    for dtype, dim in kinds:
        kind = str(dtype).removeprefix("torch.")
        for call in calls(dtype, dim, scale):
            yield f"{kind} × {dim}: {call[0]}", dtype, call


def _copied(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device)
    if isinstance(value, list | tuple):
        return type(value)(_copied(each, device) for each in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def difference(got: Any, want: Any) -> float:
    """The largest difference of results, relative to the largest value; infinite of shapes."""
    worst = 0.0
    for a, b in itertools.zip_longest(_tensors(got), _tensors(want)):
        if a is None or b is None or a.shape != b.shape:
            return float("inf")
        if not b.numel():
            continue
        off = (a.detach().cpu().double() - b.double()).abs().max()
        error = float(off / b.double().abs().max().clamp(min=1e-3))
        # Written so that NaN fails too.
        worst = max(worst, error) if error == error else float("inf")
    return worst


def run(
    device: str,
    note: Callable[[str, str], object],
    *,
    kinds: Iterable[tuple[torch.dtype, int]],
    check: bool,
) -> None:
    """Calls everything; on a CPU, which has to stand for a GPU, with few lookups.

    Args:
        device: Where.
        note: Told a name and what has become of it: ``"running"``, ``"ok"``, or what is wrong.
        kinds: Types of tables and their widths.
        check: Whether results are compared.
    """
    scale = Scale(30, 40, 8) if device == "cpu" else Scale(500, 2_000, 100)
    for name, dtype, (_, op, arguments) in every_call(kinds, scale):
        note(name, "running")
        mine = _copied(arguments, device)
        result = getattr(torch.ops.amtl, op)(*mine)
        amtl_kernels.synchronize()
        if not check:
            note(name, "ok")
            continue
        wanted = _copied(arguments, "cpu")
        want = reference.IMPLEMENTATIONS[op](*wanted)
        error = difference([result, list(mine)], [want, list(wanted)])
        limit = TOLERANCE[dtype]
        note(name, "ok" if error <= limit else f"off by {error:.2g}, allowed are {limit:.2g}")


def main() -> None:
    """What compute-sanitizer watches."""
    setting = Setting("--dry-run" in sys.argv[1:], Path())
    setting.backend("cuda")
    kinds = SIMULATED_KINDS if setting.dry else EVERY_KIND
    run(setting.device, lambda *told: print(*told, flush=True), kinds=kinds, check=False)
    print("done")


if __name__ == "__main__":
    main()
