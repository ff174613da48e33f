"""Options of the size search, shared by the two layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from amtl.layer.budget import (
    BudgetError,
    SizeGrid,
    check_share,
    default_tier_width,
    is_number,
    no_share,
)
from amtl.layer.frequency import FrequencyGroups, frequency_groups, rounded_counts
from amtl.layer.rounding import PART_BYTES, unit
from amtl.layer.size_head import SizeHead
from amtl.layer.sizes import PARAMETRIZATIONS, make_size_head
from amtl_kernels.rounding import BITS


@dataclass(frozen=True)
class SearchOptions:
    """How a layer searches sizes. All fields are keyword arguments of the layers.

    Attributes:
        budget: stored bytes over those of N * D numbers of the table's type, tier rounding and step
            sizes included, in (0, 1]. None only with "free": the paper's layer, whose saving is an
            outcome of training.
        bits: of a stored number, 2, 4, 8 or 16; None keeps the table's type, and narrows rows to
            meet the budget. "auto", what layers and `amtl.convert` take where nothing is given:
            what loses least, see `amtl.layer.shares.automatic_bits`. Frozen training rounds
            what is looked up, and `to_integers` (which saving calls) keeps the codes only. Rows are
            stored in whole bytes, so sizes are even at 4 bits and multiples of 4 at 2; where D is
            not, its last number, or last three, are left out.
        masters: whether frozen training of few bits keeps the numbers that it rounds. False: codes
            are all there is, updated at random so that the mean is kept (ALPT, arXiv 2212.05735),
            which a fused SGD or RowwiseAdagrad does; see `amtl.layer.rounding`.
        parametrization: "rule" (default: sizes follow from counts, nothing is learned), "ordinal"
            (the twins learn on from there) or "free" (the paper); see `amtl.layer.sizes`.
        min_dim: smallest size, 0..D. None: 0, and 1 for "free" (the paper). A row of size 0 stores
            nothing and is looked up as its field's shared row, or as zeros.
        granularity: sizes are multiples of it (and D).
        tier_width: stored widths are multiples of it (and D). None: the largest power of two up to
            min(16 bytes' worth, budget * D / 4), at least 1.
        temperature: T > 0 of the softmax ("free") or of the soft mask's width ("ordinal").
        final_temperature: T at the freeze point, reached geometrically; None keeps T.
        kernel_width: width of the ordinal soft mask in log-size.
        size_noise: standard deviation of the noise in log-size during the search, in training mode
            only. None: 0.5 for "ordinal", else 0.
        noise_quantiles: number of noise levels Q that rows are hashed to.
        learns_every: one pass of so many, >= 1, gives what learns the sizes a gradient. In the
            others it has none, sizes stay, and a step costs little more than where nothing learns.
            Lookups between two changes of the table are one pass. Processes that train together
            learn at every pass all the same.
        freeze_at: share of training after which the trainer should call `freeze()`; noise ends
            there in any case.
        capacity_bits: b of the capacity law, `k = D * 1/2 log2(1 + rho * count) / b`: the rule, and
            where "ordinal" starts. What a number is worth: many bits make sizes flat, few make
            them proportional to the count.
        init_exponent: a of a power law `k ~ (count + 1)^a` in its place; None keeps the capacity
            law.
        field_weights: what the counts of each field are multiplied by in either law; None for
            ones. `layer.head.set_field_weights` changes them later.
        mask_hidden: hidden widths of the twins.
        twins: False keeps one branch (the paper's ablation).
        weight_std: standard deviation of the initial weights; nn.Embedding's is 1.
        bounds_check: "raise", "clamp" or "off" for indices out of range.
        seed: added to what the size noise draws from torch's default generator.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    budget: float | None = 0.4
    bits: int | None = None
    masters: bool = True
    parametrization: str = "rule"
    min_dim: int | None = None
    granularity: int = 1
    tier_width: int | None = None
    temperature: float = 1.0
    final_temperature: float | None = None
    kernel_width: float = 0.3
    size_noise: float | None = None
    noise_quantiles: int = 64
    learns_every: int = 1
    freeze_at: float = 0.4
    capacity_bits: float = 4.0
    init_exponent: float | None = None
    field_weights: Sequence[float] | None = None
    mask_hidden: Sequence[int] = (32,)
    twins: bool = True
    weight_std: float = 1.0
    bounds_check: str = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(
                f"parametrization must be one of {PARAMETRIZATIONS}, got {self.parametrization!r}"
            )
        # Runs of version 1 hold numbers above 1 and open, so how large it is shows in use.
        if self.budget is not None and not is_number(self.budget):
            raise no_share(self.budget)
        if self.bits is not None and not (type(self.bits) is int and self.bits in BITS):
            raise ValueError(f"bits must be one of {BITS} or None, got {self.bits!r}")
        if not self.masters and self.bits is None:
            raise ValueError("masters=False keeps codes only: it needs bits=16, 8, 4 or 2")
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        if not (math.isfinite(self.weight_std) and self.weight_std >= 0):
            raise ValueError(f"weight_std must be a finite number >= 0, got {self.weight_std!r}")
        every = self.learns_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"learns_every must be a whole number >= 1, got {every!r}")
        if not 0 <= self.freeze_at <= 1:
            raise ValueError(
                f"freeze_at must be a share of training in 0..1, got {self.freeze_at!r}"
            )
        if self.bounds_check not in ("raise", "clamp", "off"):
            raise ValueError(
                f"bounds_check must be 'raise', 'clamp' or 'off', got {self.bounds_check!r}"
            )
        object.__setattr__(self, "mask_hidden", tuple(self.mask_hidden))
        if self.field_weights is not None:
            object.__setattr__(self, "field_weights", tuple(map(float, self.field_weights)))
        if self.min_dim is None:
            object.__setattr__(self, "min_dim", 1 if self.parametrization == "free" else 0)
        if self.size_noise is None:
            object.__setattr__(
                self, "size_noise", 0.5 if self.parametrization == "ordinal" else 0.0
            )

    def given(self) -> dict[str, Any]:
        """Those that are no defaults, JSON-able: `SearchOptions(**...)` has the others by itself.

        Files hold no more, so defaults stay what they are.
        """
        plain = SearchOptions(parametrization=self.parametrization)
        kept = {key: value for key, value in vars(self).items() if value != getattr(plain, key)}
        if self.parametrization != SearchOptions.parametrization:
            kept["parametrization"] = self.parametrization
        return {key: list(v) if isinstance(v, tuple) else v for key, v in kept.items()}

    def grid(self, dim: int, itemsize: int) -> SizeGrid:
        """Allowed sizes of a table of width `dim` with weights of `itemsize` bytes."""
        width = self.tier_width
        if width is None and self.bits is None:
            width = min(dim, default_tier_width(dim, self.budget, itemsize))
        whole = 1 if self.bits is None else unit(self.bits)
        width = whole if width is None else width
        if width % whole or dim < whole:
            raise ValueError(
                f"rows of {self.bits} bits a number are stored in whole bytes: tier_width must be "
                f"a multiple of {whole} and embedding_dim no less, got {width} and {dim}; bits=8 "
                "fits any width"
            )
        assert self.min_dim is not None
        return SizeGrid(dim, self.min_dim, self.granularity, width, whole)

    def in_numbers(self, rows: int, dim: int, itemsize: int, parts: int) -> SearchOptions:
        """These options with a budget that counts numbers, as size heads do.

        Args:
            rows: N.
            dim: D.
            itemsize: bytes of a number of the table.
            parts: parts of the tiers with a step size of their own, which are paid for first.

        Raises:
            BudgetError: step sizes alone take more.
        """
        if self.bits is None or self.budget is None:
            return self
        check_share(self.budget)
        size = max(1, rows * dim)
        share = (self.budget * size * itemsize - parts * PART_BYTES) * 8 / self.bits / size
        if share <= 0:
            raise BudgetError(
                f"budget {self.budget:g} is {self.budget * size * itemsize:.0f} bytes, fewer than "
                f"the {parts * PART_BYTES} that {parts} step sizes take: bits=None, "
                "numbers of the table's own type, needs none (--bits 32 of amtl train)"
            )
        return replace(self, budget=min(1.0, share))

    def groups(
        self, counts: Tensor, field_sizes: Sequence[int], row_features: Tensor | None = None
    ) -> FrequencyGroups:
        """`frequency_groups`, of counts that are rounded where sizes are learned."""
        if self.parametrization != "rule":
            counts = rounded_counts(counts)
        return frequency_groups(counts, field_sizes, row_features)

    def head(self, groups: FrequencyGroups, grid: SizeGrid) -> SizeHead:
        """The size head that these options describe."""
        assert self.size_noise is not None
        return make_size_head(
            self.parametrization,
            groups,
            grid,
            self.budget,
            capacity_bits=self.capacity_bits,
            init_exponent=self.init_exponent,
            field_weights=self.field_weights,
            hidden=self.mask_hidden,
            twins=self.twins,
            kernel_width=self.kernel_width,
            size_noise=self.size_noise,
            noise_quantiles=self.noise_quantiles,
            temperature=self.temperature,
        )
