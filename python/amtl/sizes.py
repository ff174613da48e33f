"""How many dimensions each frequency group keeps: learned, by the paper's softmax, or by a rule.

A size head maps groups to sizes. Its forward returns what `amtl_kernels.adaptive_embedding` takes:
hard sizes `dims` (integers, [G], or [G, Q] while size noise explores) and the soft mask (float32,
[G, D]), whose values the forward ignores and whose gradient trains the head.

    OrdinalSizes   one number per group: log k = log D * sigmoid(f + c), c set by the budget
    FreeSizes      D logits per group, tempered softmax, argmax (the paper, section 3)
    RuleSizes      k = scale * (count + 1)^a, scale set by the budget; nothing to train
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amtl.budget import SizeGrid, capacity, fit_shift, fit_tilt
from amtl.frequency import FrequencyGroups, frequency_features, log_count_zscores

PARAMETRIZATIONS = ("ordinal", "free", "rule")


class GroupSizes(NamedTuple):
    """What a size head returns.

    Attributes:
        dims: uint8 (D <= 255) or int32, [G], or [G, Q] under size noise: row i takes column
            hash(seed, i) mod Q.
        mask: float32 [G, D], the soft mask; only its gradient matters.
    """

    dims: Tensor
    mask: Tensor


class TwinBranches(nn.Module):
    """The twins: two MLPs of one shape, weights not shared, fused by the gate before any softmax.

    `z = alpha * h(s) + (1 - alpha) * l(s)`, `alpha = sigmoid(norm(q))` (paper section 3.2): the
    frequent and the rare end of a field train different branches.

    Args:
        in_features: width of the frequency vector.
        hidden: hidden widths of both branches; empty for linear branches.
        out_features: outputs per group.
        twins: False keeps a single branch (the paper's ablation) and ignores the gate.
        zero_output: start with output layers at zero.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        twins: bool = True,
        zero_output: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def branch() -> nn.Sequential:
            layers: list[nn.Module] = []
            width = in_features
            for size in hidden:
                layers += [nn.Linear(width, size, device=device), nn.SiLU()]
                width = size
            last = nn.Linear(width, out_features, device=device)
            if zero_output:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            return nn.Sequential(*layers, last)

        self.high = branch()
        self.low = branch() if twins else None

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        """Fused outputs [G, out] from features [G, F] and the gate alpha [G]."""
        high: Tensor = self.high(features)
        if self.low is None:
            return high
        alpha = gate[:, None]
        return alpha * high + (1 - alpha) * self.low(features)


class SizeHead(nn.Module):
    """Base of the size heads: group statistics, allowed sizes, budget and size noise.

    The statistics travel in the state_dict, so a loaded head needs no counts. Floating-point
    tensors keep their type under `.half()` and `.to(dtype)`: sizes must not depend on the type of
    the table.

    Args:
        groups: frequency groups of the table.
        grid: allowed sizes.
        budget: stored fraction of N * D to meet, None for no budget.
        size_noise: standard deviation of the noise in log-size, >= 0.
        noise_quantiles: number of quantiles Q of the noise.

    Raises:
        ValueError: an argument out of range.
        BudgetError: the budget is below what the smallest size stores.
    """

    group_counts: Tensor
    group_fields: Tensor
    group_rows: Tensor
    features: Tensor
    gate: Tensor
    rows: Tensor
    noise_factors: Tensor
    temperature: Tensor

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        *,
        size_noise: float = 0.0,
        noise_quantiles: int = 64,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        grid.check_budget(budget)
        if not (math.isfinite(size_noise) and size_noise >= 0):
            raise ValueError(f"size_noise must be a finite number >= 0, got {size_noise!r}")
        if not (isinstance(noise_quantiles, int) and noise_quantiles >= 1):
            raise ValueError(
                f"noise_quantiles must be a whole number >= 1, got {noise_quantiles!r}"
            )
        self.grid = grid
        self.budget = budget
        self.size_noise = float(size_noise)
        self.num_fields = groups.num_fields
        self._constant(
            "temperature", torch.tensor(temperature, dtype=torch.float32).to(groups.counts.device)
        )
        rows = groups.rows_per_group()
        device = rows.device
        self.register_buffer("group_counts", groups.counts)
        self.register_buffer("group_fields", groups.fields)
        self.register_buffer("group_rows", rows)
        features = frequency_features(groups.counts, rows, groups.fields, groups.num_fields)
        if groups.extra is not None:
            features = torch.cat([features, groups.extra], dim=1)
        self.register_buffer("features", features)
        quantile = (torch.arange(noise_quantiles, dtype=torch.float64) + 0.5) / noise_quantiles
        factors = torch.exp(self.size_noise * torch.special.ndtri(quantile))
        self._constant("noise_factors", factors.to(device, torch.float32))
        self._constant("size_table", torch.tensor(grid.sizes, device=device))
        self._constant(
            "stored_table", torch.tensor(grid.stored, dtype=torch.float64, device=device)
        )
        self._dims_dtype = torch.uint8 if grid.dim <= 255 else torch.int32
        self._derive()

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _derive(self) -> None:
        """Recompute what follows from the group statistics."""
        zscore = log_count_zscores(
            self.group_counts, self.group_rows, self.group_fields, self.num_fields
        )
        self._constant("gate", torch.sigmoid(zscore).to(torch.float32))
        self._constant("rows", self.group_rows.to(torch.float64))
        self.num_rows = int(self.group_rows.sum())
        self.capacity = (
            math.inf if self.budget is None else capacity(self.grid, self.num_rows, self.budget)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SizeHead:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Another number of groups is not an error: the loaded table brings its own counts.
        for name in ("group_counts", "group_fields", "group_rows", "features"):
            loaded = state_dict.get(prefix + name)
            current = getattr(self, name)
            if loaded is not None and loaded.shape != current.shape:
                self.register_buffer(name, current.new_empty(loaded.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._derive()

    def set_temperature(self, temperature: float) -> None:
        """Set T, a tensor so that a compiled graph need not know its value."""
        self.temperature.fill_(temperature)

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self.group_counts.numel()

    def levels(self) -> Tensor:
        """Index of each group's size in `grid.sizes`, int64 [G], without noise or gradient."""
        raise NotImplementedError

    def sizes(self) -> Tensor:
        """Size of each group, int64 [G], without noise or gradient."""
        table: Tensor = self.get_buffer("size_table")
        return table[self.levels()]

    def stored_fraction(self) -> float:
        """Stored weights over N * D, tier rounding included."""
        if self.num_rows == 0:
            return 0.0
        stored = self.get_buffer("stored_table")[self.levels()]
        return float((stored * self.rows).sum()) / (self.num_rows * self.grid.dim)

    def _noisy_dims(self, size: Tensor) -> Tensor:
        """Sizes at the Q quantiles of the noise, [G, Q], around a size that may be fractional.

        `dims[g, q] = round(k_g * exp(sigma * Phi^-1((q + 1/2) / Q)))` on the grid of allowed sizes.
        """
        step = self.grid.granularity
        noisy = torch.outer(size.to(torch.float32) / step, self.noise_factors)
        noisy = noisy.round_().mul_(step).clamp_(self.grid.sizes[0], self.grid.dim)
        return noisy.to(self._dims_dtype)

    def extra_repr(self) -> str:
        """Number of groups, budget and noise."""
        return f"groups={self.num_groups}, budget={self.budget}, size_noise={self.size_noise:g}"


class OrdinalSizes(SizeHead):
    """One scalar f per group: `log k = log D * sigmoid(f + c)`, with c set by the budget.

    c is solved at every call so that the stored fraction over rows is as close to the budget as
    possible and never above; its gradient keeps the budget (implicit function theorem):
    `dc = -sum_g w_g df_g`, `w_g = n_g k'_g / sum n k'`, `k' = dk/df`. The soft mask is a logistic
    kernel in log-size, `m[g, j] = sigmoid((log k_g - log(j - 1/2)) / (width * T))`.

    f starts at the rule `k ~ (count + 1)^a`: `f = 4a / log D * log1p(count)` has
    `d log k / d log(count + 1) = a` at mid-range, and the twins' output layers start at zero.

    Args:
        init_exponent: a >= 0.
        hidden, twins: see `TwinBranches`.
        kernel_width: width of the soft mask in log-size, > 0.
        **kwargs: see `SizeHead`; a budget is required.
    """

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        *,
        init_exponent: float = 0.5,
        hidden: Sequence[int] = (32,),
        twins: bool = True,
        kernel_width: float = 0.3,
        **kwargs: Any,
    ) -> None:
        _require_budget("ordinal", budget)
        _check_exponent(init_exponent)
        if not (math.isfinite(kernel_width) and kernel_width > 0):
            raise ValueError(f"kernel_width must be a finite number > 0, got {kernel_width!r}")
        self.init_exponent = float(init_exponent)
        self.kernel_width = float(kernel_width)
        super().__init__(groups, grid, budget, **kwargs)
        device = self.group_counts.device
        self.log_dim = math.log(grid.dim)
        logits = torch.logit(_log(grid.midpoints, device) / self.log_dim)
        _register_steps(self, logits)
        self._constant("log_columns", _log(grid.column_midpoints, device).to(torch.float32))
        self.branches = TwinBranches(
            self.features.shape[1], hidden, 1, twins=twins, zero_output=True, device=device
        )

    def _derive(self) -> None:
        super()._derive()
        scale = 4 * self.init_exponent / max(math.log(self.grid.dim), 1e-9)
        start = scale * torch.log1p(self.group_counts.to(torch.float64))
        self._constant("start", start.to(torch.float32))

    def scores(self) -> Tensor:
        """Score f of each group, float32 [G]."""
        start = self.get_buffer("start")
        fused: Tensor = self.branches(self.features, self.gate)
        return start + fused.squeeze(1)

    def _shift(self, scores: Tensor) -> Tensor:
        return _fit_shift(self, scores.detach().to(torch.float64))

    def levels(self) -> Tensor:
        """See `SizeHead.levels`."""
        with torch.no_grad():
            scores = self.scores()
            return _levels(self, scores, self._shift(scores))

    def log_sizes(self, scores: Tensor, shift: Tensor) -> Tensor:
        """Log-size log k, float32 [G], differentiable in the direction that keeps the budget."""
        shift = shift.to(scores.dtype)
        with torch.no_grad():
            share = torch.sigmoid(scores + shift)
            slope = share * (1 - share) * torch.exp(self.log_dim * share) * self.rows
            weight = (slope / slope.sum().clamp(min=1e-30)).to(scores.dtype)
        weighted = (weight * scores).sum()
        return self.log_dim * torch.sigmoid(scores + (shift - (weighted - weighted.detach())))

    def forward(self, noise: bool = False) -> GroupSizes:
        """Sizes and soft mask; `noise` gives [G, Q] sizes."""
        scores = self.scores()
        shift = self._shift(scores)
        log_size = self.log_sizes(scores, shift)
        if noise and self.size_noise > 0:
            dims = self._noisy_dims(log_size.detach().exp())
        else:
            dims = self.get_buffer("size_table")[_levels(self, scores.detach(), shift)]
        scale = 1 / (self.kernel_width * self.temperature)
        columns = self.get_buffer("log_columns") * scale
        mask = torch.sigmoid((log_size * scale)[:, None] - columns)
        return GroupSizes(dims.to(self._dims_dtype), mask)


class FreeSizes(SizeHead):
    """The paper's head: D logits per group, `p = softmax(z / T)`, `k = argmax p`, ties to less.

    The soft mask is the reverse cumulative sum of p, so autograd turns the straight-through mask
    gradient into the paper's: `dL/dp_k = sum_{j <= k} dL/dm_j` and
    `dL/dz_k = p_k / T (dL/dp_k - sum_q p_q dL/dp_q)`. Without a budget this is the paper's layer.
    With one, the logits are tilted by `-c * k / D`; c is bisected at every call so that the hard
    sizes meet the budget, and its gradient keeps the expected size over rows.

    Args:
        hidden, twins: see `TwinBranches`.
        **kwargs: see `SizeHead`.
    """

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        *,
        hidden: Sequence[int] = (32,),
        twins: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(groups, grid, budget, **kwargs)
        device = self.group_counts.device
        sizes = torch.tensor(grid.sizes, dtype=torch.float32, device=device)
        self._constant("relative_sizes", sizes / grid.dim)
        self._constant("column_levels", torch.tensor(grid.column_levels, device=device))
        self.branches = TwinBranches(
            self.features.shape[1], hidden, len(grid.sizes), twins=twins, device=device
        )

    def logits(self) -> Tensor:
        """Fused logits z, tilted to the budget if there is one, float32 [G, M]."""
        z: Tensor = self.branches(self.features, self.gate)
        if self.budget is None:
            return z
        relative = self.get_buffer("relative_sizes").to(z.dtype)
        tilt = fit_tilt(
            z.detach(), self.rows, relative, self.get_buffer("stored_table"), self.capacity
        )
        with torch.no_grad():
            p = torch.softmax((z - tilt * relative) / self.temperature, dim=1)
            mean = (p * relative).sum(1, keepdim=True)
            slope = p * (relative - mean) * self.rows[:, None]
            weight = (slope / (slope * relative).sum().clamp(min=1e-30)).to(z.dtype)
        weighted = (weight * z).sum()
        return z - (tilt + (weighted - weighted.detach())) * relative

    def levels(self) -> Tensor:
        """See `SizeHead.levels`."""
        with torch.no_grad():
            return self.logits().argmax(1)

    def forward(self, noise: bool = False) -> GroupSizes:
        """Sizes and soft mask; `noise` gives [G, Q] sizes."""
        z = self.logits()
        p = torch.softmax(z / self.temperature, dim=1)
        mask = p.flip(1).cumsum(1).flip(1)
        levels = self.get_buffer("column_levels")
        if levels.numel() != p.shape[1]:
            mask = mask[:, levels]
        dims = self.get_buffer("size_table")[z.detach().argmax(1)]
        if noise and self.size_noise > 0:
            return GroupSizes(self._noisy_dims(dims), mask)
        return GroupSizes(dims.to(self._dims_dtype), mask)


class RuleSizes(SizeHead):
    """`k = clip(scale * (count + 1)^a, min_dim, D)`, scale set by the budget; no parameters.

    Args:
        init_exponent: a >= 0.
        **kwargs: see `SizeHead`; a budget is required.
    """

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        *,
        init_exponent: float = 0.5,
        **kwargs: Any,
    ) -> None:
        _require_budget("rule", budget)
        _check_exponent(init_exponent)
        self.init_exponent = float(init_exponent)
        super().__init__(groups, grid, budget, **kwargs)
        _register_steps(self, _log(grid.midpoints, self.group_counts.device))
        self._fit()

    def _derive(self) -> None:
        super()._derive()
        if "thresholds" in self._buffers:
            self._fit()

    def _fit(self) -> None:
        scores = self.init_exponent * torch.log1p(self.group_counts.to(torch.float64))
        shift = _fit_shift(self, scores)
        dims = self.get_buffer("size_table")[_levels(self, scores, shift)]
        size = torch.exp(scores + shift).clamp(self.grid.sizes[0], self.grid.dim)
        self._constant("level_of_group", _levels(self, scores, shift))
        self._constant("dims", dims.to(self._dims_dtype))
        self._constant("noisy_dims", self._noisy_dims(size))
        self._constant("mask", self.features.new_zeros(self.num_groups, self.grid.dim))

    def levels(self) -> Tensor:
        """See `SizeHead.levels`."""
        return self.get_buffer("level_of_group")

    def forward(self, noise: bool = False) -> GroupSizes:
        """Sizes and a mask that asks for no gradient; `noise` gives [G, Q] sizes."""
        dims = self.get_buffer("noisy_dims" if noise and self.size_noise > 0 else "dims")
        return GroupSizes(dims, self.get_buffer("mask"))


def _log(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.log(torch.tensor(values, dtype=torch.float64, device=device))


def _register_steps(head: SizeHead, thresholds: Tensor) -> None:
    """Keep the thresholds of all sizes, and those at which the stored width grows.

    The last one stays in any case: if the whole table fits, sizes shall reach D.
    """
    growth = [b - a for a, b in zip(head.grid.stored, head.grid.stored[1:], strict=False)]
    steps = torch.tensor(growth, dtype=torch.float64, device=thresholds.device)
    head._constant("thresholds", thresholds)
    chosen = steps > 0
    chosen[-1:] = True
    head._constant("step_thresholds", thresholds[chosen])
    head._constant("steps", steps[chosen])


def _fit_shift(head: SizeHead, scores: Tensor) -> Tensor:
    spare = head.capacity - head.num_rows * head.grid.stored[0]
    return fit_shift(
        scores,
        head.rows,
        head.get_buffer("step_thresholds"),
        head.get_buffer("steps"),
        max(spare, 0.0),
    )


def _levels(head: SizeHead, scores: Tensor, shift: Tensor) -> Tensor:
    """Thresholds reached by each group, compared exactly as `fit_shift` compares them."""
    thresholds = head.get_buffer("thresholds") - shift
    return torch.searchsorted(thresholds, scores.to(torch.float64), right=True)


def _require_budget(name: str, budget: float | None) -> None:
    if budget is None:
        raise ValueError(
            f"parametrization={name!r} needs a budget: the fraction of N * D to store, in (0, 1]. "
            "Only parametrization='free' works without one (the paper's layer)."
        )


def _check_exponent(exponent: float) -> None:
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(f"init_exponent must be a finite number >= 0, got {exponent!r}")


def make_size_head(
    parametrization: str,
    groups: FrequencyGroups,
    grid: SizeGrid,
    budget: float | None,
    *,
    init_exponent: float = 0.5,
    hidden: Sequence[int] = (32,),
    twins: bool = True,
    kernel_width: float = 0.3,
    **kwargs: Any,
) -> SizeHead:
    """Build the head of a parametrization name; see the classes for the arguments.

    Raises:
        ValueError: an unknown name, or an argument out of range.
    """
    if any(isinstance(h, bool) or not isinstance(h, int) or h < 1 for h in hidden):
        raise ValueError(f"hidden widths must be whole numbers >= 1, got {tuple(hidden)}")
    if parametrization == "ordinal":
        return OrdinalSizes(
            groups,
            grid,
            budget,
            init_exponent=init_exponent,
            hidden=hidden,
            twins=twins,
            kernel_width=kernel_width,
            **kwargs,
        )
    if parametrization == "free":
        return FreeSizes(groups, grid, budget, hidden=hidden, twins=twins, **kwargs)
    if parametrization == "rule":
        return RuleSizes(groups, grid, budget, init_exponent=init_exponent, **kwargs)
    raise ValueError(f"parametrization must be one of {PARAMETRIZATIONS}, got {parametrization!r}")
