"""How a table enters its two phases, and its state dict, which leads into either."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from amtl.layer.basis import multiply, principal_basis, turn_states
from amtl.layer.frequency import check_counts, decode_row_map, encode_row_map
from amtl.layer.growing import Growth
from amtl.layer.instances import looked_for_once
from amtl.layer.lookups import TableLookups
from amtl.layer.replicas import retire, wrappers_of
from amtl.layer.rounding import Parts, Rounding, cut, mean_squares, numbers_in, step_of
from amtl.layer.sharing import version_of
from amtl.layer.tiers import (
    drop_parameters,
    hand_over,
    optimizers_of,
    replace_parameters,
    restore_parameters,
    split_rows,
)

_Self = TypeVar("_Self", bound="TableStates")


class _OfPlainState(str):
    """A key that is missing, which says why where it is made part of an error.

    Nobody tells a module whether its state is loaded strictly.
    """

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (the state is that of a plain nn.Embedding: load it before amtl.convert, "
            "into what amtl.revert(model) makes, or with strict=False, which fills the table and "
            "leaves sizes and phase as they are)"
        )


class TableStates(TableLookups):
    """Phases and state of `AMTLTable`."""

    def _enter_frozen(
        self, blocks: list[nn.Parameter], ends: tuple[int, ...], row_order: Tensor | None
    ) -> None:
        if self.head is not None:
            self.head.hold()
        self._parameters["weight"] = None
        self.row_group = None
        self.blocks = nn.ParameterList(blocks)
        self.tier_ends = ends
        self.row_order = row_order
        self._order_seen = version_of(row_order)
        self._kept = self._still = None
        self._moved = False
        self._tier_padding = None
        if row_order is not None and self.padding_idx is not None:
            self._tier_padding = int(row_order[self.padding_idx])

    def _enter_search(self, weight: nn.Parameter, row_group: Tensor) -> None:
        if self.head is not None:
            self.head.release()
        self._parameters["weight"] = weight
        self.row_group = row_group
        self.row_map = None
        self.row_order = None
        self.rounding = None
        self.steps = None
        self._tier_padding = None
        self.blocks = nn.ParameterList()
        self.tier_ends = None
        self._redirection = None
        self._kept = self._still = None
        self._moved = False

    def absorb_order(self) -> Tensor:
        """Hand the row order over: from now on the layer expects new row numbers.

        Rows of size 0 have the new number of their shared row, so the layer has fewer rows from
        now on: `num_embeddings` is the number of rows that it stores.

        Returns:
            int32 [N]: old row -> new row, the identity if rows kept their order. Rows of several
            fields interleave. Renumber the vocabulary with it.

        Raises:
            RuntimeError: the layer is not frozen, or a collection.
        """
        if self._keeps_numbering:
            raise RuntimeError(
                "a collection keeps the row numbers of its tables, whose tiers interleave"
            )
        if self.tier_ends is None:
            raise RuntimeError("absorb_order() needs a frozen layer; call freeze() first")
        rows = torch.arange(self.num_embeddings, dtype=torch.int32, device=self.device)
        order = self._frozen_rows(rows).to(torch.int32)
        if self.row_map is not None:
            groups = decode_row_map(self.row_map, self.num_embeddings)
            self.row_map = encode_row_map(groups[self._own_rows()])
        self.padding_idx = self._frozen_padding()
        if self.shared_rows is not None:
            self.shared_rows = order[self.shared_rows].to(torch.int64)
        self.num_embeddings = self.tier_ends[-1]
        self.row_order = None
        self._tier_padding = None
        return order

    def row_squares(self) -> Tensor | None:
        """Mean square of the numbers that each row is rounded with, float32 [N]; None without bits.

        Step sizes follow from it, see `round_by`. Of a layer that is frozen.
        """
        bits = self.options.bits
        if bits is None or self.tier_ends is None:
            return None
        if self.rounding is not None:
            squares, ends = self.rounding.mean_square, self.rounding.ends
        else:
            assert self.steps is not None
            one = step_of(torch.ones((), device=self.device), bits)
            squares = (self.steps.float() / one).square()
            ends = torch.tensor(self.tier_ends, device=self.device)
        return torch.cat([squares, squares.new_zeros(1)])[self._parts_of_rows(ends)]

    def _parts_of_rows(self, ends: Tensor) -> Tensor:
        """The part that each row is in, int64 [N]; rows that keep no numbers are behind all."""
        rows = torch.arange(self.num_embeddings, device=self.device)
        return torch.bucketize(self._frozen_rows(rows).long(), ends, right=True)

    @torch.no_grad()
    def round_by(self, squares: Tensor) -> None:
        """Take step sizes for the mean squares of rows, their mean by counts in each part.

        Freezing finds step sizes that fit the numbers, each row as much as another; those of
        training fit what is looked up. A table that is frozen anew goes on from these.

        Args:
            squares: float32 [N], of `row_squares()`; 0 of a row that nothing is known of.
        """
        if self.rounding is None or self.steps is not None or self.row_map is None:
            return
        own = self.rounding.mean_square
        groups = decode_row_map(self.row_map, self.num_embeddings)
        part = self._parts_of_rows(self.rounding.ends)
        known = (squares > 0) & (part < len(own))
        # So exact that the mean of equal ones is the same number.
        weight = self._head().group_counts[groups[known]].double() + 1
        total = torch.zeros_like(own, dtype=torch.float64).index_add_(0, part[known], weight)
        found = torch.zeros_like(total).index_add_(0, part[known], weight * squares[known])
        own.copy_(torch.where(total > 0, found / total, own.double()))

    def to_principal_basis(
        self: _Self, optimizer: Optimizer | Iterable[Optimizer] | None = None
    ) -> _Self:
        """Hold rows in the principal components of the table; lookups without masks stay equal.

        For trained tables whose rows are to be cut off: see `amtl.layer.basis`. `weight` is
        overwritten, and holds rows as they are stored from now on; lookups multiply what they find
        by `basis` [D, D], which is a buffer. Sizes stay, and so does what was learned of them.
        O(N * D^2).

        Args:
            optimizer: as in `freeze`; momenta and sums of squares are turned along.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is frozen, has a basis, or is a collection.
            ValueError: numbers are not finite, or the layer has a `max_norm`.
        """
        self._turn(*self._components(), optimizer)
        return self

    @torch.no_grad()
    def _components(self) -> tuple[Tensor, Tensor]:
        """The basis that the table is to have, and its inverse."""
        if self.tier_ends is not None or self.weight is None or self.row_group is None:
            raise RuntimeError("rows that are cut off have no components: before freeze()")
        if self.basis is not None or self._keeps_numbering:
            what = "is a collection" if self._keeps_numbering else "has a basis already"
            raise RuntimeError(f"table {self.name!r} {what}")
        if self.max_norm is not None:
            raise ValueError(f"table {self.name!r} has max_norm, which scales rows as given")
        counts = self._head().group_counts[self.row_group.long()]
        counts[self._padding_rows()] = 0
        try:
            return principal_basis(self.weight, counts)
        except ValueError as error:
            raise ValueError(f"table {self.name!r}: {error}") from error

    @torch.no_grad()
    def _turn(
        self,
        basis: Tensor,
        inverse: Tensor,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ) -> None:
        weight = self.weight
        assert weight is not None
        multiply(weight, inverse)
        turn_states(self._followed(optimizer, [weight]), weight, basis.T)
        self.basis = basis.to(self.dtype)

    def _read_counts(self, counts: object) -> tuple[Tensor, Growth]:
        """Counts of all rows, those of each field one below the other, and how many are new.

        Args:
            counts: see `thaw`.

        Raises:
            ValueError: other shapes, or more than there are rows and not by field.
        """
        fields, rows = self.field_sizes, self.num_embeddings
        several = self._keeps_numbering or len(fields) > 1
        by_field = self._by_field(counts) if several else None
        if by_field is not None:
            if len(by_field) != len(fields) or sum(fields) != rows:
                raise ValueError(
                    f"table {self.name!r} has {len(fields)} fields of {sum(fields):,} rows, of "
                    f"which {rows:,} are stored: counts of {len(by_field)} fields do not fit it"
                )
            each = [check_counts(c, n, grows=True) for c, n in zip(by_field, fields, strict=True)]
            after = [len(c) for c in each]
            return torch.cat(each).to(self.device), Growth.between(fields, after)
        checked = check_counts(counts, rows, grows=True).to(self.device)
        if several and len(checked) > rows:
            raise ValueError(
                f"counts name {len(checked):,} rows, and the table {self.name!r} of {rows:,} holds "
                f"{len(fields)} fields: give the counts of each, {self._example_of_counts()}"
            )
        if self._keeps_numbering:
            return checked, Growth.between(fields, fields)
        return checked, Growth.between([rows], [len(checked)])

    def _by_field(self, counts: object) -> list[Any] | None:
        """Counts that are given for each field; None if they are those of all rows."""
        if not isinstance(counts, list | tuple):
            return None
        several = (isinstance(c, Mapping | Sequence) or getattr(c, "ndim", 0) == 1 for c in counts)
        return list(counts) if any(several) else None

    def _example_of_counts(self) -> str:
        return "[counts_of_the_first, counts_of_the_second, ...]"

    def _take_rows(self, growth: Growth) -> Callable[[], None]:
        """Have the rows of a growth, as counts and sizes go; calling what it returns undoes that.

        Where rows of several fields were taken as one field's, it is one from now on.
        """
        rows = ("num_embeddings", "full_rows", "field_sizes", "shared_rows")
        paddings = ("padding_idx", "other_paddings", "full_padding")
        before = {name: getattr(self, name) for name in (*rows, *paddings)}
        if len(growth.rows) != len(self.field_sizes):
            self.shared_rows = None
        self.num_embeddings += growth.num_new
        self.full_rows += growth.num_new
        self.field_sizes = growth.after
        if len(growth.rows) > 1:
            numbers = growth.numbers()
            if self.padding_idx is not None:
                self.padding_idx = self.full_padding = int(numbers[self.padding_idx])
                self.other_paddings = tuple(numbers[list(self.other_paddings)].tolist())
            if self.shared_rows is not None:
                self.shared_rows = numbers.to(self.device)[self.shared_rows]
        self._number_fields()

        def undo() -> None:
            for name, value in before.items():
                setattr(self, name, value)
            self._number_fields()

        return undo

    def _number_fields(self) -> None:
        """What a subclass keeps of where fields begin."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.row_group is not None:
            destination[prefix + "row_map"] = encode_row_map(self.row_group)
        if self.tier_ends is not None:
            destination[prefix + "tier_ends"] = torch.tensor(self.tier_ends)
        destination[prefix + "schedule"] = self.schedule

    @property
    def schedule(self) -> Tensor:
        """What a state dict holds of the layer beside its tensors, float64.

        An attribute because `torch.distributed.checkpoint` looks each key up as one.
        """
        # absorb_order() moves the padding row and leaves fewer rows, so they are part of the state.
        padding = -1 if self.padding_idx is None else self.padding_idx
        schedule = [
            self.options.budget or 0,
            self.progress,
            padding,
            self.full_rows,
            self.num_embeddings,
        ]
        schedule.append(self.options.bits or 0)
        if self.rounding is not None:
            schedule.append(self.rounding.turn)
            if self.masterless:
                schedule.append(self.rounding.changes)
        return torch.tensor(schedule, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = ("schedule", "row_map", "tier_ends")
        if prefix + "weight" in state_dict and not any(prefix + key in state_dict for key in own):
            missing_keys.append(_OfPlainState(f"{prefix}{own[1 if self.tier_ends is None else 2]}"))
            self._complete(state_dict, prefix, error_msgs)
        schedule = state_dict.pop(prefix + "schedule", None)
        basis = state_dict.get(prefix + "basis")
        if schedule is not None and (basis is None or self.basis is None):
            self.basis = None if basis is None else torch.empty_like(basis, device=self.device)
        fits = False
        if schedule is not None:
            self.update_schedule(float(schedule[1]))
            if schedule[0] > 0:
                self.options = replace(self.options, budget=float(schedule[0]))
            if self.padding_idx is not None and schedule[2] >= 0:
                self.padding_idx = int(schedule[2])
            fits = len(schedule) < 4 or int(schedule[3]) == self.full_rows
            if fits:
                self.num_embeddings = int(schedule[4]) if len(schedule) > 4 else self.full_rows
        shared = state_dict.setdefault(prefix + "shared_rows", self.shared_rows)
        if shared is None:
            del state_dict[prefix + "shared_rows"]
        elif self.shared_rows is None:
            self.shared_rows = torch.empty_like(shared, device=self.device)
        ends = state_dict.pop(prefix + "tier_ends", None)
        row_map = state_dict.get(prefix + "row_map")
        if ends is not None:
            search = f"{prefix}head."
            if self.head is not None and not any(key.startswith(search) for key in state_dict):
                # A packed file has nothing of the search: the layer keeps its own.
                state_dict.update(self.head.state_dict(prefix=search))
            bits = int(schedule[5]) if schedule is not None and len(schedule) > 5 else None
            with looked_for_once(error_msgs):
                self._adopt_tiers(state_dict, prefix, tuple(ends.tolist()), fits, bits, error_msgs)
            if self.rounding is not None and schedule is not None and len(schedule) > 6:
                self.rounding.turn = int(schedule[6])
                self.rounding.changes = int(schedule[7]) if len(schedule) > 7 else 0
            self.row_map = None if row_map is None else torch.empty_like(row_map).to(self.device)
        elif prefix + "weight" in state_dict and self.head is None:
            error_msgs.append(
                f"{prefix}weight: the state is of the search, for which a layer from a packed file "
                "has no size head: thaw(counts=...) makes one"
            )
            return
        elif prefix + "weight" in state_dict:
            loaded = state_dict[prefix + "weight"]
            same = tuple(loaded.shape) == (self.num_embeddings, self.embedding_dim)
            present = self._parameters["weight"]
            if same and (present is None or present.shape != loaded.shape):
                with looked_for_once(error_msgs):
                    self._adopt_weight(self.row_map if row_map is None else row_map)
            state_dict.pop(prefix + "row_map", None)
            if row_map is not None:
                self.row_group = decode_row_map(row_map, self.num_embeddings).to(self.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.tier_ends is not None and self.row_order is not None:
            self._enter_frozen(list(self.blocks), self.tier_ends, self.row_order)

    def _complete(self, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Make a state of this layer, in its phase, of one with nothing but a dense weight."""
        loaded = state_dict[prefix + "weight"]
        shape = (self.num_embeddings, self.embedding_dim)
        if tuple(loaded.shape) != shape:
            if self.tier_ends is not None:
                del state_dict[prefix + "weight"]
                errors.append(
                    f"size mismatch for {prefix}weight: the state has {list(loaded.shape)}, the "
                    f"table {list(shape)}"
                )
            return
        if self.steps is not None:
            del state_dict[prefix + "weight"]
            errors.append(
                f"{prefix}weight: the state is that of a plain nn.Embedding, and the table holds "
                "codes only, which numbers cannot be loaded into: load it before freeze()"
            )
        if self.basis is not None:
            loaded = loaded.detach().to(self.device, torch.float64)
            loaded = (loaded @ self.basis.double().inverse()).to(self.dtype)
            state_dict[prefix + "weight"] = loaded
        state = self.state_dict(prefix=prefix)
        if self.tier_ends is not None and self.steps is None:
            del state_dict[prefix + "weight"]
            plan = self._plan()
            loaded = loaded.detach().to(self.device, self.dtype)
            blocks = split_rows(loaded, plan)
            state.update({f"{prefix}blocks.{c}": block for c, block in enumerate(blocks)})
            if any(
                bool(loaded[plan.rows(tier)][:, width:].any())
                for tier, width in enumerate(plan.widths)
            ):
                warnings.warn(
                    f"table {self.name!r} is frozen, and a plain nn.Embedding was loaded into it: "
                    "numbers beyond the width of their rows are left out. thaw() the layer first, "
                    "or load before amtl.convert, to have all of them",
                    stacklevel=4,
                )
            if self.rounding is not None:
                squares = _mean_squares(blocks, self.rounding, plan.ends, self.name)
                state[f"{prefix}rounding.mean_square"] = squares
        for key, value in state.items():
            state_dict.setdefault(key, value)

    def _adopt_tiers(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        ends: tuple[int, ...],
        fits: bool,
        bits: int | None,
        errors: list[str],
    ) -> None:
        """Take the frozen phase with room for the tiers of a state dict.

        Fewer rows may be stored if the state `fits`, that is, was made with as many rows. `bits`
        are those of the state, 0 for numbers of the table's type, None if it does not say.
        """
        mine = self.options.bits or 0
        if bits not in (None, mine):
            errors.append(
                f"{prefix}blocks: the state is of a table with bits={bits or None}, the layer has "
                f"bits={mine or None}"
            )
            return
        loaded = [state_dict.get(f"{prefix}blocks.{c}") for c in range(len(ends))]
        present = [block for block in loaded if block is not None]
        columns = [int(block.shape[1]) for block in present]
        steps = state_dict.get(prefix + "steps")
        widths = [numbers_in(block, self.options.bits) for block in present]
        merges = prefix + "shared_rows" in state_dict or bool(self.other_paddings)
        merges = merges and ends[-1:] < (self.num_embeddings,)
        if (
            not ends
            or (ends[-1] != self.num_embeddings and not (fits and merges))
            or len(widths) != len(ends)
            or max(widths) > self.embedding_dim
        ):
            errors.append(
                f"{prefix}tier_ends: tiers that end at {ends} with widths {widths} do not fit a "
                f"table [{self.num_embeddings}, {self.embedding_dim}]"
            )
            return
        rounds = prefix + "rounding.ends" in state_dict
        if (rounds or steps is not None) != (self.options.bits is not None):
            kind = "a table of few bits" if self.options.bits is None else "one of floats"
            errors.append(
                f"{prefix}blocks: the state is of {kind}, the layer has bits={self.options.bits}"
            )
            return
        if rounds and (steps is None) != self.options.masters:
            errors.append(
                f"{prefix}blocks: the state is of training with masters={steps is None}, the layer "
                f"has masters={self.options.masters}"
            )
            return
        before, mask = self._table(), self.mask_parameters()
        starts, dtype = (0, *ends), self.dtype
        trains = (before[0].requires_grad or self.steps is not None) and steps is None
        blocks = [
            nn.Parameter(
                torch.empty(
                    end - start,
                    count,
                    dtype=dtype if steps is None else torch.uint8,
                    device=self.device,
                ),
                requires_grad=trains,
            )
            for start, end, count in zip(starts, ends, columns, strict=False)
        ]
        alike = [(b.shape, b.dtype) for b in before] == [(b.shape, b.dtype) for b in blocks]
        if self.tier_ends is not None and alike:
            blocks = before
        else:
            optimizers = optimizers_of([*before, *mask])
            hand_over(before, blocks, self.name)
            replace_parameters(optimizers, before, blocks)
            places = drop_parameters(optimizers, mask)
            if self.tier_ends is None:
                self._mask_places = places
            retire(wrappers_of([*before, *mask]))
        order = state_dict.get(prefix + "row_order")
        room = None if order is None else torch.zeros_like(order, device=self.device)
        padding, self.padding_idx = self.padding_idx, None
        self._enter_frozen(blocks, ends, room)
        self.padding_idx = padding
        self.steps = None if steps is None else torch.empty_like(steps, dtype=dtype)
        self.rounding = None
        if rounds and self.options.bits is not None:
            parts = Parts(*(state_dict[f"{prefix}rounding.{k}"].tolist() for k in Parts._fields))
            empty = torch.zeros(len(parts.ends), device=blocks[0].device)
            self.rounding = Rounding(self.options.bits, parts, empty)

    def _adopt_weight(self, row_map: Tensor | None) -> None:
        """Take the search phase with room for a dense weight."""
        before = self._table()
        weight = nn.Parameter(
            torch.empty(
                self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.device
            ),
            requires_grad=before[0].requires_grad or self.steps is not None,
        )
        assert row_map is not None
        groups = decode_row_map(row_map, self.num_embeddings).to(self.device)
        optimizers = optimizers_of(before)
        retire(wrappers_of(before))
        if self.head is not None:
            self.head.release()
            mask = list(self.head.parameters())
            behind = self._before_sizes()
            restore_parameters(optimizers, mask, self._mask_places, before[-1], behind=behind)
        self._mask_places = []
        hand_over(before, [weight], self.name)
        replace_parameters(optimizers, before, [weight])
        self._enter_search(weight, groups)


def _mean_squares(
    blocks: Sequence[Tensor], rounding: Rounding, ends: Sequence[int], name: str
) -> Tensor:
    """Those by which parts are rounded; numbers that are rounded already stay what they are."""
    parts, bits = rounding.parts(), rounding.bits
    squares = mean_squares(blocks, ends, parts, bits, name)
    of_one = step_of(torch.ones(()), bits).item()
    for part, piece in enumerate(cut(blocks, ends, parts)):
        step = _step_between(piece.detach().float().flatten().abs(), bits)
        if step > 0:
            squares[part] = (step / of_one) ** 2
    return squares


def _step_between(magnitudes: Tensor, bits: int) -> float:
    """The step size whose levels, `step * (1/2, 3/2, ...)`, these numbers are; 0 for none."""
    if not magnitudes.numel() or not bool(magnitudes.min() > 0):
        return 0.0
    least, sample = magnitudes.min(), magnitudes[:256]
    # Few numbers may miss the lowest levels.
    steps = 2 * least / torch.arange(1, 2 ** min(bits, 8), 2, device=least.device)
    for numbers in (sample, magnitudes):
        levels = numbers / steps[:, None] - 0.5
        off = (levels - levels.round()).abs().amax(1)
        fits = (off < 0.02) & (levels.amax(1) < 2 ** (bits - 1) - 0.5)
        if not bool(fits.any()):
            return 0.0
        steps = steps[fits][:1]
    return float(steps)
