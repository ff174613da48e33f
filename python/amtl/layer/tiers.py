"""Size tiers: rows ordered by falling stored width, one dense block per width.

Tier c holds rows [ends[c-1], ends[c]) in a block [rows, widths[c]], so the row number tells the
tier and no size is stored per row. Here: the plan, the way of a table into tiers and back, and the
same way for the optimizer's state.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amtl.layer.instances import instances_of
from amtl_kernels import empty_table
from amtl_kernels._calls import kind

# State that holds a direction: it must vanish where the weights were cut off, or the first step
# after freezing would move padding by gradients of masked coordinates. Magnitudes are kept.
MOMENTA = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "exp_inf_avg", "prev"})

# A table in frequency order whose first row is padding has one run more than widths; each is a
# parameter of its own.
_FEW_RUNS = 4


@dataclass(frozen=True)
class TierPlan:
    """Where each row of a table goes.

    Attributes:
        widths: of each tier; they fall, but where rows that come in few runs stay where they are.
        ends: first place after each tier; the last is P <= N.
        order: int64 [P], the row that each place holds; None if the first P rows stay where they
            are.
        num_rows: N.
    """

    widths: tuple[int, ...]
    ends: tuple[int, ...]
    order: Tensor | None
    num_rows: int

    def rows(self, tier: int) -> slice | Tensor:
        """Rows of one tier, as an index into the table."""
        start = self.ends[tier - 1] if tier else 0
        if self.order is None:
            return slice(start, self.ends[tier])
        return self.order[start : self.ends[tier]]

    def of_places(self, values: Tensor) -> Tensor:
        """Values [N] of rows as those of places, [P]."""
        return values[: self.ends[-1]] if self.order is None else values[self.order]

    def places(self) -> Tensor | None:
        """Inverse of `order`: the place of each row, int32 [N], or None; 0 for rows without one."""
        if self.order is None:
            return None
        place = torch.zeros(self.num_rows, dtype=torch.int32, device=self.order.device)
        place[self.order] = torch.arange(
            self.order.numel(), dtype=torch.int32, device=self.order.device
        )
        return place


def plan_tiers(
    stored: Tensor, widest: int, merged: Tensor | None = None, within: Tensor | None = None
) -> TierPlan:
    """Order rows by falling stored width, stable within a width. O(N * number of widths).

    Rows that come in few runs of one width stay where they are: a tier a run.

    Args:
        stored: integer [N], stored width of each row, 0..`widest`.
        widest: D.
        merged: bool [N], rows without a place of their own; None for none.
        within: int64 [N] >= 0, by which rows of one width are ordered, falling, as sizes and
            counts do in a table in frequency order; None for as they come.
    """
    total = stored.numel()
    rows = None if merged is None else (~merged).nonzero().flatten()
    if rows is not None:
        stored = stored[rows]
        within = None if within is None else within[rows]
    if stored.numel() == 0:
        return TierPlan((widest,), (0,), None, total)
    widths = stored.unique().flip(0).tolist()
    members = torch.bincount(stored.to(torch.int32), minlength=widest + 1)
    ends = members[widths].cumsum(0).tolist()
    order = None
    key = stored
    if within is not None:
        key = stored.to(torch.int64) * (int(within.max()) + 1) + within
    falling = bool((key[1:] <= key[:-1]).all())
    together = rows is None or int(rows[-1]) < len(rows)
    if together and not falling:
        runs, members = stored.unique_consecutive(return_counts=True)
        pieces = len(key.unique_consecutive())
        if len(runs) <= len(widths) + _FEW_RUNS and pieces <= len(key.unique()) + _FEW_RUNS:
            return TierPlan(tuple(runs.tolist()), tuple(members.cumsum(0).tolist()), None, total)
    if not (together and falling):
        if within is None:
            order = torch.cat([(stored == width).nonzero().flatten() for width in widths])
        else:
            order = key.argsort(descending=True, stable=True)
        if rows is not None:
            order = rows[order]
    return TierPlan(tuple(widths), tuple(ends), order, total)


def split_rows(
    table: Tensor,
    plan: TierPlan,
    row_dims: Tensor | None = None,
    tiers: Sequence[int] | None = None,
) -> list[Tensor]:
    """Cut a dense [N, D] table into contiguous blocks [rows, width].

    Args:
        table: [N, D].
        plan: the tiers.
        row_dims: integer [N], sizes beyond which a block is filled with zeros; None keeps the
            full stored width.
        tiers: which ones; None for all.
    """
    blocks = []
    for tier in range(len(plan.widths)) if tiers is None else tiers:
        rows, width = plan.rows(tier), plan.widths[tier]
        part = table[:, :width]
        count = plan.ends[tier] - (plan.ends[tier - 1] if tier else 0)
        block = empty_table(count, width, dtype=table.dtype, device=table.device)
        if isinstance(rows, slice):
            block.copy_(part[rows])
        else:
            torch.index_select(part, 0, rows, out=block)
        if row_dims is not None and block.numel():
            kept = row_dims[rows]
            least = int(kept.min())
            columns = torch.arange(least, width, device=table.device)
            block[:, least:].masked_fill_(columns >= kept[:, None], 0)
        blocks.append(block)
    return blocks


def merge_rows(blocks: Sequence[Tensor], plan: TierPlan, dim: int) -> Tensor:
    """Inverse of `split_rows`: dense [N, dim], zeros beyond the stored widths."""
    table = empty_table(plan.num_rows, dim, dtype=blocks[0].dtype, device=blocks[0].device).zero_()
    for tier, block in enumerate(blocks):
        table[plan.rows(tier), : block.shape[1]] = block
    return table


def split_vector(vector: Tensor, plan: TierPlan) -> list[Tensor]:
    """Cut a per-row tensor [N, ...] into per-tier tensors."""
    return [vector[plan.rows(tier)].clone() for tier in range(len(plan.widths))]


def merge_vectors(parts: Sequence[Tensor], plan: TierPlan) -> Tensor:
    """Inverse of `split_vector`."""
    vector = parts[0].new_zeros(plan.num_rows, *parts[0].shape[1:])
    for tier, part in enumerate(parts):
        vector[plan.rows(tier)] = part
    return vector


def as_optimizers(
    optimizer: Optimizer | Iterable[Optimizer] | None, parameters: Iterable[nn.Parameter]
) -> list[Optimizer]:
    """One or several optimizers as a list; for None, those of this process that hold parameters.

    Raises:
        TypeError: something else than an optimizer.
    """
    if optimizer is None:
        return optimizers_of(parameters)
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer)
    found: list[Any] = list(cast(Iterable[Any], optimizer)) if several else [optimizer]
    for each in found:
        if not isinstance(each, Optimizer) and not hasattr(each, "param_groups"):
            raise TypeError(
                f"optimizer must be one of torch.optim, or a list of some, got {kind(each)}: "
                "left out, those that hold the tables are found"
            )
    return found


def optimizers_of(parameters: Iterable[nn.Parameter]) -> list[Optimizer]:
    """The living optimizers that hold one of the parameters, O(objects in the process)."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        optimizer
        for optimizer in instances_of(Optimizer)
        if any(
            id(p) in wanted
            for group in getattr(optimizer, "param_groups", ())
            for p in group["params"]
        )
    ]


