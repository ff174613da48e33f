"""How many dimensions each frequency group keeps: learned, by the paper's softmax, or by a rule.

A size head maps groups to sizes. Its forward returns what `amtl_kernels.adaptive_embedding` takes:
hard sizes `dims` (integers, [G], or [G, Q] while size noise explores) and the soft mask (float32,
[G, D]), whose values the forward ignores and whose gradient trains the head.

    OrdinalSizes   one number per group, turned into a size by a law (`amtl.layer.laws`)
    FreeSizes      D logits per group, tempered softmax, argmax (the paper, section 3)
    RuleSizes      the law of the counts alone; nothing to train
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from amtl.layer.budget import SizeGrid, fit_shift, fit_shifts, fit_tilt, fit_tilts
from amtl.layer.companions import Company
from amtl.layer.frequency import FrequencyGroups
from amtl.layer.laws import SizeLaw, make_law
from amtl.layer.size_head import OfGroups, Padded, SizeHead, Solution, being_traced
from amtl_kernels._heads import kernel_mask_gradient, softmax_mask_gradient, twins

PARAMETRIZATIONS = ("ordinal", "free", "rule")


class TwinBranches(nn.Module):
    """The twins: two MLPs of one shape, weights not shared, fused by the gate before any softmax.

    `z = alpha * h(s) + (1 - alpha) * l(s)`, `alpha = sigmoid(norm(q))` (paper section 3.2): the
    frequent and the rare end of a field train different branches.

    Their numbers are one parameter, for an optimizer takes its time for each, and initialisers of
    a model's linear layers, which would change every size, find none.

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
        self.widths = (in_features, *hidden, out_features)
        self.names = ("high", "low") if twins else ("high",)
        self._shapes = list(zip(self.widths[1:], self.widths, strict=False)) * len(self.names)
        self._widths = torch.tensor(self.widths)
        numbers: list[Tensor] = []
        for i, (out, into) in enumerate(self._shapes, 1):
            made = nn.Linear(into, out, device=device)
            if zero_output and i % (len(self.widths) - 1) == 0:
                nn.init.zeros_(made.weight)
                nn.init.zeros_(made.bias)
            numbers += [made.weight.detach().flatten(), made.bias.detach()]
        self.numbers = nn.Parameter(torch.cat(numbers))

    def layers(self, numbers: Tensor | None = None) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Weight [..., out, in] and bias [..., out] of each layer, by branch.

        Args:
            numbers: [..., P], of one head or several; None: those here.
        """
        numbers = self.numbers if numbers is None else numbers
        counts = [count for out, into in self._shapes for count in (out * into, out)]
        parts = numbers.split(counts, -1)
        layers = [
            (weight.unflatten(-1, shape), bias)
            for shape, weight, bias in zip(self._shapes, parts[::2], parts[1::2], strict=True)
        ]
        depth = len(self.widths) - 1
        return {name: layers[i * depth :][:depth] for i, name in enumerate(self.names)}

    def forward(self, features: Tensor, gate: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Fused outputs [..., G, out].

        Args:
            features: [..., G, F].
            gate: alpha, [..., G].
            numbers: as in `layers`.
        """
        numbers = self.numbers if numbers is None else numbers
        if not (numbers.requires_grad and torch.is_grad_enabled()):
            found = self.natively(features, gate, numbers)
            if found is not None:
                return found
        out = {name: perceptron(features, each) for name, each in self.layers(numbers).items()}
        if "low" not in out:
            return out["high"]
        alpha = gate[..., None]
        return alpha * out["high"] + (1 - alpha) * out["low"]

    def natively(
        self,
        features: Tensor,
        gate: Tensor,
        numbers: Tensor,
        grad: Tensor | None = None,
    ) -> Tensor | None:
        """What `forward` returns, or the gradient of the numbers; None if PyTorch has to find it.

        Args:
            features: as in `forward`.
            gate: as in `forward`.
            numbers: as in `layers`, there.
            grad: of the outputs, [..., G, out]; None for the outputs.
        """
        if being_traced():
            return None
        shares = gate if "low" in self.names else None
        if numbers.dim() > 1:
            return twins(numbers, features, shares, self._widths, grad)
        shares, grad = (None if x is None else x[None] for x in (shares, grad))
        found = twins(numbers[None], features[None], shares, self._widths, grad)
        return None if found is None else found[0]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # States in which each layer had parameters of its own.
        if f"{prefix}high.0.weight" in state_dict:
            parts = [
                state_dict.pop(f"{prefix}{name}.{2 * layer}.{kind}").flatten()
                for name in self.names
                for layer in range(len(self.widths) - 1)
                for kind in ("weight", "bias")
            ]
            state_dict[prefix + "numbers"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def perceptron(features: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Outputs [..., G, out] of an MLP with SiLU.

    Args:
        features: [..., G, F].
        layers: see `TwinBranches.layers`.
    """
    x = features
    for i, (weight, bias) in enumerate(layers):
        x = nn.functional.silu(x) if i else x
        if weight.dim() == 2:
            x = nn.functional.linear(x, weight, bias)
        else:
            x = torch.baddbmm(bias[:, None], x, weight.mT)
    return x


class LawSizes(SizeHead):
    """What heads with one score a group share: a law, a shift that meets the budget, field weights.

    The shift is such that the stored fraction over rows is as close to the budget as possible and
    never above.

    Args:
        law: from scores to sizes.
        field_weights: what the counts of each field are multiplied by, > 0; None for ones.
        **kwargs: see `SizeHead`; a budget is required.
    """

    start: Tensor
    field_weights: Tensor

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        law: SizeLaw,
        field_weights: Sequence[float] | None,
        **kwargs: Any,
    ) -> None:
        if budget is None:
            raise ValueError(
                "this parametrization needs a budget: the fraction of N * D to store, in (0, 1]. "
                "Only parametrization='free' works without one (the paper's layer)."
            )
        self.law = law
        self._rounds_down = law.rounds_down
        super().__init__(groups, grid, budget, **kwargs)
        device = self.group_counts.device
        thresholds = torch.tensor(law.thresholds, dtype=torch.float64, device=device)
        growth = [b - a for a, b in zip(grid.stored, grid.stored[1:], strict=False)]
        steps = torch.tensor(growth, dtype=torch.float64, device=device)
        # The last threshold counts in any case: if the whole table fits, sizes shall reach D.
        chosen = steps > 0
        chosen[-1:] = True
        self._constant("thresholds", thresholds)
        self._constant("step_thresholds", thresholds[chosen])
        self._constant("steps", steps[chosen])
        weights = [1.0] * self.num_fields if field_weights is None else field_weights
        self.register_buffer("field_weights", self._checked_weights(weights))

    def _checked_weights(self, values: Sequence[float] | Tensor) -> Tensor:
        weights = torch.as_tensor(values, dtype=torch.float64).to(self.group_counts.device)
        if weights.shape != (self.num_fields,) or not bool(
            (weights.isfinite() & (weights > 0)).all()
        ):
            raise ValueError(
                f"field_weights must be {self.num_fields} finite numbers > 0, one a field, got "
                f"{values}"
            )
        return weights

    def set_field_weights(self, values: Sequence[float] | Tensor) -> None:
        """Multiply the counts of each field by a number > 0; the budget stays. Saved with the head.

        Raises:
            ValueError: not F finite numbers > 0.
        """
        self.field_weights.copy_(self._checked_weights(values))
        self._derive()

    def _derive(self) -> None:
        super()._derive()
        log_weights = torch.log(self.field_weights)[self.group_fields]
        self._constant("start", self.law.start(self.group_counts.to(torch.float64), log_weights))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # States written before there were field weights.
        weights = {prefix + "field_weights": torch.ones_like(self.field_weights)}
        super()._load_from_state_dict({**weights, **state_dict}, prefix, *args, **kwargs)

    def likeness(self) -> tuple[object, ...]:
        """See `SizeHead.likeness`."""
        law = self.law
        return *super().likeness(), type(law), law.thresholds, law.columns

    def room(self) -> float:
        """See `SizeHead.room`."""
        return max(self.capacity - self.num_rows * self.grid.stored[0], 0.0)

    def steps_of(self, heads: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See `SizeHead.steps_of`."""
        thresholds, steps = (
            pad_sequence([head.get_buffer(name) for head in heads], True, padding)
            for name, padding in (("step_thresholds", math.inf), ("steps", 0.0))
        )
        if thresholds.numel():
            # Steps of nothing at the last threshold, which all of them have, change nothing.
            thresholds = thresholds.minimum(self.get_buffer("thresholds")[-1])
        return thresholds, steps

    def _solve(self, scores: Tensor, of: Padded | None = None) -> tuple[Tensor, Tensor]:
        scores = scores.to(torch.float64)
        if of is None:
            steps = self.get_buffer("step_thresholds"), self.get_buffer("steps")
            shift = fit_shift(scores, self.rows, *steps, self.room())
        else:
            shift = fit_shifts(scores, of.rows, of.thresholds, of.steps, of.room)
        # Compared exactly as `fit_shift` compares them.
        thresholds = self.get_buffer("thresholds") - shift[..., None]
        return shift, torch.searchsorted(thresholds, scores, right=True)


class OrdinalSizes(LawSizes):
    """One scalar f per group, a law that makes u = f + c a size, and c set by the budget.

    c is solved when parameters changed, and its gradient keeps the budget (implicit function
    theorem): `dc = -sum_g w_g df_g`, `w_g = n_g k'_g / sum n k'`, `k' = dk/df`. The soft mask is a
    logistic kernel in log-size, `m[g, j] = sigmoid((log k_g - log x_j) / (width * T))`, where x_j
    is the real-valued size from which column j is kept: 1/2 where the hard mask changes.

    f starts at what the law says of the counts, and the twins' output layers start at zero.

    Args:
        law: see `LawSizes`.
        field_weights: see `LawSizes`.
        hidden, twins: see `TwinBranches`.
        kernel_width: width of the soft mask in log-size, > 0.
        **kwargs: see `SizeHead`.
    """

    trains = True
    branches: TwinBranches

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        law: SizeLaw,
        field_weights: Sequence[float] | None = None,
        *,
        hidden: Sequence[int] = (32,),
        twins: bool = True,
        kernel_width: float = 0.3,
        **kwargs: Any,
    ) -> None:
        if not (math.isfinite(kernel_width) and kernel_width > 0):
            raise ValueError(f"kernel_width must be a finite number > 0, got {kernel_width!r}")
        self.kernel_width = float(kernel_width)
        super().__init__(groups, grid, budget, law, field_weights, **kwargs)
        device = self.group_counts.device
        columns = torch.log(torch.tensor(law.columns, dtype=torch.float64, device=device))
        self._constant("log_columns", columns.to(torch.float32))
        self.branches = TwinBranches(
            self.features.shape[1], hidden, 1, twins=twins, zero_output=True, device=device
        )
        self._watch()
        self._derive()

    def _derive(self) -> None:
        super()._derive()
        self._constant("start", self.start.to(torch.float32))

    def likeness(self) -> tuple[object, ...]:
        """See `SizeHead.likeness`."""
        return *super().likeness(), self.kernel_width, self.branches.widths, self.branches.names

    def scores(self, of: OfGroups | None = None, numbers: Tensor | None = None) -> Tensor:
        """Score f of each group, float32 [..., G]."""
        of = self if of is None else of
        fused: Tensor = self.branches(of.features, of.gate, numbers)
        return of.start + fused.squeeze(-1)

    def log_sizes(self, scores: Tensor, shift: Tensor, of: OfGroups | None = None) -> Tensor:
        """Log-size log k, [..., G], differentiable in the direction that keeps the budget."""
        shift = shift.to(scores.dtype)[..., None]
        with torch.no_grad():
            weight = self._weights(scores + shift, of)
        weighted = (weight * scores).sum(-1, keepdim=True)
        return self.law.log_size(scores + (shift - (weighted - weighted.detach())))

    def _weights(self, u: Tensor, of: OfGroups | None) -> Tensor:
        """How much of the budget a step of each u costs, as a share of what all of them do."""
        slope = self.law.slope(u) * (self if of is None else of).rows
        return (slope / slope.sum(-1, keepdim=True).clamp(min=1e-30)).to(u.dtype)

    def _real_sizes(self, scores: Tensor, solution: Solution) -> Tensor:
        return self._solved(scores, solution)[1].exp()

    def _solved(self, scores: Tensor, solution: Solution) -> tuple[Tensor, Tensor]:
        """Arguments u of the law, and log k, as solved for, [..., G]; the latter is found once."""
        u = scores + solution.shift.to(scores.dtype)[..., None]
        if solution.log_sizes is None:
            solution.log_sizes = self.law.log_size(u)
        return u, solution.log_sizes

    def _kernel(self, of: OfGroups | None) -> tuple[Tensor, Tensor]:
        """What log-sizes are multiplied by, [..., 1], and where columns lie then, [..., D]."""
        scale = (1 / self.kernel_width) / (self if of is None else of).temperature[..., None]
        return scale, self.get_buffer("log_columns") * scale

    def _mask(self, scores: Tensor, solution: Solution, of: OfGroups | None = None) -> Tensor:
        scale, columns = self._kernel(of)
        log_sizes = self.log_sizes(scores, solution.shift, of)
        solution.log_sizes = log_sizes.detach()
        return torch.sigmoid((log_sizes * scale)[..., None] - columns[..., None, :])

    def _pull(
        self, scores: Tensor, numbers: Tensor, solution: Solution, of: Padded, grad: Tensor
    ) -> Tensor | None:
        scale, columns = self._kernel(of)
        u, log_sizes = self._solved(scores, solution)
        found = kernel_mask_gradient(log_sizes * scale, columns, grad)
        if found is None:
            return None
        found = found * scale * self.law.log_slope(u)
        found = found - self._weights(u, of) * found.sum(-1, keepdim=True)
        return self.branches.natively(of.features, of.gate, numbers, found[..., None])


class FreeSizes(SizeHead):
    """The paper's head: D logits per group, `p = softmax(z / T)`, `k = argmax p`, ties to less.

    The soft mask is the reverse cumulative sum of p, so autograd turns the straight-through mask
    gradient into the paper's: `dL/dp_k = sum_{j <= k} dL/dm_j` and
    `dL/dz_k = p_k / T (dL/dp_k - sum_q p_q dL/dp_q)`. Without a budget this is the paper's layer.
    With one, the logits are tilted by `-c * k / D`; c is bisected when parameters changed so that
    the hard sizes meet the budget, and its gradient keeps the expected size over rows.

    Args:
        hidden, twins: see `TwinBranches`.
        **kwargs: see `SizeHead`.
    """

    trains = True
    branches: TwinBranches

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
        self._every_size = grid.column_levels == tuple(range(len(grid.sizes)))
        self.branches = TwinBranches(
            self.features.shape[1], hidden, len(grid.sizes), twins=twins, device=device
        )
        self._watch()
        self._derive()

    def likeness(self) -> tuple[object, ...]:
        """See `SizeHead.likeness`."""
        branches = self.branches
        return *super().likeness(), self.budget is None, branches.widths, branches.names

    def room(self) -> float:
        """See `SizeHead.room`."""
        return self.capacity

    def steps_of(self, heads: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See `SizeHead.steps_of`."""
        stored = torch.stack([head.get_buffer("stored_table") for head in heads])
        return stored[:, :0], stored

    def scores(self, of: OfGroups | None = None, numbers: Tensor | None = None) -> Tensor:
        """Fused logits z, float32 [..., G, M]."""
        of = self if of is None else of
        z: Tensor = self.branches(of.features, of.gate, numbers)
        return z

    def _solve(self, scores: Tensor, of: Padded | None = None) -> tuple[Tensor, Tensor]:
        if self.budget is None:
            return scores.new_zeros(scores.shape[:-2]), scores.argmax(-1)
        relative = self.get_buffer("relative_sizes").to(scores.dtype)
        if of is None:
            stored = self.get_buffer("stored_table")
            tilt = fit_tilt(scores, self.rows, relative, stored, self.capacity)
        else:
            tilt = fit_tilts(scores, of.rows, relative, of.steps, of.room)
        return tilt, (scores - tilt[..., None, None] * relative).argmax(-1)

    def _real_sizes(self, scores: Tensor, solution: Solution) -> Tensor:
        return solution.sizes

    def _tilted(self, z: Tensor, tilt: Tensor, of: OfGroups) -> Tensor:
        """Logits tilted to the budget, differentiable in the direction that keeps it."""
        if self.budget is None:
            return z
        relative = self.get_buffer("relative_sizes").to(z.dtype)
        tilt = tilt[..., None, None]
        with torch.no_grad():
            p = torch.softmax((z - tilt * relative) / of.temperature[..., None, None], dim=-1)
            mean = (p * relative).sum(-1, keepdim=True)
            slope = p * (relative - mean) * of.rows[..., None]
            total = (slope * relative).sum((-2, -1), keepdim=True)
            weight = (slope / total.clamp(min=1e-30)).to(z.dtype)
        weighted = (weight * z).sum((-2, -1), keepdim=True)
        return z - (tilt + (weighted - weighted.detach())) * relative

    def _mask(self, scores: Tensor, solution: Solution, of: OfGroups | None = None) -> Tensor:
        of = self if of is None else of
        tilted = self._tilted(scores, solution.shift, of)
        p = torch.softmax(tilted / of.temperature[..., None, None], dim=-1)
        mask = p.flip(-1).cumsum(-1).flip(-1)
        return mask if self._every_size else mask[..., self.get_buffer("column_levels")]

    def _pull(
        self, scores: Tensor, numbers: Tensor, solution: Solution, of: Padded, grad: Tensor
    ) -> Tensor | None:
        temperature = of.temperature[..., None, None]
        with torch.enable_grad():
            moved = scores.requires_grad_()
            tilted = self._tilted(moved, solution.shift, of)
        levels = self.get_buffer("column_levels")
        found = softmax_mask_gradient(tilted.detach() / temperature, levels, grad)
        if found is None:
            return None
        found = found / temperature
        if tilted is not moved:
            (found,) = torch.autograd.grad(tilted, moved, found)
        return self.branches.natively(of.features, of.gate, numbers, found)


class RuleSizes(LawSizes):
    """What the law says of the counts alone; no parameters.

    Args:
        law: see `LawSizes`.
        field_weights: see `LawSizes`.
        **kwargs: see `SizeHead`.
    """

    def __init__(
        self,
        groups: FrequencyGroups,
        grid: SizeGrid,
        budget: float | None,
        law: SizeLaw,
        field_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(groups, grid, budget, law, field_weights, **kwargs)
        self._derive()

    def _derive(self) -> None:
        super()._derive()
        shift, levels = super()._solve(self.start)
        self._constant("shift", shift)
        self._constant("level_of_group", levels)

    def scores(self, of: OfGroups | None = None, numbers: Tensor | None = None) -> Tensor:
        """Score of each group, float64 [G]."""
        return self.start

    def _solve(self, scores: Tensor, of: Padded | None = None) -> tuple[Tensor, Tensor]:
        return self.get_buffer("shift"), self.get_buffer("level_of_group")

    def _real_sizes(self, scores: Tensor, solution: Solution) -> Tensor:
        size = self.law.log_size(scores + solution.shift).exp()
        return size.clamp(self.grid.sizes[0], self.grid.dim)

    def _mask(self, scores: Tensor, solution: Solution, of: OfGroups | None = None) -> Tensor:
        return self.features.new_zeros(self.num_groups, self.grid.dim)


def make_size_head(
    parametrization: str,
    groups: FrequencyGroups,
    grid: SizeGrid,
    budget: float | None,
    *,
    capacity_bits: float = 4.0,
    init_exponent: float | None = None,
    field_weights: Sequence[float] | None = None,
    hidden: Sequence[int] = (32,),
    twins: bool = True,
    kernel_width: float = 0.3,
    **kwargs: Any,
) -> SizeHead:
    """Build the head of a parametrization name; see the classes for the arguments.

    The law is that of capacity, with `capacity_bits`, or a power law if `init_exponent` is given.

    Raises:
        ValueError: an unknown name, or an argument out of range.
    """
    if any(isinstance(h, bool) or not isinstance(h, int) or h < 1 for h in hidden):
        raise ValueError(f"hidden widths must be whole numbers >= 1, got {tuple(hidden)}")
    if parametrization == "free":
        if field_weights is not None:
            raise ValueError("field_weights multiply counts; parametrization='free' uses none")
        return _joined(FreeSizes(groups, grid, budget, hidden=hidden, twins=twins, **kwargs))
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(
            f"parametrization must be one of {PARAMETRIZATIONS}, got {parametrization!r}"
        )
    law = make_law(parametrization, grid, capacity_bits, init_exponent)
    if parametrization == "rule":
        return RuleSizes(groups, grid, budget, law, field_weights, **kwargs)
    learned = OrdinalSizes(
        groups,
        grid,
        budget,
        law,
        field_weights,
        hidden=hidden,
        twins=twins,
        kernel_width=kernel_width,
        **kwargs,
    )
    return _joined(learned)


def _joined(head: SizeHead) -> SizeHead:
    """A head that is a company of one, until others join it."""
    Company().add(head)
    return head
