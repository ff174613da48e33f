"""Several tables in one call as the host simulator runs them, as in `simulated.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .simulated import (
    NAMES,
    RULES,
    answer_report,
    array,
    lookups,
    poisoned,
    psw_gradient,
    tensor_of,
    tools,
    update,
)


def _dense_list(
    weights: list[Tensor], sizes: list[dict[str, Any]], padding: list[int]
) -> list[dict[str, Any]]:
    """Dense tables as the tool module takes a list of tables."""
    tables = []
    for weight, described, row in zip(weights, sizes, padding, strict=True):
        rows, dim = weight.shape
        block = {"weight": array(weight), "rows": rows, "width": dim, **described}
        tables.append({"dim": dim, "padding": row, "blocks": [block]})
    return tables


def _groups(row_groups: list[Tensor], group_dims: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "row_group": array(groups),
            "group_dims": array(sizes),
            "groups": sizes.shape[0],
            "columns": sizes.shape[1] if sizes.dim() == 2 else 1,
        }
        for groups, sizes in zip(row_groups, group_dims, strict=True)
    ]


class Tables:
    """A call of several tables, from the operators' leading arguments."""

    def __init__(self, form: str, described: list[Any], bags: list[Any], seed: int = 0) -> None:
        self.indices, self.offsets, self.weights, mode, padding = bags
        self.blocks = described[0]
        self.dtype = self.blocks[0].dtype
        if form == "tiered":
            _, counts, ends, dims = described
            every = iter(zip(self.blocks, ends, strict=True))
            tables = []
            for count, dim, row in zip(counts, dims, padding, strict=True):
                mine = [next(every) for _ in range(count)]
                blocks = [
                    {"weight": array(b), "rows": b.shape[0], "width": b.shape[1]} for b, _ in mine
                ]
                tables.append({"dim": dim, "padding": row, "blocks": blocks})
        elif form == "masked":
            sizes = [{"row_dims": array(dims)} for dims in described[1]]
            tables = _dense_list(self.blocks, sizes, padding)
        else:
            tables = _dense_list(self.blocks, _groups(*described[1:3]), padding)
        self.batch = (self.offsets.numel() - 1) // len(tables)
        self.dims = [table["dim"] for table in tables]
        self.rows = [sum(block["rows"] for block in table["blocks"]) for table in tables]
        self.groups = [table["blocks"][0].get("groups", 0) for table in tables]
        self.table = {
            "list": tables,
            "dense": form != "tiered",
            "batch": self.batch,
            "seed": seed,
        }
        self.call = lookups(
            self.indices, self.offsets, self.weights, mode, include_last_offset=True
        )

    def forward(self, bounds_check: int) -> Tensor:
        out = poisoned(self.batch, sum(self.dims), dtype=self.dtype)
        report = np.full(3, -1, dtype=np.int64)
        if bounds_check:
            self.call["report"] = report
        tools.lookup(NAMES[self.dtype], self.table, self.call, array(out))
        position = max(int(report[0]), int(report[2]))
        if position >= 0 and report[1] < 0:
            starts = self.offsets[:: self.batch]
            t = int(torch.searchsorted(starts, position, right=True)) - 1
            mine = {"indices": self.call["indices"][int(starts[t]) :]}
            report[report >= 0] -= int(starts[t])
            try:
                answer_report(mine, report, self.rows[t], bounds_check)
            except (IndexError, ValueError) as error:
                raise type(error)(f"table {t}: {error}") from None
        answer_report(self.call, np.where([False, True, False], report, -1), 0, bounds_check)
        return out

    def psw(self, grad: Tensor, asked: bool) -> Tensor:
        return psw_gradient(self.table, self.call, grad, self.dtype, asked)

    def masks(self, asked: bool) -> tuple[dict[str, Any], Tensor]:
        """What to ask for, and where it is written: ``[all groups, widest]``."""
        total = sum(self.groups) if asked else 0
        out = poisoned(total, max(self.dims), dtype=torch.float32)
        return ({"group_grad": array(out)} if asked else {}), out

    def flat(self, masks: Tensor) -> Tensor:
        if not masks.numel():
            return masks.flatten()
        parts = masks.split(self.groups)
        return torch.cat([p[:, :d].flatten() for p, d in zip(parts, self.dims, strict=True)])

    def backward(self, grad: Tensor, weight_grad: bool, mask_grad: bool) -> tuple[Any, ...]:
        rows = [torch.empty(0, dtype=torch.int64) for _ in self.blocks]
        grads = [torch.empty(0, block.shape[1], dtype=self.dtype) for block in self.blocks]
        wishes, masks = self.masks(mask_grad)
        if weight_grad or mask_grad:
            found = tools.backward(NAMES[self.dtype], self.table, self.call, array(grad), wishes)
            if weight_grad and "rows" in found:
                rows = [tensor_of(values, torch.int64) for values in found["rows"]]
                grads = [tensor_of(values, self.dtype) for values in found["grads"]]
        return rows, grads, self.flat(masks)

    def update(
        self,
        grad: Tensor,
        state: list[Tensor],
        mask_grad: bool,
        optimizer: int,
        hyper: list[float],
    ) -> Tensor:
        blocks = [block for table in self.table["list"] for block in table["blocks"]]
        moments = (0, 1, 1, 2)[optimizer]
        for i, block in enumerate(blocks):
            mine = state[i * moments : (i + 1) * moments]
            block |= {n: array(s) for n, s in zip(("first", "second"), mine, strict=False)}
        lr, eps, weight_decay, beta1, beta2, step, *stochastic = hyper
        counter = state[len(blocks) * moments :]
        values = update(
            RULES[optimizer],
            int(step),
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            stochastic_rounding=any(stochastic),
            **({"counter": array(counter[0].reshape(1))} if counter else {}),
        )
        wishes, masks = self.masks(mask_grad)
        tools.backward_update(NAMES[self.dtype], self.table, self.call, array(grad), values, wishes)
        return self.flat(masks)


def _several(form: str, described: int) -> dict[str, Any]:
    """The three operators of a form whose tables are described by so many arguments."""
    learns = form == "adaptive"

    def bags_of(arguments: Any) -> tuple[Tables, list[Any]]:
        first = described + int(learns and isinstance(arguments[described], list))
        seed = arguments[first + 5] if learns else 0
        call = Tables(form, list(arguments[:described]), list(arguments[first : first + 5]), seed)
        return call, list(arguments[first + 5 + int(learns) :])

    def forward(*arguments: Any) -> Tensor:
        call, (bounds_check,) = bags_of(arguments)
        return call.forward(bounds_check)

    def backward(grad: Tensor, *arguments: Any) -> tuple[Any, ...]:
        call, (weight_grad, *mask_grad, psw_grad) = bags_of(arguments)
        rows, grads, masks = call.backward(grad, weight_grad, any(mask_grad))
        psw = call.psw(grad, psw_grad)
        return (rows, grads, masks, psw) if learns else (rows, grads, psw)

    def update_(*arguments: Any) -> Any:
        tables, (state, grad, *rest) = arguments[:described], arguments[described:]
        call, (*mask_grad, psw_grad, optimizer, hyper) = bags_of((*tables, *rest))
        psw = call.psw(grad, psw_grad)
        masks = call.update(grad, state, any(mask_grad), optimizer, hyper)
        return (masks, psw) if learns else psw

    op = f"{form}_embedding_bag_tables"
    return {op: forward, f"{op}_backward": backward, f"{op}_update_": update_}


IMPLEMENTATIONS = _several("masked", 2) | _several("adaptive", 3) | _several("tiered", 4)
"""Operator name to the simulated operator."""
