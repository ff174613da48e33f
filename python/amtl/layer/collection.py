"""`AMTLEmbeddingCollection`: many tables under one budget, looked up in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.optim import Optimizer

import amtl_kernels
from amtl.layer.frequency import check_counts
from amtl.layer.fusing import FusedOptimizer
from amtl.layer.graphs import record, refuse_script
from amtl.layer.replicas import retire, wrappers_of
from amtl.layer.size_head import being_traced
from amtl.layer.table import AMTLTable
from amtl.layer.table_rows import require_rows
from amtl.layer.tiers import optimizers_of, unite_parameters
from amtl_kernels._calls import kind


class AMTLEmbeddingCollection(AMTLTable):
    """Many tables of one width whose rows learn their own under one common budget.

    Inside it is one table over the rows of all: one lookup, one solution for all sizes, one weight
    in the search and one set of tiers once frozen, whatever the number of tables. The budget goes
    where counts say, across tables; `field_weights` shifts it from one to another.

    Frozen, it keeps `row_order`, 4 bytes a row, for tiers of several tables interleave. Of few bits
    that is so, and in files, only where the budget does not hold all rows at one width.

    Padding rows of several tables are one: the first table's that has one is looked up for all,
    and once frozen the others take no place. The attribute `padding_idx` is its number among the
    rows of all tables.

    Args:
        num_embeddings: rows of each table, by name; without names they are called "0", "1", ...
        embedding_dim: D >= 1, of all tables.
        mode: "sum" or "mean", of bags.
        max_norm, norm_type, sparse, device, dtype: as in nn.Embedding.
        _weight: initial table [N, D], the tables one below the other. _freeze: it does not train.
        counts: training counts [N_t] of each table, by name or in order.
        padding_idx: a row of each table without gradient, which in bags counts for nothing, by
            name or in order; None, or a name left out: a table has none. Padding rows of `_weight`
            are equal.
        shared_rows: where rows of size 0 are looked up: a row of each table, by name or in order,
            or "rarest"; None or "zero": they give zeros.
        fused_optimizer: see `AMTLEmbedding`.
        **options: see `SearchOptions`; `budget` is that of all tables together.

    Raises:
        ValueError: an argument out of range, missing counts, or a budget that cannot be met.
    """

    starts: Tensor
    sizes: Tensor
    paddings: Tensor
    _keeps_numbering = True

    def __init__(
        self,
        num_embeddings: Mapping[str, int] | Sequence[int],
        embedding_dim: int,
        mode: str = "sum",
        max_norm: float | None = None,
        norm_type: float = 2.0,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        counts: Mapping[str, object] | Sequence[object],
        padding_idx: Mapping[str, int | None] | Sequence[int | None] | None = None,
        shared_rows: Mapping[str, int] | Sequence[int] | str | None = None,
        fused_optimizer: FusedOptimizer | None = None,
        **options: Any,
    ) -> None:
        if mode not in ("sum", "mean"):
            raise ValueError(f"mode must be 'sum' or 'mean', got {mode!r}")
        if not isinstance(num_embeddings, Mapping):
            num_embeddings = {str(t): rows for t, rows in enumerate(num_embeddings)}
        if not num_embeddings or min(num_embeddings.values()) < 1:
            raise ValueError(f"a collection needs tables of at least one row, got {num_embeddings}")
        names, rows = list(num_embeddings), list(num_embeddings.values())
        given = _in_order("counts", counts, names)
        starts = [sum(rows[:t]) for t in range(len(rows))]
        shared: Any = shared_rows
        if shared_rows is not None and not isinstance(shared_rows, str):
            local = _in_order("shared_rows", shared_rows, names)
            shared = [start + int(row) for start, row in zip(starts, local, strict=True)]
        paddings = _padding_rows(padding_idx, dict(zip(names, rows, strict=True)))
        paddings = {name: starts[names.index(name)] + row for name, row in paddings.items()}
        if _weight is not None and len(_weight) == sum(rows):
            _check_paddings({name: _weight[row] for name, row in paddings.items()})
        padding = list(paddings.values())
        every = [check_counts(c, n) for c, n in zip(given, rows, strict=True)]
        super().__init__(
            sum(rows),
            embedding_dim,
            padding[0] if padding else None,
            max_norm,
            norm_type,
            False,
            sparse,
            _weight,
            not _freeze,
            device,
            dtype,
            torch.cat(every),
            rows,
            None,
            shared,
            options,
            padding[1:],
        )
        self._hold_names(names, mode)
        self.fuse(fused_optimizer)

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Mapping[str, nn.Embedding | nn.EmbeddingBag],
        counts: Mapping[str, object],
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        **options: Any,
    ) -> AMTLEmbeddingCollection:
        """A collection with the weights of a model's embeddings, trained or not.

        In optimizers that hold them, its one weight takes the place of theirs, with their state.

        Args:
            embeddings: by name, of one width, type and device, without `max_norm`, their padding
                rows equal.
            counts: training counts [N_t] by name.
            optimizer: the optimizer(s) that hold the weights. None: those found in the process.
            **options: of the collection. `mode` is that of the embeddings if they are bags.

        Raises:
            ValueError: embeddings that do not go into one collection.
        """
        modules = list(embeddings.values())
        check_alike(embeddings)
        if isinstance(modules[0], nn.EmbeddingBag):
            options.setdefault("mode", modules[0].mode)
        weights: list[Any] = [module.weight for module in modules]
        trains = any(weight.requires_grad for weight in weights)
        with torch.no_grad():
            made = cls(
                {name: module.num_embeddings for name, module in embeddings.items()},
                modules[0].embedding_dim,
                sparse=modules[0].sparse,
                _weight=torch.cat([weight.detach() for weight in weights]),
                _freeze=not trains,
                counts=counts,
                padding_idx=[module.padding_idx for module in modules],
                **options,
            )
        made.train(modules[0].training)
        if optimizer is None:
            optimizers = optimizers_of(weights)
        else:
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        unite_parameters(optimizers, made.table_parameters()[0], weights)
        retire(wrappers_of(weights))
        return made

    def _hold_names(self, names: Sequence[str], mode: str) -> None:
        self.names, self.mode = list(names), mode
        self._table_of = {name: t for t, name in enumerate(self.names)}
        sizes = torch.tensor(self.field_sizes, dtype=torch.int64)
        self.register_buffer("sizes", sizes.to(self.device), persistent=False)
        starts = sizes.cumsum(0) - sizes
        self.register_buffer("starts", starts.to(self.device), persistent=False)
        padding = self._padding_rows()
        owners = torch.bucketize(torch.tensor(padding, dtype=torch.int64), starts, right=True) - 1
        self._padding_of = dict(zip(owners.tolist(), padding, strict=True))
        if self.other_paddings:
            # Of tables without one that of another, which is no row of theirs.
            rows = [self._padding_of.get(t, self.padding_idx) for t in range(len(sizes))]
            paddings = torch.tensor(rows, device=self.device)
            self.register_buffer("paddings", paddings, persistent=False)

    def _number_fields(self) -> None:
        self._hold_names(self.names, self.mode)

    def _by_field(self, counts: object) -> list[Any] | None:
        named = isinstance(counts, Mapping) and any(isinstance(key, str) for key in counts)
        return super()._by_field(_in_order("counts", counts, self.names) if named else counts)

    def _example_of_counts(self) -> str:
        return f"{{{self.names[0]!r}: its_counts, ...}}"

    def _configure(self, config: Mapping[str, Any]) -> None:
        self._unnamed = (config["names"], config["mode"])

    def _enter_frozen(
        self, blocks: list[nn.Parameter], ends: tuple[int, ...], row_order: Tensor | None
    ) -> None:
        super()._enter_frozen(blocks, ends, row_order)
        # A layer from a file has a device only now.
        unnamed = self.__dict__.pop("_unnamed", None)
        if unnamed is not None:
            self._hold_names(*unnamed)

    def config(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able."""
        return {**super().config(), "names": list(self.names), "mode": self.mode}

    def forward(
        self,
        input: Tensor | Mapping[str, Tensor],
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look rows of all T tables up.

        Args:
            input: int32 or int64. Without offsets one row of each table: [..., T], or by name
                tensors of one shape [...]. With them bags: [L], concatenated by table.
            offsets: [T * B + 1], as in FBGEMM: bag b of table t is
                `input[offsets[t * B + b] : offsets[t * B + b + 1]]`.
            per_sample_weights: like `input`, of bags with mode "sum".

        Returns:
            [..., T, D], or [B, T, D] of bags.

        Raises:
            IndexError: an index outside its table (`bounds_check="raise"`).
            TypeError: an argument is no tensor.
            ValueError: shapes, types or devices do not fit.
        """
        if isinstance(input, Mapping):
            if input.keys() != self._table_of.keys():
                raise ValueError(f"input must name the tables {self.names}, it names {list(input)}")
            input = self._stacked(input)
        if isinstance(input, Proxy):
            return record(self, "forward", input, input, offsets, per_sample_weights)
        if offsets is None:
            if per_sample_weights is not None:
                raise ValueError("per_sample_weights go with bags, which need offsets")
            return self._embed(self._rows(input))
        return self._pooled(input, offsets, per_sample_weights)

    def lookup(self, names: str | Sequence[str], input: Tensor) -> Tensor:
        """Rows of one table, or of some.

        Args:
            names: one table; or S, the same one more than once if need be.
            input: int32 or int64: any shape for one table, [..., S] for some.

        Returns:
            `input.shape + [D]`.

        Raises:
            KeyError: no such table.
            IndexError: an index outside its table (`bounds_check="raise"`).
            TypeError: no tensor.
            ValueError: shapes or types do not fit.
        """
        if isinstance(input, Proxy):
            return record(self, "lookup", input, names, input)
        require_rows(input)
        if isinstance(names, str):
            table = self._number(names)
            return self._embed(self._rows(input[..., None], [table]).squeeze(-1))
        chosen = [self._number(name) for name in names]
        return self._embed(self._rows(input, None if list(names) == self.names else chosen))

    def table(self, name: str) -> CollectedTable:
        """A module that looks one table up, to stand where an nn.Embedding stood.

        Raises:
            KeyError: no such table.
        """
        return CollectedTable(self, name)

    def padding_of(self, name: str) -> int | None:
        """The padding row of a table, counted from its first row; None if it has none.

        Raises:
            KeyError: no such table.
        """
        table = self._number(name)
        row = self._padding_of.get(table)
        return None if row is None else row - self.field_offsets[table]

    def _number(self, name: str) -> int:
        """Which table it is."""
        if name not in self._table_of:
            raise KeyError(f"no table {name!r}; the collection has {self.names}")
        return self._table_of[name]

    def _stacked(self, input: Mapping[str, Tensor]) -> Tensor:
        """Rows by name as rows of each table, [..., T]."""
        try:
            stacked = torch.stack([input[name] for name in self.names], -1)
            fits = not isinstance(stacked, Tensor) or not stacked.dtype.is_floating_point
        except (TypeError, RuntimeError):
            fits = False
        if fits:
            return stacked
        for name in self.names:
            require_rows(input[name], f"input[{name!r}]")
        found = {name: (*input[name].shape, str(input[name].device)) for name in self.names}
        raise ValueError(f"input must hold tensors of one shape on one device, got {found}")

    def _rows(self, input: Tensor, tables: list[int] | None = None) -> Tensor:
        """Rows of the common table for [..., S] rows of these tables, of all for None."""
        self._check_caller()
        require_rows(input)
        starts, sizes = self.starts, self.sizes
        if tables is not None:
            starts, sizes = starts[tables], sizes[tables]
        if not input.dim() or input.shape[-1] != len(starts):
            raise ValueError(
                f"indices must be [..., {len(starts)}], one for each table, got "
                f"{tuple(input.shape)}; with offsets they are bags"
            )
        rows = self._inside(input, starts, sizes, tables)
        if self.other_paddings and self.tier_ends is None:
            paddings = self.paddings if tables is None else self.paddings[tables]
            rows = self._one_padding(rows, paddings)
        return rows

    def _one_padding(self, rows: Tensor, paddings: Tensor) -> Tensor:
        """These rows, with one padding row for that of each one's table; frozen, none needs it."""
        assert self.padding_idx is not None
        return torch.where(rows == paddings, self.padding_idx, rows)

    def _inside(
        self, input: Tensor, starts: Tensor, sizes: Tensor, tables: list[int] | None
    ) -> Tensor:
        """Rows of the common table, as `bounds_check` wants those outside of theirs."""
        bounds = self.options.bounds_check
        if bounds == "off" or not input.numel():
            return input + starts
        if self._traces():
            inside = (input >= 0) & (input < sizes)
            if bounds == "clamp":
                return torch.minimum(input.clamp(min=0), sizes - 1) + starts
            return torch.where(inside, input + starts, -1)
        # Nothing of the size of the input is made for that, which would cost more than the lookup.
        highest = input.reshape(-1, len(starts)).amax(0)
        if int(input.min()) < 0 or bool((highest >= sizes).any()):
            self._outside(input, sizes, tables)
            input = torch.minimum(input.clamp(min=0), sizes - 1)
        return input + starts

    def _outside(self, input: Tensor, sizes: Tensor, tables: list[int] | None) -> None:
        """Refuse, or warn of, indices [..., S] that are not all inside tables of these sizes."""
        flat = input.reshape(-1, len(sizes))
        position, column = ((flat < 0) | (flat >= sizes)).nonzero()[0].tolist()
        table = column if tables is None else tables[column]
        self._complain(int(flat[position, column]), position, table)

    def _pooled(self, input: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        tables = len(self.names)
        self._check_caller()
        require_rows(input)
        require_rows(offsets, "offsets")
        if input.dim() != 1 or offsets.dim() != 1 or (len(offsets) - 1) % tables:
            raise ValueError(
                f"bags are indices [L] and offsets [{tables} * B + 1], got {tuple(input.shape)} "
                f"and {tuple(offsets.shape)}"
            )
        bags = (len(offsets) - 1) // tables
        if not bags:
            return torch.zeros(0, tables, self.embedding_dim, dtype=self.dtype, device=self.device)
        lengths = offsets[::bags].diff()
        end = int(offsets[-1])
        if bool((lengths < 0).any()) or not 0 <= end <= len(input):
            raise ValueError("offsets must start at 0, never decrease and end within the indices")
        input = input[:end]
        if isinstance(weights, Tensor):
            weights = weights[:end]
        table = torch.repeat_interleave(lengths, output_size=end)
        bounds, sizes = self.options.bounds_check, self.sizes[table]
        if bounds != "off":
            outside = (input < 0) | (input >= sizes)
            if bool(outside.any()):
                position = int(outside.nonzero()[0])
                which = int(table[position])
                # Counted from the table's first index, as the operators do.
                self._complain(int(input[position]), position - int(offsets[which * bags]), which)
                input = torch.minimum(input.clamp(min=0), sizes - 1)
        rows = input + self.starts[table]
        if self.other_paddings and self.tier_ends is None:
            rows = self._one_padding(rows, self.paddings[table])
        out = self._pool(rows, offsets, weights, self.mode, True)
        return out.view(tables, bags, self.embedding_dim).transpose(0, 1)

    def _complain(self, value: int, position: int, table: int) -> None:
        rows = self.field_sizes[table]
        if self.options.bounds_check == "clamp":
            amtl_kernels.reference.warn_clamped(value, position, rows)
            return
        raise IndexError(
            f"table {self.names[table]!r}: index {value} at position {position} is out of range "
            f"for a table of {rows} rows"
        )

    def _mapped(self, indices: Tensor, lookup: Any) -> Tensor:
        # Inside the tables already; where that is traced, -1 stands for what is not.
        if not self._traces():
            rows: Tensor = lookup(indices)
            return rows
        return super()._mapped(indices, lookup)

    def _operator_bounds(self) -> str:
        return "raise" if self._traces() and self.options.bounds_check == "raise" else "off"

    def _traces(self) -> bool:
        return being_traced()

    def table_bytes(self) -> dict[str, int]:
        """Bytes of the weights that each table stores, or would if sizes were frozen now."""
        table = torch.tensor([self.grid.stored_width(k) for k in range(self.embedding_dim + 1)])
        stored = table.to(self.device)[self.row_dims().long()]
        bits = self.options.bits or 8 * self.dtype.itemsize
        parts = stored.split(self.field_sizes)
        return {name: int(p.sum()) * bits // 8 for name, p in zip(self.names, parts, strict=True)}

    def embeddings(self, *, masked: bool = True) -> dict[str, nn.Embedding]:
        """New nn.Embeddings of the tables, by name.

        Args:
            masked: what the collection shows; False: in the search, all of its weight.
        """
        hidden = self.phase == "search" and not masked
        dense = self.table_parameters()[0].detach().clone() if hidden else self.dense_weight()
        if hidden and self.padding_idx is not None:
            dense[self._padding_rows()] = dense[self.padding_idx].clone()
        return {
            name: nn.Embedding(
                len(part),
                self.embedding_dim,
                padding_idx=self.padding_of(name),
                sparse=self.sparse,
                _weight=part.clone(),
            )
            for name, part in zip(self.names, dense.split(self.field_sizes), strict=True)
        }

    def extra_repr(self) -> str:
        """As a layer, with the number of tables."""
        return f"{super().extra_repr()}, tables={len(self.names)}"


def _in_order(what: str, values: Any, names: Sequence[str]) -> list[Any]:
    """Values by name or in order, in order."""
    if isinstance(values, Mapping):
        missing = [name for name in names if name not in values]
        if missing or len(values) != len(names):
            raise ValueError(f"{what} must name the tables {list(names)}, got {list(values)}")
        return [values[name] for name in names]
    if len(values) != len(names):
        raise ValueError(f"{len(values)} {what} for {len(names)} tables")
    return list(values)


def _padding_rows(padding_idx: Any, rows: Mapping[str, int]) -> dict[str, int]:
    """The padding row of each table that has one, 0..N-1."""
    if padding_idx is None:
        return {}
    if isinstance(padding_idx, Mapping):
        unknown = [name for name in padding_idx if name not in rows]
        if unknown:
            raise ValueError(f"padding_idx names no tables of {list(rows)}: {unknown}")
        padding_idx = [padding_idx.get(name) for name in rows]
    given = zip(rows, _in_order("padding_idx", padding_idx, list(rows)), strict=True)
    found = {name: int(row) for name, row in given if row is not None}
    for name, row in found.items():
        if not -rows[name] <= row < rows[name]:
            raise ValueError(f"padding_idx {row} of table {name!r} is outside 0..{rows[name] - 1}")
    return {name: row % rows[name] for name, row in found.items()}


def _check_paddings(values: Mapping[str, Tensor]) -> None:
    """Raise unless padding rows hold the same."""
    first, *others = values or [""]
    for name in others:
        if not torch.equal(values[name], values[first]):
            raise ValueError(
                f"the padding rows of {name!r} and {first!r} hold different values; a collection "
                "looks one up for all tables, so they must be equal"
            )


def check_alike(embeddings: Mapping[str, Any]) -> None:
    """Raise unless these embeddings go into one collection.

    Raises:
        ValueError: they do not.
    """
    if not embeddings:
        raise ValueError("a collection needs at least one embedding")
    first_name, first = next(iter(embeddings.items()))
    for name, module in embeddings.items():
        if type(module) not in (nn.Embedding, nn.EmbeddingBag):
            raise ValueError(f"{name!r} is {kind(module)}, not an nn.Embedding")
        for key in ("max_norm", "scale_grad_by_freq"):
            if getattr(module, key) not in (None, False):
                raise ValueError(f"{name!r} has {key}, which a collection has not for one table")
        for key in ("embedding_dim", "sparse", "mode"):
            if getattr(module, key, None) != getattr(first, key, None):
                raise ValueError(f"{name!r} differs from {first_name!r} in {key}")
        for key in ("dtype", "device"):
            if getattr(module.weight, key) != getattr(first.weight, key):
                raise ValueError(f"{name!r} differs from {first_name!r} in {key}")
    padded = {name: m for name, m in embeddings.items() if m.padding_idx is not None}
    _check_paddings({name: m.weight.detach()[m.padding_idx] for name, m in padded.items()})


class CollectedTable(nn.Module):
    """One table of a collection, called as an nn.Embedding; it has no parameters of its own.

    Attributes:
        name: of the table.
        num_embeddings, embedding_dim, padding_idx: of the table.
    """

    def __init__(self, collection: AMTLEmbeddingCollection, name: str) -> None:
        super().__init__()
        # In a tuple, which nn.Module does not look into: the model has the collection once.
        self._home = (collection,)
        self.name = name
        self.embedding_dim = collection.embedding_dim
        self.padding_idx = collection.padding_of(name)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.collection.field_sizes[self.collection._number(self.name)]

    @property
    def collection(self) -> AMTLEmbeddingCollection:
        """Where the table is."""
        return self._home[0]

    def forward(self, input: Tensor) -> Tensor:
        """`collection.lookup(name, input)`."""
        return self.collection.lookup(self.name, input)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def extra_repr(self) -> str:
        """As nn.Embedding, with the name."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, name={self.name!r}"