def _position(group: dict[str, Any], parameter: nn.Parameter) -> int | None:
    for position, other in enumerate(group["params"]):
        if other is parameter:
            return position
    return None


def _holders(
    optimizers: list[Optimizer], parameter: nn.Parameter
) -> list[tuple[Optimizer, dict[str, Any], int]]:
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            position = _position(group, parameter)
            if position is not None:
                found.append((optimizer, group, position))
    return found


def holding(
    optimizers: list[Optimizer], parameters: Sequence[nn.Parameter]
) -> list[tuple[Optimizer, dict[str, Any], nn.Parameter]]:
    """The first group of each optimizer that holds one of these, and the first that it holds.

    It may hold some only: a tier of no numbers is left out of what divides by the size of one.
    """
    found = []
    for optimizer in optimizers:
        held = [(group, p) for group in optimizer.param_groups for p in parameters]
        first = next((pair for pair in held if _position(*pair) is not None), None)
        if first is not None:
            found.append((optimizer, *first))
    return found


def _replace(group: dict[str, Any], old: nn.Parameter, parameters: Sequence[nn.Parameter]) -> None:
    """Put parameters in the place of one."""
    position = _position(group, old)
    if position is None:
        # Done: trainers wrap an optimizer in another one that has the same list of parameters.
        return
    group["params"][position : position + 1] = parameters
    names = group.get("param_names")
    if names is not None:
        names[position : position + 1] = [
            f"{names[position]}.{i}" if len(parameters) > 1 else names[position]
            for i in range(len(parameters))
        ]


