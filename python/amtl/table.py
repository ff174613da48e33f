"""What `AMTLEmbedding` and `AMTLEmbeddingBag` share: the table and its two phases.

In the search phase it is one dense weight [N, D], and every row shows a prefix of itself,
`e_i = m_i * W[i]`, whose length its frequency group learns. `freeze()` cuts the table into size
tiers: outputs stay bit-identical, memory drops, training goes on. `thaw()` leads back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import amtl_kernels
from amtl.budget import SizeGrid
from amtl.frequency import (
    check_counts,
    check_field_sizes,
    decode_row_map,
    encode_row_map,
    frequency_groups,
)
from amtl.noise import first_seed, next_seed
from amtl.options import SearchOptions
from amtl.sizes import SizeHead
from amtl.tiers import (
    TierPlan,
    as_optimizers,
    drop_parameters,
    freeze_optimizers,
    merge_rows,
    plan_tiers,
    require_held,
    split_rows,
    thaw_optimizers,
)

_Self = TypeVar("_Self", bound="AMTLTable")


class AMTLTable(nn.Module):
    """What the two layers share: the table, its phases, sizes and accounting.

    Not constructed directly. `name` says which table an index error is about; `amtl.convert` and
    `amtl.load` set it to the dotted module name. Attributes of the search phase: `weight` [N, D],
    `row_group` int32 [N], `head`. Of the frozen phase: `blocks`, `tier_ends`, and `row_order`
    (int32 [N], the new row of each row) unless rows kept their order or the caller took it with
    `absorb_order()`.
    """

    weight: nn.Parameter | None
    row_group: Tensor | None
    row_order: Tensor | None
    row_map: Tensor | None
    head: SizeHead | None

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
        options: SearchOptions,
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
        self._describe(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            sparse,
            check_field_sizes(field_sizes, num_embeddings),
            options,
        )
        if weight is None:
            data = amtl_kernels.empty_table(
                num_embeddings, embedding_dim, device=device, dtype=dtype
            )
            self.weight = nn.Parameter(data, requires_grad=requires_grad)
            self.reset_parameters()
        else:
            self.weight = nn.Parameter(weight.contiguous(), requires_grad=requires_grad)
        groups = frequency_groups(
            check_counts(counts, num_embeddings).to(self.weight.device),
            self.field_sizes,
            row_features,
        )
        self.row_group = groups.row_group
        self.grid = options.grid(embedding_dim, self.weight.element_size())
        self.head = options.head(groups, self.grid)

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
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
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
        self._first_seed = first_seed(options.seed)
        self._seed_counter = torch.tensor(self._first_seed)
        self._mask_places: list[tuple[int, int]] = []
        self.register_parameter("weight", None)
        self.register_buffer("row_group", None, persistent=False)
        self.register_buffer("row_map", None)
        self.register_buffer("row_order", None)
        self.blocks = nn.ParameterList()
        self.register_module("head", None)

    @classmethod
    def from_config(
        cls: type[_Self],
        config: Mapping[str, Any],
        blocks: Sequence[Tensor],
        row_order: Tensor | None = None,
    ) -> _Self:
        """A frozen layer from `config()` and its tensors, without a size head.

        Args:
            config: what `config()` returned.
            blocks: the tiers, used as they are (not copied).
            row_order: int32 [N] or None.

        Raises:
            ValueError: tensors that do not fit the configuration.
        """
        ends = tuple(config["tier_ends"])
        dim = config["embedding_dim"]
        rows = [end - start for start, end in zip((0, *ends), ends, strict=False)]
        fits = len(blocks) == len(ends) > 0 and ends[-1] == config["num_embeddings"]
        for block, count in zip(blocks, rows, strict=False):
            fits = fits and block.dim() == 2 and block.shape[0] == count >= 0
            fits = fits and 1 <= block.shape[1] <= dim
        if row_order is not None:
            fits = fits and tuple(row_order.shape) == (config["num_embeddings"],)
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
        layer.grid = SizeGrid(
            dim, layer.options.min_dim, layer.options.granularity, config["tier_width"]
        )
        layer._configure(config)
        layer._enter_frozen([nn.Parameter(b) for b in blocks], ends, row_order)
        return layer

    def _configure(self, config: Mapping[str, Any]) -> None:
        """Attributes of a subclass, from `config()`."""

    def reset_parameters(self) -> None:
        """Draw weights from N(0, weight_std^2), the padding row zero, as nn.Embedding does."""
        if self.weight is None:
            raise RuntimeError("reset_parameters() needs the search phase; call thaw() first")
        nn.init.normal_(self.weight, std=self.options.weight_std)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

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
        """Type of the table."""
        return self._table()[0].dtype

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

    def _table(self) -> list[nn.Parameter]:
        return list(self.blocks) if self.weight is None else [self.weight]

    def table_parameters(self) -> list[nn.Parameter]:
        """The table: `[weight]`, or the blocks once frozen."""
        return self._table()

    def mask_parameters(self) -> list[nn.Parameter]:
        """What learns the sizes; give it a learning rate of its own. Empty once frozen."""
        if self.head is None or self.tier_ends is not None:
            return []
        return list(self.head.parameters())

    def group_dims(self) -> Tensor:
        """Size of each group without noise, int32 [G]."""
        return self._head().sizes().to(torch.int32)

    def row_dims(self) -> Tensor:
        """Size of each row, int32 [N]; once frozen, its stored width, which training may use."""
        if self.tier_ends is None:
            assert self.row_group is not None
            return self.group_dims()[self.row_group]
        widths = torch.tensor([block.shape[1] for block in self.blocks], dtype=torch.int32)
        ends = torch.tensor((0, *self.tier_ends))
        dims = widths.repeat_interleave(ends.diff()).to(self.device)
        return dims if self.row_order is None else dims[self.row_order]

    def row_fields(self) -> Tensor:
        """Field of each row, int64 [N]."""
        groups = self.row_group
        if groups is None:
            if self.row_map is None:
                raise RuntimeError("a layer loaded from a packed file knows no fields")
            groups = decode_row_map(self.row_map, self.num_embeddings)
        return self._head().group_fields[groups]

    def stored_fraction(self) -> float:
        """Weights stored after freezing, over N * D; tier rounding included."""
        if self.tier_ends is None:
            return self._head().stored_fraction()
        stored = sum(block.numel() for block in self.blocks)
        return stored / max(1, self.num_embeddings * self.embedding_dim)

    def stored_bytes(self) -> int:
        """Bytes of the frozen table: weights, and `row_order` while it is kept.

        In the search phase: what the weights would take if sizes were frozen now.
        """
        if self.tier_ends is None:
            size = self.num_embeddings * self.embedding_dim
            return round(self.stored_fraction() * size) * self._table()[0].element_size()
        order = 0 if self.row_order is None else self.row_order.nbytes
        return sum(block.nbytes for block in self.blocks) + order

    def dense_bytes(self) -> int:
        """Bytes of the same table as an nn.Embedding."""
        return self.num_embeddings * self.embedding_dim * self._table()[0].element_size()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """What an nn.Embedding with the same outputs holds (without noise): new, dense [N, D]."""
        if self.weight is not None:
            columns = torch.arange(self.embedding_dim, device=self.device)
            return self.weight.masked_fill(columns >= self.row_dims()[:, None], 0)
        return merge_rows([b.detach() for b in self.blocks], self._plan(), self.embedding_dim)

    def _plan(self) -> TierPlan:
        assert self.tier_ends is not None
        order = None
        if self.row_order is not None:
            order = torch.empty(self.num_embeddings, dtype=torch.int64, device=self.device)
            order[self.row_order] = torch.arange(self.num_embeddings, device=self.device)
        return TierPlan(tuple(b.shape[1] for b in self.blocks), self.tier_ends, order)

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
        if self.head is None:
            raise RuntimeError(
                "this layer was loaded from a packed file and has no size head; thaw(counts=...) "
                "makes one"
            )
        return self.head

    def _named(self, error: IndexError) -> IndexError:
        return IndexError(f"table {self.name!r}: {error}") if self.name else error

    def _noisy(self) -> bool:
        return self.training and self._noise_on and self._head().size_noise > 0

    def _seed(self, noisy: bool) -> int:
        return next_seed(self._seed_counter) if noisy else 0

    def _renorm(self, indices: Tensor) -> None:
        """Scale looked-up rows of the table to at most `max_norm`, in place, as nn.Embedding."""
        assert self.max_norm is not None
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
                local = flat[(flat >= start) & (flat < end)] - start
                torch.embedding_renorm_(block.detach(), local, self.max_norm, self.norm_type)
                start = end

    def _frozen_rows(self, indices: Tensor) -> Tensor:
        """Indices in the numbering of the tiers; those out of range stay so, for the operator."""
        order = self.row_order
        if order is None:
            return indices
        if self.options.bounds_check == "off":
            return order[indices]
        inside = (indices >= 0) & (indices < self.num_embeddings)
        rows = order[indices.clamp(0, self.num_embeddings - 1)]
        if self.options.bounds_check == "raise":
            return torch.where(inside, rows, indices)
        if not torch.compiler.is_compiling() and not bool(inside.all()):
            position = int((~inside).flatten().nonzero()[0])
            amtl_kernels.reference.warn_clamped(
                int(indices.flatten()[position]), position, self.num_embeddings
            )
        return rows

    def _frozen_padding(self) -> int | None:
        return self._tier_padding if self.row_order is not None else self.padding_idx

    _tier_padding: int | None = None

    def freeze(self: _Self, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> _Self:
        """Fix the sizes and cut the table into tiers; outputs (without noise) stay bit-identical.

        Rows are ordered by falling stored width, stable, so a table in frequency order whose sizes
        fall with frequency keeps its order. Otherwise the layer keeps `row_order` (4 bytes a row)
        until `absorb_order()`. Padding inside a tier starts at zero; its bytes are paid for, so
        training goes on in it. The dense weight is released; until then both exist. O(N * D).

        Args:
            optimizer: the optimizer(s) of the table and the mask. The blocks take the place of the
                weight in its parameter group, with their state; mask parameters are dropped.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is frozen already.
            ValueError: the table is trainable but not in the optimizer.
        """
        if self.tier_ends is not None or self.weight is None or self.row_group is None:
            raise RuntimeError("the layer is frozen already")
        optimizers = as_optimizers(optimizer)
        require_held(optimizers, [self.weight], "freeze")
        head = self._head()
        with torch.no_grad():
            levels = head.levels()
            small = torch.uint8 if self.embedding_dim <= 255 else torch.int32
            group = self.row_group.to(torch.int64)
            stored = torch.tensor(self.grid.stored, dtype=small, device=self.device)[levels][group]
            row_dims = head.get_buffer("size_table")[levels].to(small)[group]
            del group
            plan = plan_tiers(stored, self.embedding_dim)
            trainable = self.weight.requires_grad
            blocks = [
                nn.Parameter(block, requires_grad=trainable)
                for block in split_rows(self.weight.detach(), plan, row_dims)
            ]
            freeze_optimizers(optimizers, self.weight, blocks, plan, row_dims)
            self._mask_places = drop_parameters(optimizers, list(head.parameters()))
            for parameter in head.parameters():
                parameter.grad = None
            self.row_map = encode_row_map(self.row_group)
            self._enter_frozen(blocks, plan.ends, plan.places())
        return self

    def _enter_frozen(
        self, blocks: list[nn.Parameter], ends: tuple[int, ...], row_order: Tensor | None
    ) -> None:
        self.weight = None
        self.row_group = None
        self.blocks = nn.ParameterList(blocks)
        self.tier_ends = ends
        self.row_order = row_order
        self._tier_padding = None
        if row_order is not None and self.padding_idx is not None:
            self._tier_padding = int(row_order[self.padding_idx])

    def thaw(
        self: _Self,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        counts: object = None,
    ) -> _Self:
        """Back to the search phase: a dense weight, zeros beyond the stored widths.

        The size head continues where it was, so rows show their searched size again; what frozen
        training put into the padding of a tier is kept in the weight, but masked.

        Args:
            optimizer: as in `freeze`; state is merged, mask parameters return without state.
            counts: needed for a layer loaded from a packed file only: [N], in the layer's present
                row numbering. One field is assumed.

        Returns:
            The layer.

        Raises:
            RuntimeError: the layer is in the search phase, or counts are missing.
        """
        if self.tier_ends is None:
            raise RuntimeError("the layer is in the search phase already")
        optimizers = as_optimizers(optimizer)
        blocks = list(self.blocks)
        require_held(optimizers, blocks[:1], "thaw")
        if counts is not None:
            groups = frequency_groups(
                check_counts(counts, self.num_embeddings).to(self.device), None
            )
            self.field_sizes = [self.num_embeddings]
            self.head = self.options.head(groups, self.grid)
            self.row_map = encode_row_map(groups.row_group)
        head = self._head()
        assert self.row_map is not None
        plan = self._plan()
        with torch.no_grad():
            dense = merge_rows([b.detach() for b in blocks], plan, self.embedding_dim)
            weight = nn.Parameter(dense, requires_grad=blocks[0].requires_grad)
            thaw_optimizers(optimizers, weight, blocks, plan)
            self._restore_mask(optimizers, weight, head)
            self._enter_search(weight, decode_row_map(self.row_map, self.num_embeddings))
        return self

    def _restore_mask(
        self, optimizers: list[Optimizer], weight: nn.Parameter, head: SizeHead
    ) -> None:
        """Put mask parameters back into the group they came from, else into the table's."""
        parameters = list(head.parameters())
        for number, optimizer in enumerate(optimizers):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            missing = [p for p in parameters if id(p) not in held]
            places = [g for o, g in self._mask_places if o == number]
            if len(places) == len(parameters) and max(places, default=-1) < len(
                optimizer.param_groups
            ):
                targets = [optimizer.param_groups[g] for g in places]
            elif not self._mask_places and id(weight) in held:
                table = next(
                    g for g in optimizer.param_groups if any(p is weight for p in g["params"])
                )
                targets = [table] * len(parameters)
            else:
                continue
            for parameter, group in zip(parameters, targets, strict=True):
                if any(parameter is p for p in missing):
                    group["params"].append(parameter)
                    if group.get("param_names") is not None:
                        group["param_names"].append(f"mask.{len(group['params'])}")
        self._mask_places = []

    def _enter_search(self, weight: nn.Parameter, row_group: Tensor) -> None:
        self.weight = weight
        self.row_group = row_group
        self.row_map = None
        self.row_order = None
        self._tier_padding = None
        self.blocks = nn.ParameterList()
        self.tier_ends = None

    def absorb_order(self) -> Tensor:
        """Hand the row order over: from now on the layer expects new row numbers.

        Returns:
            int32 [N]: old row -> new row, the identity if rows kept their order. Rows of several
            fields interleave. Renumber the vocabulary with it.

        Raises:
            RuntimeError: the layer is not frozen.
        """
        if self.tier_ends is None:
            raise RuntimeError("absorb_order() needs a frozen layer; call freeze() first")
        order = self.row_order
        if order is None:
            return torch.arange(self.num_embeddings, dtype=torch.int32, device=self.device)
        if self.row_map is not None:
            groups = decode_row_map(self.row_map, self.num_embeddings)
            moved = torch.empty_like(groups)
            moved[order] = groups
            self.row_map = encode_row_map(moved)
        self.padding_idx = self._tier_padding
        self.row_order = None
        self._tier_padding = None
        return order

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.row_group is not None:
            destination[prefix + "row_map"] = encode_row_map(self.row_group)
        if self.tier_ends is not None:
            destination[prefix + "tier_ends"] = torch.tensor(self.tier_ends)
        # absorb_order() moves the padding row, so it is part of the state.
        padding = -1 if self.padding_idx is None else self.padding_idx
        steps = int(self._seed_counter) - self._first_seed
        destination[prefix + "schedule"] = torch.tensor(
            [steps, self.progress, padding], dtype=torch.float64
        )

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
        schedule = state_dict.pop(prefix + "schedule", None)
        if schedule is not None:
            self._seed_counter = torch.tensor(self._first_seed + int(schedule[0]))
            self.update_schedule(float(schedule[1]))
            if self.padding_idx is not None and schedule[2] >= 0:
                self.padding_idx = int(schedule[2])
        ends = state_dict.pop(prefix + "tier_ends", None)
        row_map = state_dict.get(prefix + "row_map")
        if ends is not None:
            self._adopt_tiers(state_dict, prefix, tuple(ends.tolist()), error_msgs)
            self.row_map = None if row_map is None else torch.empty_like(row_map).to(self.device)
        elif prefix + "weight" in state_dict:
            loaded = state_dict[prefix + "weight"]
            if self.weight is None and tuple(loaded.shape) == (
                self.num_embeddings,
                self.embedding_dim,
            ):
                self._adopt_weight()
            state_dict.pop(prefix + "row_map", None)
            if row_map is not None:
                self.row_group = decode_row_map(row_map, self.num_embeddings).to(self.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.tier_ends is not None and self.row_order is not None:
            self._enter_frozen(list(self.blocks), self.tier_ends, self.row_order)

    def _adopt_tiers(
        self, state_dict: dict[str, Any], prefix: str, ends: tuple[int, ...], errors: list[str]
    ) -> None:
        """Take the frozen phase with room for the tiers of a state dict."""
        loaded = [state_dict.get(f"{prefix}blocks.{c}") for c in range(len(ends))]
        widths = [int(b.shape[1]) for b in loaded if b is not None]
        if (
            not ends
            or ends[-1] != self.num_embeddings
            or len(widths) != len(ends)
            or max(widths) > self.embedding_dim
        ):
            errors.append(
                f"{prefix}tier_ends: tiers that end at {ends} with widths {widths} do not fit a "
                f"table [{self.num_embeddings}, {self.embedding_dim}]"
            )
            return
        like = self._table()[0]
        starts = (0, *ends)
        blocks = [
            nn.Parameter(
                like.new_empty(end - start, width, requires_grad=False),
                requires_grad=like.requires_grad,
            )
            for start, end, width in zip(starts, ends, widths, strict=False)
        ]
        order = state_dict.get(prefix + "row_order")
        room = None if order is None else torch.zeros_like(order, device=like.device)
        padding, self.padding_idx = self.padding_idx, None
        self._enter_frozen(blocks, ends, room)
        self.padding_idx = padding

    def _adopt_weight(self) -> None:
        """Take the search phase with room for a dense weight."""
        like = self._table()[0]
        weight = nn.Parameter(
            like.new_empty(self.num_embeddings, self.embedding_dim, requires_grad=False),
            requires_grad=like.requires_grad,
        )
        assert self.row_map is not None
        self._enter_search(weight, decode_row_map(self.row_map, self.num_embeddings))

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
            "options": {**asdict(self.options), "mask_hidden": list(self.options.mask_hidden)},
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
        parts.append(f"phase={self.phase!r}, budget={self.budget}")
        parts.append(f"parametrization={self.options.parametrization!r}")
        if len(self.field_sizes) > 1:
            parts.append(f"fields={len(self.field_sizes)}")
        if self.tier_ends is not None:
            parts.append(f"tiers={len(self.tier_ends)}, stored={self.stored_fraction():.3f}")
        return ", ".join(parts)
