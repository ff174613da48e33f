"""The base of the size heads: statistics of the groups, and sizes that are solved for once.

Sizes change when parameters do. So a head solves for them once per change and keeps the result:
repeated forwards between two optimizer steps rebuild the differentiable part only, and without
gradients nothing at all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from amtl.layer.budget import SizeGrid, capacity
from amtl.layer.frequency import FrequencyGroups, frequency_features, log_count_zscores
from amtl.layer.rounding import step_groups
from amtl_kernels._heads import draw_sizes


def being_traced() -> bool:
    """Whether operations are recorded, so that what was computed before must not be left out."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


class GroupSizes(NamedTuple):
    """What a size head returns.

    Attributes:
        dims: uint8 (D <= 255) or int32, [G], or [G, Q] under size noise: row i takes column
            hash(seed, i) mod Q.
        mask: float32 [G, D], the soft mask; only its gradient matters.
        sizes: as `dims`, [G], always without noise. The same tensor until sizes are solved anew.
    """

    dims: Tensor
    mask: Tensor
    sizes: Tensor


@dataclass
class Solution:
    """Sizes as solved for one state of the parameters, without gradients.

    Attributes:
        shift: what the budget adds to all scores (or tilts all logits by).
        levels: int64 [G], index of each group's size in `grid.sizes`.
        sizes: uint8 or int32 [G].
        noisy: the same type, [G, Q], once asked for.
        log_sizes: float32 [G], logarithm of the sizes before they were cut to the grid, once a mask
            needed it.
        mask: float32 [G, D], once asked for without gradients.
    """

    shift: Tensor
    levels: Tensor
    sizes: Tensor
    noisy: Tensor | None = None
    log_sizes: Tensor | None = None
    mask: Tensor | None = None


class _Watched(NamedTuple):
    """A parameter as it was when sizes were solved.

    On the CPU its very values are compared, for edits through `parameter.data` count no version.
    On a GPU reading them would wait, so there versions have to do (and `train()` and `eval()`).

    Attributes:
        module, name: where it is held.
        parameter: what was there.
        address: of its first value.
        memory: its bytes, wherever they lie; None where they cannot be read.
        value: bytes or version.
    """

    module: nn.Module
    name: str
    parameter: nn.Parameter
    address: int
    memory: ctypes.Array[ctypes.c_char] | None
    value: bytes | int

    @classmethod
    def of(cls, module: nn.Module, name: str, parameter: nn.Parameter) -> _Watched:
        """A parameter as it is."""
        address = parameter.data_ptr()
        if not parameter.is_cpu:
            return cls(module, name, parameter, address, None, parameter._version)
        memory = (ctypes.c_char * parameter.nbytes).from_address(address)
        return cls(module, name, parameter, address, memory, memory.raw)


def _hold(seen: list[_Watched]) -> bool:
    """Whether nothing has changed. One loop without calls: an evaluating layer asks every time."""
    for module, name, parameter, address, memory, value in seen:
        # The memory is the parameter's as long as its address is.
        if module._parameters[name] is not parameter or parameter.data_ptr() != address:
            return False
        if (parameter._version if memory is None else memory.raw) != value:
            return False
    return True