def require_held(
    optimizers: list[Optimizer], parameters: Sequence[nn.Parameter], action: str
) -> None:
    """Raise unless trainable parameters are in one of the optimizers, if there are any."""
    for parameter in parameters:
        if optimizers and parameter.requires_grad and not _holders(optimizers, parameter):
            raise ValueError(
                f"{action}: the table is trainable but not in the optimizer that was given. Pass "
                "the optimizer that holds it, or a list of all optimizers."
            )


def _dense_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter, taken out; momentum of sparse gradients is sparse itself."""
    state = optimizer.state.pop(parameter, None) or {}
    return {
        key: value.to_dense() if isinstance(value, Tensor) and value.is_sparse else value
        for key, value in state.items()
    }


def freeze_optimizers(
    optimizers: list[Optimizer],
    weight: nn.Parameter,
    blocks: Sequence[nn.Parameter],
    plan: TierPlan,
    row_dims: Tensor,
) -> None:
    """Put the blocks in the place of the table, and its state cut alike.

    State of shape [N, D] is split into tiers, of shape [N] or [N, 1] permuted, of shape [1, D]
    (Adafactor's of columns) cut to each width, numbers are copied to every block. Momenta are cut
    to each row's size, second moments keep the stored width. State of which it is not known how to
    cut it (projections, columns of other shapes) stays where rows do, and else begins anew.
    Blocks of codes have no state of a number each: it would be larger than they are.
    """
    stays = _stays(weight, blocks, plan)
    for optimizer, group, _ in _holders(optimizers, weight):
        _replace(group, weight, blocks)
        state = _dense_state(optimizer, weight)
        if not state or (not stays and _starts_anew(optimizer, [state], [weight])):
            continue
        per_block: list[dict[str, Any]] = [{} for _ in blocks]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                if blocks[0].dtype == torch.uint8:
                    continue
                parts = split_rows(value, plan, row_dims if key in MOMENTA else None)
            elif isinstance(value, Tensor) and value.ndim and len(value) == len(weight):
                parts = split_vector(value, plan)
            elif _is_of_columns(value, weight):
                parts = [value[:, : block.shape[1]].clone() for block in blocks]
            else:
                parts = [copy.deepcopy(value) for _ in blocks]
            for target, part in zip(per_block, parts, strict=True):
                target[key] = part
        for block, target in zip(blocks, per_block, strict=True):
            optimizer.state[block] = target


def thaw_optimizers(
    optimizers: list[Optimizer],
    weight: nn.Parameter,
    blocks: Sequence[nn.Parameter],
    plan: TierPlan,
) -> None:
    """Inverse of `freeze_optimizers`; blocks that have no state yet count as zeros."""
    stays = _stays(weight, blocks, plan)
    for optimizer, group, first in holding(optimizers, blocks):
        states = [_dense_state(optimizer, block) for block in blocks]
        _replace(group, first, [weight])
        drop_parameters([optimizer], blocks)
        if not stays and _starts_anew(optimizer, states, blocks):
            continue
        keys = {key: None for state in states for key in state}
        merged: dict[str, Any] = {}
        for key in keys:
            sample = next(state[key] for state in states if key in state)
            if stays or _is_number(sample, blocks[0]):
                numbers = [state[key] for state in states if key in state]
                plain = all(isinstance(n, Tensor | int | float) for n in numbers)
                merged[key] = max(numbers) if plain else sample
                continue
            pairs = [(s, b) for s, b in zip(states, blocks, strict=True) if key in s]
            of_columns = all(_is_of_columns(state[key], block) for state, block in pairs)
            if of_columns and len(blocks) < len(weight):
                # Means over rows, of which those that keep less have zeros.
                merged[key] = sample.new_zeros(1, weight.shape[1])
                for state, block in pairs:
                    merged[key][:, : block.shape[1]] += state[key] * (len(block) / len(weight))
                continue
            full = sample.ndim == 2 and all(
                key not in s or s[key].shape == b.shape for s, b in zip(states, blocks, strict=True)
            )
            parts = [
                state.get(key, sample.new_zeros(b.shape if full else (len(b), *sample.shape[1:])))
                for state, b in zip(states, blocks, strict=True)
            ]
            merged[key] = (
                merge_rows(parts, plan, weight.shape[1]) if full else merge_vectors(parts, plan)
            )
        if merged:
            optimizer.state[weight] = merged


def unite_parameters(
    optimizers: list[Optimizer], weight: nn.Parameter, parts: Sequence[nn.Parameter]
) -> None:
    """Put a table [N, D] in the place of tables [N_t, D], with their states one below the other.

    Raises:
        ValueError: an optimizer holds some of the tables, or in several groups.
    """
    for optimizer in optimizers:
        held = [_holders([optimizer], part) for part in parts]
        if not any(held):
            continue
        groups = {id(group) for found in held for _, group, _ in found}
        if not all(held) or len(groups) > 1:
            raise ValueError(
                "tables of one collection must be in one group of their optimizer, all of them"
            )
    plan = TierPlan(
        tuple(part.shape[1] for part in parts),
        tuple(sum(len(p) for p in parts[: t + 1]) for t in range(len(parts))),
        None,
        len(weight),
    )
    for optimizer in optimizers:
        for _, group, position in _holders([optimizer], parts[0]):
            states = {part: optimizer.state.pop(part, None) for part in parts[1:]}
            for part in parts[1:]:
                _remove(group, _require_position(group, part))
            position = _require_position(group, parts[0])
            group["params"][position : position + 1] = parts
            if group.get("param_names") is not None:
                name = group["param_names"][position]
                group["param_names"][position : position + 1] = [name] * len(parts)
            for part, state in states.items():
                if state is not None:
                    optimizer.state[part] = state
    thaw_optimizers(optimizers, weight, parts, plan)


def _require_position(group: dict[str, Any], parameter: nn.Parameter) -> int:
    position = _position(group, parameter)
    assert position is not None
    return position


def hand_over(old: Sequence[nn.Parameter], new: Sequence[nn.Parameter], name: str) -> None:
    """Give parameters the attributes that were set on those before, and warn of hooks on these.

    Args:
        old: of a table, all the same in this.
        new: what takes their place.
        name: of the table.
    """
    for parameter in new:
        vars(parameter).update(vars(old[0]))
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in old):
        warnings.warn(
            f"table {name!r} has other parameters now, of other shapes, and hooks on those before "
            "are called no more: hook what the layer gives, or layer.table_parameters() from now "
            "on",
            stacklevel=3,
        )


def replace_parameters(
    optimizers: list[Optimizer], old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
) -> None:
    """Put parameters in the place of others, with state where it has the shapes of the new ones.

    A checkpoint's optimizer may be loaded before its model; and PyTorch's loading of a model
    leaves optimizers as they are.
    """
    for optimizer, group, first in holding(optimizers, old):
        states = [optimizer.state.get(parameter) or {} for parameter in old]
        _replace(group, first, new)
        optimizer.state.pop(first, None)
        drop_parameters([optimizer], old)
        _begin_state(optimizer, group, new)
        if len(old) == len(new) and all(map(_fits, states, new)):
            optimizer.state.update((p, s) for p, s in zip(new, states, strict=True) if s)
        elif not all(map(_fits, states, old)):
            warnings.warn(
                f"{type(optimizer).__name__} holds a state of other tables than it had: it was "
                "loaded before the model and is lost; load the optimizer's state after the model's",
                stacklevel=2,
            )


def _stays(weight: Tensor, blocks: Sequence[Tensor], plan: TierPlan) -> bool:
    """Whether all rows keep their places and their width."""
    return len(blocks) == 1 and blocks[0].shape == weight.shape and plan.order is None


def _starts_anew(
    optimizer: Optimizer, states: Sequence[Mapping[str, Any]], tables: Sequence[Tensor]
) -> bool:
    """Whether some of the states cannot follow their tables, which is warned of."""
    if all(map(_fits, states, tables)):
        return False
    warnings.warn(
        f"{type(optimizer).__name__} keeps a state that cannot follow a table whose rows move or "
        "change their widths: it begins anew for this table. Freeze before the optimizer is made, "
        "or take bits=8, where rows stay as they are",
        stacklevel=4,
    )
    return True


def _is_of_columns(value: object, table: Tensor) -> bool:
    """Whether a state has one number for each column of a table."""
    return isinstance(value, Tensor) and value.shape == (1, *table.shape[1:])


def _fits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether an optimizer's state may be that of a parameter: a number a number, row or column."""
    rows = parameter.shape[:1]
    return all(
        value.shape in (parameter.shape, rows, (*rows, 1), (1, *parameter.shape[1:]))
        for value in _tensors_in(list(state.values()))
        if not _is_number(value, parameter)
    )


def _is_number(value: object, table: Tensor) -> bool:
    """Whether it says nothing of single rows or columns: a count of steps, by whatever shape."""
    if not isinstance(value, Tensor) or not value.ndim:
        return True
    return value.shape == (1,) and len(table) != 1


def _tensors_in(value: object) -> list[Tensor]:
    """Those of a state, also in lists, tuples and dictionaries of it."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, list | tuple | Mapping):
        return []
    return [tensor for part in inner for tensor in _tensors_in(part)]  # type: ignore[attr-defined]


def _begin_state(
    optimizer: Optimizer, group: dict[str, Any], parameters: Iterable[nn.Parameter]
) -> None:
    """What Adagrad makes when it is constructed and its steps rely on; others wait."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return
    for parameter in parameters:
        device = parameter.device if group.get("fused") else None
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "sum": torch.full_like(
                parameter, group["initial_accumulator_value"], requires_grad=False
            ),
        }


