"""What a table is made of, what it costs, and which row a lookup reads, in either phase."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import amtl_kernels
from amtl.layer.budget import SizeGrid
from amtl.layer.frequency import decode_row_map
from amtl.layer.fusing import Updated, refuse_repetition, refuse_replicas, watch
from amtl.layer.graphs import refuse_script
from amtl.layer.noise import draw_seed, mix_seed
from amtl.layer.options import SearchOptions
from amtl.layer.rounding import PART_BYTES, Rounding, cut, decode, encode, numbers_in
from amtl.layer.sharing import implied_order, own_rows, require_places, version_of
from amtl.layer.shown import NoWeightError
from amtl.layer.size_head import SizeHead, being_traced
from amtl.layer.tiers import Place, TierPlan, Weakly, merge_rows, optimizers_of
from amtl_kernels._calls import refuse_transforms
from amtl_kernels.optim import RowOptimizer
from amtl_kernels.rounding import pack_codes

PATIENCE = 5
"""Changes of the table, by whatever, without one of its sizes before that is warned of; and passes
that find gradients in a table which nothing changes."""


def require_rows(value: object, name: str = "input") -> None:
    """Raise unless these are row numbers.

    Raises:
        TypeError: not a tensor.
        ValueError: not of int32 or int64.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of int32 or int64, got {value!r:.60}")
    if value.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {value.dtype}")