class OfGroups(Protocol):
    """What sizes follow from, of the groups of one head or of several.

    Attributes:
        features: float32 [..., G, F].
        gate: float32 [..., G].
        rows: float64 [..., G], rows of each group.
        start: scores that follow from the counts alone, [..., G].
        temperature: float32 [...].
    """

    @property
    def features(self) -> Tensor: ...  # noqa: D102
    @property
    def gate(self) -> Tensor: ...  # noqa: D102
    @property
    def rows(self) -> Tensor: ...  # noqa: D102
    @property
    def start(self) -> Tensor: ...  # noqa: D102
    @property
    def temperature(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Padded:
    """`OfGroups` of L heads, one below the other, and what their budgets leave.

    Heads of fewer groups repeat their first one, without rows.

    Attributes:
        features, gate, rows, start, temperature: see `OfGroups`, with L in front.
        thresholds, steps: float64 [L, M], see `SizeHead.steps_of`.
        room: float64 [L], see `SizeHead.room`.
        lengths: groups of each head.
    """

    features: Tensor
    gate: Tensor
    rows: Tensor
    start: Tensor
    temperature: Tensor
    thresholds: Tensor
    steps: Tensor
    room: Tensor
    lengths: list[int]

    def apart(self, values: Tensor) -> list[Tensor]:
        """What belongs to the groups of each head, of [L, G, ...]."""
        most = values.shape[1]
        each = zip(values.unbind(), self.lengths, strict=True)
        return [own if length == most else own[:length] for own, length in each]


class Companions(Protocol):
    """Heads that are solved for together, see `amtl.layer.companions`."""

    def add(self, head: SizeHead) -> None:
        """Take a copy of a head in."""

    def forget(self) -> None:
        """The groups of some head are others now."""

    def solve(self, head: SizeHead) -> None:
        """Leave a solution with this head, and with others, if it can be found so."""

    def mask(self, head: SizeHead, solution: Solution) -> Tensor | None:
        """The soft mask of a solution that was found so, [G, D]; its gradient trains the head."""

    def draw(self, solution: Solution) -> None:
        """Add noisy sizes to a solution that was found so."""


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
    share: Tensor
    features: Tensor
    gate: Tensor
    rows: Tensor
    noise_factors: Tensor
    start: Tensor
    temperature: Tensor
    trains = False
    """Whether the soft mask has a gradient to pass on."""
    branches: nn.Module
    """What it passes it on to."""
    companions: Companions | None = None

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
        # A state brings its own: tables that share a budget have parts of it that follow from the
        # counts of all.
        self.register_buffer("share", torch.tensor(budget or 0.0, dtype=torch.float64))
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
        self._slots: list[tuple[nn.Module, str]] | None = []
        self._held: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._kept: tuple[list[_Watched], bool, Solution] | None = None

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
        self._forget()

    def _forget(self) -> None:
        self._kept = None
        if self.companions is not None:
            self.companions.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SizeHead:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        self._forget()
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
        # States from before there was a share.
        state_dict = {prefix + "share": self.share, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.budget = float(self.share) or None
        self._derive()

    def set_temperature(self, temperature: float) -> None:
        """Set T, a tensor so that a compiled graph need not know its value."""
        self.temperature.fill_(temperature)
        self._kept = None

    def train(self, mode: bool = True) -> SizeHead:
        """As nn.Module; what was solved is forgotten, however parameters have changed."""
        self._kept = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.companions is not None:
            self.companions.add(self)

    def _replicate_for_data_parallel(self) -> SizeHead:
        # The replica's parameters are not those in the slots, nor on their device.
        replica = super()._replicate_for_data_parallel()
        replica._slots = None
        return replica

    def learns(self) -> nn.Parameter:
        """The only parameter of a head that trains: a walk over modules takes 20 times as long."""
        found = self.branches._parameters["numbers"]
        assert found is not None
        return found

    def _watch(self) -> None:
        """Remember where the parameters are, which a walk over modules would find slowly."""
        self._slots = [(m, name) for m in self.modules() for name in m._parameters]

    def hold(self) -> None:
        """Keep the parameters as buffers: nobody who asks the model for parameters meets them.

        What trains, wraps or counts parameters would take them for some that want a gradient. They
        stay in the state_dict under their names.
        """
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())
                    self._held.append((module, name, parameter))
        if self._held:
            self._slots = None
            self._forget()

    def release(self) -> None:
        """Inverse of `hold`: the very parameters, with the values that the buffers have by now."""
        for module, name, parameter in self._held:
            parameter.data = module.get_buffer(name)
            del module._buffers[name]
            module.register_parameter(name, parameter)
        if self._held:
            self._held = []
            self._watch()

    def _snapshot(self) -> list[_Watched] | None:
        """What sizes depend on now; None if a change of it could go unseen."""
        if self._slots is None or being_traced() or self._capturing():
            return None
        seen = []
        for module, name in self._slots:
            # Not kept: torch.export leaves a module another dictionary.
            parameter = module._parameters[name]
            plain = type(parameter) is nn.Parameter and parameter.is_contiguous()
            if parameter is None or not plain or parameter.is_inference():
                return None
            seen.append(_Watched.of(module, name, parameter))
        return seen

    def _recall(self) -> Solution | None:
        """What was kept, if it still holds."""
        if being_traced() or self._kept is None:
            return None
        seen, inference, solution = self._kept
        if inference != torch.is_inference_mode_enabled() or self._capturing():
            return None
        return solution if _hold(seen) else None

    def present_sizes(self) -> Tensor | None:
        """Sizes of the groups as solved before, if they still hold; the same tensor as then."""
        solution = self._recall()
        return None if solution is None else solution.sizes

    def _capturing(self) -> bool:
        """A CUDA graph must solve for sizes whenever it is replayed."""
        return self._counts.is_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def _counts(self) -> Tensor:
        # Past nn.Module, which takes most of a microsecond to find a buffer.
        found = self._buffers["group_counts"]
        assert found is not None
        return found

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self._counts.numel()

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return self._counts.device

    def likeness(self) -> tuple[object, ...]:
        """What is equal in heads that can be solved for together."""
        noise = self.size_noise, len(self.noise_factors)
        grid = self.grid.sizes, self.grid.granularity
        return type(self), *grid, noise, self.features.shape[1]

    def room(self) -> float:
        """What sizes may cost beyond what all of them do."""
        raise NotImplementedError

    def steps_of(self, heads: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """From which scores on sizes of several such heads cost more, and how much; [L, M]."""
        raise NotImplementedError

    def scores(self, of: OfGroups | None = None, numbers: Tensor | None = None) -> Tensor:
        """What parameters say of each group, differentiable; [..., G] or [..., G, M].

        Args:
            of: groups; None: those of this head.
            numbers: of the parameters of several heads, [L, P]; None: those of this one.
        """
        raise NotImplementedError

    def _solve(self, scores: Tensor, of: Padded | None = None) -> tuple[Tensor, Tensor]:
        """Shift [...] and levels [..., G] that meet the budget, from detached scores."""
        raise NotImplementedError

    def _real_sizes(self, scores: Tensor, solution: Solution) -> Tensor:
        """Sizes before they were cut to the grid, float32 [..., G]."""
        raise NotImplementedError

    def _mask(self, scores: Tensor, solution: Solution, of: OfGroups | None = None) -> Tensor:
        """The soft mask, float32 [..., G, D], differentiable."""
        raise NotImplementedError

    def _pull(
        self, scores: Tensor, numbers: Tensor, solution: Solution, of: Padded, grad: Tensor
    ) -> Tensor | None:
        """Gradient of the numbers of several heads, [L, P], by native code.

        Args:
            scores: as they were found from the numbers.
            numbers: [L, P].
            solution: with L in front.
            of: their groups.
            grad: of the soft masks, [L, G, D].

        Returns:
            None where autograd has to find it by way of `_mask`.
        """
        return None

    _rounds_down = False

    def _sizes_at(self, levels: Tensor) -> Tensor:
        """Sizes of levels, in the type of lookups."""
        return self.get_buffer("size_table")[levels].to(self._dims_dtype)

    def _solution(self) -> tuple[Solution, Tensor | None]:
        """Sizes for the present parameters, and the scores if they had to be computed."""
        scores = None
        solution = self._recall()
        if solution is None and self.companions is not None and not being_traced():
            self.companions.solve(self)
            solution = self._recall()
        if solution is None:
            scores = self.scores()
            with torch.no_grad():
                shift, levels = self._solve(scores.detach())
                sizes = self._sizes_at(levels)
            solution = Solution(shift, levels, sizes)
            seen = self._snapshot()
            if seen is not None and type(sizes) is Tensor:
                self._kept = seen, torch.is_inference_mode_enabled(), solution
        return solution, scores

    def levels(self) -> Tensor:
        """Index of each group's size in `grid.sizes`, int64 [G], without noise or gradient."""
        with torch.no_grad():
            return self._solution()[0].levels

    def sizes(self) -> Tensor:
        """Size of each group, int64 [G], without noise or gradient."""
        table: Tensor = self.get_buffer("size_table")
        return table[self.levels()]

    def step_groups(self) -> Tensor:
        """What shares a step size at equal width, int64 [G]; see `amtl.layer.rounding`."""
        return step_groups(self.group_counts, self.group_fields)

    def num_parts(self) -> int:
        """How many step sizes the present sizes would take."""
        stored = self.get_buffer("stored_table")[self.levels()].to(torch.int64)
        key = self.step_groups() * (self.grid.dim + 1) + stored
        return int(key[(stored > 0) & (self.rows > 0)].unique().numel())

    def stored_fraction(self) -> float:
        """Stored weights over N * D, tier rounding included."""
        if self.num_rows == 0:
            return 0.0
        stored = self.get_buffer("stored_table")[self.levels()]
        return float((stored * self.rows).sum()) / (self.num_rows * self.grid.dim)

    def forward(self, noise: bool = False, learns: bool = True) -> GroupSizes:
        """Sizes and soft mask. O(G * D) when parameters changed.

        Args:
            noise: whether sizes are [G, Q].
            learns: whether the mask may have a gradient.
        """
        noise = noise and self.size_noise > 0
        solution, scores = self._solution()
        mask = None
        if self.trains and torch.is_grad_enabled():
            if self.companions is not None and not being_traced():
                mask = self.companions.mask(self, solution)
            if mask is None:
                scores = self.scores() if scores is None else scores
                mask = self._mask(scores, solution)
            mask = mask if learns else mask.detach()
        else:
            if solution.mask is None:
                with torch.no_grad():
                    scores = self.scores() if scores is None else scores
                    solution.mask = self._mask(scores, solution)
            mask = solution.mask
        if not noise:
            return GroupSizes(solution.sizes, mask, solution.sizes)
        if solution.noisy is None and self.companions is not None:
            self.companions.draw(solution)
        if solution.noisy is None:
            with torch.no_grad():
                # After the mask, which needs the same logarithms.
                scores = self.scores() if scores is None else scores
                real = self._real_sizes(scores.detach(), solution)
                solution.noisy = self._noisy_dims(real, solution.sizes)
        return GroupSizes(solution.noisy, mask, solution.sizes)

    def _noisy_dims(self, real: Tensor, sizes: Tensor) -> Tensor:
        """Sizes at the Q quantiles of the noise, [..., G, Q], around sizes that may be fractional.

        `dims[g, q] = k_g * exp(sigma * Phi^-1((q + 1/2) / Q))`, cut to the grid as without noise.
        Whether a row keeps anything at all is never left to the noise.
        """
        step, dim = self.grid.granularity, self.grid.dim
        least = next(size for size in self.grid.sizes if size)
        real, factors, cuts = real.to(torch.float32), self.noise_factors, self._rounds_down
        if not being_traced():
            drawn = draw_sizes(real, sizes, factors, step, least, dim, cuts)
            if drawn is not None:
                return drawn
        noisy = (real if step == 1 else real / step)[..., None] * factors
        full = noisy >= dim / step if cuts and dim % step else None
        noisy = noisy.floor_() if cuts else noisy.round_()
        if step > 1:
            noisy.mul_(step)
        if full is not None:
            noisy.masked_fill_(full, dim)
        noisy.clamp_(least, dim)
        if self.grid.sizes[0] == 0:
            noisy.mul_((sizes > 0)[..., None])
        return noisy.to(self._dims_dtype)

    def extra_repr(self) -> str:
        """Number of groups, budget and noise."""
        return f"groups={self.num_groups}, budget={self.budget}, size_noise={self.size_noise:g}"