class Weakly:
    """Something, while it lives; copies and files of what holds this are without it."""

    def __init__(self, thing: Any = None) -> None:
        self._reference = None if thing is None else weakref.ref(thing)

    def __call__(self) -> Any:
        """The thing, or None."""
        return None if self._reference is None else self._reference()

    def __reduce__(self) -> tuple[type[Weakly], tuple[()]]:
        return Weakly, ()


class Place(NamedTuple):
    """Where a parameter was.

    Attributes:
        parameter, number, group: numbers; that of the optimizer among those that were given, -1 if
            they were looked for, in no order.
        optimizer: the optimizer itself.
        position: in the group, when the parameters before were gone.
        name: what the optimizer called it, if it has names.
    """

    parameter: int
    number: int
    optimizer: Weakly
    group: int
    position: int
    name: str | None


def drop_parameters(
    optimizers: list[Optimizer], parameters: Sequence[nn.Parameter], told: bool = False
) -> list[Place]:
    """Take parameters and their state out; returns where they were.

    Groups stay, empty if need be, so that schedulers keep their count. `told`: the optimizers were
    given, not looked for.
    """
    places = []
    for number, optimizer in enumerate(optimizers):
        known = number if told or len(optimizers) == 1 else -1
        for group_number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(parameters):
                position = _position(group, parameter)
                if position is not None:
                    name = _remove(group, position)
                    optimizer.state.pop(parameter, None)
                    where = (known, Weakly(optimizer), group_number, position)
                    places.append(Place(index, *where, name))
    return places


