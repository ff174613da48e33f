"""What `AMTLEmbedding` and `AMTLEmbeddingBag` share: the table and its two phases.

In the search phase it is one dense weight [N, D], and every row shows a prefix of itself,
`e_i = m_i * W[i]`, whose length its frequency group learns. `freeze()` cuts the table into size
tiers: outputs stay bit-identical, memory drops, training goes on. `thaw()` leads back.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import amtl_kernels
from amtl.layer.budget import BudgetError
from amtl.layer.frequency import (
    check_counts,
    check_field_sizes,
    decode_row_map,
    encode_row_map,
)
from amtl.layer.fusing import (
    FusedOptimizer,
    first_step,
    make_handle,
    require_no_need_of_masters,
    require_rule_of_codes,
)
from amtl.layer.growing import begin_rows, with_new_rows, with_new_tier
from amtl.layer.options import SearchOptions
from amtl.layer.replicas import require_same_sizes, retire, wrappers_of
from amtl.layer.rounding import (
    Rounding,
    bytes_of,
    cut,
    encode,
    encode_parts,
    mean_squares,
    numbers_in,
    plan_parts,
    ranges_of,
    unit,
    where_they_are,
)
from amtl.layer.shares import AUTO, options_of_table, tell_of_nothing
from amtl.layer.sharing import SharedRows, groups_that_share, implied_order, resolve_shared_rows
from amtl.layer.size_head import SizeHead
from amtl.layer.table_states import TableStates
from amtl.layer.tiers import (
    TierPlan,
    as_optimizers,
    drop_parameters,
    freeze_optimizers,
    hand_over,
    plan_tiers,
    require_held,
    restore_parameters,
    split_rows,
    thaw_optimizers,
)
from amtl_kernels.rounding import pack_codes

_Self = TypeVar("_Self", bound="AMTLTable")

_MUCH = 1 / 3
"""Share of the lookups: large tables of rare values do well where fewer than that find nothing."""


class AMTLTable(TableStates):
    """What the two layers share: the table, its phases, sizes and accounting.

    Not constructed directly. `name` says which table an index error is about; `amtl.convert` and
    `amtl.load` set it to the dotted module name. Attributes of the search phase: `weight` [N, D],
    `row_group` int32 [N], `head`. Of the frozen phase: `blocks`, `tier_ends`, and `row_order`
    (int32 [N], the new row of each row) unless rows kept their order or the caller took it with
    `absorb_order()`. Of both: `shared_rows`, int64 [F] or None, the row of each field that stands
    in for rows of size 0; `full_rows`, the rows it was made with, which shares of memory refer to;
    `full_padding`, the padding row it was made with.
    """

    _keeps_numbering = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
        weight: Tensor | None,
        requires_grad: bool,
        device: Any,
        dtype: torch.dtype | None,
        counts: object,
        field_sizes: Sequence[int] | None,
        row_features: Tensor | None,
        shared_rows: SharedRows,
        options: Mapping[str, Any],
        other_paddings: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if num_embeddings < 0 or embedding_dim < 1:
            raise ValueError(
                f"a table needs num_embeddings >= 0 and embedding_dim >= 1, got "
                f"[{num_embeddings}, {embedding_dim}]"
            )
        if scale_grad_by_freq:
            raise ValueError(
                "scale_grad_by_freq=True is not supported: it would scale the gradient of the "
                "table but not that of the sizes. Use a per-row optimizer (Adagrad) instead."
            )
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx {padding_idx} is outside 0..{num_embeddings - 1}")
            padding_idx %= num_embeddings
        if weight is not None and tuple(weight.shape) != (num_embeddings, embedding_dim):
            raise ValueError(
                f"_weight has shape {tuple(weight.shape)}, not [{num_embeddings}, {embedding_dim}]"
            )
        if weight is None:
            shape = num_embeddings, embedding_dim
            table = amtl_kernels.empty_table(*shape, device=device, dtype=dtype)
        else:
            table = weight.contiguous()
        checked = check_counts(counts, num_embeddings).to(table.device)
        sizes = check_field_sizes(field_sizes, num_embeddings)
        found = options_of_table(table, checked, sizes, options)
        self._describe(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            sparse,
            sizes,
            found,
        )
        self.other_paddings = tuple(other_paddings)
        self.weight = nn.Parameter(table, requires_grad=requires_grad)
        if weight is None:
            self.reset_parameters()
        padding = self._padding_rows()
        self._share(resolve_shared_rows(shared_rows, checked, self.field_sizes, padding))
        self.grid = found.grid(embedding_dim, table.element_size())
        try:
            self.row_group, self.head = self._search(checked, found, row_features)
        except BudgetError:
            if options.get("bits", AUTO) != AUTO or found.bits is None:
                raise
            # Of a few rows step sizes alone take more than the budget.
            self.options = found = replace(found, bits=None, masters=True)
            self.grid = found.grid(embedding_dim, table.element_size())
            self.row_group, self.head = self._search(checked, found, row_features)
        self._tell_of_nothing(checked)

    def _tell_of_nothing(self, counts: Tensor) -> None:
        """Warns where a budget leaves nothing for rows that much of the lookups are of."""
        if self.options.parametrization != "rule" or self.shared_rows is not None:
            return
        looked_up = counts.double()
        looked_up[self._padding_rows()] = 0
        share = float((looked_up * (self.row_dims() == 0)).sum() / looked_up.sum().clamp(min=1))
        if share > _MUCH:
            tell_of_nothing(share, self.budget, stacklevel=5)

    def _share(self, rows: Sequence[int] | None) -> None:
        self.shared_rows = None if rows is None else torch.tensor(rows, device=self.device)

    def _search(
        self, counts: Tensor, options: SearchOptions, row_features: Tensor | None
    ) -> tuple[Tensor, SizeHead]:
        """Group of each row, and a new size head."""
        shared = None if self.shared_rows is None else self.shared_rows.tolist()
        padding = self._padding_rows()

        def search(parts: int) -> tuple[Tensor, SizeHead]:
            numbers = options.in_numbers(
                self.num_embeddings, self.embedding_dim, self.dtype.itemsize, parts
            )
            groups = groups_that_share(
                counts, self.field_sizes, row_features, shared, padding, numbers, self.grid
            )
            return groups.row_group, numbers.head(groups, self.grid)

        found = search(0)
        if options.bits is None:
            return found
        # Step sizes are paid for, and how many there are depends on the sizes.
        parts, paid = found[1].num_parts(), 0
        while parts > paid:
            try:
                found, paid = search(parts), parts
            except BudgetError:
                if parts == paid + 1:
                    raise
                # Fewer numbers need fewer step sizes.
                parts = (parts + paid + 1) // 2
                continue
            parts = found[1].num_parts()
        return found

    @classmethod
    def from_config(
        cls: type[_Self],
        config: Mapping[str, Any],
        blocks: Sequence[Tensor],
        row_order: Tensor | None = None,
        steps: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> _Self:
        """A frozen layer from `config()` and its tensors, without a size head.

        Args:
            config: what `config()` returned.
            blocks: the tiers, used as they are (not copied).
            row_order: int32 [N] or None.
            steps: float [C], step sizes of blocks of codes, or None.
            basis: float [D, D], see `to_principal_basis`, or None.

        Raises:
            ValueError: tensors that do not fit the configuration.
        """
        ends = tuple(config["tier_ends"])
        dim = config["embedding_dim"]
        rows = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        shared, paddings = config.get("shared_rows"), config.get("other_paddings", ())
        fits = len(blocks) == len(ends) > 0
        fits = fits and ends[-1] <= config["num_embeddings"]
        whole = ends[-1:] == (config["num_embeddings"],)
        fits = fits and (shared is not None or bool(paddings) or whole)
        if paddings and row_order is None:
            total, named = config["num_embeddings"], {config["padding_idx"], *paddings}
            fits = fits and bool(config.get("passes_paddings"))
            fits = fits and ends[-1] == total - len(paddings) == total + 1 - len(named)
            fits = fits and all(0 <= row < total for row in named)
            if fits:
                row_order = implied_order(total, config["padding_idx"], paddings)
                row_order = row_order.to(blocks[0].device)
        bits = config["options"].get("bits")
        for block, count in zip(blocks, rows, strict=False):
            fits = fits and block.dim() == 2 and block.shape[0] == count >= 0
            fits = fits and numbers_in(block, bits) <= dim
            fits = fits and (block.dtype == torch.uint8) == (steps is not None)
            fits = fits and (steps is None or block.shape[1] * 8 % (bits or 8) == 0)
        fits = fits and (steps is None or (bits is not None and tuple(steps.shape) == (len(ends),)))
        if row_order is not None:
            fits = fits and tuple(row_order.shape) == (config["num_embeddings"],)
        fits = fits and (basis is None or tuple(basis.shape) == (dim, dim))
        if not fits:
            raise ValueError(
                f"tiers {[tuple(b.shape) for b in blocks]} that end at rows {ends} do not make a "
                f"table [{config['num_embeddings']}, {dim}]"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._describe(
            config["num_embeddings"],
            dim,
            config["padding_idx"],
            config["max_norm"],
            config["norm_type"],
            config["sparse"],
            list(config["field_sizes"]),
            SearchOptions(**config["options"]),
        )
        exact = replace(layer.options, tier_width=config["tier_width"])
        layer.grid = exact.grid(dim, (blocks[0] if steps is None else steps).element_size())
        layer.other_paddings = tuple(paddings)
        layer._configure(config)
        layer.full_rows = config.get("full_rows", layer.num_embeddings)
        layer.full_padding = config.get("full_padding", layer.padding_idx)
        layer.shared_rows = (
            None if shared is None else torch.tensor(shared, device=blocks[0].device)
        )
        parameters = [nn.Parameter(b, requires_grad=steps is None) for b in blocks]
        layer._enter_frozen(parameters, ends, row_order)
        layer.steps, layer.basis = steps, basis
        return layer

    def _configure(self, config: Mapping[str, Any]) -> None:
        """Attributes of a subclass, from `config()`."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, weight_std^2), padding rows zero, as nn.Embedding does.

        Frozen, the numbers that are stored; sizes stay.
        """
        if self.steps is not None:
            raise RuntimeError(
                f"table {self.name!r} holds codes, which cannot be drawn anew: call its thaw() "
                "(of a model: amtl.thaw) first"
            )
        tables, std = self._table(), self.options.weight_std
        for table in tables:
            nn.init.normal_(table, std=std)
        if self.tier_ends is None:
            for row in self._padding_rows():
                tables[0][row].fill_(0)
            return
        place = self._frozen_padding()
        for block, end in zip(tables, self.tier_ends, strict=True):
            if place is not None and end - len(block) <= place < end:
                block[place - end].fill_(0)
        if self.rounding is not None:
            given = self.tier_ends, self.rounding.parts(), self.rounding.bits, self.name
            self.rounding.mean_square.copy_(mean_squares(tables, *given))

    def fuse(self: _Self, optimizer: FusedOptimizer | None) -> _Self:
        """Let the backward update the table, by an optimizer that is the handle from then on.

        `fused_optimizer` is the handle, an ordinary `torch.optim.Optimizer`: schedulers set its
        learning rate, `state_dict()` saves it, freezing, thawing and loading take it along. Its
        `step()` finds no gradient and counts the step; call it once after each backward, as usual:
        then gradients that should have added up over several are refused. Without `step()`, every
        backward is one; `torch.autograd.grad` is a backward, too. Nothing is left to clip: norms
        over all parameters miss the table, and hooks on it are given None. With a GradScaler in
        use, whose gradients would have to be scaled back first, the backward refuses.

        Args:
            optimizer: a class of `amtl_kernels.optim` or what else makes one of its optimizers from
                a list of parameters; one that holds the table already, which keeps its state; or
                None: gradients again, which the former handle takes at its `step()`.

        Returns:
            The layer.

        Raises:
            TypeError: another kind of optimizer.
            ValueError: an optimizer that does not hold the table, or whose state is too large for a
                table without masters.
        """
        if optimizer is None:
            self.fused_optimizer = None
            return self
        tables: list[Tensor] = [*self.table_parameters()]
        handle = make_handle(optimizer, self.table_parameters())
        if self.masterless:
            require_rule_of_codes(handle, self.name)
        try:
            handle.check_owns(tables)
        except ValueError:
            raise ValueError(
                f"the fused optimizer must hold table {self.name!r} in one of its groups"
            ) from None
        self.fused_optimizer = handle
        return self

    def _replicate_for_data_parallel(self: _Self) -> _Self:
        if self.fused_optimizer is not None and torch.is_grad_enabled():
            raise RuntimeError(
                f"table {self.name!r} has a fused optimizer, which nn.DataParallel cannot train: "
                "its copies are in no optimizer. Call amtl.fuse(model, None)"
            )
        return super()._replicate_for_data_parallel()

    def _followed(
        self, optimizer: Optimizer | Iterable[Optimizer] | None, parameters: list[nn.Parameter]
    ) -> list[Optimizer]:
        """The optimizers that a change of parameters concerns; the handle comes last."""
        handle = self.fused_optimizer
        found = [o for o in as_optimizers(optimizer, parameters) if o is not handle]
        return found if handle is None else [*found, handle]

    def freeze(
        self: _Self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        bits: int | None = None,
        masters: bool | None = None,
    ) -> _Self:
        """Fix the sizes and cut the table into tiers; outputs (without noise) stay bit-identical.

        Where numbers have few bits, by the layer's own `bits` or those given here, outputs are
        rounded from now on, and training goes on rounding.

        Rows are ordered by falling stored width, stable, so a table in frequency order whose sizes
        fall with frequency keeps its order. Otherwise the layer keeps `row_order` (4 bytes a row)
        until `absorb_order()`; but rows of few bits stay where they are, and all get the width of
        the widest, where the budget holds that. Rows of size 0 that have a shared row keep no place
        at all. Padding inside a tier starts at zero; its bytes are paid for, so training goes on in
        it. The dense weight is released; until then both exist. Attributes that were set on it go
        over to the blocks; hooks do not, which is warned of. O(N * D).

        Args:
            optimizer: the optimizer(s) of the table and the mask. The blocks take the place of the
                weight in its parameter group, with their state; mask parameters are dropped. None:
                whichever hold them, looked for among all objects of the process.
            bits: of a stored number, 2, 4, 8 or 16, in place of the layer's own: its `bits` from
                now on. Sizes are rounded up to whole bytes, and no level of so few bits is zero, so
                what a row gains stands for little rather than nothing. The table takes about
                `bits / 32` of what it would.
            masters: in place of the layer's own: False keeps codes only, which the fused optimizer
                goes on training (`amtl.layer.rounding`). Training then takes about the bytes that
                are served, and a number a row of RowwiseAdagrad.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is frozen already, or processes that train it together have
                different sizes.
            ValueError: the table is trainable but not in the optimizer, or numbers that are not
                finite would be rounded, or rows of D numbers of so many bits are no whole bytes,
                so that learned ones would be left out, or the layer cannot do without masters (it
                needs bits, a fused SGD or RowwiseAdagrad, float32, and no `max_norm`).
        """
        if self.tier_ends is not None or self.weight is None or self.row_group is None:
            raise RuntimeError("the layer is frozen already")
        head = self._head()
        options = self.options
        # Sizes that were found for other bits aim at no bytes of these.
        allowed = self._allowed_bytes() if bits in (None, options.bits) else math.inf
        if bits is not None:
            options = replace(options, bits=bits, tier_width=None)
            if self.embedding_dim % unit(bits):
                raise ValueError(
                    f"rows of {bits} bits a number are stored in whole bytes, so that of "
                    f"{self.embedding_dim} numbers the last would be left out: take bits=8"
                )
        if masters is not None:
            options = replace(options, masters=masters)
        if not options.masters:
            require_no_need_of_masters(
                self.name, self.weight, self.fused_optimizer, self.max_norm is not None
            )
        if bits is not None:
            self.grid = options.grid(self.embedding_dim, self.weight.element_size())
        self.options = options
        optimizers = self._followed(optimizer, [self.weight, *head.parameters()])
        if optimizer is not None:
            require_held(optimizers, [self.weight], "freeze")
        wrappers = wrappers_of([self.weight, *head.parameters()])
        with torch.no_grad():
            levels = head.levels()
            if wrappers:
                kept = head.get_buffer("size_table")[levels]
                require_same_sizes(wrappers, [kept, self.row_group], self.name)
            small = torch.uint8 if self.embedding_dim <= 255 else torch.int32
            group = self.row_group.to(torch.int64)
            stored = torch.tensor(self.grid.stored, dtype=small, device=self.device)[levels][group]
            # A row of all numbers may have one too many for whole bytes.
            row_dims = head.get_buffer("size_table")[levels].to(small)[group].minimum(stored)
            merged = self._merged(row_dims)
            steps = None
            if self.options.bits is not None:
                padding = self.padding_idx
                if padding is not None and not bool(self.weight[padding].any()):
                    # No code is zero, so a row of zeros keeps no numbers.
                    stored[padding] = row_dims[padding] = 0
                steps = head.step_groups()[group].masked_fill_(stored == 0, 0)
            del group
            plan = plan_tiers(stored, self.embedding_dim, merged, steps)
            if steps is not None:
                stay = self._where_they_are(stored, merged, plan, steps, allowed)
                if stay is not None:
                    plan, stored, steps = stay
                    # Rows that were never seen hold what nobody has learned: they begin as zeros.
                    seen = head.group_counts[self.row_group.to(torch.int64)] > 0
                    row_dims = torch.where((row_dims > 0) | seen, stored, row_dims)
            order = self._places(plan, merged)
            parts, rounding, codes = None, None, None
            if steps is not None:
                parts = plan_parts(plan.of_places(stored), plan.of_places(steps))
            if parts is not None and not self.options.masters:
                # A block a part, as in a packed table.
                plan = replace(plan, widths=tuple(parts.widths), ends=tuple(parts.ends))
                bits = self.options.bits or 8
                # A range of codes that the first steps would leave cuts them off.
                least = first_step(self.fused_optimizer, self.weight)
                squares, codes = encode_parts(self.weight, plan, row_dims, bits, self.name, least)
                rounding = Rounding(bits, parts, squares)
            trainable = self.weight.requires_grad and codes is None
            blocks = [
                nn.Parameter(block, requires_grad=trainable)
                for block in codes or split_rows(self.weight.detach(), plan, row_dims)
            ]
            if rounding is None and parts is not None and self.options.bits is not None:
                bits = self.options.bits
                squares = mean_squares(blocks, plan.ends, parts, bits, self.name)
                rounding = Rounding(bits, parts, squares)
            hand_over([self.weight], blocks, self.name)
            freeze_optimizers(optimizers, self.weight, blocks, plan, row_dims)
            mask = list(head.parameters())
            self._mask_places = drop_parameters(optimizers, mask, optimizer is not None)
            for parameter in head.parameters():
                parameter.grad = None
            self.row_map = encode_row_map(self.row_group)
            if trainable and optimizer is None and not optimizers:
                self._left = weakref.ref(self.weight)
            self._enter_frozen(blocks, plan.ends, order)
            self.rounding = rounding
            if rounding is not None and codes is not None:
                self.steps = rounding.steps()
        retire(wrappers)
        return self

    def _allowed_bytes(self) -> float:
        budget = self.options.budget
        return math.inf if budget is None else budget * self.dense_bytes() * (1 + 1e-12)

    def _where_they_are(
        self,
        stored: Tensor,
        merged: Tensor | None,
        plan: TierPlan,
        steps: Tensor,
        allowed: float,
    ) -> tuple[TierPlan, Tensor, Tensor] | None:
        """A plan in which rows stay, their widths and step groups; see `rounding.where_they_are`.

        Padding rows of other tables are passed over, as their numbers tell. None where others
        share a row, where rows have to move, or where they stay by `plan` and all is well: they are
        of one width, and their step sizes are paid for.
        """
        padding, bits = self.padding_idx, self.options.bits
        assert bits is not None
        moved = plan.order is not None
        if not moved:
            taken = bytes_of(plan.of_places(stored), plan.of_places(steps), bits)
            alike = bool((stored == int(stored.max())).sum() >= len(stored) - (padding is not None))
            if math.isinf(allowed) or (taken <= allowed and alike):
                return None
        if merged is not None and int(merged.sum()) > len(self.other_paddings):
            return None
        fields, wide = self.row_fields(), torch.zeros_like(stored)
        rows = None if merged is None else (~merged).nonzero().flatten()
        mine = slice(None) if rows is None else rows
        if padding is not None:
            empty = not int(stored[padding])
            padding -= sum(row < padding for row in self.other_paddings)
            padding = padding if empty else None
        kept, ranges = stored[mine], fields.clone()
        assert self.weight is not None
        ranges[mine] = ranges_of(self.weight[mine], fields[mine])
        for steps in (ranges, fields):
            own = steps[mine]
            found = where_they_are(kept, own, padding, bits, allowed, self.grid.widest, moved)
            if found is None:
                continue
            plan = plan_tiers(found, self.embedding_dim, within=own)
            if plan.order is None:
                wide[mine] = found
                return replace(plan, order=rows, num_rows=len(stored)), wide, steps
        return None

    def to_integers(self: _Self) -> _Self:
        """A frozen layer of few bits as one that holds their codes only: new, with equal outputs.

        Lookups decode. It does not train; `thaw(counts=...)` leads back to numbers of the table's
        type. O(stored numbers).

        Raises:
            RuntimeError: the layer is not frozen, or has no `bits`.
            ValueError: a number is not finite.
        """
        if self.steps is not None and self.rounding is None:
            return self
        if self.rounding is None or self.tier_ends is None:
            raise RuntimeError("to_integers() needs a frozen layer with bits=2, 4, 8 or 16")
        if self.max_norm is not None:
            # As looking every row up would, which codes can no longer do.
            self._renorm(torch.arange(self.tier_ends[-1], device=self.device))
        bits, parts = self.rounding.bits, self.rounding.parts()
        if self.steps is not None:
            codes = [block.detach().clone() for block in self.blocks]
            return self._constant(codes, parts.ends, self.steps.clone())
        steps = self.rounding.steps(self.dtype)
        pieces = cut([block.detach() for block in self.blocks], self.tier_ends, parts)
        if not all(bool(values.isfinite().all()) for values in (*pieces, steps)):
            raise ValueError(
                f"table {self.name!r} holds numbers that are not finite, which have no code"
            )
        codes = [
            pack_codes(encode(piece, step, bits), bits)
            for piece, step in zip(pieces, steps, strict=True)
        ]
        return self._constant(codes, parts.ends, steps)

    def _constant(self: _Self, codes: list[Tensor], ends: list[int], steps: Tensor) -> _Self:
        """A layer of these codes that does not train, a block a part."""
        config = {**self.config(), "tier_ends": ends}
        layer = type(self).from_config(config, codes, self.row_order, steps, self.basis)
        layer.name = self.name
        return layer.train(self.training)

    def _places(self, plan: TierPlan, merged: Tensor | None) -> Tensor | None:
        """The place of each row, int32 [N]; None where a comparison tells it."""
        if merged is None:
            return plan.places()
        stand_in, shared = self._stand_ins()[merged], self.shared_rows
        if plan.order is None and shared is not None and bool((stand_in == shared[-1]).all()):
            return None
        places = plan.places()
        if places is None:
            places = torch.arange(plan.num_rows, dtype=torch.int32, device=self.device)
        places[merged] = places[stand_in]
        return places

    def thaw(
        self: _Self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        counts: object = None,
    ) -> _Self:
        """Back to the search phase: a dense weight, zeros beyond the stored widths.

        Rows that had no place start from their shared row. The size head continues where it was, so
        rows show their searched size again; what frozen training put into the padding of a tier is
        kept in the weight, but masked.

        Args:
            optimizer: as in `freeze`; state is merged, mask parameters return without state.
            counts: needed for a layer loaded from a packed file only: [N], in the layer's present
                row numbering. More than N of them append rows to a table of one field, which begin
                as the mean of the others, without state. Of several fields the counts of each, of
                a collection by name or in order: rows that are new are behind those of their
                field, and the fields behind it move up. [N] counts of several fields are taken as
                those of one, except in a collection.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is in the search phase, or counts are missing.
            ValueError: counts are fewer than rows, or more where there are several fields and
                they are not those of each.
        """
        if self.tier_ends is None:
            raise RuntimeError("the layer is in the search phase already")
        blocks = list(self.blocks)
        with_numbers = [block for block in blocks if block.numel()] or blocks
        optimizers = self._followed(optimizer, blocks)
        if optimizer is not None:
            require_held(optimizers, with_numbers[:1], "thaw")
        wrappers = wrappers_of(blocks)
        with torch.no_grad():
            plan, dense = self._plan(), self._dense(rounded=False)
        if counts is not None:
            checked, growth = self._read_counts(counts)
            undo = self._take_rows(growth)
            options = replace(self.options, field_weights=None)
            try:
                row_group, self.head = self._search(checked, options, None)
            except BudgetError:
                undo()
                raise
            if growth.num_new:
                dense = with_new_rows(dense, growth)
                rows = nn.Parameter(dense[growth.new_rows().to(dense.device)])
                begin_rows(optimizers, blocks, rows)
                blocks.append(rows)
                plan = with_new_tier(plan, self.embedding_dim, growth)
            self.row_map = encode_row_map(row_group)
        head = self._head()
        if self.row_map is None:
            raise RuntimeError(
                "the state that was loaded is of a packed file, which knows no groups; "
                "thaw(counts=...) makes them"
            )
        with torch.no_grad():
            trains = blocks[0].requires_grad or self.steps is not None
            weight = nn.Parameter(dense, requires_grad=trains)
            head.release()
            # The reverse of freezing, so that positions are those of then.
            mask = list(head.parameters())
            told = optimizer is not None
            behind = self._before_sizes()
            restore_parameters(optimizers, mask, self._mask_places, with_numbers[-1], told, behind)
            hand_over(blocks, [weight], self.name)
            thaw_optimizers(optimizers, weight, blocks, plan)
            self._enter_search(weight, decode_row_map(self.row_map, self.num_embeddings))
            self._mask_places = []
        retire(wrappers)
        return self
