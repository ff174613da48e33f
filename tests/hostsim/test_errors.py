"""The CUDA operators' checks of arguments: what they refuse, and in which words.

A call that the CPU operators refuse, the CUDA operators refuse in the same words, operator by
operator and argument by argument. What only the device can see is looked at in forwards alone: a
backward that asked would wait for the device. Two more things are refused by all, but not in the
same order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amtl_kernels
from amtl_kernels._schema import SCHEMAS

from . import simulator as sim

pytestmark = pytest.mark.skipif(
    "error" in amtl_kernels.build_info()["native"],  # type: ignore[operator]
    reason="no native CPU operators to compare with",
)

N, D, G = 6, 4, 3


def values(op: str) -> dict[str, Any]:
    """Arguments that fit, by name: five lookups, two bags, in several tables three."""
    several = "tables" in op
    weight = torch.arange(N * D, dtype=torch.float32).reshape(N, D)
    sizes = torch.full((N,), 2, dtype=torch.int32)
    group = torch.arange(N, dtype=torch.int32) // 2
    dims = torch.full((G,), 3, dtype=torch.int32)
    bagged = "bag" in op or "backward" in op or "update_" in op
    lookups, bags = (10, 2) if several else (5, 2 if bagged else 5)
    found: dict[str, Any] = {
        "weight": weight,
        "weights": [weight, weight.clone()],
        "indices": torch.arange(lookups) % N,
        "offsets": torch.arange(5) * 2 if several else torch.tensor([0, 3]),
        "row_dims": [sizes, sizes.clone()] if several else sizes,
        "row_group": group,
        "row_groups": [group, group.clone()],
        "group_dims": [dims, dims.clone()] if several else dims,
        "group_mask": torch.zeros(G, D),
        "group_masks": [torch.zeros(G, D)] * 2,
        "per_sample_weights": torch.ones(lookups),
        "blocks": [weight[:2].clone(), weight[2:, :3].contiguous()],
        "tier_ends": [2, N],
        "embedding_dim": D,
        "grad": torch.ones(bags, D),
        "rows": torch.arange(3),
        "grads": torch.ones(3, D),
        "state": [torch.ones(N, D)],
        "padding_idx": [-1, 2] if several else -1,
        "bounds_check": 1,
        "mode": 0,
        "seed": 7,
        "optimizer": 1,
        "hyper": [0.1, 1e-8, 0.0, 0.9, 0.99, 1.0],
        "lr": 0.1,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "step": 1,
        "rounding_seed": None,
        "groups_sorted": False,
        "include_last_offset": False,
        "weight_grad": True,
        "mask_grad": True,
        "psw_grad": True,
        "state_sum": torch.ones(N) if "rowwise" in op else torch.ones(N, D),
        "exp_avg": torch.ones(N, D),
        "exp_avg_sq": torch.ones(N, D),
    }
    if op.startswith("tiered"):
        found["state"] = [torch.ones_like(block) for block in found["blocks"]]
    if several:
        found["grad"] = torch.ones(2, 2 * D)
        found["state"] = [torch.ones(N, D) for _ in range(2)]
        if op.startswith("tiered"):
            found["blocks"] = found["blocks"] * 2
            found["state"] = [torch.ones_like(block) for block in found["blocks"]]
            found |= {"tier_counts": [2, 2], "tier_ends": [2, N] * 2, "embedding_dims": [D, D]}
    return found


def outcome(function: Any, op: str, changes: dict[str, Any]) -> tuple[str, str]:
    """What a call with other arguments raises, if it raises."""
    given = values(op)
    names = [a.name for a in getattr(torch.ops.amtl, op).default._schema.arguments]
    if not changes.keys() <= set(names):
        return "not applicable", ""
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    try:
        function(*(given[name] for name in names))
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return "accepted", ""


def first(change: Any) -> Any:
    """Applies to a tensor, or to the second of a list."""
    return lambda v: [v[0], change(v[1]), *v[2:]] if isinstance(v, list) else change(v)


def put(position: int, value: int) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return first(change)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


IN_FORWARDS: dict[str, dict[str, Any]] = {
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
    "no tables": {"weights": []},
    "no offset to include": {"offsets": lambda v: v[:0], "include_last_offset": True},
    "a negative size": {"row_dims": put(3, -1)},
    "a size past the row": {"row_dims": put(2, D + 1)},
    "a group that is not there": {"row_group": put(2, G)},
    "a group that is not there in a later table": {"row_groups": put(1, -1)},
    "a negative group size": {"group_dims": put(1, -1)},
    "a group size past the row": {"group_dims": put(2, D + 3)},
}

CHANGES: dict[str, dict[str, Any]] = {
    "indices of floats": {"indices": lambda v: v.float()},
    "indices with gaps": {"indices": strided},
    "offsets of floats": {"offsets": lambda v: v.float()},
    "offsets in two dimensions": {"offsets": lambda v: v[None]},
    "a table of doubles": {"weight": lambda v: v.double()},
    "a table of one dimension": {"weight": lambda v: v[0]},
    "a table with gaps": {"weight": strided},
    "a table without columns": {"weight": lambda v: v[:, :0].contiguous()},
    "tables of doubles": {"weights": first(lambda v: v.double())},
    "tables of two types": {"weights": first(lambda v: v.half())},
    "sizes of int64": {"row_dims": first(lambda v: v.long())},
    "too few sizes": {"row_dims": first(lambda v: v[1:])},
    "sizes in two dimensions": {"row_dims": first(lambda v: v[:, None])},
    "fewer sizes than tables": {"row_dims": lambda v: v[1:]},
    "groups of int64": {"row_group": lambda v: v.long()},
    "too few groups": {"row_group": lambda v: v[1:]},
    "group sizes of int64": {"group_dims": first(lambda v: v.long())},
    "group sizes in three dimensions": {"group_dims": first(lambda v: v[:, None, None])},
    "group sizes without columns": {"group_dims": first(lambda v: v[:, None][:, :0].contiguous())},
    "weights of doubles": {"per_sample_weights": lambda v: v.double()},
    "too few weights": {"per_sample_weights": lambda v: v[1:]},
    "weights of a mean": {"mode": 1},
    "an unknown mode": {"mode": 2},
    "blocks of two types": {"blocks": first(lambda v: v.half())},
    "no blocks": {"blocks": [], "tier_ends": []},
    "tier ends that do not fit": {"tier_ends": lambda v: [v[0] + 1, *v[1:]]},
    "too few tier ends": {"tier_ends": lambda v: v[1:]},
    "a block wider than the row": {"embedding_dim": 3},
    "rows without columns": {"embedding_dim": 0},
    "a table of rows without columns": {"embedding_dims": [D, 0]},
    "blocks wider than the rows": {"embedding_dims": [D, 3]},
    "a table without tiers": {"tier_counts": [4, 0]},
    "too few counts of tiers": {"tier_counts": [4]},
    "too few padding rows": {"padding_idx": lambda v: v[1:] if isinstance(v, list) else v},
    "an unknown check": {"bounds_check": 3},
    "a gradient of another type": {"grad": lambda v: v.half()},
    "a gradient too small": {"grad": lambda v: v[1:]},
    "a gradient with gaps": {"grad": strided},
    "an unknown optimizer": {"optimizer": 4},
    "too few hyperparameters": {"hyper": [0.1]},
    "step zero": {"hyper": [0.1, 1e-8, 0.0, 0.9, 0.99, 0.0]},
    "no state": {"state": []},
    "too much state": {"state": lambda v: [*v, v[0], v[0]]},
    "state of another shape": {"state": lambda v: [v[0][1:], *v[1:]]},
    "state with gaps": {"state": lambda v: [strided(v[0]), *v[1:]]},
    "a counter of floats": {"state": lambda v: [*v, torch.ones(1)]},
    "two counters": {"state": lambda v: [*v, torch.ones(2).long()]},
    "rows of int32": {"rows": lambda v: v.int()},
    "gradients of other rows": {"grads": lambda v: v[1:]},
    "gradients of another type": {"grads": lambda v: v.half()},
    "sums of another shape": {"state_sum": lambda v: v[1:]},
    "moments of another shape": {"exp_avg_sq": lambda v: v[1:]},
    "step zero of Adam": {"step": 0},
}


def words(outcome: tuple[str, str]) -> tuple[str, str]:
    """What the tables of a call share, the CPU operators check with the first one, and name it."""
    return outcome[0], outcome[1].removeprefix("table 0: ")


@pytest.mark.parametrize("what", [*IN_FORWARDS, *CHANGES])
def test_refused_in_the_words_of_the_cpu_operators(what: str) -> None:
    changes = (IN_FORWARDS | CHANGES)[what]
    forwards = [op for op in SCHEMAS if "bounds_check" in SCHEMAS[op]]
    refused = []
    for op in forwards if what in IN_FORWARDS else SCHEMAS:
        want = outcome(getattr(torch.ops.amtl, op), op, changes)
        if want[0] != "not applicable":
            assert words(outcome(sim.IMPLEMENTATIONS[op], op, changes)) == words(want), op
            refused.append(want[0] != "accepted")
    assert any(refused), "no operator looks at that"


@pytest.mark.parametrize("op", SCHEMAS)
def test_arguments_that_fit_are_accepted(op: str) -> None:
    """What the refused calls were changed from."""
    assert outcome(sim.IMPLEMENTATIONS[op], op, {}) == ("accepted", "")