def _exports_to_onnx() -> bool:
    """Whether torch.onnx is among the callers; its newer exporter tells in no other way."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.onnx."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


# What torch.compiler.assume_constant_result() sets, which would import the compiler.
_exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


class TableRows(nn.Module):
    """The attributes of `AMTLTable`, sizes and accounting, and the rows that lookups read."""

    row_group: Tensor | None
    row_order: Tensor | None
    row_map: Tensor | None
    shared_rows: Tensor | None
    steps: Tensor | None
    basis: Tensor | None
    head: SizeHead | None
    rounding: Rounding | None
    grid: SizeGrid
    other_paddings: tuple[int, ...] = ()
    """Padding rows of other tables in it, in whose place `padding_idx` is looked up."""
    fused_optimizer: RowOptimizer | None = None
    """What updates the table within the backward, see `fuse`."""
    _before_use: Callable[[], None] | None = None
    """What wants to be called before values of tiers are used: a check of the file they are in."""

    def _describe(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        sparse: bool,
        field_sizes: list[int],
        options: SearchOptions,
    ) -> None:
        """Everything but the tensors."""
        self.num_embeddings = num_embeddings
        self.full_rows = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.full_padding = padding_idx
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = False
        self.name = ""
        self.sparse = sparse
        self.options = options
        self.field_sizes = field_sizes
        self.tier_ends: tuple[int, ...] | None = None
        self.progress = 0.0
        self._noise_on = options.freeze_at > 0
        self._seed_offset = mix_seed(options.seed)
        self._mask_places: list[Place] = []
        self.size_names = Weakly()
        self._redirection: tuple[Tensor, Tensor | None] | None = None
        self._noticed: tuple[Tensor, int] | None = None
        self._untaught = 0
        self.fused_optimizer = None
        self._updated = Updated()
        self.register_parameter("weight", None)
        self.register_buffer("row_group", None, persistent=False)
        self.register_buffer("row_map", None)
        self.register_buffer("row_order", None)
        self._order_seen = 0
        self.register_buffer("shared_rows", None)
        self.register_buffer("steps", None)
        self.register_buffer("basis", None)
        self.register_module("rounding", None)
        self.blocks = nn.ParameterList()
        self.register_module("head", None)

    @property
    def weight(self) -> nn.Parameter | None:
        """The dense table [N, D] of the search phase, unmasked; frozen, its rows to read.

        Those are what a lookup of all rows shows, and are made, gradients included, where they are
        used: O(N * D). Writing to them is a NoWeightError.
        """
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"] if self.tier_ends is None else self._shown_rows()

    @weight.setter
    def weight(self, value: nn.Parameter | None) -> None:
        self._parameters["weight"] = value

    def _shown_rows(self) -> Any:
        raise NotImplementedError

    def _refuse_weight(self) -> NoReturn:
        raise NoWeightError(
            f"the layer {self.name!r} is frozen and has no dense weight to write to or optimize: "
            f"layer.weight, or the layer called on torch.arange({self.num_embeddings}), shows all "
            "rows, to train through, and dense_weight() is a copy of them. What trains, and has "
            "gradients, are table_parameters(): they are for an optimizer, and "
            "layer.requires_grad_(False) keeps them as they are. What writes rows after each step, "
            "to normalise them or so, goes before amtl.freeze(): train, then freeze. amtl.revert() "
            "puts an nn.Embedding in its place"
        )

    def __getattr__(self, name: str) -> Any:
        # Python asks here where the property raises, and would lose what it says.
        if name == "weight" and self.tier_ends is not None:
            return self._shown_rows()
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module; a frozen layer takes no weight."""
        if name == "weight" and param is not None and self.tier_ends is not None:
            self._refuse_weight()
        super().register_parameter(name, param)

    def __dir__(self) -> list[str]:
        # torch.jit.trace reads whatever is listed.
        return [n for n in super().__dir__() if n != "weight" or self.tier_ends is None]

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    @property
    def phase(self) -> str:
        """Either "search" or "frozen"."""
        return "search" if self.tier_ends is None else "frozen"

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self._table()[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the table; of integers, that of what lookups give."""
        return self._table()[0].dtype if self.steps is None else self.steps.dtype

    @property
    def masterless(self) -> bool:
        """Whether it is frozen to codes that train."""
        return self.steps is not None and self.rounding is not None

    @property
    def budget(self) -> float | None:
        """Stored fraction aimed at, None without a budget."""
        return self.options.budget

    @property
    def freeze_at(self) -> float:
        """Share of training after which sizes should be frozen."""
        return self.options.freeze_at

    @property
    def field_offsets(self) -> list[int]:
        """First row of each field, in the numbering before `absorb_order()`."""
        offsets = [0]
        for size in self.field_sizes[:-1]:
            offsets.append(offsets[-1] + size)
        return offsets

    def _apply(self, fn: Any, recurse: bool = True) -> TableRows:
        kept = self.steps
        super()._apply(fn, recurse)
        if kept is not None and self.steps is not None and self.masterless:
            # Other step sizes would ask for other codes.
            self.steps = kept.to(self.steps.device)
        return self

    def _table(self) -> list[nn.Parameter]:
        try:
            weight = self._parameters["weight"]
        except KeyError:
            raise RuntimeError(
                f"the weight of the layer {self.name!r} is parametrized, so that what it shows is "
                "made anew in each call: torch.nn.utils.parametrize.remove_parametrizations(layer, "
                '"weight") first'
            ) from None
        return self._tiers() if weight is None else [weight]

    def _tiers(self) -> list[nn.Parameter]:
        """The blocks; a ParameterList takes a microsecond for each."""
        # nn.DataParallel gives its replicas tensors in place of the parameters.
        blocks = self._modules["blocks"]
        held = blocks._parameters or blocks.__dict__.get("_former_parameters", {})  # type: ignore[union-attr]
        return list(held.values())  # type: ignore[arg-type]

    def table_parameters(self) -> list[nn.Parameter]:
        """The table: `[weight]`, or the blocks once frozen."""
        self._announce()
        return self._table()

    def _announce(self) -> None:
        if self._before_use is not None:
            self._before_use()

    def _before_sizes(self) -> set[int] | None:
        """Ids of what a model that names sizes first has before this layer's; else None."""
        names = self.size_names()
        return None if names is None else names.before(self)

    def mask_parameters(self) -> list[nn.Parameter]:
        """What learns the sizes; give it a learning rate of its own. Empty once frozen."""
        if self.head is None or self.tier_ends is not None:
            return []
        return list(self.head.parameters())

    def group_dims(self) -> Tensor:
        """Size of each group without noise, int32 [G]."""
        return self._head().sizes().to(torch.int32)

    def row_dims(self) -> Tensor:
        """Size of each row, int32 [N]; once frozen, its stored width, which training may use.

        Rows that are looked up as their shared row, or another padding row, have size 0.
        """
        if self.tier_ends is None:
            assert self.row_group is not None
            dims = self.group_dims()[self.row_group]
            if self.other_paddings:
                dims[list(self.other_paddings)] = 0
            return dims
        plan = self._plan()
        starts = (0, *plan.ends)
        dims = torch.zeros(self.num_embeddings, dtype=torch.int32, device=self.device)
        for tier, width in enumerate(plan.widths):
            if plan.ends[tier] > starts[tier]:
                dims[plan.rows(tier)] = width
        return dims

    def row_fields(self) -> Tensor:
        """Field of each row, int64 [N]."""
        groups = self.row_group
        if groups is None:
            if self.row_map is None:
                raise RuntimeError("a layer loaded from a packed file knows no fields")
            groups = decode_row_map(self.row_map, self.num_embeddings)
        return self._head().group_fields[groups]

    def stored_fraction(self) -> float:
        """Bytes of values stored, over those of N * D numbers of the table's type.

        In the search phase: what they would be if sizes were frozen now. Tier rounding and step
        sizes included.
        """
        return self.value_bytes() / max(1, self.dense_bytes())

    def value_bytes(self) -> int:
        """Bytes of values that a packed table takes: numbers or codes, and step sizes."""
        bits = self.options.bits
        if self.tier_ends is None:
            head = self._head()
            numbers = round(head.stored_fraction() * self.full_rows * self.embedding_dim)
            if bits is None:
                return numbers * self.dtype.itemsize
            return numbers * bits // 8 + head.num_parts() * PART_BYTES
        blocks = list(self.blocks)
        if self.steps is not None:
            parts = sum(block.shape[1] > 0 for block in blocks)
            return sum(block.nbytes for block in blocks) + parts * PART_BYTES
        if self.rounding is None or bits is None:
            return sum(block.nbytes for block in blocks)
        parts = sum(width > 0 for width in self.rounding.parts().widths)
        return sum(block.numel() for block in blocks) * bits // 8 + parts * PART_BYTES

    def stored_bytes(self) -> int:
        """`value_bytes`, a basis, and `row_order` where it is kept and nothing else says it."""
        beside = (self.told_order(), self.basis)
        return self.value_bytes() + sum(each.nbytes for each in beside if each is not None)

    def told_order(self) -> Tensor | None:
        """`row_order` where a file has to say it; None where padding rows do, O(N)."""
        return None if self._passes_paddings() else self.row_order

    def _passes_paddings(self) -> bool:
        order, padding = self.row_order, self.padding_idx
        if order is None or padding is None or not self.other_paddings:
            return False
        implied = implied_order(len(order), padding, self.other_paddings)
        return torch.equal(order, implied.to(order.device))

    def dense_bytes(self) -> int:
        """Bytes of an nn.Embedding with all the rows that the layer was made with."""
        return self.full_rows * self.embedding_dim * self.dtype.itemsize

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """What an nn.Embedding with the same outputs holds (without noise): new, dense [N, D]."""
        return self._out_of_basis(self._dense())

    def _out_of_basis(self, rows: Tensor) -> Tensor:
        """Rows [..., D] as lookups show them."""
        basis = self._buffers["basis"]
        return rows if basis is None else rows @ basis.to(rows.dtype)

    def _dense(self, rounded: bool = True) -> Tensor:
        if self.tier_ends is None:
            assert self.weight is not None
            dims = self.row_dims()
            columns = torch.arange(self.embedding_dim, device=self.device)
            dense = self.weight.masked_fill(columns >= dims[:, None], 0)
            merged = self._merged(dims)
            if merged is not None:
                dense[merged] = dense[self._stand_ins()[merged]]
            return dense
        plan = self._plan()
        blocks = [b.detach() for b in self.blocks]
        if self.steps is not None:
            bits = self.options.bits or 8
            blocks = [decode(b, s, bits) for b, s in zip(blocks, self.steps, strict=True)]
        elif self.rounding is not None and rounded:
            parts, bits = self.rounding.parts(), self.rounding.bits
            pieces = cut(blocks, plan.ends, parts)
            steps = self.rounding.steps(self.dtype)
            blocks = [
                decode(pack_codes(encode(b, s, bits), bits), s, bits)
                for b, s in zip(pieces, steps, strict=True)
            ]
            plan = replace(plan, widths=tuple(parts.widths), ends=tuple(parts.ends))
        dense = merge_rows(blocks, plan, self.embedding_dim)
        places = self._frozen_rows(torch.arange(self.num_embeddings, device=self.device))
        return dense if plan.ends[-1] == len(dense) else dense[self._own_rows()[places]]

    def _plan(self) -> TierPlan:
        assert self.tier_ends is not None
        self._announce()
        order = None if self.row_order is None else self._own_rows()
        widths = tuple(numbers_in(block, self.options.bits) for block in self.blocks)
        return TierPlan(widths, self.tier_ends, order, self.num_embeddings)

    def _own_rows(self) -> Tensor:
        """The row that each place of the tiers holds, int64 [P]."""
        assert self.tier_ends is not None
        places = self.tier_ends[-1]
        if self.row_order is None:
            return torch.arange(places, device=self.device)
        shares = places < self.num_embeddings
        rows = own_rows(self.row_order, self.shared_rows if shares else None, places)
        if self.padding_idx is not None and self.other_paddings:
            rows[self.row_order[self.padding_idx]] = self.padding_idx
        return rows

    def _merged(self, dims: Tensor) -> Tensor | None:
        """Rows that are looked up as another one, bool [N], from the sizes of all rows."""
        others = list(self.other_paddings)
        if self.shared_rows is None and not others:
            return None
        merged = torch.zeros_like(dims, dtype=torch.bool)
        if self.shared_rows is not None:
            merged = dims == 0
            merged[self.shared_rows] = False
        if self.padding_idx is not None:
            merged[self.padding_idx] = False
        merged[others] = True
        return merged if bool(merged.any()) else None

    def _stand_ins(self) -> Tensor:
        """The row that each row is looked up as where it is merged, int64 [N]."""
        if self.shared_rows is None:
            rows = torch.arange(self.num_embeddings, device=self.device)
        else:
            rows = self.shared_rows[self.row_fields()]
        if self.padding_idx is not None and self.other_paddings:
            rows[list(self.other_paddings)] = self.padding_idx
        return rows

    def _padding_rows(self) -> list[int]:
        """Rows that do not train and count for nothing."""
        return [] if self.padding_idx is None else [self.padding_idx, *self.other_paddings]

    def update_schedule(self, progress: float) -> None:
        """Tell the layer which share of training is done: sets temperature and size noise.

        Temperature goes geometrically from `temperature` to `final_temperature`, which it reaches
        at `freeze_at`; size noise is on before `freeze_at` and off from there.

        Raises:
            ValueError: progress is outside 0..1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be a share of training in 0..1, got {progress!r}")
        self.progress = float(progress)
        # Booleans and tensors, not the progress itself: torch.compile would recompile every step.
        self._noise_on = progress < self.freeze_at
        first, last = self.options.temperature, self.options.final_temperature
        if self.head is not None and last is not None:
            share = min(1.0, progress / self.freeze_at) if self.freeze_at > 0 else 1.0
            self.head.set_temperature(first * (last / first) ** share)

    def _head(self) -> SizeHead:
        # Not by its name, which a module looks for in three places.
        head: SizeHead | None = self._modules["head"]  # type: ignore[assignment]
        if head is None:
            raise RuntimeError(
                "this layer was loaded from a packed file and has no size head; thaw(counts=...) "
                "makes one"
            )
        return head

    def _named(self, error: IndexError) -> IndexError:
        text = str(error)
        if self.tier_ends is not None:
            # The operator knows the stored rows only.
            text = text.replace(f" {self.tier_ends[-1]} rows", f" {self.num_embeddings} rows")
        return IndexError(f"table {self.name!r}: {text}" if self.name else text)

    def _noisy(self) -> bool:
        return self.training and self._noise_on and self._head().size_noise > 0

    def _notice_learning(self, sizes: Tensor) -> None:
        """Refuse to go on if an optimizer has the table and none its sizes, which want to learn.

        Where the table changes in another way, as by hand, it is warned of once.
        """
        if not self.training or self._untaught < 0 or not torch.is_grad_enabled():
            return
        head, weight = self._head(), self._parameters.get("weight")
        if not head.trains:
            self._untaught = -1
            return
        if being_traced() or type(weight) is not nn.Parameter:
            return
        # nn.Module takes four microseconds to set an attribute.
        before, self.__dict__["_noticed"] = self._noticed, (sizes, weight._version)
        if before is None or before[0] is not sizes or before[1] == weight._version:
            return
        self._untaught += 1
        if self._untaught not in (1, PATIENCE):
            return
        trainable = [p for p in head.parameters() if p.requires_grad]
        if not trainable or optimizers_of(trainable):
            self._untaught = -1
            return
        message = (
            f"table {self.name!r} is trained, but what learns its sizes is in no optimizer, so "
            'they stay as they started: optimizer.add_param_group({"params": '
            'amtl.mask_parameters(model), "lr": 1e-2}), or requires_grad_(False) on these if the '
            'sizes are to stay, or parametrization="rule"'
        )
        if optimizers_of([weight]):
            self._untaught = 0
            raise RuntimeError(message)
        if self._untaught == PATIENCE:
            self._untaught = -1
            warnings.warn(message, stacklevel=4)

    def _check_caller(self) -> None:
        """Refuse transformations that cannot see into the operators, with the reason."""
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            if torch.onnx.is_in_onnx_export() or (
                torch.compiler.is_exporting() and _exports_to_onnx()
            ):
                raise RuntimeError(
                    "ONNX has no operator for rows of different widths: export what "
                    "amtl.revert(model, masked=True) makes, a dense model with the same outputs"
                )
            return
        refuse_transforms("AMTL layers")
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(parameter).tangent is not None
            for parameter in (*self._table(), *self.mask_parameters())
        ):
            raise RuntimeError(
                "AMTL layers have no forward-mode derivative: use autograd (backward, "
                "torch.autograd.grad)"
            )

    def _call(self, lookup: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A lookup of `amtl_kernels`, which updates the table in the backward if that is wished."""
        optimizer = self.fused_optimizer
        tables = self._table() if optimizer is not None and torch.is_grad_enabled() else ()
        trains = tables and (any(table.requires_grad for table in tables) or self.masterless)
        if optimizer is None or not trains:
            return lookup(*args, **kwargs, sparse=self.sparse)
        refuse_replicas(tables, self.name)
        refuse_repetition(self._updated, self.name)
        fused = lookup(*args, **kwargs, optimizer=optimizer)
        return watch(fused, optimizer, self._updated, self.name)

    def _seed(self, noisy: bool) -> int:
        if noisy and not torch.compiler.is_compiling() and torch._C._is_tracing():
            raise RuntimeError(
                "torch.jit.trace would record one draw of the size noise for ever: call eval() "
                "first, or freeze()"
            )
        return draw_seed(self._seed_offset) if noisy else 0

    def _renorm(self, indices: Tensor) -> None:
        """Scale looked-up rows of the table to at most `max_norm`, in place, as nn.Embedding."""
        assert self.max_norm is not None
        if self.steps is not None:
            return
        with torch.no_grad():
            flat = indices.reshape(-1)
            if self.options.bounds_check == "clamp":
                flat = flat.clamp(0, self.num_embeddings - 1)
            if self.tier_ends is None:
                assert self.weight is not None
                torch.embedding_renorm_(self.weight.detach(), flat, self.max_norm, self.norm_type)
                return
            start = 0
            for block, end in zip(self.blocks, self.tier_ends, strict=True):
                if block.shape[1]:
                    local = flat[(flat >= start) & (flat < end)] - start
                    torch.embedding_renorm_(block.detach(), local, self.max_norm, self.norm_type)
                start = end

    def _mapped(self, indices: Tensor, lookup: Callable[[Tensor], Tensor]) -> Tensor:
        """Other row numbers for indices; those out of range stay so, for the operator."""
        if self.options.bounds_check == "off" or self.num_embeddings == 0:
            return lookup(indices)
        if indices.is_cpu and not being_traced() and type(indices) is Tensor and indices.numel():
            # Without temporaries of the size of the indices, which cost more than the lookup.
            low, high = torch.aminmax(indices)
            if int(low) >= 0 and int(high) < self.num_embeddings:
                return lookup(indices)
        inside = (indices >= 0) & (indices < self.num_embeddings)
        rows = lookup(indices.clamp(0, self.num_embeddings - 1))
        if self.options.bounds_check == "raise":
            return torch.where(inside, rows, indices)
        if not torch.compiler.is_compiling() and not bool(inside.all()):
            position = int((~inside).flatten().nonzero()[0])
            amtl_kernels.reference.warn_clamped(
                int(indices.flatten()[position]), position, self.num_embeddings
            )
        return rows

    def _frozen_rows(self, indices: Tensor) -> Tensor:
        """Indices in the numbering of the tiers."""
        require_rows(indices)
        self._announce()
        assert self.tier_ends is not None
        order, places = self._buffers["row_order"], self.tier_ends[-1]
        if order is not None:
            if not self.training and not being_traced() and version_of(order) != self._order_seen:
                require_places(order, places, self.name)
                self._order_seen = version_of(order)

            def lookup(rows: Tensor) -> Tensor:
                # Four times as fast as brackets.
                if rows.dim() == 1:
                    return order.index_select(0, rows)
                return order.index_select(0, rows.reshape(-1)).view(rows.shape)

            if indices.is_cpu and not being_traced() and type(indices) is Tensor:
                try:
                    # Looks at each index itself.
                    return lookup(indices)
                except IndexError:
                    pass
            return self._mapped(indices, lookup)
        if places == self.num_embeddings:
            return indices
        assert self.shared_rows is not None
        shared = self.shared_rows[-1]
        return self._mapped(indices, lambda rows: torch.where(rows >= places, shared, rows))

    def _searched_rows(self, indices: Tensor, sizes: Tensor) -> Tensor:
        """Indices, with the shared row for rows of groups that have size 0 without noise."""
        require_rows(indices)
        stand_in = self._redirect(sizes)
        if stand_in is None:
            return indices
        group, padding = self.row_group, self.padding_idx
        assert group is not None

        def lookup(rows: Tensor) -> Tensor:
            of_rows = group.index_select(0, rows.reshape(-1))
            other = stand_in.index_select(0, of_rows).view(rows.shape)
            moves = other >= 0 if padding is None else (other >= 0) & (rows != padding)
            return torch.where(moves, other.to(rows.dtype), rows)

        return self._mapped(indices, lookup)

    def _redirect(self, sizes: Tensor) -> Tensor | None:
        """What stands in for the rows of each group, int32 [G], -1 for themselves; None for nobody.

        Once per solution of the sizes. A GPU is not waited for: there somebody always does.
        """
        if self.shared_rows is None or self.grid.sizes[0] > 0:
            return None
        if self._redirection is not None and self._redirection[0] is sizes:
            return self._redirection[1]
        nothing = sizes == 0
        traced = being_traced() or type(sizes) is not Tensor
        result = None
        if traced or not sizes.is_cpu or bool(nothing.any()):
            shared = self.shared_rows[self._head().group_fields]
            result = torch.where(nothing, shared, -1).to(torch.int32)
        if not traced:
            self._redirection = sizes, result
        return result

    def _operator_bounds(self) -> str:
        """What the operators do about indices out of range."""
        return self.options.bounds_check

    def _frozen_padding(self) -> int | None:
        return self.padding_idx if self._buffers["row_order"] is None else self._tier_padding

    _tier_padding: int | None = None

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able: class, shape, options, tiers."""
        return {
            "class": type(self).__name__,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "sparse": self.sparse,
            "field_sizes": list(self.field_sizes),
            "tier_ends": None if self.tier_ends is None else list(self.tier_ends),
            "tier_width": self.grid.tier_width,
            # Of models of many small tables this would be most of the file.
            **({} if self.full_rows == self.num_embeddings else {"full_rows": self.full_rows}),
            **({} if self.shared_rows is None else {"shared_rows": self.shared_rows.tolist()}),
            **(
                {} if self.full_padding == self.padding_idx else {"full_padding": self.full_padding}
            ),
            **({"other_paddings": list(self.other_paddings)} if self.other_paddings else {}),
            **({"passes_paddings": True} if self._passes_paddings() else {}),
            "options": self.options.given(),
        }

    def extra_repr(self) -> str:
        """As nn.Embedding, then the phase, the budget and what is not default."""
        parts = [f"{self.num_embeddings}, {self.embedding_dim}"]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        if self.max_norm is not None:
            parts.append(f"max_norm={self.max_norm}")
        if self.norm_type != 2:
            parts.append(f"norm_type={self.norm_type}")
        if self.sparse:
            parts.append("sparse=True")
        budget = self.budget if self.budget is None else float(f"{self.budget:.4g}")
        parts.append(f"phase={self.phase!r}, budget={budget}")
        if self.options.bits is not None:
            parts.append(f"bits={self.options.bits}")
        parts.append(f"parametrization={self.options.parametrization!r}")
        if self.fused_optimizer is not None:
            parts.append(f"fused_optimizer={type(self.fused_optimizer).__qualname__}")
        if len(self.field_sizes) > 1:
            parts.append(f"fields={len(self.field_sizes)}")
        if self.tier_ends is not None:
            parts.append(f"tiers={len(self.tier_ends)}, stored={self.stored_fraction():.3f}")
        return ", ".join(parts)