def _remove(group: dict[str, Any], position: int) -> str | None:
    del group["params"][position]
    names: list[str] | None = group.get("param_names")
    return None if names is None else names.pop(position)


def restore_parameters(
    optimizers: list[Optimizer],
    parameters: Sequence[nn.Parameter],
    places: Sequence[Place],
    neighbour: nn.Parameter,
    told: bool = False,
    behind: Set[int] | None = None,
) -> None:
    """Inverse of `drop_parameters`, without state; where nothing was dropped, beside `neighbour`.

    The order within a group matters: by it, and by nothing else, optimizers load their state.

    Args:
        optimizers: as given to `drop_parameters`, which may have others in the place of those.
        parameters: as given to `drop_parameters`.
        places: what it returned.
        neighbour: a parameter whose group takes them otherwise.
        told: the optimizers were given: no other one is meant.
        behind: ids of what a model that names them first (`amtl.layer.names`) has before them; None
            where it names them after the neighbour.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [i for i, parameter in enumerate(parameters) if id(parameter) not in held]
    placed = set()
    for place in reversed(places):
        optimizer = place.optimizer()
        if told and not any(optimizer is given for given in optimizers):
            optimizer = None
        if optimizer is None and place.number in range(len(optimizers)):
            optimizer = optimizers[place.number]
        if optimizer is None or place.parameter not in missing:
            continue
        if place.group < len(optimizer.param_groups):
            group = optimizer.param_groups[place.group]
            _insert(optimizer, group, place.position, parameters[place.parameter], place.name)
            placed.add(place.parameter)
    # Of several that hold the table, a fused optimizer comes last.
    for optimizer, group, position in _holders(optimizers, neighbour)[:1]:
        start = position + 1
        if behind is not None:
            start = sum(id(parameter) in behind for parameter in group["params"])
        for index in reversed(missing):
            if index not in placed:
                _insert(optimizer, group, start, parameters[index], None)


def _insert(
    optimizer: Optimizer,
    group: dict[str, Any],
    position: int,
    parameter: nn.Parameter,
    name: str | None,
) -> None:
    group["params"].insert(position, parameter)
    if group.get("param_names") is not None:
        group["param_names"].insert(position, name or f"mask.{len(group['params'])}")
    _begin_state(optimizer, group, [parameter])
