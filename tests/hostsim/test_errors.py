"""The CUDA operators' checks of arguments: what they refuse, and in which words.

A call that the CPU operators refuse, the CUDA operators refuse in the same words, operator by
operator and argument by argument. What only the device can see is looked at in forwards alone: a
backward that asked would wait for the device. Two more things are refused by all, but not in the
same order.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import applying, call

import amtl_kernels
from amtl_kernels._schema import SCHEMAS

from . import simulator as sim

pytestmark = pytest.mark.skipif(
    "error" in amtl_kernels.build_info()["native"],  # type: ignore[operator]
    reason="no native CPU operators to compare with",
)

N, D, G = 6, 4, 3
FORMS = ("masked", "adaptive", "tiered")
LAYOUTS = ("plain", "bags", "tables")
Kind = tuple[str, str, str]

KINDS: list[Kind] = [
    *itertools.product(["lookup", "lookup_backward", "lookup_update_"], FORMS, LAYOUTS),
    ("apply_", "tiered", "bags"),
]
"""Every operator, with every form of a table: lookups, bags, or bags in two tables."""


def values(form: str, layout: str) -> dict[str, Any]:
    """Arguments of all operators that fit, by name: five lookups, two bags, in two tables ten."""
    tables = 2 if layout == "tables" else 1
    weight = torch.arange(N * D, dtype=torch.float32).reshape(N, D)
    described: dict[str, Any] = {"seed": 7}
    blocks = [weight.clone() for _ in range(tables)]
    if form == "tiered":
        blocks = [weight[:2].clone(), weight[2:, :3].contiguous()] * tables
        described |= {"dims": [D] * tables, "block_counts": [2] * tables}
    elif form == "masked":
        described["sizes"] = [torch.full((N,), 2, dtype=torch.int32)] * tables
    else:
        described["sizes"] = [torch.full((G,), 3, dtype=torch.int32)] * tables
        described["row_groups"] = [torch.arange(N, dtype=torch.int32) // 2] * tables
        described["masks"] = [torch.zeros(G, D)] * tables
    pooled = layout != "plain"
    if pooled:
        described["offsets"] = torch.arange(5) * 2 if tables > 1 else torch.tensor([0, 3])
        described["per_sample_weights"] = torch.ones(5 * tables)
    of = call(
        blocks,
        torch.arange(5 * tables) % N,
        torch.ones(2 if pooled else 5, D * tables),
        padding_idx=[-1, 2][:tables],
        **described,
    )
    state = [torch.ones_like(block) for block in blocks]
    hyper = [0.1, 1e-8, 0.0, 0.9, 0.99, 1.0]
    grads = [torch.ones(2, block.shape[1]) for block in blocks]
    every = {
        **of.lookup(),
        **of.backward(),
        **of.update("adagrad", hyper, state, blocks),
        **applying(blocks, [torch.arange(2)] * 2, grads, "adagrad", hyper, state),
    }
    return every | {"mask_grad": True} | dict.fromkeys(("steps", "bits", "step_ends"))


def outcome(function: Any, kind: Kind, changes: dict[str, Any]) -> tuple[str, str]:
    """What a call with other arguments raises, if it raises."""
    op, form, layout = kind
    given = values(form, layout)
    names = [a.name for a in getattr(torch.ops.amtl, op).default._schema.arguments]
    if not changes.keys() <= set(names):
        return "not applicable", ""
    for name, change in changes.items():
        if callable(change) and (given[name] is None or given[name] == []):
            return "not applicable", ""
        given[name] = change(given[name]) if callable(change) else change
    arguments = [given[name] for name in names]
    try:
        function(*arguments)
        if function is sim.IMPLEMENTATIONS[op]:
            sim.raise_found()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return "accepted", ""


def last(change: Any) -> Any:
    """Applies to a tensor, or to the last of a list."""
    return lambda v: [*v[:-1], change(v[-1])] if isinstance(v, list) else change(v)


def put(position: int, value: int) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return last(change)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


Changes = dict[str, dict[str, Any]]

IN_FORWARDS: Changes = {
    "an index too large": {"indices": put(2, N + 4)},
    "a negative index": {"indices": put(4, -3)},
    "an index of a later table": {"indices": put(-1, N)},
    "offsets that start late": {"offsets": put(0, 1)},
    "offsets that fall": {"offsets": put(1, -1)},
    "offsets past the indices": {"offsets": put(-1, 99)},
    "narrow offsets that fall": {"offsets": lambda v: put(1, -1)(v.int())},
    "wide offsets of narrow indices": {
        "offsets": put(-1, 2**32 + 1),
        "indices": lambda v: v.int(),
    },
    "an index and offsets": {"indices": put(2, N + 4), "offsets": put(1, -1)},
    "no offset to include": {"offsets": lambda v: v[:0], "include_last_offset": True},
    "a negative size": {"sizes": put(2, -1)},
    "a size past the row": {"sizes": put(2, D + 3)},
    "a group that is not there": {"row_groups": put(2, G)},
    "a negative group": {"row_groups": put(1, -1)},
}

CHANGES: Changes = {
    "indices of floats": {"indices": lambda v: v.float()},
    "indices with gaps": {"indices": strided},
    "indices in two dimensions": {"indices": lambda v: v[None]},
    "no offsets": {"offsets": None},
    "weights without offsets": {"offsets": None, "pooling": 0},
    "offsets of floats": {"offsets": lambda v: v.float()},
    "offsets in two dimensions": {"offsets": lambda v: v[None]},
    "offsets of half a bag": {"offsets": lambda v: v[1:]},
    "offsets without the last": {"include_last_offset": False},
    "no tables": {"blocks": [], "block_counts": []},
    "blocks of doubles": {"blocks": last(lambda v: v.double())},
    "every block of doubles": {"blocks": lambda v: [block.double() for block in v]},
    "blocks of one dimension": {"blocks": last(lambda v: v[0])},
    "blocks with gaps": {"blocks": last(strided)},
    "blocks without columns": {"blocks": last(lambda v: v[:, :0].contiguous())},
    "blocks of two types": {"blocks": last(lambda v: v.bfloat16())},
    "tables of two types": {
        "blocks": lambda v: [b.bfloat16() if i < len(v) // 2 else b for i, b in enumerate(v)]
    },
    "a block more": {"blocks": lambda v: [*v, v[0]]},
    "a table more": {"block_counts": lambda v: [*v, 1]},
    "a table without blocks": {"block_counts": lambda v: [*v, 0]},
    "two blocks with sizes": {
        "blocks": lambda v: [*v, v[0]],
        "block_counts": lambda v: [*v[:-1], v[-1] + 1],
    },
    "more tiers than there is room for": {
        "blocks": lambda v: [*v, *[v[-1]] * 1024],
        "block_counts": lambda v: [*v[:-1], v[-1] + 1024],
    },
    "a block wider than the row": {"dims": lambda v: [*v[:-1], 3]},
    "rows without columns": {"dims": lambda v: [*v[:-1], 0]},
    "too many widths": {"dims": lambda v: [*v, D]},
    "a width that a table with sizes has not": {"dims": [D + 1]},
    "sizes of int64": {"sizes": last(lambda v: v.long())},
    # Groups without a size are found by forwards alone.
    "too few sizes": {"sizes": last(lambda v: v[1:] if len(v) == N else v)},
    "sizes in three dimensions": {"sizes": last(lambda v: v[:, None, None])},
    "sizes without columns": {"sizes": last(lambda v: v[:, None][:, :0].contiguous())},
    "fewer sizes than tables": {"sizes": lambda v: v[1:]},
    "more sizes than tables": {"sizes": lambda v: [*v, v[0]]},
    "sizes with gaps": {"sizes": last(strided)},
    "groups without sizes": {"sizes": []},
    "groups of int64": {"row_groups": last(lambda v: v.long())},
    "too few groups": {"row_groups": last(lambda v: v[1:])},
    "groups with gaps": {"row_groups": last(strided)},
    "groups of more tables": {"row_groups": lambda v: [*v, v[0]]},
    "weights of doubles": {"per_sample_weights": lambda v: v.double()},
    "too few weights": {"per_sample_weights": lambda v: v[1:]},
    "weights with gaps": {"per_sample_weights": strided},
    "weights of a mean": {"pooling": 1},
    "an unknown pooling": {"pooling": 2},
    "too few padding rows": {"padding_idx": lambda v: v[1:]},
    "an unknown check": {"bounds_check": 3},
    "a gradient of another type": {"grad": lambda v: v.bfloat16()},
    "a gradient too small": {"grad": lambda v: v[1:]},
    "a gradient too narrow": {"grad": lambda v: v[:, 1:].contiguous()},
    "a gradient with gaps": {"grad": strided},
    "an unknown optimizer": {"optimizer": 4},
    "too few hyperparameters": {"hyper": [0.1]},
    "step zero": {"hyper": [0.1, 1e-8, 0.0, 0.9, 0.99, 0.0]},
    "step zero of Adam": {
        "optimizer": 3,
        "state": lambda v: [state for state in v for _ in range(2)],
        "hyper": [0.1, 1e-8, 0.0, 0.9, 0.99, 0.0],
    },
    "no state": {"state": []},
    "too much state": {"state": lambda v: [*v, v[0], v[0]]},
    "state of another shape": {"state": last(lambda v: v[1:])},
    "state of the shape of another optimizer": {"optimizer": 2},
    "second moments of another shape": {
        "optimizer": 3,
        "state": lambda v: [*v[:1], v[0][1:], *v[1:], *v[1:]],
    },
    "state with gaps": {"state": last(strided)},
    "a counter of floats": {"state": lambda v: [*v, torch.ones(1)]},
    "two counters": {"state": lambda v: [*v, torch.ones(2).long()]},
    "rows of int32": {"rows": last(lambda v: v.int())},
    "rows of fewer blocks": {"rows": lambda v: v[1:]},
    "rows with gaps": {"rows": last(strided)},
    "gradients of other rows": {"grads": last(lambda v: v[1:])},
    "gradients of another type": {"grads": last(lambda v: v.bfloat16())},
    "gradients of fewer blocks": {"grads": lambda v: v[1:]},
    "gradients of rows with gaps": {"grads": last(strided)},
}


@pytest.mark.parametrize("what", [*IN_FORWARDS, *CHANGES])
def test_refused_in_the_words_of_the_cpu_operators(what: str) -> None:
    changes = (IN_FORWARDS | CHANGES)[what]
    refused = []
    for kind in KINDS:
        if what in IN_FORWARDS and kind[0] != "lookup":
            continue
        want = outcome(getattr(torch.ops.amtl, kind[0]), kind, changes)
        if want[0] != "not applicable":
            assert outcome(sim.IMPLEMENTATIONS[kind[0]], kind, changes) == want, kind
            refused.append(want[0] != "accepted")
    assert any(refused), "no operator looks at that"


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_arguments_that_fit_are_accepted(kind: Kind) -> None:
    """What the refused calls were changed from."""
    assert outcome(sim.IMPLEMENTATIONS[kind[0]], kind, {}) == ("accepted", "")


def test_every_operator_is_asked() -> None:
    assert {op for op, _, _ in KINDS} == set(SCHEMAS)
